"""The demo world: a small web that is drawn, not downloaded. Image-text pairs, their mess, and zero-shot tasks.

A picture shows one to three equal symbols (glyphs of the font that matplotlib ships) in one colour on a noisy
background that no caption names. A caption says what is there in one of many natural ways:

    "two red stars painted on a plain wall near the harbour"

Mess is planted at the rates of FAULTS, and every row says in `truth_*` what was really drawn and what was done to it;
only an oracle may read that. Everything is a pure function of (seed, stream, row), so shards can be drawn anywhere, in
any order, and give the same bytes. The pool, the trusted reference and each task are streams of their own: no image
or random draw of one is ever in another.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.core import storage
from pipeline.core.tars import TarWriter

if TYPE_CHECKING:
    import numpy as np

VERSION = 1  # bump when any image, caption or task changes

FAULTS = {
    "mismatched": 0.36,  # the caption of another row, which shows another object
    "boilerplate": 0.05,  # "click to enlarge"
    "file_name": 0.05,  # "IMG_0042.jpg"
    "other_language": 0.04,  # says what is there, but in German, French, Spanish, Italian or Russian
    "exact_duplicate": 0.03,  # image bytes and caption of an earlier good row
    "near_duplicate": 0.03,  # an earlier good row, cropped by a few pixels and encoded again, its caption edited
    "tiny": 0.02,  # the right picture, 8 to 16 px wide
    "extreme_aspect": 0.02,  # the right picture as a strip more than three times as wide or high
    "corrupt": 0.01,  # bytes that do not decode: cut in the middle, or no image at all
}

GLYPHS = {
    "star": "\u2605",
    "heart": "\u2665",
    "cloud": "\u2601",
    "umbrella": "\u2602",
    "phone": "\u260e",
    "arrow": "\u27a4",
    "flag": "\u2691",
    "anchor": "\u2693",
    "plane": "\u2708",
    "crown": "\u265b",
}  # all with a plural in -s, so that prompts need no grammar
COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 40),
    "purple": (170, 50, 200),
    "white": (245, 245, 245),
}
SHIFTED_COLOURS = ((245, 150, 40), (250, 150, 190), (70, 220, 225), (200, 160, 110))  # orange, pink, cyan, tan
COUNTS = ("one", "two", "three")

MADE = ("painted", "drawn", "printed", "stamped", "sketched", "pasted", "stitched", "carved")
SURFACES = (
    "a plain wall", "old paper", "the kitchen table", "a wooden board", "a cotton bag", "the school door",
    "a paper cup", "the garden fence", "a shop window", "the back of a chair", "a clay tile", "the first page",
)  # fmt: skip
PLACES = (
    "near the harbour", "in our street", "at the market", "by the old bridge", "in the library", "for the summer fair",
    "behind the station", "at my school", "in the living room", "from last year", "before the show", "by my sister",
)  # fmt: skip
SENTENCES = (
    "{what} {made} on {surface}",
    "{what} {made} on {surface} {place}",
    "{what} on {surface} {place}",
    "a photo of {what} on {surface}",
    "a picture of {what} {place}",
    "here is a picture of {what} {made} on {surface}",
    "this is {what} {made} {place}",
    "we saw {what} on {surface} {place}",
)
BOILERPLATE = (
    "click to enlarge", "image", "click here for more information", "no description available", "photo", "untitled",
    "add to cart", "read more about this product", "share this on social media", "sale", "picture 1 of 12",
    "image may be subject to copyright", "thumbnail", "loading", "view the full size image",
)  # fmt: skip
FILE_NAMES = ("IMG_{:04d}.jpg", "DSC{:05d}.JPG", "{:08d}.png", "photo-{:d}.jpeg", "scan_{:d}.png", "image{:d}.jpg")
EDITS = ("{} today", "photo: {}", "{}!", "{}, again", "{} (copy)", "see {}")

# one thing, several things; then colours in the form that the sentence needs
LANGUAGES = {
    "de": {
        "counts": ("", "zwei", "drei"),
        "objects": {
            "star": ("ein Stern", "Sterne"), "heart": ("ein Herz", "Herzen"), "cloud": ("eine Wolke", "Wolken"),
            "umbrella": ("ein Regenschirm", "Regenschirme"), "phone": ("ein Telefon", "Telefone"),
            "arrow": ("ein Pfeil", "Pfeile"), "flag": ("eine Flagge", "Flaggen"), "anchor": ("ein Anker", "Anker"),
            "plane": ("ein Flugzeug", "Flugzeuge"), "crown": ("eine Krone", "Kronen"),
        },
        "colours": ("Rot", "Grün", "Blau", "Gelb", "Lila", "Weiß"),
        "sentences": (
            "{what} in {colour} auf einer alten Wand", "Hier sieht man {what} in {colour}, gemalt von Kindern",
        ),
    },
    "fr": {
        "counts": ("", "deux", "trois"),
        "objects": {
            "star": ("une étoile", "étoiles"), "heart": ("un cœur", "cœurs"), "cloud": ("un nuage", "nuages"),
            "umbrella": ("un parapluie", "parapluies"), "phone": ("un téléphone", "téléphones"),
            "arrow": ("une flèche", "flèches"), "flag": ("un drapeau", "drapeaux"), "anchor": ("une ancre", "ancres"),
            "plane": ("un avion", "avions"), "crown": ("une couronne", "couronnes"),
        },
        "colours": ("rouge", "verte", "bleue", "jaune", "violette", "blanche"),
        "sentences": (
            "{what} de couleur {colour} sur le mur de la cuisine", "Une photo avec {what} de couleur {colour}",
        ),
    },
    "es": {
        "counts": ("", "dos", "tres"),
        "objects": {
            "star": ("una estrella", "estrellas"), "heart": ("un corazón", "corazones"), "cloud": ("una nube", "nubes"),
            "umbrella": ("un paraguas", "paraguas"), "phone": ("un teléfono", "teléfonos"),
            "arrow": ("una flecha", "flechas"), "flag": ("una bandera", "banderas"), "anchor": ("un ancla", "anclas"),
            "plane": ("un avión", "aviones"), "crown": ("una corona", "coronas"),
        },
        "colours": ("rojo", "verde", "azul", "amarillo", "morado", "blanco"),
        "sentences": (
            "{what} de color {colour} en la pared de la escuela", "Aquí se puede ver {what} de color {colour}",
        ),
    },
    "it": {
        "counts": ("", "due", "tre"),
        "objects": {
            "star": ("una stella", "stelle"), "heart": ("un cuore", "cuori"), "cloud": ("una nuvola", "nuvole"),
            "umbrella": ("un ombrello", "ombrelli"), "phone": ("un telefono", "telefoni"),
            "arrow": ("una freccia", "frecce"), "flag": ("una bandiera", "bandiere"), "anchor": ("un'ancora", "ancore"),
            "plane": ("un aereo", "aerei"), "crown": ("una corona", "corone"),
        },
        "colours": ("rosso", "verde", "blu", "giallo", "viola", "bianco"),
        "sentences": (
            "{what} di colore {colour} sul muro della casa", "Nella foto si vede anche {what} di colore {colour}",
        ),
    },
    "ru": {
        "counts": ("", "две", "три"),
        "objects": {
            "star": ("звезда", "звезды"), "heart": ("сердце", "сердца"), "cloud": ("облако", "облака"),
            "umbrella": ("зонт", "зонта"), "phone": ("телефон", "телефона"), "arrow": ("стрела", "стрелы"),
            "flag": ("флаг", "флага"), "anchor": ("якорь", "якоря"), "plane": ("самолёт", "самолёта"),
            "crown": ("корона", "короны"),
        },
        "feminine": ("star", "arrow", "crown"),  # две; all others два
        "colours": ("красного", "зелёного", "синего", "жёлтого", "фиолетового", "белого"),
        "sentences": ("{what} {colour} цвета на старой стене", "На этой картинке {what} {colour} цвета"),
    },
}  # fmt: skip

# Where random numbers come from. A new stream gets a new number; a number is never used again.
STREAMS = {"pool": 0, "reference": 1, "objects": 2, "objects_shift": 3, "colours": 4, "counts": 5, "retrieval": 6}
SCENE, CAPTION, PICTURE, FAULT = range(4)  # parts of a row, each with random numbers of its own

TASKS = ("objects", "objects_shift", "colours", "counts", "retrieval")
TASK_IMAGES = 500  # of each classification task
RETRIEVAL_CAPTIONS = 3  # of each image


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `shifted` scenes are drawn in another style, see `_picture`."""

    noun: str
    colour: str
    count: int
    shifted: bool = False


def pairs(num_pairs: int, seed: int, clean: bool, start: int, stop: int) -> Iterator[dict]:
    """Rows start..stop of a world of num_pairs rows, in order.

    Args:
        seed: at least 0. Another seed gives another world.
        clean: True draws the trusted reference: no faults, and never a draw that the pool has.

    Yields:
        {image: encoded bytes, caption: str, truth_fault: a key of FAULTS or "" for a good row,
        truth_object, truth_colour: str, truth_count: 1..3}. The truth is about the picture, whatever the caption says.
    """
    stream = "reference" if clean else "pool"
    for row in range(start, min(stop, num_pairs)):
        yield _pair(stream, seed, row, num_pairs)


def _pair(stream: str, seed: int, row: int, num_pairs: int) -> dict:
    scene, fault = _scene(stream, seed, row), _fault(stream, seed, row)
    rng = _random(stream, seed, row, FAULT)
    source = row
    if fault in ("exact_duplicate", "near_duplicate"):
        source = _earlier_good_row(stream, seed, row, rng)
        scene = _scene(stream, seed, source)
        fault = fault if source != row else ""  # nothing to repeat yet
    caption = _caption(_random(stream, seed, source, CAPTION), scene)
    painter = _random(stream, seed, source, PICTURE)
    kind, quality = ("PNG", 0) if painter.random() < 0.2 else ("JPEG", int(painter.integers(85, 96)))
    picture = _picture(painter, scene)

    if fault == "mismatched":
        caption = _caption_of_another(stream, seed, row, num_pairs, scene, rng)
    elif fault == "boilerplate":
        caption = _pick(rng, BOILERPLATE)
    elif fault == "file_name":
        caption = _pick(rng, FILE_NAMES).format(int(rng.integers(1, 10_000)))
    elif fault == "other_language":
        caption = _foreign_caption(rng, scene)
    elif fault == "near_duplicate":
        caption = _pick(rng, EDITS).format(caption)
        left, top, right, bottom = (int(n) for n in rng.integers(1, 3, size=4))
        picture = picture[top : len(picture) - bottom, left : picture.shape[1] - right]
        kind, quality = "JPEG", 80
    elif fault == "tiny":
        picture = _resized(picture, *(int(n) for n in rng.integers(8, 17, size=2)))
    elif fault == "extreme_aspect":
        picture = _strip(rng, picture)
    image = _encoded(picture, kind, quality)
    if fault == "corrupt":
        image = _corrupted(rng, image)
    return {
        "image": image,
        "caption": caption,
        "truth_fault": fault,
        "truth_object": scene.noun,
        "truth_colour": scene.colour,
        "truth_count": scene.count,
    }


def _random(stream: str, seed: int, row: int, part: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng((seed, STREAMS[stream], row, part))


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _scene(stream: str, seed: int, row: int) -> Scene:
    rng = _random(stream, seed, row, SCENE)
    return Scene(_pick(rng, tuple(GLYPHS)), _pick(rng, tuple(COLOURS)), int(rng.integers(1, len(COUNTS) + 1)))


def _fault(stream: str, seed: int, row: int) -> str:
    if stream != "pool":
        return ""
    left = _random(stream, seed, row, FAULT).random()
    for name, rate in FAULTS.items():
        left -= rate
        if left < 0:
            return name
    return ""


def _earlier_good_row(stream: str, seed: int, row: int, rng: np.random.Generator) -> int:
    """An earlier row without a fault, all about equally likely; the row itself when there is none."""
    first = int(rng.integers(row)) if row else 0
    for step in range(row):
        candidate = (first - step) % row
        if _fault(stream, seed, candidate) == "":
            return candidate
    return row


def _caption_of_another(stream, seed, row, num_pairs, scene, rng) -> str:
    for _ in range(100):
        other = int(rng.integers(num_pairs))
        other_scene = _scene(stream, seed, other)
        if other_scene.noun != scene.noun:
            return _caption(_random(stream, seed, other, CAPTION), other_scene)
    # A world of a few rows may have a single object; then the caption of a picture that was never drawn.
    nouns = tuple(noun for noun in GLYPHS if noun != scene.noun)
    return _caption(rng, replace(scene, noun=_pick(rng, nouns)))


def _what(scene: Scene) -> str:
    return f"{COUNTS[scene.count - 1]} {scene.colour} {scene.noun}{'s' if scene.count > 1 else ''}"


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    return _pick(rng, SENTENCES).format(
        what=_what(scene), made=_pick(rng, MADE), surface=_pick(rng, SURFACES), place=_pick(rng, PLACES)
    )


def _foreign_caption(rng: np.random.Generator, scene: Scene) -> str:
    code = _pick(rng, tuple(LANGUAGES))
    words = LANGUAGES[code]
    one, several = words["objects"][scene.noun]
    count = words["counts"][scene.count - 1]
    if count == "две" and scene.noun not in words["feminine"]:
        count = "два"
    what = one if scene.count == 1 else f"{count} {several}"
    colour = words["colours"][tuple(COLOURS).index(scene.colour)]
    sentence = _pick(rng, words["sentences"]).format(what=what, colour=colour)
    return sentence[0].upper() + sentence[1:]


@functools.lru_cache(maxsize=2048)
def _glyph(noun: str, size_px: int):
    """The symbol as an 8-bit mask whose longer side is size_px."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(path, 128, layout_engine=ImageFont.Layout.BASIC)
    sheet = Image.new("L", (256, 256))
    ImageDraw.Draw(sheet).text((32, 32), GLYPHS[noun], font=font, fill=255)
    mask = sheet.crop(sheet.getbbox())
    scale = size_px / max(mask.size)
    return mask.resize([max(1, round(side * scale)) for side in mask.size], Image.Resampling.BOX)


def _picture(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """[H, W, 3] uint8, 40 to 56 px a side.

    Ordinary scenes: symbols nearly upright in their colour on a dull, smooth, grainy background. Shifted scenes:
    turned further, in a colour that no caption names, on dark stripes.
    """
    import numpy as np
    from PIL import Image

    short = int(rng.integers(40, 49))
    width, height = ((short, short), (short, short), (short + 8, short), (short, short + 8))[int(rng.integers(4))]
    if scene.shifted:
        phase, slope = rng.uniform(0, 6), rng.uniform(-1, 1)
        ys, xs = np.mgrid[0:height, 0:width]
        stripes = ((xs + slope * ys + phase) // 6 % 2)[:, :, None]
        canvas = rng.uniform(20, 80, size=3) + stripes * rng.uniform(10, 50, size=3)
        ink = np.array(_pick(rng, SHIFTED_COLOURS)) + rng.uniform(-20, 20, size=3)
        angles = rng.uniform(10, 20, size=scene.count) * rng.choice([-1, 1], size=scene.count)
    else:
        blobs = rng.uniform(50, 120) + rng.uniform(-25, 25, size=(4, 4, 3))
        canvas = _resized(np.clip(blobs, 0, 255).astype(np.uint8), width, height).astype(np.float64)
        ink = np.array(COLOURS[scene.colour]) + rng.uniform(-20, 20, size=3)
        angles = rng.uniform(-8, 8, size=scene.count)
    canvas = canvas + rng.normal(0, 10, size=(height, width, 3))

    # Symbols keep to the central square, which is what a centre crop sees, one in each of its quarters.
    left, top = (width - short) // 2, (height - short) // 2
    if scene.count == 1:
        cells = [(0.0, 0.0, 1.0)]
    else:
        cells = [((n % 2) / 2, (n // 2) / 2, 0.5) for n in rng.permutation(4)[: scene.count]]
    fill = rng.uniform(0.65, 0.9) if scene.count == 1 else rng.uniform(0.9, 1.0)
    for (cell_x, cell_y, cell), angle in zip(cells, angles, strict=True):
        turned = math.radians(abs(angle))  # a turned square is this much wider; the symbol stays inside its cell
        mask = _glyph(scene.noun, int(fill * cell * short / (math.cos(turned) + math.sin(turned))))
        mask = mask.rotate(float(angle), resample=Image.Resampling.BILINEAR, expand=True)
        room_x, room_y = cell * short - mask.width, cell * short - mask.height
        x = left + round(cell_x * short + room_x * rng.uniform())
        y = top + round(cell_y * short + room_y * rng.uniform())
        x, y = min(max(x, 0), width - mask.width), min(max(y, 0), height - mask.height)
        cover = np.asarray(mask, dtype=np.float64)[:, :, None] / 255
        part = canvas[y : y + mask.height, x : x + mask.width]
        part += cover * (ink - part)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _encoded(picture: np.ndarray, kind: str, quality: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return out.getvalue()


def _resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def _strip(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The picture somewhere in a strip of its mean colour, four to six times as long as it is wide."""
    import numpy as np

    height, width, _ = picture.shape
    lying = rng.random() < 0.5
    long = round(rng.uniform(4, 6) * max(height, width))
    shape = (height, long, 3) if lying else (long, width, 3)
    strip = np.clip(picture.mean(axis=(0, 1)) + rng.normal(0, 10, size=shape), 0, 255).astype(np.uint8)
    if lying:
        x = int(rng.integers(long - width + 1))
        strip[:, x : x + width] = picture
    else:
        y = int(rng.integers(long - height + 1))
        strip[y : y + height] = picture
    return strip


def _corrupted(rng: np.random.Generator, image: bytes) -> bytes:
    way = int(rng.integers(3))
    if way == 0:
        return image[: int(len(image) * rng.uniform(0.3, 0.8))]
    if way == 1:
        return b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>"
    return rng.bytes(len(image))


def write_tasks(path: str, seed: int) -> list[str]:
    """The names of the tasks, written as folders of that name below `path`, in CLIP_benchmark's layout.

    objects, objects_shift (the same names, another style), colours, counts: TASK_IMAGES images each, balanced over
    classes. retrieval: every combination of object, colour and count once, RETRIEVAL_CAPTIONS different captions each.
    """
    one_or_more = [f"{count} {colour} {{c}}{'s' if count != 'one' else ''}" for count in COUNTS for colour in COLOURS]
    coloured = [f"{count} {{c}} {noun}{'s' if count != 'one' else ''}" for count in COUNTS for noun in GLYPHS]
    counted = [f"{{c}} {colour} {noun}{s}" for colour in COLOURS for noun in GLYPHS for s in ("", "s")]
    classes = {
        "objects": (tuple(GLYPHS), one_or_more),
        "objects_shift": (tuple(GLYPHS), one_or_more),
        "colours": (tuple(COLOURS), coloured),
        "counts": (COUNTS, counted),
    }
    for task, (names, templates) in classes.items():
        samples = []
        for row in range(TASK_IMAGES):
            label = row % len(names)
            scene = _scene(task, seed, row)
            if task == "colours":
                scene = replace(scene, colour=names[label])
            elif task == "counts":
                scene = replace(scene, count=label + 1)
            else:
                scene = replace(scene, noun=names[label], shifted=task == "objects_shift")
            samples.append((_task_image(task, seed, row, scene), "cls", str(label)))
        prompts = [f"{template} on a plain wall" for template in templates]
        _write_task(storage.join(path, task), samples, {
            "classnames.txt": names, "zeroshot_classification_templates.txt": prompts,
        })  # fmt: skip

    scenes = [Scene(noun, colour, n + 1) for noun in GLYPHS for colour in COLOURS for n in range(len(COUNTS))]
    samples = []
    for row, scene in enumerate(scenes):
        rng, captions = _random("retrieval", seed, row, CAPTION), []
        while len(captions) < RETRIEVAL_CAPTIONS:
            caption = _caption(rng, scene)
            if caption not in captions:
                captions.append(caption)
        samples.append((_task_image("retrieval", seed, row, scene), "txt", "\n".join(captions)))
    _write_task(storage.join(path, "retrieval"), samples, {"dataset_type.txt": ("retrieval",)})
    return list(TASKS)


def _task_image(task: str, seed: int, row: int, scene: Scene) -> bytes:
    return _encoded(_picture(_random(task, seed, row, PICTURE), scene), "PNG", 0)


def _write_task(folder: str, samples: list[tuple[bytes, str, str]], files: dict[str, tuple[str, ...]]) -> None:
    with storage.write_file(storage.join(folder, "test", "0.tar")) as temporary, TarWriter(temporary) as tar:
        for row, (image, suffix, text) in enumerate(samples):
            tar.add(f"s{row:07d}.png", image)
            tar.add(f"s{row:07d}.{suffix}", text.encode())
    for name, lines in files.items():
        storage.write_bytes(storage.join(folder, name), ("\n".join(lines) + "\n").encode())
    storage.write_bytes(storage.join(folder, "test", "nshards.txt"), b"1\n")
