"""The synthetic data set on disk: scenes drawn, written as COCO JSON and PNG images, and known again."""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from retinanet.data.coco import write_coco
from retinanet.data.scenes import CLASSES, GENERATOR, ShapesSpec, check_seed, draw_scene
from retinanet.errors import ConfigError, DataError
from retinanet.records import GroundTruth

__all__ = ["CLASSES", "GENERATOR", "ShapesSpec", "draw_scene", "generate_shapes", "holds_shapes"]

USUAL = ShapesSpec()


def generate_shapes(
    output: Path,
    *,
    train: int = 2000,
    val: int = 300,
    test: int = 0,
    seed: int = 0,
    spec: ShapesSpec = USUAL,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a COCO data set of drawn images and return its folder.

    `annotations/instances_SPLIT.json` and `images/SPLIT/000000.png` ... for each split with images. The
    folder appears under its name only when it is complete. The same arguments give the same bytes. Each JSON
    says under `info` what its images were drawn by.

    Args:
        output: the folder to make; must not exist.
        train, val, test: number of images, >= 0, of each split; a split of 0 is not written.
        seed: >= 0.
        progress: called after each image with the number of images written so far.

    Raises:
        ConfigError: a negative count or seed, or no image at all.
        DataError: `output` exists or cannot be made.
    """
    counts = {"train": train, "val": val, "test": test}
    for name, count in counts.items():
        if count < 0:
            raise ConfigError(f"--{name} needs 0 or more images; got {count}")
    if not any(counts.values()):
        raise ConfigError("a data set needs at least one image in train, val or test; got 0 in each")
    check_seed("a data set", seed)
    output = Path(output)
    if os.path.lexists(output):
        raise DataError(
            f"--output needs a new folder; {output} exists, and nothing is ever overwritten. Choose another name"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
    except OSError as error:
        raise DataError(
            f"--output {output}: no folder can be made in {output.parent} ({error.strerror}); "
            "choose another place"
        ) from None
    with staging as temporary:
        unfinished = Path(temporary) / "data"
        written = 0
        for split, count in counts.items():
            if count:
                _write_split(unfinished, split, count, written, seed, spec, progress)
                written += count
        unfinished.rename(output)
    return output


def holds_shapes(
    folder: Path,
    *,
    train: int = 2000,
    val: int = 300,
    test: int = 0,
    seed: int = 0,
    spec: ShapesSpec = USUAL,
) -> bool:
    """Whether a folder says of its splits that `generate_shapes` would draw the same ones today."""
    counts = {"train": train, "val": val, "test": test}
    return all(
        _recorded(folder, split) == _info(split, count, seed, spec)
        for split, count in counts.items()
        if count
    )


def _info(split: str, count: int, seed: int, spec: ShapesSpec) -> dict[str, object]:
    return {
        "description": "disks, squares and triangles, drawn by `retinanet data shapes`",
        "version": str(GENERATOR),
        "split": split,
        "images": count,
        "seed": seed,
        "spec": asdict(spec),
    }


def _recorded(folder: Path, split: str) -> object:
    try:
        document = json.loads((folder / _annotations(split)).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return document.get("info") if isinstance(document, dict) else None


def _annotations(split: str) -> str:
    return f"annotations/instances_{split}.json"


def _write_split(
    folder: Path,
    split: str,
    count: int,
    written: int,
    seed: int,
    spec: ShapesSpec,
    progress: Callable[[int], None] | None,
) -> None:
    (folder / "images" / split).mkdir(parents=True)
    files: list[str] = []
    truths: list[GroundTruth] = []
    for index in range(count):
        pixels, truth = draw_scene(spec, seed, split, index)
        files.append(f"images/{split}/{index:06d}.png")
        Image.fromarray(pixels).save(folder / files[-1], compress_level=1, compress_type=zlib.Z_RLE)
        truths.append(truth)
        if progress:
            progress(written + index + 1)
    (folder / "annotations").mkdir(exist_ok=True)
    write_coco(
        folder / _annotations(split),
        classes=CLASSES,
        files=files,
        sizes=[(spec.image_size, spec.image_size)] * count,
        ground_truths=truths,
        info=_info(split, count, seed, spec),
    )
