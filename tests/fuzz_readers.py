"""A fuzz target for every reader: any input ends in a valid data set or a `DataError`, soon.

Small data sets of each format, and real annotation files where `RETINANET_TEST_DATA` tells where they lie, are damaged
at random, byte by byte and, where they are JSON, value by value, and opened. What fails is kept and can be repeated:

    python tests/fuzz_readers.py --seconds 60 --seed 7
    python tests/fuzz_readers.py --seed 7 --only 1234
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet.data import Dataset, open_dataset
from retinanet.errors import DataError

LONGEST = 5.0  # seconds an input
TOKENS = (
    b"NaN", b"-Infinity", b"1e999", b"-1e-999", b"null", b"true", b"[" * 40, b"{" * 40, b"]", b"}", b",", b":", b'"',
    b"\\ud800", b"\\u0000", b"\0", b"\xff", b"\xef\xbb\xbf", b"../", b"/etc/passwd", b"C:\\", b"9" * 400, b"-0",
    b"<!DOCTYPE a>", b"<!ENTITY b 'c'>", b"&b;", b"<object>", b"</object>", b"<xmin>", b"]]>", b"<![CDATA[", b"&#0;",
    b"*a", b"&a ", b"- ", b"\n", b"\t", b"\r", b";", b"#", b"!!python/object:os.system", b"0x1f", b"1_000", b"inf",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-308, "", "1", "x", "nan",
    "../a.png", "/a.png", "a.png", "\ud800", "\x00", "\u202e", "a" * 600, [], {}, [1, 2, 3, 4], [[]], {"id": 1},
    ["1", 2, 3, 4],
)  # fmt: skip


def seeds() -> dict[str, dict[str, bytes]]:
    """Return sound small data sets by name: files by path."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(stream, "PNG")
    png = stream.getvalue()
    document = {
        "info": {"year": 2020},
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": "x", "file_name": "b.png", "width": 40.0, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 7.5, "iscrowd": 0},
            {
                "id": 2,
                "image_id": "x",
                "category_id": 8,
                "bbox": [5, 5, -1.5, 10],
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    corners = "<xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>22.5</ymax>"
    page = (
        "<?xml version='1.0' encoding='utf-8'?><annotation><filename>a.png</filename><size><width>40</width>"
        "<height>30</height></size><object><name>cat</name><difficult>1</difficult>"
        f"<bndbox>{corners}</bndbox></object></annotation>"
    )
    found = {
        "COCO": {"instances_train.json": json.dumps(document).encode(), "a.png": png, "b.png": png},
        "VOC": {
            "Annotations/a.xml": page.encode(),
            "ImageSets/Main/train.txt": b"a 1\na\n",
            "JPEGImages/a.png": png,
        },
        "YOLO": {
            "data.yaml": b"path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
            "images/train/a.png": png,
            "images/val/b.png": png,
            "labels/train/a.txt": b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9\n",
        },
        "CSV": {
            "train.csv": b"path,x1,y1,x2,y2,class\na.png,1,2,11,22,cat\nb.png,,,,,\n",
            "classes.csv": b"cat,0\ndog,1\n",
            "a.png": png,
            "b.png": png,
        },
        "Open Images": {
            "train-annotations-bbox.csv": (
                b"ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
                b"a,x,/m/01,1,0.1,0.5,0.2,0.9,0,0,0\nb,x,/m/02,1,0,1,0,1,0,0,1\n"
            ),
            "class-descriptions-boxable.csv": b"/m/01,Cat\n/m/02,Dog\n",
            "a.png": png,
            "b.png": png,
        },
    }
    return found | _real_files(png)


def _real_files(png: bytes) -> dict[str, dict[str, bytes]]:
    real = os.environ.get("RETINANET_TEST_DATA")
    if not real:
        return {}
    page = (Path(real) / "bccd/BCCD/Annotations/BloodImage_00338.xml").read_bytes()
    truth = (Path(real) / "eval_fixtures/faster_coco_eval/tests/dataset/gt_dataset.json").read_bytes()
    return {
        "BCCD": {"Annotations/a.xml": page, "ImageSets/Main/train.txt": b"a\n", "JPEGImages/a.png": png},
        "COCO of others": {"instances_train.json": truth},
    }


def damaged(content: bytes, choose: random.Random) -> bytes:
    """Change some bytes: exchange, leave out, repeat, insert words that mean something to a parser."""
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        start = choose.randint(0, len(content))
        end = min(len(content), start + choose.choice((0, 1, 1, 4, 30, 300)))
        middle = choose.choice(
            (
                b"",
                choose.randbytes(choose.randint(1, 6)),
                choose.choice(TOKENS),
                content[start:end] * choose.choice((2, 3, 50)),
                content[end : end + choose.randint(0, 40)],
            )
        )
        content = content[:start] + middle + content[end:]
    return content


def changed(content: bytes, choose: random.Random) -> bytes:
    """Exchange some values of a JSON document, anywhere in it."""
    document = json.loads(content)
    for _ in range(choose.choice((1, 1, 2, 5))):
        holder, key, node = None, None, document
        while isinstance(node, dict | list) and node and choose.random() < 0.8:
            holder, key = node, choose.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        value = copy.deepcopy(choose.choice((*VALUES, node)))
        if holder is None:
            document = value
        elif isinstance(holder, list) and choose.random() < 0.3:
            holder.insert(key, value)
        else:
            holder[key] = value
    return json.dumps(document).replace("NaN", "1e999").encode()


def inputs(seed: int, number: int) -> tuple[str, dict[str, bytes]]:
    """Return the damaged data set of a number: the same for the same seed."""
    choose = random.Random(f"{seed} {number}")
    known = _SEEDS
    name = choose.choice(sorted(known))
    files = dict(known[name])
    for _ in range(choose.choice((1, 1, 1, 2))):
        victim = choose.choice([path for path in sorted(files) if not path.endswith(".png")] or sorted(files))
        is_json = victim.endswith(".json") and choose.random() < 0.7
        try:
            files[victim] = (changed if is_json else damaged)(files[victim], choose)
        except (ValueError, RecursionError):  # damaged before: no JSON any more
            files[victim] = damaged(files[victim], choose)
    if choose.random() < 0.05:
        del files[choose.choice(sorted(files))]
    return name, files


_SEEDS = seeds()


def check(dataset: Dataset) -> None:
    """Hold a data set to what every reader promises."""
    edges = np.repeat(np.stack([dataset.widths, dataset.heights], axis=1), np.diff(dataset.offsets), axis=0)
    assert (dataset.boxes >= 0).all(), "a box lies left of or above its image"
    assert (dataset.boxes[:, 2:] <= edges).all(), "a box reaches beyond its image"
    assert np.isfinite(dataset.areas).all(), "an area is not finite"
    assert dataset.fault_total >= len(dataset.faults), "faults are lost"
    for index in range(len(dataset)):
        dataset.ground_truth(index)
        path = os.path.realpath(dataset.path(index))
        assert path.startswith(os.path.realpath(dataset.root)), f"{path} lies outside"
    assert all(len(str(fault)) < 3000 for fault in dataset.faults), "a message is endless"


def refusal(read: Callable[[], Dataset]) -> str:
    """Return the message of a `DataError`, or "" for a valid data set; nothing else may come."""
    try:
        check(read())
    except DataError as error:
        return str(error)
    return ""


def one(seed: int, number: int, folder: Path) -> str | None:
    """Open one damaged data set; return what was wrong with the opening, None for nothing."""
    _, files = inputs(seed, number)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    before = sorted(folder.rglob("*"))
    choose = random.Random(number)
    start = time.perf_counter()
    warnings.simplefilter("error")  # one on the terminal would be a defect, too
    try:
        said = refusal(lambda: open_dataset(folder, "train", images=choose.choice(("required", "absent"))))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    seconds = time.perf_counter() - start
    if len(said) > 4000:
        return f"a message of {len(said)} characters"
    if seconds > LONGEST:
        return f"it took {seconds:.1f} seconds"
    return None if sorted(folder.rglob("*")) == before else "something was written into the data folder"


def failures(seconds: float, seed: int, *, first: int = 0) -> Iterator[tuple[int, str | None]]:
    """Yield (number, what failed or None) of damaged data sets until the time is over."""
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as name:
            yield number, one(seed, number, Path(name))
        number += 1


def main() -> int:
    """Fuzz for a while; keep what fails. Return 1 if something did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="do one number again")
    given = parser.parse_args()
    if given.only is not None:
        with tempfile.TemporaryDirectory() as name:
            wrong = one(given.seed, given.only, Path(name))
        print(wrong or "sound")
        return int(wrong is not None)
    count = failed = 0
    for number, wrong in failures(given.seconds, given.seed):
        count += 1
        if wrong is None:
            continue
        failed += 1
        kept = Path(tempfile.gettempdir()) / f"fuzz-{given.seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        one(given.seed, number, kept)
        print(f"--seed {given.seed} --only {number}: kept in {kept}\n{wrong}", file=sys.stderr)
    print(f"{count:,} damaged data sets, seed {given.seed}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
