"""`--checkpoint-gradients`: the same weights, bit for bit, from fewer kept activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import retinanet
from retinanet.batches import Batch
from retinanet.data import open_dataset
from retinanet.errors import ConfigError
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PyramidSpec, RetinaNet, build_retinanet
from retinanet.objective import Objective
from retinanet.processes import ALONE, Processes
from retinanet.records import Classes
from retinanet.training import checkpointing
from retinanet.training.batch_size import WorstCase
from retinanet.training.checkpointing import GradientCheckpoints
from retinanet.training.configuration import TrainingOptions
from retinanet.training.planning import plan_run
from retinanet.training.step import TrainingStep
from test_training import TINY

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")


def network_of(backbone: str = "test_resnet", norm: str = "native", head_norm: str = "group") -> RetinaNet:
    torch.manual_seed(0)
    spec = ModelSpec(
        Classes(("a", "b")),
        backbone=BackboneSpec(backbone, norm=norm),  # type: ignore[arg-type]
        pyramid=PyramidSpec(channels=64),
        head=HeadSpec(depth=2, norm=head_norm),  # type: ignore[arg-type]
    )
    return build_retinanet(spec)


def step_of(
    network: RetinaNet,
    *,
    checkpoint_gradients: bool = False,
    precision: str = "fp32",
    parts: int = 1,
    processes: Processes = ALONE,
) -> TrainingStep:
    spec = ModelSpec(Classes(("a", "b")))
    return TrainingStep(
        network,
        Objective(anchors=spec.anchors, coding=spec.coding),
        optimizer="sgd",
        weight_decay=1e-4,
        average_decay=0.9,
        device=CPU,
        precision=precision,  # type: ignore[arg-type]
        checkpoint_gradients=checkpoint_gradients,
        parts=parts,
        processes=processes,
    )


def batch(side: int = 96) -> Batch:
    return WorstCase(side, side + 32, boxes=5).batch(2, 2)


def assert_equal_steps(network: RetinaNet, **options: Any) -> None:
    """Two steps with and without; the second starts from moved weights, optimiser and statistics."""
    plain = step_of(copy.deepcopy(network), checkpoint_gradients=False, **options)
    kept = step_of(network, checkpoint_gradients=True, **options)
    assert kept.activations.forwards  # type: ignore[attr-defined]
    for number in range(2):
        losses = []
        for step in (plain, kept):
            torch.manual_seed(number)  # stochastic depth
            losses.append(step(batch(), 0.01).total)
        assert torch.equal(*losses)
    expected = plain.network.state_dict()
    assert [*kept.network.state_dict()] == [*expected]
    for name, value in kept.network.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for name, value in kept.shipped.state_dict().items():
        assert torch.equal(value, plain.shipped.state_dict()[name]), name


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("test_resnet", "native"),  # BatchNorm in training, whose statistics must move once
        ("resnet18", "group"),
        ("test_resnet", "frozen"),
        ("test_convnext", "native"),
        ("mobilenetv3_small_050", "native"),
        pytest.param("regnetx_002", "native", marks=pytest.mark.slow),
    ],
)
def test_a_step_gives_the_same_weights_bit_for_bit(backbone: str, norm: str) -> None:
    assert_equal_steps(network_of(backbone, norm))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    ["efficientnet_b0", "cspdarknet53", "vgg11_bn", "densenet121", "resnetv2_50", "focalnet_tiny_srf"],
)
def test_other_backbones_do_too(backbone: str) -> None:
    assert_equal_steps(network_of(backbone))


def test_also_in_bfloat16() -> None:
    assert_equal_steps(network_of(), precision="bf16")


def test_also_part_by_part() -> None:
    assert_equal_steps(network_of(), parts=2)


@pytest.mark.parametrize("stage", ["stem", "stage1", "backbone"])
def test_frozen_stages_stay_as_they_are(stage: str) -> None:
    network = network_of()
    network.backbone.freeze(stage)
    frozen = [part for part in network.backbone.modules() if not part.training]
    before = copy.deepcopy(network.backbone.state_dict())
    assert_equal_steps(network)
    checkpoints = GradientCheckpoints(network)
    assert not set(frozen) & set(checkpoints.forwards)
    for name, value in network.backbone.state_dict().items():
        assert stage != "backbone" or torch.equal(value, before[name]), name


def dropping(network: RetinaNet) -> RetinaNet:
    """Return a network with random numbers in its forward pass."""
    block = network.backbone.network.get_submodule("layer2.0")
    usual = type(block).forward

    class Dropping(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return usual(self, x) * nn.functional.dropout(torch.ones(len(x), 1, 1, 1), 0.5)

    block.__class__ = Dropping
    return network


def test_stochastic_depth_draws_the_same_again() -> None:
    assert_equal_steps(dropping(network_of()))


def saved_bytes(network: RetinaNet, *, checkpoint_gradients: bool) -> int:
    """Return what a forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    images = batch(256).images
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if checkpoint_gradients:
            with GradientCheckpoints(network):
                held.append(network(images))
        else:
            held.append(network(images))
    return sum(kept.values())


@pytest.mark.parametrize(("backbone", "norm"), [("resnet18", "group"), ("mobilenetv3_small_050", "native")])
def test_less_is_kept(backbone: str, norm: str) -> None:
    network = network_of(backbone, norm)
    plain, kept = (saved_bytes(network, checkpoint_gradients=asked) for asked in (False, True))
    assert kept < plain / 2


def test_outside_of_it_the_network_is_as_before() -> None:
    network = network_of()
    before = {part: dict(part.__dict__) for part in network.modules()}
    checkpoints = GradientCheckpoints(network)
    with checkpoints:
        assert any("forward" in part.__dict__ for part in network.modules())
        network(batch().images)
    with pytest.raises(InterruptedError), checkpoints:
        raise InterruptedError
    assert {part: dict(part.__dict__) for part in network.modules()} == before


def test_nothing_is_computed_twice_without_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    calls: list[int] = []
    monkeypatch.setattr(checkpointing.nn.GroupNorm, "forward", lambda _, x: calls.append(1) or x)
    with torch.no_grad(), GradientCheckpoints(network):
        network(batch().images)
    assert len(calls) == 5 * 2 * 2  # levels, heads, depth


def test_a_part_that_writes_into_its_input_is_refused() -> None:
    network = network_of()
    block = network.backbone.network.get_submodule("layer2.0")
    usual = type(block).forward

    class Writing(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return usual(self, x.mul_(0.5))

    block.__class__ = Writing
    with pytest.raises(
        ConfigError, match=r"--checkpoint-gradients needs a backbone whose blocks leave their input"
    ):
        step_of(network, checkpoint_gradients=True)(batch(), 0.01)


# --- a run ------------------------------------------------------------------------------------------------------


def test_the_plan_tells_it(data: Path) -> None:
    train = open_dataset(data, "train")
    row = ("activations", "computed again in the backward pass", "asked for")
    options = {**TINY, "data": str(data), "backbone": "test_resnet", "steps": 2}
    asked = plan_run(TrainingOptions(**options, checkpoint_gradients=True), train)
    not_asked = plan_run(TrainingOptions(**options), train)
    assert row in asked.reasons
    assert [reason for reason in asked.reasons if reason != row] == [*not_asked.reasons]
    assert isinstance(TrainingStep.of(asked, network_of()).activations, GradientCheckpoints)


def test_the_compiler_decides_by_itself() -> None:
    with pytest.raises(ConfigError, match="--checkpoint-gradients and --compile exclude each other"):
        TrainingOptions(data="x", compile=True, checkpoint_gradients=True)


def test_a_run_makes_the_same_model(data: Path, tmp_path: Path) -> None:
    options = {**TINY, "data": str(data), "backbone": "test_resnet", "image_size": 64, "steps": 3}
    weights = []
    for asked in (False, True):
        run = retinanet.train(output=str(tmp_path / str(asked)), checkpoint_gradients=asked, **options)
        weights.append(load_file(run.path / "last" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
