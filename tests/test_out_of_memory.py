"""A step that finds no memory on a CUDA device is taken again in more parts, as if nothing had happened.

Torch's error is raised by hand here, on a CPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retinanet.batches import Batch
from retinanet.errors import TrainingError
from retinanet.model import RetinaNet
from retinanet.processes import ALONE
from retinanet.training.batch_size import WorstCase
from retinanet.training.folder import RunFolder
from retinanet.training.meter import Meter
from retinanet.training.saving import Saving
from retinanet.training.skipping import SkippedSteps, UnreadableImages
from retinanet.training.state import State
from retinanet.training.step import TrainingStep
from test_checkpointing import dropping, network_of, step_of


def batch(images: int = 4) -> Batch:
    return WorstCase(64, 96, boxes=5).batch(images, 2)


class Device:
    """Has room for so many images at once; says so on the way back, when gradients are there and statistics moved."""

    def __init__(self, network: RetinaNet, room: int) -> None:
        self.room = room
        self.images: list[int] = []
        network.register_forward_pre_hook(self._there)
        network.backbone.network.get_submodule("layer1.0").register_full_backward_pre_hook(self._back)

    def _there(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.images.append(len(given[0]))

    def _back(self, *_: object) -> None:
        if self.images[-1] > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def weights(step: TrainingStep) -> dict[str, Tensor]:
    return {**step.network.state_dict(), **{f"average.{k}": v for k, v in step.shipped.state_dict().items()}}


def test_the_step_is_that_of_as_many_parts_from_the_start() -> None:
    """With running statistics that move and random numbers that are drawn."""
    network = dropping(network_of())
    expected = step_of(copy.deepcopy(network), parts=4)
    failing = step_of(network)
    told: list[str] = []
    failing.told = told.append
    device = Device(network, room=1)
    drawn = []
    for step in (expected, failing):
        torch.manual_seed(0)
        step(batch(), 0.01)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)
    assert device.images == [4, 2, 1, 1, 1, 1]
    assert told == [
        f"no memory left on cpu: from now on its images of a step pass in {parts} parts, as with --accumulate {parts}; "
        "the result stays the same"
        for parts in (2, 4)
    ]
    for name, value in weights(failing).items():
        assert torch.equal(value, weights(expected)[name]), name


@pytest.mark.parametrize(
    ("images", "checkpoint_gradients", "message"),
    [
        (
            1,
            False,
            "go on with --resume RUN --checkpoint-gradients, or start anew with a smaller --image-size",
        ),
        (1, True, "start anew with a smaller --image-size"),
        (
            3,
            False,
            "go on with --resume RUN --checkpoint-gradients, or start anew with a smaller --image-size",
        ),
    ],
)
def test_advice_is_of_what_helps(images: int, checkpoint_gradients: bool, message: str) -> None:
    network = network_of()
    step = step_of(network, checkpoint_gradients=checkpoint_gradients)
    Device(network, room=0)
    with pytest.raises(TrainingError) as refused:
        step(batch(images), 0.01)
    assert str(refused.value) == f"no memory left on cpu for one image; {message}"


def test_what_a_compiled_network_cannot_have_is_no_advice() -> None:
    step = step_of(network_of())
    step.forward = lambda images: step.network(images)  # as compiled
    Device(step.network, room=0)
    with pytest.raises(TrainingError, match="for one image; start anew with a smaller --image-size"):
        step(batch(1), 0.01)


def test_no_room_for_the_step_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(network_of())

    def full() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step.optimizers[0], "step", full)
    with pytest.raises(
        TrainingError, match="no memory left on cpu for the optimiser's step; start anew with --optim"
    ):
        step(batch(1), 0.01)


def test_a_run_that_goes_on_takes_as_many_parts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would run out of memory again."""
    kept: list[State] = []
    monkeypatch.setattr("retinanet.training.saving.save_state", lambda _, state: kept.append(state))

    def saving(step: TrainingStep) -> Saving:
        told = SkippedSteps(ALONE), UnreadableImages(ALONE)
        return Saving(None, RunFolder(tmp_path), step, Meter(), *told)  # type: ignore[arg-type]

    saving(step_of(network_of(), parts=4)).save(7)
    again = step_of(network_of())
    assert saving(again).restore(kept[0]) == 7
    assert again.parts == 4
    one = State(7, kept[0].parts, {**kept[0].values, "parts_of_a_step": 1})
    saving(again).restore(one)
    assert again.parts == 4  # what --accumulate asks for stays
