"""One step of training, as the run takes it, its trial measures it and `retinanet bench step` times it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet import kernels
from retinanet.batches import Batch, RawPredictions
from retinanet.data.sampling import share_of
from retinanet.devices import Precision, autocast
from retinanet.errors import TrainingError
from retinanet.model import RetinaNet
from retinanet.objective import Objective
from retinanet.processes import ALONE, Processes
from retinanet.training.checkpointing import GradientCheckpoints
from retinanet.training.gradients import GradientSum
from retinanet.training.memory import keep_freed, return_large_blocks
from retinanet.training.optimizer import WeightAverage, build_optimizers, set_rate
from retinanet.training.plan import Plan

# Running statistics, each with what it was.
Statistics: TypeAlias = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stepped:
    """What a step found, on the device: the losses of all its images, those of other processes included; how many
    anchors were positive; whether all numbers were finite, without which the weights stay as they were.
    """

    total: Tensor
    classes: Tensor
    boxes: Tensor
    positives: Tensor
    finite: Tensor


class TrainingStep:
    """Forward, losses, backward, clipping, optimiser, average. Nothing in it asks a CUDA device for a value.

    A step whose loss or gradient is not finite, in any process, changes nothing in any: neither weights nor running
    statistics nor what the optimiser remembers nor the average. The next one goes on as if it had not been.

    Args:
        network: moved to the device, in channels_last: the heads' outputs then lie as the losses read them.
        average_decay: keeps a moving average of the weights (`average`); None keeps none.
        clip_norm: longest gradient; None does not clip.
        compile: run the network through `torch.compile`. Each of the first image sizes
            compiles anew; then torch has a graph for all.
        checkpoint_gradients: compute activations again in the backward pass; not together with `compile`.
        parts: in how many parts this process's images pass through the network, one after the other, for less memory.
            The gradient is that of all of them together, but for rounding and for the statistics of a BatchNorm that
            trains. Too little memory on a CUDA device doubles it, and the step begins anew.
        images: a step's, of all processes together; by default those of this one.
        processes: that take the step together.
        told: is given one line when `parts` doubles.
    """

    def __init__(
        self,
        network: RetinaNet,
        objective: Objective,
        *,
        optimizer: Literal["sgd", "adamw", "muon"],
        weight_decay: float,
        decay_all: bool = False,
        average_decay: float | None = None,
        clip_norm: float | None = None,
        device: torch.device,
        precision: Precision = "fp32",
        compile: bool = False,
        checkpoint_gradients: bool = False,
        parts: int = 1,
        images: int | None = None,
        processes: Processes = ALONE,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.objective = objective
        self.clip_norm = clip_norm
        self.device = device
        self.precision: Precision = precision
        for tensor in network.state_dict().values():
            processes.copy_of_main(tensor)
        self.parts = parts
        self.images = images
        self.processes = processes
        self.told = told
        self.average = WeightAverage(copy.deepcopy(network), average_decay) if average_decay else None
        self.optimizers = build_optimizers(
            network,
            outputs=network.outputs,
            name=optimizer,
            lr=0.0,
            weight_decay=weight_decay,
            decay_all=decay_all,
        )
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.gradients = GradientSum(self.trained, processes)
        # A CPU's values are at hand. A CUDA device's are not, and what depends on them has to be decided there.
        self.decides_on_device = device.type != "cpu"
        self.activations: AbstractContextManager[None] = nullcontext()
        if checkpoint_gradients:
            self.activations = GradientCheckpoints(network)
        if device.type == "cpu" and checkpoint_gradients:
            return_large_blocks()  # else a CPU's memory hardly shows what is not kept
        elif device.type == "cpu":
            keep_freed()
        self.forward: Callable[[Tensor], RawPredictions] = network
        if compile:
            # Known before it is traced: what is found out later makes torch compile again.
            kernels.available(device.type)
            self.forward = torch.compile(network)

    @classmethod
    def of(
        cls,
        plan: Plan,
        network: RetinaNet,
        processes: Processes = ALONE,
        told: Callable[[str], None] | None = None,
    ) -> TrainingStep:
        """Return the step of a plan."""
        recipe = plan.recipe
        return cls(
            network,
            plan.objective,
            optimizer=recipe.optimizer,
            weight_decay=recipe.weight_decay,
            decay_all=recipe.decay_all,
            average_decay=recipe.average_decay,
            clip_norm=recipe.clip_norm,
            device=plan.device,
            precision=plan.options.precision,
            compile=plan.options.compile,
            checkpoint_gradients=plan.options.checkpoint_gradients,
            parts=plan.options.accumulate,
            images=plan.batch_size,
            processes=processes,
            told=told,
        )

    @property
    def shipped(self) -> RetinaNet:
        """The network that is validated and saved: the average where there is one."""
        return self.average.model if self.average else self.network

    def __call__(self, batch: Batch, lr: float) -> Stepped:
        """Train on this process's share of a batch."""
        self.network.train()
        before = self._statistics()
        losses = self._all_parts(batch, before)
        self.gradients.finish()
        losses = self.processes.add(losses)
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.trained, self.clip_norm, foreach=True)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None], foreach=True)
        finite = torch.isfinite(losses[0]) & torch.isfinite(norm)
        for buffer, old in before:
            buffer.copy_(torch.where(finite, buffer, old))
        set_rate(self.optimizers, lr)
        try:
            self._update(finite)
        except torch.cuda.OutOfMemoryError:
            raise TrainingError(
                f"no memory left on {self.device} for the optimiser's step; start anew with --optimizer sgd, which "
                "keeps least, or with a smaller --backbone"
            ) from None
        if self.average:
            self.average.update(self.network, finite)
        total, classes, boxes, positives = losses
        return Stepped(total, classes, boxes, positives, finite)

    def _all_parts(self, batch: Batch, before: Statistics) -> Tensor:
        """Pass a batch through the network and back, for lack of memory in more parts; return the losses.

        Each attempt begins where the first one did: running statistics, random numbers and gradients are put back, but
        for gradients that other processes have in their sums already.
        """
        draw_again = _random_numbers(self.device)
        positives: Tensor | None = None
        total: Tensor | None = None
        while True:
            try:
                shares = None
                if self.processes.several or min(self.parts, len(batch.images)) > 1:
                    if positives is None or total is None:  # once: all add to it
                        positives = self._positives(batch)
                        total = self.processes.add(positives.sum())
                    # What the sums of each image here are multiplied by, so that those of the step add up to its loss.
                    shares = self.objective.shares(
                        positives, total=total, images=self.images or len(positives)
                    )
                return self._there_and_back(batch, shares)
            except torch.cuda.OutOfMemoryError:
                self._take_more_parts(len(batch.images))
            # Out of the handler: the error keeps the graph, and with it the memory.
            self.gradients.forget()
            for parameter in self.trained:
                parameter.grad = None
            for buffer, old in before:
                buffer.copy_(old)
            draw_again()
            torch.cuda.empty_cache()
            if self.told:
                self.told(
                    f"no memory left on {self.device}: from now on its images of a step pass in {self.parts} parts, "
                    f"as with --accumulate {self.parts}; the result stays the same"
                )

    def _take_more_parts(self, images: int) -> None:
        """Take twice as many parts.

        Raises:
            TrainingError: a part is one image already.
        """
        parts = min(self.parts, images)
        if parts == images:
            raise TrainingError(f"no memory left on {self.device} for one image; {self._advice()}") from None
        self.parts = min(2 * parts, images)

    def _advice(self) -> str:
        if self.forward is self.network and isinstance(self.activations, nullcontext):
            return "go on with --resume RUN --checkpoint-gradients, or start anew with a smaller --image-size"
        return "start anew with a smaller --image-size"

    def _there_and_back(self, batch: Batch, shares: Tensor | None) -> Tensor:
        images = batch.images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        targets = batch.targets.to(self.device)
        height, width = images.shape[2:]
        parts = min(self.parts, len(images))
        found = []
        for part in range(parts):
            of_part = share_of(len(images), part, parts)
            rows = slice(of_part.start, of_part.stop)
            with autocast(self.device, self.precision), self.activations:
                predictions = self.forward(images[rows])
            losses = self.objective(
                predictions,
                targets[rows],
                height=height,
                width=width,
                shares=None if shares is None else shares[rows],
            )
            del predictions  # the losses keep the gradients of the logits, and the way back needs no others
            self.gradients.begin(last=part == parts - 1)
            losses.total.backward()
            found.append(
                torch.stack([losses.total, losses.classes, losses.boxes, losses.positives.float()]).detach()
            )
        return torch.stack(found).sum(dim=0)

    def _positives(self, batch: Batch) -> Tensor:
        """Return how many anchors of each image here are positive."""
        height, width = batch.images.shape[2:]
        return self.objective.positives(batch.targets.to(self.device), height=height, width=width)

    def share_statistics(self) -> None:
        """Give all processes the main one's running statistics, which each gathers from its own images."""
        for network in (self.network, *([self.average.model] if self.average else [])):
            for norm in network.modules():
                if isinstance(norm, _BatchNorm):
                    for buffer in norm.buffers():
                        self.processes.copy_of_main(buffer)

    def _statistics(self) -> Statistics:
        """Return the running statistics that a forward pass is going to change, each with a copy."""
        norms = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        return [(buffer, buffer.clone()) for norm in norms if norm.training for buffer in norm.buffers()]

    def _update(self, finite: Tensor) -> None:
        """Take the optimisers' steps where all is finite."""
        takes = self.decides_on_device or bool(finite)
        for optimizer in self.optimizers:
            if self.decides_on_device:
                # Torch's fused optimisers, and our Muon, leave everything as it is where this is not 0.
                optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            if takes:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _random_numbers(device: torch.device) -> Callable[[], None]:
    """Return what makes torch draw again what it draws from now on."""
    host = torch.get_rng_state()
    there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def draw_again() -> None:
        torch.set_rng_state(host)
        if there is not None:
            torch.cuda.set_rng_state(there, device)

    return draw_again
