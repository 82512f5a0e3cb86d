"""`retinanet paper`: every table and figure of the paper, published values beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make tables, figures and explanations of the paper: `paper list` names them."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ITEM")] = ()
    """list, or what to make: iou, giou, fig1, fig3 ..."""
    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "runs/paper"
    """Where ITEM.md, ITEM.html, ITEM.json and pictures go; an item made before is made again."""

    def run(self) -> int:
        from pathlib import Path

        from retinanet.errors import ConfigError, did_you_mean
        from retinanet.paper.items import ITEMS
        from retinanet.paper.page import write_page

        for name in self.items:
            if name not in (*ITEMS, "list"):
                raise ConfigError(
                    f"paper has no item {name!r}.{did_you_mean(name, ITEMS)} `retinanet paper list` names all"
                )
        if self.items in ((), ("list",)):
            width = max(map(len, ITEMS))
            for name, item in ITEMS.items():
                print(f"{name:<{width}}  {item.what}")
            return 0
        if "list" in self.items:
            raise ConfigError("`retinanet paper list` stands alone; got other items as well")
        for name in dict.fromkeys(self.items):
            page, *rest = write_page(ITEMS[name].make(), Path(self.output))
            pictures = [file.name for file in rest if file.suffix == ".png"]
            print(f"{name}: {page} ({', '.join(['.html', '.json', *pictures])})", flush=True)
        return 0
