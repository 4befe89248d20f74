"""House rules as tests: who imports whom, the frozen command line, light imports, what is documented and uploadable."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages", "training", "eval")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# pipeline.{run,plan,execute,report,runs} -> stages | training | eval -> pipeline.core -> third party
CORE, MIDDLE, TOP = 0, 1, 2


def layer(module: str) -> int:
    if module == "pipeline.core" or module.startswith("pipeline.core."):
        return CORE
    return TOP if module.split(".")[0] == "pipeline" else MIDDLE


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module, node.lineno


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path):
    own = module_of(path)
    for name, line in imports(path):
        top = name.split(".")[0]
        if top == "ray":
            assert own in ("pipeline.core.engine", "pipeline.execute", "training.worker"), f"{path}:{line} imports ray"
        if top not in PACKAGES:
            continue
        place = f"{path}:{line}: {own} imports {name}"
        if layer(own) == CORE:
            assert layer(name) == CORE or name == "pipeline", place
        elif layer(own) == MIDDLE:
            assert top == own.split(".")[0] or layer(name) == CORE or name == "pipeline", place
        if own.startswith("pipeline.report") and top in PACKAGES:
            assert name.startswith(("pipeline.core", "pipeline.report")), place


def test_our_packages_are_those_of_this_repository():
    for package in PACKAGES:
        found = pathlib.Path(importlib.import_module(package).__file__).resolve()
        assert found.is_relative_to(ROOT), f"{package} is imported from {found}"


def test_the_command_line_is_frozen():
    from pipeline.run import parser

    flags = sorted(flag for action in parser()._actions for flag in action.option_strings)
    assert flags == ["--clean", "--config", "--help", "--plan", "--report", "--set", "--until", "--yes", "-h"]


@pytest.mark.parametrize(
    "module",
    [
        "pipeline.run",
        "pipeline.plan",
        "pipeline.preflight",
        "pipeline.report",
        "stages",
        "eval.tasks",
        "training.recipe",
    ],
)
def test_what_the_driver_imports_is_light(module):
    code = (
        f"import sys, {module}; print([name for name in ('torch', 'open_clip', 'PIL', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_shadows_the_standard_library():
    for path in FILES:
        if path.name != "__init__.py":
            assert path.stem not in sys.stdlib_module_names, path


def test_every_stage_is_documented_and_says_what_it_adds():
    from stages import STAGES, stage_class

    readme = (ROOT / "README.md").read_text()
    for name in STAGES:
        kind = stage_class(name)
        assert kind.__module__.rsplit(".", 1)[-1] == name
        assert kind.__doc__, name
        assert kind.adds, name
        assert f"`{name}`" in readme, f"the README does not name the stage {name}"


def test_every_tracked_file_of_ours_is_uploaded_with_a_job():
    """`.gitignore` and `.rayignore` decide what `ray job submit --working-dir .` takes along: patterns are anchored."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ours = [name for name in tracked if name.split("/")[0] in (*PACKAGES, "configs")]
    assert ours
    for ignore in (".gitignore", ".rayignore"):
        hidden = subprocess.run(
            ["git", "-c", f"core.excludesFile={ROOT / ignore}", "check-ignore", "--no-index", *ours],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert hidden.stdout == "", f"{ignore} leaves out: {hidden.stdout}"


def test_nothing_names_a_machine_or_a_package_index():
    for path in [
        *FILES,
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(path for path in ROOT.glob("configs/**/*") if path.is_file()),
        ROOT / "pyproject.toml",
    ]:
        text = path.read_text()
        for word in ("index-url", "extra-index", "/home/", "/root/"):
            assert word not in text, f"{path} holds {word}"
