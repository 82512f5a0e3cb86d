"""`bench checkpointing`: our training step with `train --checkpoint-gradients` beside our step without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from retinanet.anchors import CPU
from retinanet.bench import memory
from retinanet.bench.measuring import Contest, Row
from retinanet.bench.step import StepCase, agree, our_step

PEER = "ours with gradient checkpointing"
CASES = [StepCase("resnet18", batch_size=4), StepCase("resnet50", batch_size=4)]


def contests(chosen: list[StepCase], *, device: torch.device = CPU) -> Iterator[Contest]:
    """The time of a step: where the ratio is above 1, checkpointing costs as much more."""
    for case in chosen:
        ours, peer = our_step(case, device), our_step(case, device, checkpoint_gradients=True)
        yield Contest("checkpointing", str(case), ours, {PEER: peer}, {PEER: agree(ours, peer, str)})


def memory_rows(chosen: list[StepCase]) -> Iterator[Row]:
    """The peak memory of two steps: where the ratio is below 1, checkpointing leaves as much."""
    return memory.rows("checkpointing", chosen, PEER, memory.checkpointed)
