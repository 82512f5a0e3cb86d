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

from retinanet.errors import ConfigError
from retinanet.training.configuration import TrainingOptions, write_config
from retinanet.version import __version__

RUNS = Path("runs")
VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "faster-coco-eval")


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of one run; see DESIGN in docs/architecture.md for the layout."""

    path: Path

    @classmethod
    def create(cls, output: str | None, options: TrainingOptions) -> RunFolder:
        """Make a new folder with configuration, command and environment, before anything slow starts.

        An existing run is never overwritten.
        """
        path = Path(output) if output else _next_free(RUNS)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"--output needs a new folder; {path} exists and is not empty. Choose another name"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_config(path / "config.yaml", options)
            (path / "command.txt").write_text(shlex.join(sys.argv) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written: {error}") from None
        environment = {
            "retinanet": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            **{name: version(name) for name in VERSIONS},
        }
        folder = cls(path)
        folder.write_json("environment.json", environment)
        return folder

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def last(self) -> Path:
        return self.path / "last"

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file whole or not at all."""
        beside = self.path / f".{name}.{os.getpid()}"
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.path / name)

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


def _next_free(parent: Path) -> Path:
    number = 1
    while (parent / f"train-{number}").exists():
        number += 1
    return parent / f"train-{number}"
