"""`train --compile`: what it changes in the plan and the batches, who is refused, and that it trains the same."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import retinanet
from retinanet import devices
from retinanet.batches import Batch, Targets
from retinanet.checkpoint import load_model
from retinanet.cli import main
from retinanet.data import Dataset, open_dataset
from retinanet.data.loading import training_batches
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PyramidSpec, RetinaNet, build_retinanet
from retinanet.objective import Objective
from retinanet.records import Classes
from retinanet.training.configuration import TrainingOptions
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.step import TrainingStep
from test_training import TINY as SMALL_RUN

TINY = {**SMALL_RUN, "backbone": "test_resnet", "precision": "fp32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=4, val=2, spec=ShapesSpec(image_size=96)
    )


@pytest.fixture
def train(data: Path) -> Dataset:
    return open_dataset(data, "train")


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which programs are installed, whatever this machine has; a test may change it."""
    installed = {"g++"}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(devices, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if name in installed else None)
    return installed


def plan_of(train: Dataset, **options: object) -> Plan:
    return plan_run(TrainingOptions(data="x", **{**TINY, "steps": 3, **options}), train)  # type: ignore[arg-type]


# --- the plan --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compilers")
def test_the_option_arrives_and_is_shown(train: Dataset) -> None:
    asked, not_asked = plan_of(train, compile=True), plan_of(train)
    row = ("network", "compiled, for padded sides in steps of 128", "asked for")
    assert asked.options.compile
    assert row in asked.reasons
    assert not not_asked.options.compile
    assert "network" not in {setting for setting, *_ in not_asked.reasons}


@pytest.mark.usefixtures("compilers")
def test_training_alone_gets_few_sizes(train: Dataset) -> None:
    asked, not_asked = plan_of(train, compile=True), plan_of(train)
    assert not_asked.preprocessing == not_asked.spec.preprocessing
    assert asked.preprocessing == dataclasses.replace(not_asked.preprocessing, divisor=128)
    assert asked.spec == not_asked.spec  # what the model file says and everybody else uses


@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize(("compiled", "divisor"), [(True, 128), (False, 32)])
def test_batches_are_padded_to_these_sizes(train: Dataset, compiled: bool, divisor: int) -> None:
    sides = set()
    for size in (96, 160, 280):
        plan = plan_of(train, compile=compiled, image_size=size)
        for batch in training_batches(
            train, plan.preprocessing, plan.augmentation, batch_size=2, seed=0, steps=2
        ):
            sides |= {*batch.images.shape[2:]}
    assert sides == {divisor * -(-size // divisor) for size in (96, 160, 280)}


# --- a compiler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "named", "present", "missing"),
    [
        ("linux", None, {"g++"}, None),
        ("linux", None, {"clang++"}, "g++"),
        ("linux", None, set(), "g++"),
        ("linux", "clang++", {"clang++"}, None),
        ("linux", "clang++", {"g++"}, "clang++"),  # torch tries no other than the one that is named
        ("linux", "ccache g++", {"ccache"}, None),
        ("linux", "ccache g++", {"g++"}, "ccache g++"),
        ("linux", "", {"g++"}, "g++"),
        ("darwin", None, {"clang++"}, None),
        ("win32", None, {"cl"}, None),
    ],
)
def test_a_cpu_needs_the_compiler_that_torch_would_take(
    train: Dataset,
    compilers: set[str],
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    named: str | None,
    present: set[str],
    missing: str | None,
) -> None:
    compilers.clear()
    compilers.update(present)
    monkeypatch.setattr(devices, "sys", SimpleNamespace(platform=platform))
    if named is not None:
        monkeypatch.setenv("CXX", named)
    if missing is None:
        plan_of(train, compile=True)
        return
    with pytest.raises(ConfigError) as refused:
        plan_of(train, compile=True)
    assert str(refused.value) == (
        f"--compile needs a C++ compiler on a CPU; found no {missing}. "
        "Install it, name another in CXX, or leave out --compile"
    )
    plan_of(train)  # nobody else needs one


def test_the_command_line_refuses_in_one_line(
    data: Path, compilers: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compilers.clear()
    arguments = [str(data), "--compile", "--output", str(tmp_path / "run")]
    for name, value in TINY.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "found no g++. Install it" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


# --- a step ----------------------------------------------------------------------------------------------------


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs that torch.compile makes, and runs them as they are: no C++ compiler is needed."""
    counter = CompileCounter()
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_with(network, backend=counter))
    # The checks of shapes, which only tests have, cannot be compiled.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


def network_and_objective() -> tuple[RetinaNet, Objective]:
    torch.manual_seed(0)
    spec = ModelSpec(
        Classes(("a", "b")),
        backbone=BackboneSpec("test_resnet"),
        pyramid=PyramidSpec(channels=96),  # wide enough for the convolution of `kernels`
        head=HeadSpec(depth=1),
    )
    return build_retinanet(spec), Objective(anchors=spec.anchors, coding=spec.coding)


def batch_of(boxes: int, height: int = 128, width: int = 128) -> Batch:
    generator = torch.Generator().manual_seed(boxes)
    corner = torch.rand(2, boxes, 2, generator=generator) * 80
    return Batch(
        torch.randn(2, 3, height, width, generator=generator),
        Targets(
            torch.cat((corner, corner + 30), dim=2),
            torch.arange(2 * boxes).reshape(2, boxes) % 2,
            torch.zeros(2, boxes, dtype=torch.bool),
        ),
        indices=(0, 1),
        failed=(),
    )


def step_of(network: RetinaNet, objective: Objective, compile: bool) -> TrainingStep:
    return TrainingStep(
        network,
        objective,
        optimizer="sgd",
        weight_decay=1e-4,
        average_decay=0.9,
        clip_norm=10.0,
        device=torch.device("cpu"),
        compile=compile,
    )


def test_a_compiled_step_trains_as_the_plain_one_and_compiles_once_a_size(counter: CompileCounter) -> None:
    network, objective = network_and_objective()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = step_of(copy.deepcopy(network), objective, compile=False)
    step = step_of(network, objective, compile=True)
    for boxes in (3, 7, 1, 3):
        ours, expected = (train_on(batch_of(boxes), 0.01) for train_on in (step, plain))
        for name in ("total", "classes", "boxes"):
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1  # one graph, and no other for another number of boxes
    network.eval()  # as for a validation
    step(batch_of(2), 0.01)
    plain(batch_of(2), 0.01)
    assert counter.frame_count == 1

    moved = {
        name.split(".")[0] for name, value in network.named_parameters() if not value.equal(before[name])
    }
    assert moved == {"backbone", "pyramid", "class_head", "box_head"}
    for ours, expected in ((network, plain.network), (step.shipped, plain.shipped)):
        assert [*ours.state_dict()] == [*before]  # no prefix of the compiler's in a model file
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("compilers")
def test_a_compiled_run_leaves_a_usual_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def recording(network: RetinaNet) -> object:
        return lambda images: seen.append(tuple(images.shape)) or network(images)

    monkeypatch.setattr(torch, "compile", recording)
    run = retinanet.train(
        data=str(data), output=str(tmp_path / "run"), steps=3, validate_every_steps=2, compile=True, **TINY
    )
    assert seen == [(2, 3, 128, 128)] * 3
    names = load_file(run.path / "last" / "model.safetensors")
    assert not [name for name in names if "_orig_mod" in name]
    assert load_model(run.path).spec.preprocessing.divisor == 32
