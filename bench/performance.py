"""Measure everything that `retinanet bench` can and write docs/performance.md and its picture.

    python bench/performance.py            # all of it: an hour on two cores, which must be idle
    python bench/performance.py --items loss nms --keep rows.jsonl

With `--keep` rows go to a file as they come, and items that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from retinanet.bench import loss, matching, nms, postprocess
from retinanet.bench.items import Settings, run
from retinanet.bench.measuring import Contest, machine, shown
from retinanet.bench.step import cases

ITEMS = ("loss", "matching", "nms", "postprocess", "convolution", "data", "import", "step", "checkpointing")
IDLE_LOAD = 0.3
DOCS = Path(__file__).parent.parent / "docs"
# What each item is to reach at least (project goals), by a part of its case and its peer.
GOALS = {
    ("loss", "", "torchvision"): 80.0,
    ("loss", "", "torchvision compiled"): 3.0,
    ("matching", " 8 boxes", "torchvision"): 30.0,
    ("matching", " 50 boxes", "torchvision"): 45.0,
    ("matching", " 200 boxes", "torchvision"): 60.0,
    ("matching", " 1,000 boxes", "torchvision"): 60.0,
    ("nms", "1,000 boxes, 80", "torchvision"): 8.0,
    ("nms", "5,000 boxes, 80", "torchvision"): 5.0,
    ("postprocess", "trained-like", "torchvision"): 10.0,
    ("postprocess", "early training", "torchvision"): 3.0,
    ("data", "x 800", "Pillow and NumPy"): 2.0,
    ("step", "fp32, peak memory", "torchvision"): 1 / 0.7,
    ("step", "fp32", "torchvision"): 1.3,
    ("import", "", "torchvision"): 1.0,
}
TITLES = {
    "loss": "Class loss, forward and backward, from matches and labels to the gradient of the logits",
    "matching": "IoU and matching with low-quality matches",
    "nms": "Per-class NMS at 0.5",
    "postprocess": "Logits and deltas to detections",
    "convolution": "A 3x3 convolution, forward and backward; 64 channels and 8 x 8 are left to torch's",
    "data": "From JPEG files to a batch on one core: decode, flip, resize, normalise, pad",
    "import": "A fresh process from its start to the first boxes, caches warm",
    "step": "A training step: forward, losses, backward, SGD; the same compiled; and its peak memory",
    "checkpointing": "A training step with `train --checkpoint-gradients` beside one without",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", nargs="+", choices=ITEMS, default=ITEMS)
    parser.add_argument("--keep", type=Path, default=Path("performance.jsonl"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8], help="of the training step")
    given = parser.parse_args()
    known = [json.loads(line) for line in given.keep.read_text().splitlines()] if given.keep.exists() else []
    facts = next((line for line in known if "processor" in line), None)
    here = machine()
    if facts and (facts["processor"], facts["versions"]) != (here["processor"], here["versions"]):
        parser.error(
            f"{given.keep} was measured on another machine or with other versions; give another --keep"
        )
    if facts is None:
        facts = {**here, "first_calls_s": first_calls()}
        given.keep.write_text(json.dumps(facts) + "\n")
    rows = [line for line in known if "item" in line]
    steps = tuple(case for case in cases() if case.batch_size in given.batch_sizes)
    settings = Settings(given.repeats, given.seconds, steps=steps)
    with given.keep.open("a") as file:
        for item in given.items:
            if any(row["item"] == item for row in rows):
                continue
            print(item, flush=True)
            wait_until_idle()
            # All of an item's rows or none: an interrupted item is measured anew.
            of_item = [row.to_json() for row in run([item], settings)]
            rows += of_item
            file.write("".join(json.dumps(row) + "\n" for row in of_item))
            file.flush()
    lines = measure_growth()
    draw_growth(lines, DOCS / "images" / "scaling.png")
    (DOCS / "performance.md").write_text(page(rows, facts, lines))


def wait_until_idle(longest: float = 300.0) -> None:
    """Wait for the load of other jobs, and of what was measured before, to go down."""
    until = time.monotonic() + longest
    while os.getloadavg()[0] > IDLE_LOAD:
        if time.monotonic() > until:
            sys.exit(f"the load stays above {IDLE_LOAD}: nothing measured now would be true")
        time.sleep(5)


FIRST_CALLS = """
import time, torch
from retinanet.bench import loss, matching, nms, postprocess
from retinanet.model.convolution import Convolution3x3
began = time.perf_counter()
for item in (loss.contests(64, 3, 2, compiled=False), matching.contests(64, (2,)), nms.contests(64, (9,)),
             postprocess.contests(64, 3)):
    next(item)
convolution = Convolution3x3(96, 96, 3, padding=1)
convolution(torch.zeros(1, 96, 16, 16).to(memory_format=torch.channels_last).requires_grad_()).sum().backward()
print(time.perf_counter() - began)
"""


def first_calls() -> tuple[float, float]:
    """Return the seconds of the first call of every kernel without and with its machine code on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        cold, warm = (
            float(
                subprocess.run(
                    [sys.executable, "-c", FIRST_CALLS],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(2)
        )
    return cold, warm


def goal_of(row: dict[str, Any]) -> float | None:
    """Return the least ratio that the project asks for."""
    for (item, part, peer), least in GOALS.items():
        if item == row["item"] and part in row["case"] and peer == row["peer"]:
            return least
    return None


def with_least(row: dict[str, Any], side: str, unit: str) -> str:
    """Return a median, the least value in brackets where one was kept, and images a second where they are counted."""
    least, rate = row.get(f"{side}_min_{unit.lower()}"), row.get(f"{side}_images_per_second")
    value = shown(row[f"{side}_{unit.lower()}"], unit) + (f" ({shown(least, unit)})" if least else "")
    return value + (f", {rate:.0f} images/s" if rate else "")


def page(rows: list[dict[str, Any]], facts: dict[str, Any], growth: list[Growth]) -> str:
    """Return the page of all rows."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Performance",
        "",
        "Made by `python bench/performance.py`; the same rows by `retinanet bench` (`--json`). Ours and the peer run",
        "in one process, in turns, on the same inputs, after their outputs were compared. Times are medians, with the",
        "least in brackets; ratio is peer / ours of the medians, so that above 1 we are ahead; *goal* is what the",
        "project asks for at least. Quote ratios, not times.",
        "",
        f"Machine: {facts['processor']} ({facts['instructions']}), {facts['threads']} threads, "
        f"load before {facts['load']}.",
        f"Versions: {versions}.",
        "",
    ]
    cold, warm = facts["first_calls_s"]
    behind = []
    for item in ITEMS:
        of_item = [row for row in rows if row["item"] == item]
        if not of_item:
            continue
        lines += [f"## {TITLES[item]}", "", f"`retinanet bench {item}`", ""]
        lines += ["| case | against | ours | theirs | ratio | goal | outputs equal |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in of_item:
            unit = "MiB" if "ours_mib" in row else "ms"
            ours, theirs = (with_least(row, side, unit) for side in ("ours", "peer"))
            goal = goal_of(row)
            ratio = f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
            equal = {True: "yes", False: "**no**", None: "-"}[row["equal"]]
            missed = goal is not None and row["ratio"] < goal
            if missed:
                behind.append(f"{item}, {row['case']}: {ratio}, goal {goal:.2g}")
            lines.append(
                f"| {row['case']} | {row['peer']} | {ours} | {theirs} | "
                f"{'**' + ratio + '**' if missed else ratio} | {'-' if goal is None else f'{goal:.2g}'} | {equal} |"
            )
        lines.append("")
    lines += [
        "## Where the goals are missed",
        "",
        *(f"- {line}" for line in behind or ["nowhere on this machine"]),
        "",
        "## Time against size",
        "",
        "![Time against the number of anchors, boxes and classes](images/scaling.png)",
        "",
        "Dotted: time in proportion to the work, through the last point. In the last step of each line:",
        "",
        "| operation | from | to | work grows | time grows |",
        "| --- | --- | --- | --- | --- |",
        *(line.row() for line in growth),
        "",
        "## Not in these figures",
        "",
        f"- The first call of each kernel compiles it: {cold:.0f} s for all of them here, once on a machine. Later",
        f"  processes read the machine code from disk; their first calls take {warm:.1f} s.",
        *(
            []
            if any("batch 8" in row["case"] for row in rows)
            else ["- Training steps with batch 8: not measured yet."]
        ),
        "- bfloat16 on a CPU, and CUDA: no machine with either was at hand. The Triton kernels are tested in Triton's",
        "  interpreter and their compiled code is inspected; their speed was never measured.",
        "",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Growth:
    """The median times of one of our operations, in milliseconds, at growing sizes of its input.

    Args:
        power: of the size that its work goes with; an image's side counts twice.
    """

    name: str
    of: str
    sizes: tuple[int, ...]
    milliseconds: tuple[float, ...]
    power: int = 1

    def work(self, i: int) -> float:
        """Return the work at size i, that at the last size being 1."""
        return float((self.sizes[i] / self.sizes[-1]) ** self.power)

    def row(self) -> str:
        """Return the last step as a row of the page."""
        return (
            f"| {self.name} | {self.sizes[-2]:,} {self.of} | {self.sizes[-1]:,} | {1 / self.work(-2):.1f}x | "
            f"{self.milliseconds[-1] / self.milliseconds[-2]:.1f}x |"
        )


def measure_growth() -> list[Growth]:
    """Time our operations over image sizes, boxes and classes."""
    sides, counts, classes = (128, 256, 512, 1024), (10, 30, 100, 300, 1000, 3000), (1, 5, 20, 80, 320)

    def timed(
        name: str, of: str, sizes: tuple[int, ...], contest: Callable[[int], Contest], power: int = 1
    ) -> Growth:
        wait_until_idle()
        return Growth(name, of, sizes, tuple(median_ms(contest(size).ours) for size in sizes), power)

    return [
        timed("class loss", "px", sides, lambda side: next(loss.contests(side=side, compiled=False)), 2),
        timed("matching, 50 boxes", "px", sides, lambda side: next(matching.contests(side, (50,))), 2),
        timed("logits to detections", "px", sides, lambda side: next(postprocess.contests(side)), 2),
        timed("matching, 800 px", "boxes", counts, lambda count: next(matching.contests(counts=(count,)))),
        timed("NMS, 80 classes", "boxes", counts, lambda count: next(nms.contests(counts=(count,)))),
        timed(
            "class loss, 512 px", "classes", classes, lambda k: next(loss.contests(512, k, compiled=False))
        ),
        timed(
            "logits to detections, 512 px", "classes", classes, lambda k: next(postprocess.contests(512, k))
        ),
    ]


def draw_growth(lines: list[Growth], path: Path) -> None:
    """Draw the times against the sizes of the inputs, in doubly logarithmic scale."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"px": "side of the image, pixels", "boxes": "boxes", "classes": "classes"}
    figure, axes = plt.subplots(1, len(labels), figsize=(11, 3.6), layout="constrained", sharey=True)
    for axis, (of, label) in zip(axes, labels.items(), strict=True):
        shown = [line for line in lines if line.of == of]
        for line in shown:
            (drawn,) = axis.loglog(line.sizes, line.milliseconds, "o-", label=line.name, markersize=4)
            ideal = [line.milliseconds[-1] * line.work(i) for i in range(len(line.sizes))]
            axis.loglog(line.sizes, ideal, ":", color=drawn.get_color(), alpha=0.7)
        axis.set_xlabel(label)
        axis.set_xticks(shown[0].sizes, [f"{size:,}" for size in shown[0].sizes])
        axis.minorticks_off()
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def median_ms(call: Callable[[], object], repeats: int = 15) -> float:
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
