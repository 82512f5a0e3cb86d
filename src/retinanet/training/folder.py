"""The run folder: what a run leaves behind, written while it runs."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retinanet.folders import new_folder, write_json, write_text
from retinanet.training.configuration import TrainingOptions, write_config
from retinanet.version import __version__

VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "faster-coco-eval")


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of one run; docs/architecture.md shows the layout."""

    path: Path

    @classmethod
    def create(cls, output: str | None, options: TrainingOptions) -> RunFolder:
        """Make a new folder with configuration, command and environment, before anything slow starts.

        An existing run is never overwritten.
        """
        path = new_folder(output, "train")
        write_config(path / "config.yaml", options)
        write_text(path / "command.txt", shlex.join(sys.argv) + "\n")
        environment = {
            "retinanet": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            **{name: version(name) for name in VERSIONS},
        }
        write_json(path / "environment.json", environment)
        return cls(path)

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def last(self) -> Path:
        return self.path / "last"

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
