"""Finding tasks: what is accepted, and the one line that says what is missing where."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

from eval.tasks import TASKS, TaskData, resolve_task, resolve_tasks, task_digest
from pipeline.core import storage
from pipeline.core.errors import ConfigError
from pipeline.core.tars import TarWriter

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_task(folder: pathlib.Path, files: dict[str, str] | None = None, num_shards: int = 1) -> pathlib.Path:
    """A task folder whose tars are empty: enough to be found."""
    (folder / "test").mkdir(parents=True)
    texts = {
        "classnames.txt": "cat\ndog\n",
        "zeroshot_classification_templates.txt": "a photo of a {c}.\na {c}\n",
        "test/nshards.txt": f"{num_shards}\n",
    } | (files or {})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for number in range(num_shards):
        with TarWriter(str(folder / "test" / f"{number}.tar")):
            pass
    return folder


def test_tasks_are_those_of_datacomp():
    counted = [task for task in TASKS.values() if task.counted]
    assert (len(TASKS), len(counted)) == (40, 38)
    sizes = {
        group: sum(task.group == group for task in counted) for group in ("ImageNet", "shifts", "VTAB", "retrieval")
    }
    assert sizes == {"ImageNet": 1, "shifts": 6, "VTAB": 13, "retrieval": 3}
    assert sum(task.images for task in TASKS.values()) == 732_026
    own_class_weight = {name for name, task in TASKS.items() if task.metric == "mean_per_class_recall"}
    assert own_class_weight == {"vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets"}
    assert TASKS["gtsrb"].chance == pytest.approx(0.037604)
    assert {name for name, task in TASKS.items() if not task.counted} == {"fairness/fairface", "fairness/utkface"}
    for task in TASKS.values():
        assert task.title
        own = TaskData(task, "", ("test/0.tar",), ("a",) * 5).metrics
        assert task.metric in own or not task.counted, task


def test_the_clean_tasks_are_those_of_the_paper():
    near_chance = {name for name, task in TASKS.items() if task.counted and not task.clean}
    assert sum(task.clean for task in TASKS.values()) == 33
    clevr = {"vtab/clevr_count_all", "vtab/clevr_closest_object_distance"}
    assert near_chance == {*clevr, "vtab/pcam", "wilds/camelyon17", "vtab/kitti_closest_vehicle_distance"}


def test_every_task_of_datacomp_is_documented():
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task in TASKS.values():
        row = f"| `{task.name}` | {task.title} |"
        assert row in text, f"docs/tasks.md has no row {row}"
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:4] == [f"{task.images:,}", str(task.classes or "")], line
        assert (f"`{task.metric}`" if task.metric else "none") == cells[4], line


def test_a_users_folder_by_name_by_path_and_with_settings(tmp_path):
    write_task(tmp_path / "pets")
    by_name = resolve_task("pets", str(tmp_path))
    assert (by_name.task.type, by_name.task.metric, by_name.chance) == ("zeroshot_classification", "acc1", 0.5)
    assert by_name.classnames == ("cat", "dog")
    assert by_name.shards == ("test/0.tar",)
    entry = {"name": "mine", "path": str(tmp_path / "pets"), "metric": "mean_per_class_recall", "chance": 0.4}
    mine = resolve_task({**entry, "group": "animals", "in_domain": True, "title": "My pets"})
    assert (mine.task.metric, mine.chance, mine.task.group) == ("mean_per_class_recall", 0.4, "animals")
    assert mine.task.in_domain
    assert mine.task.title == "My pets"


def test_a_retrieval_folder_needs_no_classes_and_has_no_chance_level(tmp_path):
    folder = write_task(tmp_path / "photos", {"dataset_type.txt": "retrieval\n"})
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").unlink()
    data = resolve_task("photos", str(tmp_path))
    assert (data.task.type, data.task.metric, data.chance) == ("zeroshot_retrieval", "mean_recall@1", None)


def test_known_tasks_are_found_under_datacomps_folder_names(tmp_path):
    names = "\n".join(f"class {number}" for number in range(47))
    write_task(tmp_path / "wds_vtab-dtd_test", {"classnames.txt": names})
    data = resolve_task({"name": "vtab/dtd", "in_domain": True}, str(tmp_path))
    assert data.path.endswith("wds_vtab-dtd_test")
    assert (data.task.title, data.task.group, data.task.in_domain) == ("Describable Textures", "VTAB", True)
    assert data.chance == pytest.approx(0.021277)


def test_a_folder_with_other_classes_is_not_taken_for_the_published_task(tmp_path):
    write_task(tmp_path / "cifar10")
    with pytest.raises(ConfigError, match=r"classnames.txt has 2 classes, expected the 10 of CIFAR-10"):
        resolve_task("cifar10", str(tmp_path))


def test_everything_that_is_missing_is_said_at_once_in_one_line(tmp_path):
    write_task(tmp_path / "pets", num_shards=3)
    (tmp_path / "pets" / "test" / "1.tar").unlink()
    (tmp_path / "pets" / "classnames.txt").unlink()
    with pytest.raises(ConfigError) as caught:
        resolve_tasks(["pets", "imagenet1k", "fairness/geode", "bets", "misc/winogavil"], str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert f"eval.tasks.0 = pets: {tmp_path}/pets lacks classnames.txt, test/1.tar" in message
    assert f"eval.tasks.1 = imagenet1k: no files in {tmp_path}" in message
    files = "classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt and test/0.tar, ..."
    assert f"imagenet1k or wds_imagenet1k_test with {files}" in message
    assert "expected a folder fairness/geode or wds_geode_test with classnames.txt" in message
    assert "wds_misc-winogavil_test with winogavil_dataset.csv and winogavil_images/" in message
    assert "eval.tasks.3 = bets, expected a folder" in message
    assert "Did you mean pets?" in message


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"name": "pets", "metrik": "acc1"}, r"metrik: no such setting of a task. Did you mean metric\?"),
        ({"name": "pets", "metric": "acc5"}, r"metric = acc5, expected one of zeroshot_classification"),
        ({"name": "pets", "metric": "acc_wg"}, r"metric = acc_wg, expected one of zeroshot_classification"),
        ({"name": "pets", "type": "retrieval"}, r"type = retrieval, but .*pets holds zeroshot_classification"),
        ({"name": "pets", "type": "both"}, r"type = both, expected classification or retrieval"),
        ({"name": "pets", "templates": "a {c}"}, r"templates = 'a {c}', expected a list"),
        ({"name": "pets", "templates": ["a {c.x}"]}, r"templates: 'a {c.x}', expected prompts with the class as {c}"),
        ({"name": "pets", "templates": []}, r"templates: '', expected prompts"),
        ({"name": "pets", "classnames": ["cat", 3]}, r"classnames: expected the text of each class's name"),
        ({"name": "pets", "classnames": {"cat": "cat"}}, r"expected a list in the order of the labels"),
        ({"name": "cifar10", "templates": ["a {c}"]}, r"tasks.0.templates is said for cifar10, whose files say it"),
        ({"name": "pets", "metric": "mean_recall@1"}, r"expected one of zeroshot_classification"),
        ({"name": "pets", "chance": 50}, r"chance = 50.0, expected 0 <= chance <= 1"),
        ({"name": "pets", "chance": "half"}, r"chance = 'half', expected a number"),
        ({"name": "pets", "in_domain": "yes"}, r"in_domain = 'yes', expected true or false"),
        ({"path": "pets"}, r"eval.tasks.0.name is missing"),
        ({"name": "pets", "path": "/nowhere/at/all"}, r"path = /nowhere/at/all, expected the folder"),
        ("../pets", r"expected the name of a folder below"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, entry, message):
    write_task(tmp_path / "pets")
    with pytest.raises(ConfigError, match=message):
        resolve_tasks([entry], str(tmp_path))


@pytest.mark.parametrize(
    "files, message",
    [
        ({"classnames.txt": "cat\n\ndog\n"}, r"classnames.txt line 2 is blank"),
        ({"zeroshot_classification_templates.txt": ""}, r"templates.txt line 1 is blank"),
        ({"zeroshot_classification_templates.txt": "a photo\n"}, r"expected a prompt with the class as {c}"),
        ({"zeroshot_classification_templates.txt": "a {c.__class__}\n"}, r"expected a prompt with the class as {c}"),
        ({"zeroshot_classification_templates.txt": "a {c:>999999999}\n"}, r"expected a prompt with the class as {c}"),
        ({"zeroshot_classification_templates.txt": "a {c\n"}, r"expected a prompt with the class as {c}"),
        ({"dataset_type.txt": "multilabel\n"}, r"says 'multilabel', expected classification or retrieval"),
        ({"test/nshards.txt": "two\n"}, r"says 'two', expected a count of tars"),
        ({"test/nshards.txt": "1\n", "test/1.tar": ""}, r"says 1, but test/1.tar is there too"),
    ],
)
def test_folders_that_make_no_sense(tmp_path, files, message):
    write_task(tmp_path / "pets", files)
    with pytest.raises(ConfigError, match=message):
        resolve_task("pets", str(tmp_path))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    write_task(tmp_path / "pets")
    with pytest.raises(ConfigError, match=r"eval.tasks.1.name = pets, expected a name that no other task has"):
        resolve_tasks(["pets", {"name": "pets", "metric": "mean_per_class_recall"}], str(tmp_path))


def test_the_digest_follows_content_and_not_names(tmp_path):
    write_task(tmp_path / "pets")
    write_task(tmp_path / "same")
    write_task(tmp_path / "other", {"classnames.txt": "cat\ncow\n"})
    pets, same, other = (task_digest(resolve_task(name, str(tmp_path))) for name in ("pets", "same", "other"))
    assert pets == same != other
    with TarWriter(str(tmp_path / "same" / "test" / "0.tar")) as tar:
        tar.add("s0.cls", b"0")
    assert task_digest(resolve_task("same", str(tmp_path))) != pets


def test_large_tasks_are_known_by_sizes_and_stamps_but_texts_by_content(tmp_path, monkeypatch):
    write_task(tmp_path / "pets")
    data = resolve_task("pets", str(tmp_path))
    by_bytes = task_digest(data)
    read = []
    sha256_file = storage.sha256_file
    monkeypatch.setattr("eval.tasks.HASHED_BYTES", 10)
    monkeypatch.setattr(storage, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    stamped = task_digest(data)
    assert stamped != by_bytes
    assert not any(path.endswith(".tar") for path in read)
    os.utime(tmp_path / "pets" / "test" / "0.tar", (1, 1))
    moved = task_digest(data)
    assert moved != stamped
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ncow\n")
    assert task_digest(data) != moved


def test_a_tasks_path_is_absolute(tmp_path, monkeypatch):
    write_task(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    found = [resolve_task("pets", "."), resolve_task({"name": "mine", "path": "pets"})]
    assert [data.path for data in found] == [f"{tmp_path}/pets"] * 2


def test_tasks_import_nothing_heavy():
    code = "import sys, eval.tasks; print(sorted({'torch', 'PIL', 'open_clip', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_users_prompts_and_names_stand_in_for_the_files(tmp_path):
    write_task(tmp_path / "pets")
    before = resolve_task("pets", str(tmp_path))
    own = {"name": "pets", "templates": ["{c}!"], "classnames": ["tom", "rex"]}
    data = resolve_task(own, str(tmp_path))
    assert (data.templates, data.classnames) == (("{c}!",), ("tom", "rex"))
    assert task_digest(data) not in (task_digest(before), task_digest(replace(data, templates=("{c}",))))
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / "pets" / name).unlink()
    assert resolve_task(own, str(tmp_path)) == data


def test_another_metric_than_the_published_one_has_its_own_chance_level(tmp_path):
    names = "\n".join(f"class {number}" for number in range(43))
    write_task(tmp_path / "gtsrb", {"classnames.txt": names})
    entry = {"name": "gtsrb"}
    for settings, chance in (
        ({}, 0.037604),
        ({"metric": "acc1"}, 0.037604),
        ({"metric": "acc5"}, 5 / 43),
        ({"metric": "mean_per_class_recall"}, 1 / 43),
        ({"metric": "acc5", "chance": 0.5}, 0.5),
    ):
        assert resolve_task(entry | settings, str(tmp_path)).chance == pytest.approx(chance)
