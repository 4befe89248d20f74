"""`python -m eval`: what it finds, writes, prints and leaves alone."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from eval import command
from eval.evaluate import Checkpoint, evaluate
from eval.tasks import resolve_task
from pipeline.core import clip_model
from pipeline.core.errors import ConfigError
from tests.task_fixture import picture, write_tars

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
CLASSES = "dog\ncat\nold boat\n"
FILES = ("identity", "predictions.parquet", "result.json")


def labelled(rows, classes: int = 3) -> list[tuple[str, bytes]]:
    names = [f"s{row:07d}" for row in rows]
    return [
        member
        for row, name in zip(rows, names, strict=True)
        for member in ((f"{name}.png", picture(row)), (f"{name}.cls", str(row % classes).encode()))
    ]


def write_task(folder: pathlib.Path, rows=range(8), classes: str = CLASSES) -> pathlib.Path:
    files = {"classnames.txt": classes, "zeroshot_classification_templates.txt": "a photo of a {c}.\n"}
    write_tars(folder, [labelled(rows, classes.count("\n"))], files)
    return folder


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Two tasks of classification and one of retrieval, folders that are no tasks among them."""
    folder = tmp_path / "tasks"
    write_task(folder / "animals")
    write_task(folder / "group" / "boats", range(8, 13))
    captions = [(f"{row}.png", picture(row)) for row in range(4)]
    captions += [(f"{row}.txt", f"number {row}\n".encode()) for row in range(4)]
    write_tars(folder / "photos", [sorted(captions)], {"dataset_type.txt": "retrieval\n"})
    (folder / "notes").mkdir()
    (folder / "notes" / "read.me").write_text("no task")
    return folder


def write_model(folder: pathlib.Path, seed: int) -> str:
    torch.manual_seed(seed)
    clip_model.save(clip_model.build(ARCHITECTURE).model, ARCHITECTURE, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """A model folder, and a checkpoint's artifact with one in it."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "checkpoint-0f3a" / "open_clip", 1)
    return [write_model(folder / "plain", 0), str(folder / "checkpoint-0f3a")]


def run(capsys, *words: str) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr)."""
    code = command.main([*map(str, words), "--device", "cpu", "--threads", "2"])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def bytes_of(out: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_every_pair_is_written_and_tabled(tmp_path, capsys, root, models):
    out = tmp_path / "out"
    code, lines, errors = run(capsys, "--root", root, "--out", out, *models)
    assert code == 0
    names, tasks = ("plain", "checkpoint-0f3a"), ("animals", "group/boats", "photos")
    assert set(bytes_of(out)) == {f"{name}/{task}/{file}" for name in names for task in tasks for file in FILES}
    assert errors == ["6 of 6 pairs of a checkpoint and a task to evaluate, on cpu with 2 threads"]

    rows = [line.split() for line in lines[:-1]]
    assert rows[0] == ["task", "metric", *names]
    assert [row[:2] for row in rows[1:4]] == [["animals", "acc1"], ["group/boats", "acc1"], ["photos", "mean_recall@1"]]
    assert rows[4][:3] == ["average", "of", "3"]
    for place, name in enumerate(names):
        values = []
        for task, row in zip(tasks, rows[1:4], strict=True):
            result = json.loads((out / name / task / "result.json").read_text())
            assert (result["dataset"], result["model"], result["pretrained"]) == (task, "custom", name)
            values.append(result["metrics"][row[1]])
            assert row[2 + place] == f"{100 * values[-1]:.2f}"
        assert rows[4][3 + place] == f"{100 * sum(values) / 3:.2f}"
    assert lines[-1].startswith("6 pairs in ")
    assert lines[-1].endswith(" %")

    checkpoint = Checkpoint({"folder": f"{models[1]}/open_clip"}, "custom", names[1])  # the same code as in a run
    data = resolve_task("animals", str(root))
    assert all(found.error is None for found in evaluate([checkpoint], [data], [[str(tmp_path / "alone")]]))
    for file in FILES[1:]:
        assert (tmp_path / "alone" / file).read_bytes() == (out / names[1] / "animals" / file).read_bytes()


def test_a_plain_folder_is_a_task_where_it_is_named(tmp_path, capsys, root, models):
    for number, name in enumerate(("cat", "dog")):
        (root / "pets" / name).mkdir(parents=True)
        (root / "pets" / name / "1.png").write_bytes(picture(number))
    code, _, errors = run(capsys, "--root", root, "--out", tmp_path / "all", models[0])
    assert code == 0
    assert errors[0] == "left out, as they have no test/nshards.txt: pets; --tasks names a plain folder"
    code, lines, _ = run(capsys, models[0], "--root", root, "--out", tmp_path / "one", "--tasks", "pets")
    assert (code, lines[1].split()[:2]) == (0, ["pets", "acc1"])


def test_a_second_run_does_only_what_is_new(tmp_path, capsys, root, models):
    out = tmp_path / "out"
    first = tmp_path / "first"
    shutil.copytree(models[0], first)

    def again() -> tuple[str, set[str]]:
        """What the command says it has to do, and which results it wrote."""
        before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
        code, _, errors = run(capsys, "--root", root, "--out", out, first, models[1])
        assert code == 0
        written = {path for path in out.rglob("result.json") if path.stat().st_mtime_ns != before.get(path)}
        return errors[0].partition(" pairs")[0], {str(path.parent.relative_to(out)) for path in written}

    assert again()[0] == "6 of 6"
    assert again() == ("0 of 6", set())
    table = run(capsys, "--root", root, "--out", out, first, models[1])[1]
    assert table[0].split() == ["task", "metric", "first", "checkpoint-0f3a"]
    assert len(table) == 5  # and no line of times

    classes = root / "animals" / "classnames.txt"
    classes.write_text(classes.read_text().replace("dog", "hound"))
    assert again() == ("2 of 6", {"first/animals", "checkpoint-0f3a/animals"})

    (out / "first" / "photos" / "predictions.parquet").unlink()
    assert again() == ("1 of 6", {"first/photos"})

    write_model(first, seed=5)
    assert again() == ("3 of 6", {f"first/{task}" for task in ("animals", "group/boats", "photos")})
    assert again() == ("0 of 6", set())


def test_the_same_command_writes_the_same_bytes(tmp_path, capsys, root, models):
    for name in ("one", "two"):
        assert run(capsys, "--root", root, "--out", tmp_path / name, *models)[0] == 0
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_pair_that_fails_is_one_line_and_is_tried_again(tmp_path, capsys, root, models):
    out = tmp_path / "out"
    tar = root / "animals" / "test" / "0.tar"
    whole = tar.read_bytes()
    assert run(capsys, "--root", root, "--out", out, *models)[0] == 0
    tar.write_bytes(whole[:3000])
    code, lines, errors = run(capsys, "--root", root, "--out", out, *models)
    assert code == 1
    assert [line.partition(":")[0] for line in errors[1:]] == [
        "plain on animals failed",
        "checkpoint-0f3a on animals failed",
        "error",
    ]
    assert errors[-1] == "error: 2 of 6 pairs failed"
    rows = [line.split() for line in lines]
    assert rows[1] == ["animals", "acc1", "-", "-"]  # what an earlier run wrote is no result of this tar
    assert "-" not in rows[2]
    assert rows[4] == ["average", "of", "3", "-", "-"]
    tar.write_bytes(whole)
    code, lines, errors = run(capsys, "--root", root, "--out", out, *models)
    assert (code, errors[0].partition(" pairs")[0]) == (0, "2 of 6")


def test_a_checkpoint_that_does_not_load_leaves_the_others_alone(tmp_path, capsys, root, models):
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
    weights = broken / clip_model.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-64])
    code, lines, errors = run(capsys, "--root", root, "--out", tmp_path / "out", broken, models[1])
    assert code == 1
    assert errors[-1] == "error: 3 of 6 pairs failed"
    assert all("can't be loaded" in line for line in errors[1:-1])
    assert [line.split()[-2] for line in lines[1:5]] == ["-"] * 4
    assert "-" not in [line.split()[-1] for line in lines[1:5]]


def test_weights_in_a_file_of_an_architecture_by_name(tmp_path, monkeypatch, capsys, root):
    import open_clip

    config = tmp_path / "configs" / "Tiny-16.json"
    config.parent.mkdir()
    config.write_text(json.dumps(ARCHITECTURE))
    monkeypatch.setattr(clip_model, "_known_architectures", lambda: {"Tiny-16": str(config)})
    open_clip.add_model_config(config)
    weights = pathlib.Path(write_model(tmp_path / "model", 3)) / clip_model.WEIGHTS_FILE
    named = weights.rename(tmp_path / "epoch_3.safetensors")
    code, lines, _ = run(capsys, "--root", root, "--tasks", "animals", "--out", tmp_path / "out", f"Tiny-16,{named}")
    assert code == 0
    assert lines[0].split() == ["task", "metric", "Tiny-16,epoch_3.safetensors"]
    result = json.loads((tmp_path / "out" / "Tiny-16,epoch_3.safetensors" / "animals" / "result.json").read_text())
    assert (result["model"], result["pretrained"]) == ("Tiny-16", "epoch_3.safetensors")


def test_what_is_wrong_is_said_before_any_work(tmp_path, capsys, root, models):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "weightless").mkdir()
    shutil.copy(pathlib.Path(models[0]) / clip_model.CONFIG_FILE, tmp_path / "weightless")
    shutil.copytree(models[0], tmp_path / "other" / "plain")
    (root / "half" / "test").mkdir(parents=True)
    (root / "half" / "test" / "nshards.txt").write_text("1\n")
    some = ("--tasks", "animals")
    for words, message in (
        ((root, *some, "nowhere"), "CHECKPOINT = nowhere, expected a model folder with open_clip_config.json"),
        (
            (root, *some, "ViT-B-33,openai"),
            "CHECKPOINT = ViT-B-33, expected an architecture of open_clip. Did you mean",
        ),
        ((root, *some, "ViT-B-32,opnai"), "CHECKPOINT = ViT-B-32,opnai: weights = opnai, expected a weights file"),
        ((root, *some, str(tmp_path / "weightless")), "has no weights, expected open_clip_model.safetensors"),
        ((root, *some, models[0], str(tmp_path / "other" / "plain")), "CHECKPOINT: 2 are called plain, expected"),
        ((root, "--tasks", "animls", models[0]), "--tasks = animls, expected a folder of"),
        ((root, "--tasks", "animals", "animals", models[0]), "--tasks = animals twice"),
        ((root, models[0]), "--tasks = half: "),
        ((empty, models[0]), f"--root = {empty}, expected a folder that holds folders with test/nshards.txt"),
        ((root, *some, "--batch-size", "0", models[0]), "--batch-size = 0, expected at least 1"),
    ):
        # argparse takes all words after --tasks for tasks, up to the next option
        split = [*words[:-1], "--out", tmp_path / "out", words[-1]]
        if message.startswith("CHECKPOINT: 2"):
            split = [*words[:-2], "--out", tmp_path / "out", *words[-2:]]
        code, lines, errors = run(capsys, "--root", *split)
        assert (code, lines, len(errors)) == (2, [], 1), errors
        assert errors[0].startswith("error: ")
        assert message in errors[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--device = tpu, expected cpu or cuda"):
        command._resources(command.parser().parse_args(["--root", "r", "--out", "o", "--device", "tpu", "c"]))


def test_known_tasks_go_by_their_own_name(tmp_path, capsys, root):
    classes = "".join(f"class {number}\n" for number in range(10))
    write_task(root / "wds_cifar10_test", range(20), classes)
    write_task(root / "wds_fairness" / "notes", range(3))
    assert [data.name for data in command.find_tasks(str(root), None)] == [
        "animals",
        "group/boats",
        "photos",
        "cifar10",
        "wds_fairness/notes",
    ]
    (data,) = command.find_tasks(str(root), ["cifar10"])
    assert (data.task.metric, data.task.images, len(data.digest)) == ("acc1", 10000, 32)


def test_tasks_and_results_on_an_object_store(tmp_path, capsys, root, models, s3_url):
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.put(f"{root}/", f"{s3_url}/tasks/", recursive=True)
    fs.put(f"{models[1]}/", f"{s3_url}/checkpoint-0f3a/", recursive=True)
    words = ("--root", f"{s3_url}/tasks", "--out", f"{s3_url}/out", f"{s3_url}/checkpoint-0f3a")
    code, _, errors = run(capsys, *words)
    assert (code, errors[0].partition(" pairs")[0]) == (0, "3 of 3")
    assert run(capsys, *words)[2][0].startswith("0 of 3")
    assert run(capsys, "--root", root, "--out", tmp_path / "near", models[1])[0] == 0
    near = bytes_of(tmp_path / "near")
    assert {name: fs.cat(f"{s3_url}/out/{name}") for name in near} == near


def test_the_command_starts_no_cluster(tmp_path, root, models):
    words = ["--root", str(root), "--tasks", "animals", "--out", str(tmp_path / "out"), "--device", "cpu", models[0]]
    code = "import sys; from eval.command import main; print(main(sys.argv[1:]), 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert (tmp_path / "out" / "plain" / "animals" / "identity").exists()


def test_the_module_says_all_and_ends_with_the_code(tmp_path, root, models):
    (root / "animals" / "test" / "0.tar").write_bytes(b"no tar")
    for words, expected in (((models[0],), 1), (("nowhere",), 2)):
        command_line = [sys.executable, "-m", "eval", "--root", str(root), "--out", str(tmp_path / "out"), *words]
        done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == expected
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert ("average of 3" in done.stdout) == (expected == 1)
