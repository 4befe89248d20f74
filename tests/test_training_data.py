"""The trainer's input: images and tokens as they should be, in the order and number that the ledger says."""

from __future__ import annotations

import collections
import hashlib
import io
import tarfile

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from pipeline.core import captions, clip_model, images, storage
from pipeline.core.errors import ImageError
from pipeline.core.tars import TarWriter
from tests.training_fixture import MODEL, recipe, write_train_set
from training import check_ledger, data
from training.ledger import Ledger
from training.train_set import open_train_set, pairs

NUM_SAMPLES = 50
SIDE_PX = MODEL["vision_cfg"]["image_size"]


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), NUM_SAMPLES)


def load_batches(train_set_path, own, first_step=0, **ranks):
    chosen = recipe(**own)
    train_set = open_train_set(train_set_path)
    clip = clip_model.build(chosen.model, chosen.image_size_px)
    ledger = Ledger(len(train_set), chosen.samples_seen, chosen.global_batch_size, 0, chosen.chunk_size)
    return clip, ledger, data.Loader(train_set, ledger, chosen, clip, **ranks).batches(first_step)


def picture(seed, width, height):
    """Blobs of all sizes, as photos have."""
    rng = np.random.default_rng(seed)
    layers = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in (3, 9, 30)]
    pixels = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), float) for layer in layers]
    return Image.fromarray(np.uint8(np.average(pixels, axis=0, weights=(4, 2, 1))))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_are_what_the_model_sees_in_evaluation(train_set_path):
    clip, ledger, batches = load_batches(train_set_path, {"crop_scale": None})
    train_set = open_train_set(train_set_path)
    preprocess = clip_model.preprocess_config(clip.model)
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    for batch in batches:
        for place, entry in enumerate(ledger.batch(batch.step)):
            start = int(train_set.offset_bytes[entry])
            tar = f"{train_set_path}/{train_set.tar_names[train_set.tar_of_entry[entry]]}"
            image = images.decode_rgb(storage.read_range(tar, start, start + int(train_set.size_bytes[entry])))
            found = batch.image_BSS3[place].permute(2, 0, 1).float().div(255).sub(mean).div(std)
            torch.testing.assert_close(found, clip.preprocess(image), rtol=0, atol=0)
            caption = train_set.captions[int(entry)].as_py()
            tokens = clip.tokenizer([caption])[0, : batch.tokens_BT.shape[1]]
            assert torch.equal(batch.tokens_BT[place], tokens)


@pytest.mark.parametrize("cache_bytes, table_entries", [(0, 0), (3000, 1000), (1 << 30, 1000)])
def test_batches_are_the_same_for_any_ranks_threads_and_cache(train_set_path, monkeypatch, cache_bytes, table_entries):
    alone = list(load_batches(train_set_path, {})[2])
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(data, "TOKEN_TABLE_ENTRIES", table_entries)
    parts = [list(load_batches(train_set_path, {}, rank=rank, world_size=3, threads=2)[2]) for rank in range(3)]
    for batch, *shares in zip(alone, *parts, strict=True):
        assert batch.part_sizes == [sum(shares[0].part_sizes)]
        assert torch.equal(torch.cat([share.image_BSS3 for share in shares]), batch.image_BSS3)
        tokens = [row for share in shares for row in share.tokens_BT]  # each rank's as long as its longest
        assert torch.equal(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), batch.tokens_BT)


def test_random_crops_are_torchvisions():
    """Area, ratio and place have torchvision's distribution; boxes lie inside, for extreme images too."""
    count, (height, width), scale = 4000, (90, 120), (0.5, 1.0)
    ours = np.array(data.random_crops([(height, width)] * count, scale, 0, 5, 0), float)
    assert np.array_equal(ours[100:120], data.random_crops([(height, width)] * 20, scale, 0, 5, 100))
    assert not np.array_equal(ours[:20], data.random_crops([(height, width)] * 20, scale, 0, 6, 0))
    torch.manual_seed(0)
    pixels = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(pixels, scale, data.CROP_RATIO) for _ in range(count)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in drawn], float)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.08)
    for height, width in ((10, 400), (400, 10), (1, 1)):
        for left, top, right, bottom in data.random_crops([(height, width)] * 50, (0.9, 1.0), 0, 0, 0):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def write_pairs(path, entries, image_of, samples_a_tar=16):
    """The path of a train set whose entries are these uids, in this order, each with the image of its uid."""
    rows = []
    for start in range(0, len(entries), samples_a_tar):
        name = f"{start // samples_a_tar:05d}.tar"
        with storage.write_file(f"{path}/{name}") as temporary, TarWriter(temporary) as tar:
            for place, uid in enumerate(entries[start : start + samples_a_tar], start):
                image, caption = image_of(uid), f"picture {uid}"
                rows.append((uid, name, tar.add(f"{place:09d}.jpg", image), len(image), caption))
                tar.add(f"{place:09d}.txt", caption.encode())
                tar.add(f"{place:09d}.json", f'{{"uid": "{uid}"}}'.encode())
    names = ("uid", "tar", "image_offset_bytes", "image_size_bytes", "caption")
    file = io.BytesIO()
    pq.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], names=names), file)
    storage.write_bytes(f"{path}/index.parquet", file.getvalue())
    return path


def uid(number):
    return f"{number:032x}"


def jpeg_of(one):
    return encoded(picture(int(one, 16), 20 + int(one, 16) % 7, 24), quality=95)


def uid_of_pixels(path):
    """{sha256 of the pixels at the model's size: uid}, from the tars alone, without the index or any code of ours."""
    found, uids = {}, {}
    resize, crop = Resize(SIDE_PX, InterpolationMode.BICUBIC), CenterCrop(SIDE_PX)
    for name in storage.list_files(path):
        if name.endswith(".tar"):
            with tarfile.open(f"{path}/{name}") as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for key in {name.split(".")[0] for name in members}:
                image = crop(resize(Image.open(io.BytesIO(members[f"{key}.jpg"])).convert("RGB")))
                one = members[f"{key}.json"].decode().split('"')[3]
                digest = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
                assert found.setdefault(digest, one) == one
                uids.setdefault(one, digest)
    assert len(found) == len(uids)
    return found


REPEATED = [uid(number) for number in [*range(30), 3, 3, 3, 7, 7, 29, 12, 12, 12, 12]]
ENTRIES = {"distinct": [uid(number) for number in range(37)], "repeated": REPEATED, "few": [uid(0), uid(1), uid(2)]}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_comes_out_is_what_the_ledger_says(name, tmp_path):
    """Counted by pixels, on one rank, and on three that are two after a restart; the last batch is a partial one."""
    path = write_pairs(str(tmp_path / "train_set"), ENTRIES[name], jpeg_of)
    uid_of = uid_of_pixels(path)
    own = {"crop_scale": None, "global_batch_size": 8, "samples_seen": 93}
    restart, num_steps = 5, 12

    def seen(rank, world_size, steps):
        _, _, batches = load_batches(path, own, steps.start, rank=rank, world_size=world_size, threads=2)
        found = {}
        for batch in batches:
            if batch.step == steps.stop:
                break
            own_pairs = batch.image_BSS3[: batch.part_sizes[rank]]
            found[batch.step] = [uid_of[hashlib.sha256(image.numpy().tobytes()).hexdigest()] for image in own_pairs]
        batches.close()
        return found

    alone = seen(0, 1, range(num_steps))
    together = collections.defaultdict(list)
    for world_size, steps in ((3, range(restart)), (2, range(restart, num_steps))):
        for rank in range(world_size):
            for step, uids in seen(rank, world_size, steps).items():
                together[step] += uids
    assert dict(together) == alone

    ledger, uids = Ledger(len(ENTRIES[name]), 93, 8, 0, recipe().chunk_size), pairs(path)
    table = check_ledger.times_seen(uids, check_ledger.count_batches(ledger))
    counted = collections.Counter(one for step in alone.values() for one in step)
    assert counted == dict(zip(*table.to_pydict().values(), strict=True))
    assert counted.total() == 93
    assert len(alone[num_steps - 1]) == 93 % 8
    times_in_index = collections.Counter(ENTRIES[name])
    for one, times in times_in_index.items():
        assert times * (93 // len(ENTRIES[name])) <= counted[one] <= times * -(-93 // len(ENTRIES[name]))
        assert check_ledger.steps_of(ledger, uids, one) == sorted(
            step for step, found in alone.items() for other in found if other == one
        )


def test_a_chunk_is_one_request_to_an_object_store(s3_url, monkeypatch):
    import s3fs

    path = write_train_set(f"{s3_url}/train_set", NUM_SAMPLES, samples_a_tar=NUM_SAMPLES)
    asked = []
    call = s3fs.S3FileSystem._call_s3

    async def recorded(self, method, *arguments, **options):
        asked.append((method, options.get("Range")))
        return await call(self, method, *arguments, **options)

    own = {"chunk_size": 10, "global_batch_size": 25, "samples_seen": 50}
    _, ledger, batches = load_batches(path, own)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    monkeypatch.setattr(data, "MAX_GAP_BYTES", 4096)  # else these small images are read in one go, whatever their order
    assert sum(len(batch.image_BSS3) for batch in batches) == 50
    runs = sum(1 + int((np.diff(ledger.batch(step)) != 1).sum()) for step in range(2))
    assert [method for method, _ in asked] == ["get_object"] * runs
    assert all(reads for _, reads in asked)
    assert runs <= 8  # five chunks, one cut by the start of the pass, one or two by the ends of batches


def test_scaled_decode():
    """Half, quarter and eighth sizes, as the average of what a full decode gives, orientation and formats included."""
    full = picture(1, 203, 165)
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
        stored = encoded(full, kind, **options)
        for min_side_px, scale in ((165, 1), (83, 1), (82, 2), (41, 4), (20, 8), (3, 8)):
            found = images.decode_rgb(stored, min_side_px=min_side_px)
            assert found.size == (203 // scale, 165 // scale)
            whole = images.decode_rgb(stored)
            expected = whole.reduce(scale, (0, 0, 203 // scale * scale, 165 // scale * scale))
            difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
            assert difference.mean() < (1.0 if kind == "JPEG" and scale > 1 else 1e-9)
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6  # shown turned by a quarter
    turned = images.decode_rgb(encoded(full, exif=exif), min_side_px=41)
    assert turned.size == (165 // 4, 203 // 4)
    upright = images.decode_rgb(encoded(full), min_side_px=41).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))
    assert images.decode_rgb(encoded(full.convert("L")), min_side_px=41).mode == "RGB"
    with pytest.raises(ImageError):
        images.decode_rgb(encoded(full)[:1000], min_side_px=41)


@pytest.mark.parametrize("source_px", [35, 160])
def test_crops_are_close_to_those_of_a_full_decode(source_px, tmp_path):
    """Within a level where nothing is scaled, within two on average where a JPEG is decoded at a quarter of its size."""
    sizes = {uid(number): (source_px + number % 5, source_px) for number in range(8)}
    stored = {one: encoded(picture(int(one, 16), *size), quality=95) for one, size in sizes.items()}
    path = write_pairs(str(tmp_path), list(stored), stored.__getitem__)
    own = {"samples_seen": 8}
    _, ledger, batches = load_batches(path, own)
    (batch,) = batches
    needed_px = 2 * SIDE_PX / 0.9
    scale = next(scale for scale in (8, 4, 2, 1) if source_px / scale >= needed_px or scale == 1)
    assert scale == (4 if source_px == 160 else 1)
    entries = ledger.batch(0)
    small = [[side // scale for side in reversed(sizes[uid(entry)])] for entry in entries.tolist()]
    boxes = data.random_crops(small, (0.9, 1.0), ledger.seed, 0, 0)
    for found, entry, box in zip(batch.image_BSS3.numpy(), entries.tolist(), boxes, strict=True):
        image = images.decode_rgb(stored[uid(entry)]).crop(tuple(scale * side for side in box))
        expected = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        difference = np.abs(found.astype(int) - np.asarray(expected, int))
        assert difference.max() <= 1 if scale == 1 else difference.mean() < 2


@pytest.mark.parametrize("side_px", [3, 2100])  # above 16 MB Pillow keeps an image in several pieces
def test_pixels_are_those_of_the_image(side_px):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side_px, side_px + 1, 3), np.uint8))
    np.testing.assert_array_equal(data._pixels(image)[..., :3], np.asarray(image))


PLANTED = [
    "",
    "  ",
    "a red star",
    "It's I'LL you'Ve x'S",
    "<start_of_text> a <END_OF_TEXT>b<end_of_text>",
    "a &amp; b &amp;amp; &lt;b&gt; & &copy",
    "tab\there\nnew\x1cline\x7f \x1b[31mred",
    "Σίσυφος ΣΑΣ, cafÃ© ﬁne “x” ＷＩＤＥ",
    "1234 5,6 --- !!",
    "word " * 200,
    "x" * 400,
    "日本語 のキャプション 👍🏽",
]


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "whitespace"])
def test_tokens_are_open_clips(clean, monkeypatch):
    monkeypatch.setattr(captions, "WORDS_KEPT", 20)
    for context_length in (5, 77):
        theirs = open_clip.SimpleTokenizer(context_length=context_length, clean=clean)
        ours = captions.CaptionTokenizer(theirs)
        for _ in range(2):  # with words that are known
            np.testing.assert_array_equal(ours(PLANTED), theirs(PLANTED).numpy())


@pytest.mark.real_data
def test_tokens_of_real_captions_are_open_clips(real_data_path):
    table = pq.read_table(real_data_path / "web_metadata" / "laion_alt_text.parquet", columns=["text"])
    texts = [text for text in table["text"].to_pylist()[:3000] if text]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    np.testing.assert_array_equal(captions.CaptionTokenizer(tokenizer)(texts), tokenizer(texts).numpy())
