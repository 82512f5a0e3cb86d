"""Does going on from one's own model beat starting from scratch in the same time?

    python bench/fine_tuning.py DATA --time 5m --seeds 0 1 2

The training images are halved. The first half, with all classes but the last, gives a model; the second half, with all
classes but the first, is trained from scratch and from that model, `--time` each. Both are judged on the split val with
the second half's classes. So the last class is new, the first is dropped, what lies between is kept. Objects of a
class that a half does not have stay visible and unannotated, as in anyone's data. Every run keeps the best of its
validations on val, the first model's with other classes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from retinanet.data import Dataset, open_dataset, write_coco
from retinanet.records import Classes, GroundTruth

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--time", default="5m", help="of each training")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "fine-tuning", help="a new folder for all of it"
    )
    given = parser.parse_args()
    if given.runs.exists():
        parser.error(f"--runs needs a new folder; {given.runs} exists")
    halves = write_halves(given.data, given.runs)
    common = ["--time", given.time]
    rows = []
    for seed in given.seeds:
        started, scratch, tuned = (given.runs / f"{name}-{seed}" for name in ("first", "scratch", "tuned"))
        new = ["--backbone", given.backbone, *common]
        train(halves[0], started, [*new, "--seed", str(seed)])
        seconds = [
            train(halves[1], scratch, [*new, "--seed", str(seed)]),
            train(halves[1], tuned, ["--weights", str(started), *common, "--seed", str(seed)]),
        ]
        found = [json.loads((run / "metrics.json").read_text()) for run in (scratch, tuned)]
        rows.append([one["ap"] for one in found])
        print(
            f"seed {seed}: from scratch AP {found[0]['ap']:.3f}, AP50 {found[0]['ap50']:.3f} in "
            f"{seconds[0] / 60:.1f} min; from the model AP {found[1]['ap']:.3f}, AP50 {found[1]['ap50']:.3f} in "
            f"{seconds[1] / 60:.1f} min",
            flush=True,
        )
    scratch, tuned = (statistics.mean(column) for column in zip(*rows, strict=True))
    print(f"mean of {len(rows)}: from scratch {scratch:.3f}, from the model {tuned:.3f}")


def train(data: Path, output: Path, options: list[str]) -> float:
    """Train as a user does, in a process of its own; return the seconds it took."""
    command = [sys.executable, "-m", "retinanet", "train", str(data), "--output", str(output), *options]
    began = time.monotonic()
    with output.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return time.monotonic() - began


def write_halves(data: str, folder: Path) -> tuple[Path, Path]:
    """Write both halves as COCO data sets, each with the whole of val; return their folders."""
    sets = {split: open_dataset(data, split) for split in ("train", "val")}
    names = sets["train"].classes.names
    if len(names) < 3:
        sys.exit(
            f"{data} needs three classes: one to drop, one to keep, one that is new; it has {len(names)}"
        )
    halves = folder / "data-first", folder / "data-second"
    for number, (half, kept) in enumerate(zip(halves, (names[:-1], names[1:]), strict=True)):
        for split, dataset in sets.items():
            images = range(number, len(dataset), 2) if split == "train" else range(len(dataset))
            write_split(dataset, split, images, Classes(kept), half)
    return halves


def write_split(dataset: Dataset, split: str, images: range, classes: Classes, folder: Path) -> None:
    """Copy some images of a data set with the boxes of some of its classes."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    place = folder / split
    place.mkdir()
    index = np.array([classes.names.index(n) if n in classes.names else -1 for n in dataset.classes.names])
    files, truths = [], []
    for i in images:
        source = dataset.path(i)
        files.append(f"{split}/{i}{source.suffix}")
        shutil.copyfile(source, folder / files[-1])
        truth = dataset.ground_truth(i)
        stays = index[truth.classes] >= 0
        truths.append(
            GroundTruth(
                boxes=truth.boxes[stays],
                classes=index[truth.classes[stays]],
                ignore=truth.ignore[stays],
                areas=truth.areas[stays],
            )
        )
    write_coco(
        folder / "annotations" / f"instances_{split}.json",
        classes=classes,
        files=files,
        sizes=[dataset.size(i) for i in images],
        ground_truths=truths,
    )


if __name__ == "__main__":
    main()
