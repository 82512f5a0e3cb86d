"""Gradient checkpointing (Chen et al., 2016, https://arxiv.org/abs/1604.06174): memory for time.

What a part of the network computes is let go after the forward pass and computed again, part by part, in the backward
pass. What is trained is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from timm.models._features import FeatureDictNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from retinanet.errors import ConfigError
from retinanet.model import RetinaNet


class GradientCheckpoints:
    """A context in which a network's forward pass keeps no more than the inputs of its parts for the backward pass.

    Parts are the blocks of the backbone, its stem where timm runs that layer by layer, the pyramid, and each head on
    each level. Frozen ones keep nothing anyway and are left alone. Outside the context the network is as before: who
    validates, copies or saves it sees nothing of this.

    Random numbers of a part (stochastic depth) are drawn again as they were; statistics of BatchNorm move once.

    Raises:
        ConfigError: when it runs; a part of the backbone changes its input, which therefore cannot be kept.
    """

    def __init__(self, network: RetinaNet) -> None:
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}
        timms = network.backbone.network
        for part in filter(
            _trained, (*_blocks(timms), network.pyramid, network.class_head, network.box_head)
        ):
            self.forwards[part] = partial(_recomputed, part.forward, _CopiedStatistics([part]))
        for layers in _stems(timms):
            whole = partial(_in_turn, [layer.forward for layer in layers])
            # The first layer does the work of all.
            self.forwards[layers[0]] = partial(_recomputed, whole, _CopiedStatistics(layers))
            self.forwards |= dict.fromkeys(layers[1:], _unchanged)

    def __enter__(self) -> None:
        for part, forward in self.forwards.items():
            part.forward = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self.forwards:
            del part.forward  # that of its class is seen again


class _CopiedStatistics:
    """A context in which the BatchNorms of some parts have copies of their running statistics, to move in vain."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        found = (module for part in parts for module in part.modules() if isinstance(module, _BatchNorm))
        self.norms = [module for module in found if module.track_running_stats]
        self.own: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.own = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.own, strict=True):
            norm._buffers.update({name: of.clone() for name, of in buffers.items() if of is not None})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for norm, buffers in zip(self.norms, self.own, strict=True):
            norm._buffers.update(buffers)


def _recomputed(forward: Callable[..., Any], statistics: _CopiedStatistics, *inputs: Any) -> Any:
    """Return what a part computes; its backward pass computes it again, from the same inputs."""
    versions = [of._version for of in inputs if isinstance(of, Tensor)]
    out = checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics))
    if versions != [of._version for of in inputs if isinstance(of, Tensor)] and torch.is_grad_enabled():
        raise ConfigError(
            "--checkpoint-gradients needs a backbone whose blocks leave their input as it is; this one writes into it. "
            "Use another --backbone, or leave --checkpoint-gradients out"
        )
    return out


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of stages: what is neither a single layer nor a mere sequence of others."""
    for child in network.children():
        # Timm's own stages have this attribute: within them it would make checkpoints itself, moving statistics twice.
        if type(child) in (nn.Sequential, nn.ModuleList) or hasattr(child, "grad_checkpointing"):
            yield from _blocks(child)
        elif not _single(child) and not _watched(child):
            yield child


def _stems(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield single layers that run one after the other and have weights to train: timm runs them by name, in order."""
    if not isinstance(network, FeatureDictNet):
        return
    layers: list[nn.Module] = []
    for name, child in network.items():  # the last one has a feature
        if _single(child) and (layers or not getattr(child, "inplace", False)):
            layers.append(child)
        if not _single(child) or name in network.return_layers:
            if any(map(_trained, layers)):
                yield layers
            layers = []


def _single(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _watched(module: nn.Module) -> bool:
    """Return whether somebody takes features out of its inside: they would be taken again, for the next batch."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _in_turn(forwards: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    for forward in forwards:
        images = forward(images)
    return images


def _unchanged(images: Tensor) -> Tensor:
    return images
