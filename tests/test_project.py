"""What is written is enforced: the README's code runs, its commands parse, the paths in the docs exist."""

from __future__ import annotations

import ast
import builtins
import dis
import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import CodeType

import pytest

from retinanet.cli.main import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readmes_loss_runs() -> None:
    code = next(block for block in blocks(ROOT / "README.md", "python") if "sigmoid_focal_loss" in block)
    names: dict[str, object] = {}
    exec(code, names)
    loss = names["loss"]
    assert loss.isfinite()  # type: ignore[attr-defined]


def test_the_readmes_python_runs_on_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retinanet.checkpoint import save_model
    from retinanet.data.shapes import ShapesSpec, generate_shapes
    from test_detector import make_model

    monkeypatch.chdir(tmp_path)
    save_model("runs/mine", make_model())
    generate_shapes(Path("DATA"), train=1, val=2, spec=ShapesSpec(image_size=96))
    image = next(Path("DATA/images/val").iterdir())
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(image, name)
    code = next(block for block in blocks(ROOT / "README.md", "python") if "retinanet.load" in block)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["report"].metrics.images == 2  # type: ignore[attr-defined]


def test_the_readmes_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)  # a run that one of them resumes
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("data: DATA")
    commands = re.findall(r"^    (retinanet .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        parse(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"`(src/[^`]+|docs/[^`]+)`", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_the_page_of_the_paper_names_what_exists() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    names, tests = re.findall(r"`retinanet\.([\w.]+)`", text), re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(names) > 30
    assert len(tests) > 30
    for name in names:
        found: object = importlib.import_module("retinanet")
        for number, part in enumerate(name.split(".")):
            if not hasattr(found, part):
                importlib.import_module(".".join(["retinanet", *name.split(".")[: number + 1]]))
            found = getattr(found, part)
    for file, test in tests:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_the_explanations_are_pictures_of_the_background() -> None:
    text = (ROOT / "docs" / "background.md").read_text()
    for name in ("iou", "giou", "smoothl1", "nms", "ap", "inliers", "start", "sampling"):
        assert f"](paper/{name}.png)" in text, name


@pytest.mark.parametrize("folder", ["src", "bench"])
def test_every_global_name_is_defined(folder: str) -> None:
    """jaxtyping's shapes look like undefined names to ruff and mypy, for which neither is asked about them."""
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    for source in sources:
        module = compile(source.read_text(), str(source), "exec")
        known = {i.argval for i in dis.get_instructions(module) if i.opname in ("STORE_NAME", "STORE_GLOBAL")}
        known |= {*dir(builtins), "__file__", "__name__"}
        inner = [constant for constant in module.co_consts if isinstance(constant, CodeType)]
        while inner:
            code = inner.pop()
            inner += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            asked = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            assert asked <= known, f"{source}, {code.co_name}: {asked - known}"
        tree = ast.parse(source.read_text())
        imports = [one for one in ast.walk(tree) if isinstance(one, ast.Import | ast.ImportFrom)]
        known |= {name.asname or name.name for one in imports for name in one.names}
        asked = names_of_annotations(tree)
        assert asked <= known, f"{source}, annotations: {asked - known}"


def names_of_annotations(module: ast.Module) -> set[str]:
    """Return the names that annotations consist of, but for those within strings and type parameters."""
    given: list[ast.expr | None] = []
    for node in ast.walk(module):
        if isinstance(node, ast.AnnAssign | ast.arg):
            given.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            given.append(node.returns)
    return {name.id for one in given if one for name in ast.walk(one) if isinstance(name, ast.Name)}


@pytest.mark.parametrize(
    "module",
    [
        "retinanet.boxes",
        "retinanet.losses.focal",
        "retinanet.losses.softmax",
        "retinanet.images.preprocessing",
        "retinanet.bench.measuring",
        "retinanet.bench.utilisation",
    ],
)
def test_examples_in_docstrings_hold(module: str) -> None:
    import torch

    code = importlib.import_module(module)
    result = doctest.testmod(code, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def make_demo(folder: Path, pythons: dict[str, int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make demo` where only these Pythons exist; each says whether it is new enough by its exit status,
    and makes no environment but its own name.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    commands = folder / "commands"
    commands.mkdir()
    for name, status in pythons.items():
        (commands / name).write_text(
            f'#!/bin/sh\ntest "$1" = -c && exit {status}\necho made by {name}\nexit 1\n'
        )
        (commands / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "demo", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": str(commands)},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": 0, "python3": 0}, "python3.11"),
        ({"python3": 0}, "python3"),
        ({"python3.11": 127, "python3": 0}, "python3"),  # a wrapper around nothing
    ],
)
def test_make_takes_a_python_that_is_new_enough(tmp_path: Path, pythons: dict[str, int], taken: str) -> None:
    assert f"made by {taken}\n" in make_demo(tmp_path, pythons).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("pythons", "arguments"),
    [({}, []), ({"python3": 1}, []), ({"python3": 0, "python3.10": 1}, ["PYTHON=python3.10"])],
)
def test_make_without_a_python_that_is_new_enough_says_so(
    tmp_path: Path, pythons: dict[str, int], arguments: list[str]
) -> None:
    done = make_demo(tmp_path, pythons, *arguments)
    assert done.returncode == 2
    assert "needs Python 3.11 or later; PYTHON=/path/to/python names it" in done.stderr
    assert "made by" not in done.stdout
