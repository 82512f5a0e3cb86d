"""`retinanet doctor`: what is installed here, and what of it is known to be bad."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from retinanet.training.hints import Flag

REQUIRED = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "numba",
    "pillow",
    "safetensors",
    "faster-coco-eval",
    "tyro",
)
EXTRAS = {"supervision": "supervision", "tensorboard": "tensorboard"}
# Below these, files from strangers can harm: CVE-2025-32434 and CVE-2026-24747.
LEAST_TORCH = (2, 10)


@dataclass(frozen=True)
class Doctor:
    """Print versions, devices, missing extras and known-bad versions. Exit 1 if something should be mended."""

    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        import torch

        from retinanet.devices import choose_device, resolve_precision
        from retinanet.processes import available_cores
        from retinanet.version import __version__

        problems = []
        versions: dict[str, str | None] = {"retinanet": __version__, "python": platform.python_version()}
        for package in (*REQUIRED, *EXTRAS):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = None
                if package in REQUIRED:
                    problems.append(f"{package} is missing; run: pip install -U retinanet")
        if tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < LEAST_TORCH:
            problems.append(
                f"torch {torch.__version__} has known loading vulnerabilities; run: pip install -U torch"
            )
        device = choose_device("auto")
        facts = {
            "platform": platform.platform(),
            "cores": len(available_cores()),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "precision": resolve_precision(device, "auto"),
            "threads": torch.get_num_threads(),
        }
        if self.json:
            print(json.dumps({"versions": versions, "machine": facts, "problems": problems}, indent=2))
            return 1 if problems else 0
        for name, shown in {**versions, **facts}.items():
            missing = f"not installed; for it: pip install 'retinanet[{EXTRAS.get(name, 'all')}]'"
            print(f"{name:<18} {missing if shown is None else shown}")
        print("\n".join(f"problem: {problem}" for problem in problems) or "no problems found")
        return 1 if problems else 0
