"""Small sound data sets of every format, to be read as they are or broken on purpose, and what every reader promises.

Each `*_set` writes two images of 40 x 30 and one without objects into the split `train`, one image into `val`, and
returns the folder; names and numbers are the same in every format: a cat at [4, 6, 14, 26] in `a`, a dog at
[0, 0, 20, 15] in `b`, nothing in `empty`; a cat at [25, 10, 35, 20] in the `v` of val (as x, y, width,
height it is no x1, y1, x2, y2, which proves the form of a Hugging Face set).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet.data import Dataset
from retinanet.data.dataset import Annotation
from retinanet.errors import DataError
from retinanet.records import Classes, Ignore

WIDTH, HEIGHT = 40, 30
NAMES = ("cat", "dog")
Boxes = Mapping[str, Sequence[tuple[str, tuple[float, float, float, float]]]]
SPLITS: dict[str, Boxes] = {
    "train": {"a": [("cat", (4, 6, 14, 26))], "b": [("dog", (0, 0, 20, 15))], "empty": []},
    "val": {"v": [("cat", (25, 10, 35, 20))]},
}

fuzzing = settings(
    max_examples=80, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def picture(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """Write an image that no file of another name equals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(sum(path.stem.encode()) * step % 256 for step in (1, 3, 7))
    Image.new("RGB", (width, height), colour).save(path)
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def coco_set(folder: Path, splits: Mapping[str, Boxes] = SPLITS) -> Path:
    """`annotations/instances_{split}.json` and `images/{split}`."""
    for split, images in splits.items():
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        document["categories"] = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
        for name, boxes in images.items():
            picture(folder / f"images/{split}/{name}.png")
            image = {
                "id": len(document["images"]) + 1,
                "file_name": f"{name}.png",
                "width": WIDTH,
                "height": HEIGHT,
            }
            document["images"].append(image)
            for label, (x1, y1, x2, y2) in boxes:
                number = len(document["annotations"]) + 1
                category, box = 3 if label == "cat" else 8, [x1, y1, x2 - x1, y2 - y1]
                document["annotations"].append(
                    {"id": number, "image_id": image["id"], "category_id": category, "bbox": box}
                )
        write(folder / f"annotations/instances_{split}.json", json.dumps(document))
    return folder


def voc_set(folder: Path, splits: Mapping[str, Boxes] = SPLITS, *, lists: bool = True) -> Path:
    """`Annotations`, `JPEGImages` and, with `lists`, `ImageSets/Main`."""
    for split, images in splits.items():
        for name, boxes in images.items():
            picture(folder / f"JPEGImages/{name}.png")
            write(folder / f"Annotations/{name}.xml", voc_page(f"{name}.png", boxes))
        if lists:
            write(folder / f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in images))
    return folder


def voc_page(filename: str, boxes: Sequence[tuple[str, Sequence[float]]]) -> str:
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"


def yolo_line(label: int, box: Sequence[float]) -> str:
    x1, y1, x2, y2 = box
    shares = (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT
    return f"{label} {' '.join(map(repr, shares))}\n"


def yolo_set(
    folder: Path, splits: Mapping[str, Boxes] = SPLITS, *, table: str | None = None, outer: bool = False
) -> Path:
    """`data.yaml` (its text may be given), `images/{split}` and `labels/{split}`, or `{split}/images` with `outer`.

    The image without objects has no label file.
    """
    lines = []
    for split, images in splits.items():
        place = f"{split}/images" if outer else f"images/{split}"
        lines.append(f"{split}: {place}")
        for name, boxes in images.items():
            picture(folder / place / f"{name}.png")
            labels = "".join(yolo_line(NAMES.index(label), box) for label, box in boxes)
            if labels:
                write(folder / place.replace("images", "labels") / f"{name}.txt", labels)
    write(folder / "data.yaml", "\n".join([*lines, "names: [cat, dog]"]) if table is None else table)
    return folder


def csv_set(
    folder: Path, splits: Mapping[str, Boxes] = SPLITS, *, header: str = "", classes: str | None = None
) -> Path:
    """`{split}.csv`, `images`, and `classes.csv` where its text is given."""
    for split, images in splits.items():
        rows = [header] if header else []
        for name, boxes in images.items():
            picture(folder / f"images/{name}.png")
            rows += [f"images/{name}.png,{','.join(map(str, box))},{label}" for label, box in boxes]
            rows += [] if boxes else [f"images/{name}.png,,,,,"]
        write(folder / f"{split}.csv", "\n".join(rows) + "\n")
    if classes is not None:
        write(folder / "classes.csv", classes)
    return folder


OPEN_IMAGES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
LABELS = {"cat": "/m/01yrx", "dog": "/m/0bt9lr"}


def open_images_row(name: str, label: str, box: Sequence[float], group: int = 0) -> str:
    x1, y1, x2, y2 = (value / side for value, side in zip(box, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True))
    return f"{name},xclick,{LABELS.get(label, label)},1,{x1!r},{x2!r},{y1!r},{y2!r},0,0,{group},0,0"


def open_images_set(folder: Path, splits: Mapping[str, Boxes] = SPLITS) -> Path:
    """`{split}-annotations-bbox.csv`, `class-descriptions-boxable.csv`, `{split}/ID.jpg`; empty images are absent."""
    for split, images in splits.items():
        rows = [OPEN_IMAGES]
        for name, boxes in images.items():
            picture(folder / split / f"{name}.jpg")
            rows += [open_images_row(name, label, box) for label, box in boxes]
        write(folder / f"{split}-annotations-bbox.csv", "\n".join(rows) + "\n")
    write(
        folder / "class-descriptions-boxable.csv", "".join(f"{key},{name}\n" for name, key in LABELS.items())
    )
    return folder


def hugging_face_rows(folder: Path, images: Boxes, form: str = "xywh") -> list[dict[str, Any]]:
    """Rows with embedded images, as `datasets` keeps them; the images themselves are not left behind."""
    rows = []
    for number, (name, boxes) in enumerate(images.items()):
        path = picture(folder / f"{name}.png")
        corners = [box for _, box in boxes]
        if form == "xywh":
            corners = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners]
        objects = {
            "bbox": [list(map(float, box)) for box in corners],
            "category": [label for label, _ in boxes],
        }
        image = {"bytes": path.read_bytes(), "path": path.name}
        rows.append(
            {"image_id": number, "image": image, "width": WIDTH, "height": HEIGHT, "objects": objects}
        )
        path.unlink()
    return rows


def arrow_table(rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None) -> Any:
    """A pyarrow table; with `names`, categories are their places and the features name them."""
    import pyarrow

    category = pyarrow.string() if names is None else pyarrow.int64()
    objects = pyarrow.struct(
        {"bbox": pyarrow.list_(pyarrow.list_(pyarrow.float64())), "category": pyarrow.list_(category)}
    )
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    kinds = {"image_id": pyarrow.int64(), "image": image, "width": pyarrow.int64(), "height": pyarrow.int64()}
    schema = pyarrow.schema({**{k: v for k, v in kinds.items() if k in rows[0]}, "objects": objects})
    if names is not None:
        rows = [
            {
                **row,
                "objects": {
                    **row["objects"],
                    "category": [names.index(n) for n in row["objects"]["category"]],
                },
            }
            for row in rows
        ]
        feature = {"category": {"names": list(names), "_type": "ClassLabel"}}
        features = {"info": {"features": {"objects": {"feature": feature, "_type": "Sequence"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(features)})
    return pyarrow.Table.from_pylist(list(rows), schema=schema)


def parquet_set(folder: Path, splits: Mapping[str, Boxes] = SPLITS, *, form: str = "xywh") -> Path:
    """`data/{split}-00000-of-00001.parquet` with embedded images."""
    import pyarrow.parquet

    for split, images in splits.items():
        path = folder / f"data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = hugging_face_rows(folder, images, form)
        pyarrow.parquet.write_table(arrow_table(rows, names=NAMES), path)
    return folder


def saved_set(folder: Path, splits: Mapping[str, Boxes] = SPLITS) -> Path:
    """What `datasets.DatasetDict.save_to_disk` writes."""
    import pyarrow

    for split, images in splits.items():
        table = arrow_table(hugging_face_rows(folder, images), names=NAMES)
        path = folder / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        write(folder / split / "state.json", json.dumps({"_data_files": [{"filename": path.name}]}))
    write(folder / "dataset_dict.json", json.dumps({"splits": list(splits)}))
    return folder


SETS: dict[str, Callable[[Path], Path]] = {
    "COCO": coco_set,
    "Pascal VOC": voc_set,
    "YOLO": yolo_set,
    "CSV": csv_set,
    "Open Images": open_images_set,
    "Hugging Face": parquet_set,
}


def boxes_by_image(dataset: Dataset) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Class and corners of each image, by the image's file name without folder and ending, to 1e-4 pixels."""
    found = {}
    for index, file in enumerate(dataset.files.tolist()):
        truth = dataset.ground_truth(index)
        rows = zip(truth.classes, truth.boxes, strict=True)
        found[Path(file).stem] = sorted(
            (dataset.classes.names[label], tuple(round(float(v), 4) for v in box)) for label, box in rows
        )
    return found


def expected(images: Boxes) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """The same of what a `*_set` was given."""
    return {
        name: sorted((label, tuple(map(float, box))) for label, box in boxes)
        for name, boxes in images.items()
    }


def faults(dataset: Dataset) -> list[str]:
    return [str(fault) for fault in dataset.faults]


def kinds(dataset: Dataset) -> list[tuple[str, str]]:
    """(kind, action) of each fault; every one must say what to do or why nothing is to be done."""
    return [(fault.kind, fault.action) for fault in dataset.faults]


def assert_valid(dataset: Dataset) -> None:
    """What every reader promises of what it returns."""
    for index in range(len(dataset)):
        truth, (width, height) = dataset.ground_truth(index), dataset.size(index)
        assert (truth.boxes >= 0).all()
        assert (truth.boxes <= [width, height, width, height]).all()
        assert (truth.classes < len(dataset.classes)).all()
        assert np.isfinite(truth.areas).all()
        assert dataset.path(index).is_relative_to(dataset.root)
        assert ".." not in dataset.path(index).parts
    assert all(fault.kind and fault.reason and fault.file for fault in dataset.faults)


def refusal(read: Callable[[], Dataset]) -> str:
    """The message of a `DataError`, or "" for a valid data set; nothing else may come."""
    try:
        assert_valid(read())
    except DataError as error:
        said = str(error)
    else:
        return ""
    assert 0 < len(said) < 5000
    return said


def damage(content: bytes, choose: Callable[[Any], Any]) -> bytes:
    """Overwrite, insert, cut or repeat some bytes."""
    for _ in range(choose(st.integers(1, 3))):
        start = choose(st.integers(0, len(content)))
        end = min(len(content), start + choose(st.integers(0, 12)))
        pieces = [
            b"NaN",
            b"1e999",
            b"-1",
            b",",
            b"\n",
            b"..",
            b"/",
            b"\\",
            b'"',
            b": ",
            b"[",
            b"&a ",
            b"*a",
            b"\0",
            b"\xff",
        ]
        new = choose(st.binary(max_size=6) | st.sampled_from(pieces))
        content = content[:start] + new * choose(st.integers(0, 3)) + content[end:]
    return content


@st.composite
def splits_of_boxes(draw: Any, folder: Path) -> dict[str, Dataset]:
    """A data set in memory of one to three splits, with every kind of box; its images lie in `folder`."""
    names = draw(
        st.sampled_from([("",), ("train",), ("train", "val"), ("train", "val", "test"), ("train", "odd")])
    )
    ids = draw(st.lists(st.integers(0, 90), min_size=3, max_size=3, unique=True).map(sorted))
    classes = Classes(tuple(draw(st.permutations(["cat", "no", "a dog, 'big'"]))), tuple(ids))
    place = st.sampled_from(["a.png", "b.png", "sub/a.png", "sub/c 1.png", "ü.png", "d"])
    made: dict[str, Dataset] = {}
    for name in names:
        files = draw(st.lists(place, min_size=1, max_size=3, unique=True))
        annotations, seen = [], set()
        for image in range(len(files)):
            for _ in range(draw(st.integers(0, 3))):
                x = sorted(draw(st.lists(EDGES[0], min_size=2, max_size=2, unique=True)))
                y = sorted(draw(st.lists(EDGES[1], min_size=2, max_size=2, unique=True)))
                label, ignore = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 0, 1, 2]))
                box = (x[0], y[0], x[1], y[1])
                if (image, box, label) not in seen:
                    seen.add((image, box, label))
                    area = (x[1] - x[0]) * (y[1] - y[0])
                    annotations.append(Annotation(image, box, label, area, Ignore(ignore), len(annotations)))
        for file in files:
            if not (folder / file).exists():
                path = picture(folder / f"{file}.png".replace(".png.png", ".png"))
                os.replace(path, folder / file)
        made[name] = Dataset.build(
            name="drawn", split=name, root=folder, classes=classes, files=files,
            image_ids=list(range(5, 5 + len(files))), sizes=[(WIDTH, HEIGHT)] * len(files), annotations=annotations,
        )  # fmt: skip
    return made


# Corners in quarters and thirds of pixels, and at the border, a thousandth apart at least.
EDGES = tuple(
    st.integers(0, side * 12).map(lambda twelfths: float(np.float32(twelfths / 12)))
    for side in (WIDTH, HEIGHT)
)
