"""Which parts of a network are trained, and which stay as loaded."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from torch import nn

from retinanet.model import RetinaNet


def parts_of(network: RetinaNet) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the parts in running order: the backbone's stages, pyramid, class head, box head."""
    backbone = network.backbone
    for stage, names in backbone.stages.items():
        yield f"backbone, {stage}", [backbone.network.get_submodule(name) for name in names]
    yield "pyramid", [network.pyramid]
    yield "class head", [network.class_head]
    yield "box head", [network.box_head]


def table_of_parts(network: RetinaNet) -> Table:
    """Return the parameters of each part, and whether they are trained, for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("")
    for name, modules in parts_of(network):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        count = sum(parameter.numel() for parameter in parameters)
        trained = any(parameter.requires_grad for parameter in parameters)
        table.add_row(name, f"{count:,}", "trained" if trained else "frozen")
    return table


def trained_in_words(network: RetinaNet) -> str:
    """Return how many parameters there are, and how many of them are trained."""
    whole = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return f"{whole:,} parameters, {'all' if trained == whole else f'{trained:,}'} of them trained"
