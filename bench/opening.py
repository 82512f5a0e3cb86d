"""How long opening a large data set takes, and how much memory.

Made in a temporary folder, with 80 classes: COCO files of COCO's own size (118,287 images, 860,001 boxes) and of five
million boxes, with and without polygons, whose images are empty files, as opening looks at their names only; and a file
of Open Images with a million boxes in 80,000 images, which are names of one small JPEG file, as opening reads their
sizes. Each is opened in a process of its own, whose peak memory the system tells.

    python bench/opening.py                  all five
    python bench/opening.py --images 1000 --boxes 10000
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 80
# Names of one file: few enough for every file system.
LINKS = 1000
SIDES = (640, 480)
# What is made: the form, and how many images and boxes.
COCO, POLYGONS, OPEN_IMAGES = "COCO", "COCO with polygons", "Open Images"
MADE = (
    (COCO, 118_287, 860_001),
    (POLYGONS, 118_287, 860_001),
    (COCO, 118_287, 5_000_000),
    (POLYGONS, 118_287, 5_000_000),
    (OPEN_IMAGES, 80_000, 1_000_000),
)

OPEN = """
import json, resource, sys, time
from retinanet.data import open_dataset
import_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, busy = time.perf_counter(), time.process_time()
dataset = open_dataset(sys.argv[1], "train")
seconds, busy = time.perf_counter() - start, time.process_time() - busy
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scale = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "images": len(dataset), "boxes": len(dataset.boxes), "faults": dataset.fault_total,
    "seconds": round(seconds, 2), "cpu_seconds": round(busy, 2), "peak_bytes": peak * scale,
    "before_bytes": import_peak * scale,
}))
"""


def generate_coco(folder: Path, *, images: int, boxes: int, polygons: bool) -> Path:
    """Write `instances_train.json` and empty image files; return the JSON's path."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    for name in names:
        (folder / "train" / name).touch()
    path = folder / "instances_train.json"
    with path.open("w") as stream:
        stream.write('{"info": {}, "licenses": [], "images": [')
        rows = (
            f'{{"license": 3, "file_name": "{name}", "coco_url": "http://example.org/{name}", "height": {SIDES[1]}, '
            f'"width": {SIDES[0]}, "date_captured": "2013-11-14 11:18:45", "id": {4 * number}}}'
            for number, name in enumerate(names)
        )
        stream.write(", ".join(rows) + '], "annotations": [')
        for start in range(0, boxes, 100_000):
            count = min(100_000, boxes - start)
            owners, labels = random.integers(0, images, count), random.integers(1, CLASSES + 1, count)
            corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * SIDES
            corners[:, 1] = np.minimum(np.maximum(corners[:, 1], corners[:, 0] + 1), SIDES)
            corners[:, 0] = np.minimum(corners[:, 0], corners[:, 1] - 1)
            shape = random.uniform(0, 480, (count, 24)).round(2) if polygons else None
            parts = []
            for row in range(count):
                (x1, y1), (x2, y2) = corners[row].tolist()
                outline = "" if shape is None else f'"segmentation": [{json.dumps(shape[row].tolist())}], '
                area = (x2 - x1) * (y2 - y1) * 0.6
                parts.append(
                    f'{{{outline}"area": {area:.4f}, "iscrowd": 0, "image_id": {4 * owners[row]}, '
                    f'"bbox": [{x1:.2f}, {y1:.2f}, {x2 - x1:.2f}, {y2 - y1:.2f}], "category_id": {labels[row]}, '
                    f'"id": {start + row + 1}}}'
                )
            stream.write((", " if start else "") + ", ".join(parts))
        classes = ", ".join(
            f'{{"id": {number}, "name": "class {number}"}}' for number in range(1, CLASSES + 1)
        )
        stream.write(f'], "categories": [{classes}]}}')
    return path


def generate_open_images(folder: Path, *, images: int, boxes: int) -> Path:
    """Write `train-annotations-bbox.csv` and an image under many names; return the CSV's path."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"{number:016x}" for number in range(1, images + 1)]
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        first = Path(beside) / "image.jpg"
        Image.new("RGB", SIDES).save(first)
        for number, name in enumerate(names):
            if number % LINKS == 0:  # a file has only so many names
                source = shutil.copyfile(first, folder / f"train/{name}.jpg")
            else:
                os.link(source, folder / f"train/{name}.jpg")
    path = folder / "train-annotations-bbox.csv"
    with path.open("w") as stream:
        stream.write(
            "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
        )
        for start in range(0, boxes, 100_000):
            count = min(100_000, boxes - start)
            owners = np.sort(random.integers(0, images, count)).tolist()
            labels = random.integers(0, CLASSES, count).tolist()
            corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1)
            corners[:, 1] = np.minimum(corners[:, 1] + 0.01, 1.0)
            for owner, label, ((x1, y1), (x2, y2)) in zip(owners, labels, corners.tolist(), strict=True):
                shares = f"{x1:.6f},{x2:.6f},{y1:.6f},{y2:.6f}"
                stream.write(f"{names[owner]},xclick,/m/{label:05d},1,{shares},0,0,0\n")
    return path


def generate(folder: Path, form: str, *, images: int, boxes: int) -> Path:
    """Write a data set of a form into a folder; return its file of annotations."""
    if form == OPEN_IMAGES:
        return generate_open_images(folder, images=images, boxes=boxes)
    return generate_coco(folder, images=images, boxes=boxes, polygons=form == POLYGONS)


def measure(folder: Path) -> dict[str, float]:
    """Open the data set in a fresh process; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a line a data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="images of every data set, instead of its own")
    parser.add_argument("--boxes", type=int, help="boxes of every data set, instead of its own")
    given = parser.parse_args()
    print(f"{'form':18} {'images':>8} {'boxes':>10} {'file':>9} {'seconds':>8} {'CPU':>6} {'peak':>9}")
    made = dict.fromkeys((form, given.images or images, given.boxes or boxes) for form, images, boxes in MADE)
    for form, images, boxes in made:
        with tempfile.TemporaryDirectory() as name:
            path = generate(Path(name), form, images=images, boxes=boxes)
            size = os.path.getsize(path)
            found = measure(Path(name))
        what = f"{form:18} {found['images']:>8,} {found['boxes']:>10,}"
        cost = (
            f"{found['seconds']:>8.2f} {found['cpu_seconds']:>6.2f} {found['peak_bytes'] / 2**20:>5,.0f} MiB"
        )
        print(f"{what} {size / 2**20:>5,.0f} MiB {cost}", flush=True)


if __name__ == "__main__":
    main()
