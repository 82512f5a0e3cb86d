"""`retinanet paper`: every table and figure of the paper, published values beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from retinanet.paper.measuring import Request

OPTIONAL = tyro.conf.arg(help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make tables, figures and explanations of the paper: `paper list` names them. Tables are measured by training
    every row; what is measured already is kept, so that a command that was stopped goes on when it is given again."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ITEM")] = ()
    """list, or what to make: fig1, table1b ..."""
    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "runs/paper"
    """Where ITEM.md, ITEM.html, ITEM.json and pictures go, and the results that tables are made of."""
    scale: Annotated[
        Literal["tiny", "small", "paper"] | None, tyro.conf.arg(help_behavior_hint="(default: tiny)")
    ] = None
    """Tables: tiny (a CPU, minutes a run), small (one GPU, hours a table), paper (COCO, 8 GPUs, the exact schedule)."""
    data: Annotated[
        str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: synthetic shapes)")
    ] = None
    """Tables: what to train on."""
    seeds: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 3)")] = None
    """Tables: runs of every row at its best rate."""
    rows: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: all)")] = None
    """Tables: names of rows, or parts of names, with commas."""
    parallel: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: one a GPU, else one a core)")
    ] = None
    """Tables: runs at a time."""
    pretrained: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: auto)")] = (
        None
    )
    """Tables: as of train; scales tiny and small start from scratch."""
    dry_run: bool = False
    """Tables: print the runs and the plan of the first, and stop."""

    def run(self) -> int:
        from retinanet.errors import ConfigError, did_you_mean
        from retinanet.paper.items import ITEMS
        from retinanet.paper.page import write_page
        from retinanet.paper.tables import STUDIES

        known = {name: item.what for name, item in ITEMS.items()}
        known |= {name: (study.__doc__ or "").rstrip(".") for name, study in STUDIES.items()}
        for name in self.items:
            if name not in (*known, "list"):
                raise ConfigError(
                    f"paper has no item {name!r}.{did_you_mean(name, known)} `retinanet paper list` names all"
                )
        if self.items in ((), ("list",)):
            width = max(map(len, known))
            for name, what in known.items():
                print(f"{name:<{width}}  {what}")
            return 0
        if "list" in self.items:
            raise ConfigError("`retinanet paper list` stands alone; got other items as well")
        studies = [name for name in dict.fromkeys(self.items) if name in STUDIES]
        if not studies:
            self._refuse_options_of_tables()
        request = self._request(studies) if studies else None
        for name in dict.fromkeys(self.items):
            if name in ITEMS and not self.dry_run:
                page, *rest = write_page(ITEMS[name].make(), Path(self.output))
                pictures = [file.name for file in rest if file.suffix == ".png"]
                print(f"{name}: {page} ({', '.join(['.html', '.json', *pictures])})", flush=True)
        return 0 if request is None else self._measure(studies, request)

    def _refuse_options_of_tables(self) -> None:
        from retinanet.errors import ConfigError
        from retinanet.training.configuration import option

        for name in ("scale", "data", "seeds", "rows", "parallel", "pretrained", "dry_run"):
            if getattr(self, name):
                raise ConfigError(f"{option(name)} belongs to items that are measured, such as table1b")

    def _request(self, studies: Sequence[str]) -> Request:
        import os

        import torch

        from retinanet.errors import ConfigError
        from retinanet.paper.measuring import Request, check_rows
        from retinanet.paper.settings import SCALES

        for name in ("seeds", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} needs 1 or more; got {value}")
        scale = SCALES[self.scale or "tiny"]
        rows = tuple(part.strip() for part in (self.rows or "").split(",") if part.strip())
        check_rows(studies, scale, rows)
        if self.data is None and scale.shapes is None:
            raise ConfigError(
                f"--scale {scale.name} needs --data: a folder with COCO's annotations/instances_train2017.json, "
                "instances_val2017.json and images"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Request(
            scale=scale,
            data=Path(self.data) if self.data else None,
            output=Path(self.output),
            seeds=self.seeds or 3,
            rows=rows,
            parallel=self.parallel or torch.cuda.device_count() or cores,
            pretrained=self.pretrained or "auto",
        )

    def _measure(self, studies: Sequence[str], request: Request) -> int:
        from retinanet.paper.measuring import dry_run, measure, prepare

        def say(line: str) -> None:
            print(line, flush=True)

        request = prepare(request, say)
        if self.dry_run:
            dry_run(studies, request)
            return 0
        failures = measure(studies, request, say)
        for name in studies:
            say(f"{name}: {request.output / name}.md (.html, .json, .png)")
        for failure in failures:
            say(f"failed: {failure}")
        return 1 if failures else 0
