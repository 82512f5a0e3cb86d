"""One step of training, as the run takes it, its trial measures it and `retinanet bench step` times it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from retinanet import kernels
from retinanet.batches import Batch, RawPredictions
from retinanet.devices import Precision, autocast
from retinanet.model import RetinaNet
from retinanet.objective import Losses, Objective
from retinanet.training.checkpointing import GradientCheckpoints
from retinanet.training.optimizer import WeightAverage, build_optimizers, set_rate
from retinanet.training.planning import Plan


class TrainingStep:
    """Forward, losses, backward, clipping, optimiser, average. Nothing in it asks a CUDA device for a value.

    Args:
        network: moved to the device, in channels_last: the heads' outputs then lie as the losses read them.
        average_decay: keeps a moving average of the weights (`average`); None keeps none.
        clip_norm: longest gradient; None does not clip.
        compile: run the network through `torch.compile`. Each of the first image sizes
            compiles anew; then torch has a graph for all.
        checkpoint_gradients: compute activations again in the backward pass; not together with `compile`.
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
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.objective = objective
        self.clip_norm = clip_norm
        self.device = device
        self.precision: Precision = precision
        self.average = WeightAverage(copy.deepcopy(network), average_decay) if average_decay else None
        self.optimizers = build_optimizers(
            network,
            outputs=network.outputs,
            name=optimizer,
            lr=0.0,
            weight_decay=weight_decay,
            decay_all=decay_all,
        )
        self.activations: AbstractContextManager[None] = (
            GradientCheckpoints(network) if checkpoint_gradients else nullcontext()
        )
        self.forward: Callable[[torch.Tensor], RawPredictions] = network
        if compile:
            # Known before it is traced: what is found out later makes torch compile again.
            kernels.available(device.type)
            self.forward = torch.compile(network)

    @classmethod
    def of(cls, plan: Plan, network: RetinaNet) -> TrainingStep:
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
        )

    @property
    def shipped(self) -> RetinaNet:
        """The network that is validated and saved: the average where there is one."""
        return self.average.model if self.average else self.network

    def __call__(self, batch: Batch, lr: float) -> Losses:
        """Train on a batch; return its losses, whose values are on the device."""
        self.network.train()
        images = batch.images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with autocast(self.device, self.precision), self.activations:
            predictions = self.forward(images)
        losses = self.objective(
            predictions, batch.targets.to(self.device), height=images.shape[2], width=images.shape[3]
        )
        del predictions  # the losses keep the gradients of the logits, and the way back needs no others
        losses.total.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm, foreach=True)
        set_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.network)
        return losses
