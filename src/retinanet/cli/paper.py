"""`retinanet paper`: every table and figure of the paper, published values beside measured ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from retinanet.paper.page import Page
    from retinanet.paper.results import Request


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
    """Tables: tiny (a CPU, minutes a run), small (one GPU, hours a table), paper (COCO, the exact schedule, a row a
    GPU)."""
    data: Annotated[
        str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: synthetic shapes)")
    ] = None
    """Tables: what to train on; fig4: whose val split is looked at."""
    model: Annotated[
        str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: table1b's with gamma 2)")
    ] = None
    """fig4: a run or model file of your own."""
    steps: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the scale's)")] = None
    """Tables: steps of every run; results of another length are others, and need an --output of their own."""
    sgd: bool = False
    """Tables at scales tiny and small: the paper's SGD in the place of Muon; its results are others, too."""
    seeds: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 3)")] = None
    """Tables: runs of every row at its best rate."""
    peers: bool = False
    """table2, fig2: train torchvision's Faster R-CNN, SSD and FCOS beside ours, for as long."""
    own_loss: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = (
        None
    )
    """Tables: a Python file with your own `loss(logits, targets, weight)`, which becomes a row of each."""
    rows: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: all)")] = None
    """Tables: names of rows, or parts of names, with semicolons between them."""
    parallel: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint="(default: one a GPU, else one a core)")
    ] = None
    """Tables: runs at a time."""
    pretrained: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: auto)")] = (
        None
    )
    """Tables at scale paper: as of train, or a folder of BACKBONE.safetensors; other scales start from scratch."""
    dry_run: bool = False
    """Tables: print the rows that would be trained, and the plan of the first where its images are there, and stop."""

    def run(self) -> int:
        from retinanet.errors import ConfigError, did_you_mean
        from retinanet.paper.items import ITEMS, OF_RESULTS
        from retinanet.paper.measuring import dry_run, prepare
        from retinanet.paper.tables import STUDIES

        known = {name: item.what for name, item in ITEMS.items()}
        known |= {name: item.what for name, item in OF_RESULTS.items()}
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
        asked = dict.fromkeys(self.items)
        studies = [name for name in asked if name in STUDIES]
        of_results = [name for name in asked if name in OF_RESULTS]
        if self.peers and "fig2" in asked and "table2" not in asked:
            studies.append("table2")  # whose rows the peers are
        self._refuse_what_does_not_belong(asked, measured=bool(studies), of_results=bool(of_results))
        request = self._request(studies) if studies or of_results else None
        if not self.dry_run:
            for name in asked:
                if name in ITEMS:
                    self._write(ITEMS[name].make())
        if request is None:
            return 0
        if self.dry_run:
            dry_run(studies, request)
            return 0
        if (
            studies or self.model is None or of_results != ["fig4"]
        ):  # a model of one's own needs its val split alone
            request = prepare(request, say, draw=bool(studies))
        code = self._measure(studies, request) if studies else 0
        for name in of_results:
            self._write(OF_RESULTS[name].make(request))
        return code

    def _write(self, page: Page) -> None:
        from retinanet.paper.page import write_page

        markdown, *rest = write_page(page, Path(self.output))
        pictures = [file.name for file in rest if file.suffix == ".png"]
        print(f"{page.name}: {markdown} ({', '.join(['.html', '.json', *pictures])})", flush=True)

    def _refuse_what_does_not_belong(
        self, asked: Collection[str], *, measured: bool, of_results: bool
    ) -> None:
        from retinanet.errors import ConfigError
        from retinanet.training.hints import option

        if self.model is not None and "fig4" not in asked:
            raise ConfigError("--model belongs to fig4")
        if self.peers and not {"table2", "fig2"} & set(asked):
            raise ConfigError("--peers belongs to table2 and fig2")
        if self.model is not None and self.data is None:
            raise ConfigError(
                "--model needs --data, whose val split the model is looked at with; none was given"
            )
        of_tables = ["rows", "parallel", "pretrained", "own_loss"]
        if not of_results:
            of_tables += ["scale", "data", "steps", "seeds"]
        given = [name for name in of_tables if getattr(self, name) is not None]
        given += ["dry_run"] * self.dry_run + ["sgd"] * (self.sgd and not of_results)
        if given and not measured:
            raise ConfigError(f"{option(given[0])} belongs to items that are measured, such as table1b")

    def _request(self, studies: Sequence[str]) -> Request:
        import torch

        from retinanet.errors import ConfigError
        from retinanet.paper.measuring import check_rows
        from retinanet.paper.own_loss import load_own_loss, name_of_own_loss
        from retinanet.paper.results import Request
        from retinanet.paper.settings import SCALES
        from retinanet.processes import available_cores

        for name in ("steps", "seeds", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} needs 1 or more; got {value}")
        scale = SCALES[self.scale or "tiny"]
        if self.steps is not None:
            scale = replace(scale, steps=self.steps)
        if self.sgd and scale.options["recipe"] == "paper":
            raise ConfigError(f"--sgd belongs to scales tiny and small; {scale.name} trains by it anyway")
        scale = replace(scale, sgd=self.sgd)
        if self.pretrained is not None and scale.options["recipe"] == "small":
            raise ConfigError(f"--pretrained belongs to --scale paper; {scale.name} starts from scratch")
        own_loss = None
        if self.own_loss is not None:
            file = Path(self.own_loss).resolve()
            load_own_loss(file)
            own_loss = (str(file), name_of_own_loss(file))
        rows = tuple(part.strip() for part in (self.rows or "").split(";") if part.strip())
        if self.data is None and scale.shapes is None:
            raise ConfigError(
                f"--scale {scale.name} needs --data: a folder with COCO's annotations/instances_train2017.json, "
                "instances_val2017.json and images"
            )
        request = Request(
            scale=scale,
            data=Path(self.data) if self.data else None,
            output=Path(self.output),
            seeds=self.seeds or 3,
            rows=rows,
            parallel=self.parallel or torch.cuda.device_count() or len(available_cores()),
            pretrained=self.pretrained or "auto",
            model=self.model,
            peers=self.peers,
            own_loss=own_loss,
        )
        check_rows(studies, request)
        return request

    def _measure(self, studies: Sequence[str], request: Request) -> int:
        from retinanet.paper.measuring import measure

        failures = measure(studies, request, say)
        for name in studies:
            made = [
                kind for kind in (".html", ".json", ".png") if (request.output / f"{name}{kind}").exists()
            ]
            say(f"{name}: {request.output / name}.md ({', '.join(made)})")
        for failure in failures:
            say(f"failed: {failure}")
        return 1 if failures else 0


def say(line: str) -> None:
    print(line, flush=True)
