"""The backbone: any timm network with features at strides 8, 16 and 32."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from safetensors.torch import load_file
from timm.layers.norm import GroupNorm
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn

from retinanet.errors import CheckpointError, ConfigError, did_you_mean
from retinanet.model.convolution import with_fast_convolutions
from retinanet.model.spec import BackboneSpec

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """Wrap a timm feature network: images -> (C3, C4, C5).

    Args:
        network: returns the features at strides 8, 16 and 32.
        channels: widths of C3, C4 and C5.
        stages: what can be frozen, in running order: "stem" (up to stride 2), "stage1" (stride 4) to
            "stage4" (stride 32), each with the names of its submodules. A network without a feature at
            stride 2 has no "stem" of its own.
    """

    def __init__(
        self, *, network: nn.Module, channels: tuple[int, ...], stages: dict[str, list[str]]
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.stages = stages
        self._frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images))

    def freeze(self, through: str) -> None:
        """Freeze every stage up to and including `through`; "none" freezes nothing, "backbone" everything.

        Frozen means that nothing changes: no gradient, and `train()` leaves these parts in evaluation mode,
        so that running statistics stay.
        """
        names = list(self.stages)
        if through not in ("none", "backbone", *names):
            raise ConfigError(f"--freeze needs one of none, {', '.join(names)}, backbone; got {through!r}")
        last = {"none": -1, "backbone": len(names) - 1}.get(through)
        last = names.index(through) if last is None else last
        self._frozen = [
            self.network.get_submodule(part) for name in names[: last + 1] for part in self.stages[name]
        ]
        for part in self._frozen:
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


def require_backbone(name: str) -> None:
    """Raise `ConfigError` where timm has no model of a name."""
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ConfigError(f"--backbone needs the name of a timm model, such as resnet50; got {name!r}.{near}")


def build_backbone(spec: BackboneSpec, strides: Sequence[int] = STRIDES) -> Backbone:
    """Build the timm network of a spec, without loading weights; RetinaNet takes its maps at strides 8, 16 and 32."""
    require_backbone(spec.name)
    indices = _indices_of_strides(spec.name, strides)
    options: dict[str, Any] = {"norm_layer": GroupNorm} if spec.norm == "group" else {}
    try:
        network: Any = timm.create_model(spec.name, features_only=True, out_indices=indices, **options)
    except (AssertionError, TypeError, ValueError):
        raise ConfigError(
            f"BackboneSpec.norm 'group' needs a network that timm builds with any norm, such as resnet50; "
            f"{spec.name!r} is none: use norm 'native'"
        ) from None
    channels, stages = tuple(network.feature_info.channels()), _stages(network, spec.name)
    if spec.stride_in_1x1:
        _move_stride(network, spec.name)
    if spec.norm == "frozen":
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            raise ConfigError(
                f"BackboneSpec.norm 'frozen' needs a network with BatchNorm; {spec.name!r} has none: use 'native'"
            )
        network = cast(nn.Module, freeze_batch_norm_2d(network))
    if spec.norm_eps is not None:
        for module in network.modules():
            if hasattr(module, "eps"):
                module.eps = spec.norm_eps
    return Backbone(network=with_fast_convolutions(network), channels=channels, stages=stages)


def fitting_norm(
    name: str, wanted: Literal["native", "frozen", "group"]
) -> Literal["native", "frozen", "group"]:
    """Return the wanted norm if timm can build the network with it, else "native"."""
    if wanted == "native" or not timm.is_model(name):
        return wanted
    try:
        with torch.device("meta"):
            build_backbone(BackboneSpec(name, norm=wanted))
    except ConfigError:
        return "native"
    return wanted


def _indices_of_strides(name: str, strides: Sequence[int]) -> tuple[int, ...]:
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, features_only=True)
        if getattr(network, "output_fmt", "NCHW") != "NCHW":  # Swin: channels last, and one image size only
            raise ValueError
        reductions = network.feature_info.reduction()
        return tuple(max(i for i, r in enumerate(reductions) if r == stride) for stride in strides)
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):
        raise ConfigError(
            f"--backbone needs feature maps at strides {', '.join(map(str, strides[:-1]))} and {strides[-1]}; timm's "
            f"{name!r} does not give them. "
            "Use a convolutional network such as resnet50, convnext_tiny or mobilenetv3_large_100"
        ) from None


def _stages(network: Any, name: str) -> dict[str, list[str]]:
    """Cut the network's parts, in running order, behind each feature map."""
    parts = [
        f"{outer}.{inner}" if outer == "blocks" else outer
        for outer, child in network.named_children()
        for inner in (dict(child.named_children()) if outer == "blocks" else [""])
    ]
    stages: dict[str, list[str]] = {}
    begin = 0
    for feature in network.feature_info.info:
        ends = [i + 1 for i, part in enumerate(parts) if feature["module"] in (part, part.replace("_", "."))]
        if not ends:
            raise ConfigError(
                f"--backbone needs a network whose stages can be told apart; {feature['module']!r} of timm's {name!r} "
                "is none of its parts. Use resnet50, convnext_tiny or mobilenetv3_large_100 for instance"
            )
        end = ends[0]
        level = int(math.log2(feature["reduction"])) - 1
        stages.setdefault(f"stage{level}" if level else "stem", []).extend(parts[begin:end])
        begin = end
    return stages


def _move_stride(network: nn.Module, name: str) -> None:
    bottlenecks = [
        module for module in network.modules() if isinstance(module, timm.models.resnet.Bottleneck)
    ]
    if not bottlenecks:
        raise ConfigError(
            f"BackboneSpec.stride_in_1x1 needs a network of bottlenecks, such as resnet50; got {name!r}"
        )
    for block in bottlenecks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def load_backbone(backbone: Backbone, path: Path) -> None:
    """Load weights of the same timm network: .safetensors, or .pth read without executing anything.

    The file may hold more (its classifier); a missing tensor or another shape is an error that names it.
    """
    state = _read_tensors(path)
    # timm flattens "stages.0.x" of the full network to "stages_0.x" in a feature network.
    flat = {re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", name): tensor for name, tensor in state.items()}
    wanted = backbone.network.state_dict()
    if any("running_mean" in name for name in state) and not any("running_mean" in name for name in wanted):
        raise CheckpointError(
            f"--pretrained {path} was trained with BatchNorm, the backbone has none: use norm 'native' or 'frozen'"
        )
    found = {}
    for name, tensor in wanted.items():
        source = state.get(name, flat.get(name))
        if source is None and not name.endswith("num_batches_tracked"):
            raise CheckpointError(f"--pretrained needs weights of this backbone; {path} lacks {name!r}")
        if source is not None and source.shape != tensor.shape:
            raise CheckpointError(
                f"--pretrained needs weights of this backbone; in {path} {name!r} has shape {list(source.shape)}, "
                f"required is {list(tensor.shape)}"
            )
        found[name] = tensor if source is None else source
    backbone.network.load_state_dict(found)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except Exception as error:  # what a damaged or foreign file raises is anyone's guess, IndexError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"--pretrained needs a weights file that can be read; {path}: {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"--pretrained needs a file with named tensors only; {path} holds something else"
        )
    return state
