"""`retinanet bench`: ours beside the peers, same inputs, same process, equality checked first."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

Item = Literal[
    "loss", "matching", "nms", "postprocess", "convolution", "step", "checkpointing", "data", "import"
]
ALL: tuple[Item, ...] = get_args(Item)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time our operations and the peers' in turns, on the same inputs, after comparing their outputs."""

    items: Annotated[tuple[Item, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ITEM")] = ()
    """loss, matching, nms, postprocess, convolution, step, checkpointing, data, import; without any, all of them."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:N; import runs where a model is loaded by default, data on one core, checkpointing on a
    CPU."""
    repeats: int = 10
    """Turns; each contestant runs once a turn."""
    seconds: float = 60.0
    """A case ends after this long, but not before three turns."""
    backbone: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """step: resnet18 or resnet50 alone, by default both."""
    batch_size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """step: this batch size alone, by default 2 and 8."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """step: ours; on a CPU torchvision computes in fp32, on CUDA in the same."""
    profile: bool = False
    """step: print where our time goes, and the share of what the device can compute, instead of timing peers."""
    json: bool = False
    """Print JSON: one object a row."""

    def run(self) -> int:
        from rich.console import Console
        from rich.table import Table

        from retinanet.bench.items import Settings, run
        from retinanet.bench.measuring import machine, table
        from retinanet.bench.step import cases, profile
        from retinanet.devices import choose_device
        from retinanet.errors import ConfigError

        device = choose_device(self.device)
        chosen = tuple(
            case
            for case in cases(self.precision)
            if self.backbone in (None, case.backbone) and self.batch_size in (None, case.batch_size)
        )
        if not chosen:
            raise ConfigError(
                "bench step has resnet18 and resnet50 with batches of 2 and 8; "
                f"got --backbone {self.backbone} --batch-size {self.batch_size}"
            )
        if self.profile and (self.json or self.items not in ((), ("step",))):
            raise ConfigError("--profile prints the parts of bench step; leave out --json and other items")
        if self.repeats < 1:
            raise ConfigError(f"--repeats needs at least 1; got {self.repeats}")
        if self.profile:
            for case in chosen:
                print(profile(case, device=device), flush=True)
            return 0
        facts = machine(device)
        console = Console(file=sys.stderr if self.json else sys.stdout)
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        console.print(
            f"{facts['processor']} ({facts['instructions']}), {facts['device']}, {facts['threads']} threads, "
            f"load {facts['load']}; {versions}",
            soft_wrap=True,
            highlight=False,
        )
        if (facts["load"] or 0) > 0.5 * facts["threads"]:
            console.print("the machine is busy: times will be longer than they are, and ratios uncertain")
        rows = []
        settings = Settings(self.repeats, self.seconds, self.precision, chosen, device)
        for row in run(self.items or ALL, settings):
            rows.append(row)
            if self.json:
                print(json.dumps(row.to_json()), flush=True)
            else:
                console.print(" · ".join(table([row])[0]), soft_wrap=True, highlight=False)
        if not self.json:
            shown = Table("item", "case", "against", "ours", "theirs", "ratio", "equal", box=None)
            for line in table(rows):
                shown.add_row(*line)
            console.print(shown)
        return 1 if any(row.equal is False for row in rows) else 0
