"""Decode every image of a data set for good, in parallel, and say which will not do; find near-duplicates.

Opening a data set looks at names and, where it must, at headers: seconds. Here every pixel is decoded, as
training will: minutes at first, seconds when nothing changed, because what was found is kept in a cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from retinanet.data.dataset import Dataset, Fault
from retinanet.data.facts_cache import FactsCache
from retinanet.data.image_files import is_image_name
from retinanet.data.isolation import each
from retinanet.data.kinds import Kind
from retinanet.data.near_duplicates import NearPair, near_duplicates
from retinanet.data.rules import brief, name_fault
from retinanet.errors import ImageError
from retinanet.folders import cache_folder
from retinanet.images import UInt8Array, examine

__all__ = [
    "ImageFacts",
    "NearPair",
    "audit_images",
    "difference_hash",
    "label_frames",
    "near_duplicates",
    "unlisted_images",
]

# Where the brightest pixel of an image of 16 bits ends when a camera of 12 bits wrote it; 255 is white.
DARK = (2**12 - 1) >> 8


@dataclass(frozen=True)
class ImageFacts:
    """What one decoded image file is.

    Args:
        index: position in its data set.
        width, height: pixels, as a person sees the image.
        orientation: EXIF's, 1 to 8; from 5 on the stored picture has width and height exchanged.
        mode: Pillow's name of the stored pixels: "RGB", "L", "P", "RGBA", "CMYK", "I;16" ...
        frames: pictures in the file; the first one is used.
        brightest: the largest value of a pixel as it is used, 0 to 255.
        digest: SHA-256 of the file's bytes, hexadecimal.
        dhash: 64-bit difference hash of the upright grey image: bit 8 r + c, from the highest down, says
            that cell (r, c) of an 8 x 9 reduction is darker than its right neighbour.
    """

    index: int
    width: int
    height: int
    orientation: int
    mode: str
    frames: int
    brightest: int
    digest: str
    dhash: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the picture as it is stored, before EXIF orientation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def audit_images(
    dataset: Dataset,
    *,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    cache: Path | None = None,
    data: str | Path | None = None,
) -> tuple[list[ImageFacts | None], list[Fault]]:
    """Decode every image and compare it with its annotations.

    Named are images that are missing, unreadable, truncated or too large (training goes on without them); those of
    another size than annotated, or whose labels follow the stored pixels before EXIF turned them, where no box can be
    trusted; animations, of which the first frame counts; and 16-bit images whose values end at 12 bits or before, which
    are black as they stand. Other modes are facts, not faults: `decode` makes RGB of all.

    Args:
        workers: processes that decode; 0 decodes in this one. A decoder that crashes costs a worker its image, which
            is named, and this process its life.
        progress: called with the number of images done so far.
        cache: folder of what was found before, by path, size and time of change of a file; see
            `folders.cache_folder` for the place when not given. It may not lie in the data folder.
        data: the folder that the data set was read from, where it is another than that of the images.

    Returns:
        One entry an image, None where it could not be decoded; and what is wrong, in the order of the images.

    Raises:
        ConfigError: the cache lies in the data folder.
    """
    facts: list[ImageFacts | None] = [None] * len(dataset)
    refused: dict[int, Fault] = {}
    done = 0
    folders = [dataset.root, *([Path(data)] if data is not None and Path(data).is_dir() else [])]
    with FactsCache(cache, outside=folders) as known:
        todo: dict[int, str] = {}
        for index in range(len(dataset)):
            path = str(dataset.path(index))
            kept = known.get(path)
            if kept is None:
                todo[index] = path
            else:
                facts[index] = ImageFacts(index, *kept)
        done = len(dataset) - len(todo)
        if progress:
            progress(done)
        for index, found in each(_facts_of, todo, workers, crashed=_crashed):
            if isinstance(found, _Refusal):
                refused[index] = _fault(dataset, index, "image", found.reason, found.kind)
            else:
                facts[index] = ImageFacts(index, *found)
                known.put(todo[index], found)
            done += 1
            if progress:
                progress(done)
    faults: list[Fault] = []
    for index, fact in enumerate(facts):
        faults += [refused[index]] if fact is None else _contradictions(dataset, fact)
    return facts, faults


class _Refusal(NamedTuple):
    kind: Kind
    reason: str


_Found = tuple[int, int, int, str, int, int, str, int]  # ImageFacts without its index


def _facts_of(path: str) -> _Found | _Refusal:
    """Decode one file; runs in a worker."""
    try:
        pixels, orientation, mode, frames = examine(path)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (ImageError, OSError) as error:
        return _Refusal(_kind_of(error, path), str(error))
    height, width = pixels.shape[:2]
    return width, height, orientation, mode, frames, int(pixels.max()), digest, difference_hash(pixels)


def _kind_of(error: Exception, path: str) -> Kind:
    if not Path(path).exists():
        return Kind.MISSING_IMAGE
    if "max_pixels" in str(error):
        return Kind.HUGE_IMAGE
    return Kind.TRUNCATED_IMAGE if "truncated" in str(error.__cause__) else Kind.UNREADABLE_IMAGE


def _crashed(path: str) -> _Refusal:
    return _Refusal(
        Kind.UNREADABLE_IMAGE, f"{path}: decoding it ended the process: a crash, or no memory left"
    )


def difference_hash(pixels: UInt8Array) -> int:
    """Return the 64-bit difference hash of an image; see `ImageFacts.dhash`."""
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes())


def _contradictions(dataset: Dataset, fact: ImageFacts) -> Iterator[Fault]:
    """Name what the annotations say otherwise than the file."""
    annotated, seen = dataset.size(fact.index), (fact.width, fact.height)
    if annotated != seen and annotated == fact.stored_size:
        reason = (
            f"is annotated as {_by(annotated)}, the size it is stored in; people see {_by(seen)} (EXIF orientation "
            f"{fact.orientation}): its boxes belong to the picture before it is turned"
        )
        yield _fault(dataset, fact.index, "size", reason, Kind.ROTATED_LABELS)
    elif annotated != seen:
        scale = seen[0] / annotated[0]
        scaled = abs(seen[1] / annotated[1] - scale) <= scale / min(*seen, *annotated)
        how = f": scaled by {scale:.3g}" if scaled else ""
        reason = f"is annotated as {_by(annotated)}, but is {_by(seen)}{how}"
        yield _fault(dataset, fact.index, "size", reason, Kind.OTHER_SIZE)
    if fact.frames > 1:
        reason = f"holds {fact.frames} pictures; the first is used"
        yield _fault(dataset, fact.index, "image", reason, Kind.ANIMATED_IMAGE, "repaired")
    if fact.mode.startswith("I") and fact.brightest <= DARK:
        reason = f"has 16 bits a pixel and no value above {256 * DARK + 255}; as it stands it is nearly black"
        yield _fault(dataset, fact.index, "image", reason, Kind.DARK_IMAGE, "repaired")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _fault(
    dataset: Dataset,
    index: int,
    record: str,
    reason: str,
    kind: Kind,
    action: Literal["repaired", "dropped"] = "dropped",
) -> Fault:
    return Fault(str(dataset.files[index]), record, reason, action, kind, kind.fix)


def label_frames(dataset: Dataset, facts: Sequence[ImageFacts | None]) -> dict[str, int]:
    """Count which frame the annotations of EXIF-rotated images follow.

    Returns:
        "seen": annotated as people see them, which is this library's convention; "stored": as the pixels lie in the
        file; "either": sizes do not tell (square, or turned by half); "neither": of another size altogether.
    """
    counts = dict.fromkeys(("seen", "stored", "either", "neither"), 0)
    for fact in facts:
        if fact is None or fact.orientation == 1:
            continue
        size = dataset.size(fact.index)
        seen, stored = size == (fact.width, fact.height), size == fact.stored_size
        counts["either" if seen and stored else "seen" if seen else "stored" if stored else "neither"] += 1
    return counts


def unlisted_images(splits: Sequence[Dataset]) -> list[Fault]:
    """Name the image files that lie beside listed ones, in the same folders, and that no split lists.

    Args:
        splits: all splits of a data set; one that is left out has all its images named. Images that a split lists but
            cannot use are no news here, nor are those of other data sets in the cache of Hugging Face images.
    """
    listed: dict[Path, set[str]] = {}
    roots: dict[Path, Path] = {}
    for split in splits:
        if split.root.is_relative_to(cache_folder("images")):
            continue
        for folder, names in _by_folder(split):
            listed.setdefault(folder, set()).update(names)
            roots.setdefault(folder, split.root)
    faults = []
    for folder, names in listed.items():
        try:
            with os.scandir(folder) as entries:
                others = sorted(
                    entry.name
                    for entry in entries
                    if entry.name not in names and is_image_name(entry.name) and entry.is_file()
                )
        except OSError:
            continue
        for name in others:
            file = os.path.relpath(folder / name, roots[folder])
            file = brief(file) if name_fault(file) else file  # such as a name that is no UTF-8
            kind = Kind.UNLISTED_IMAGE
            reason = "is an image that no split lists; it is not used"
            faults.append(Fault(file, "image", reason, "dropped", kind, kind.fix))
    return faults


def _by_folder(split: Dataset) -> Iterable[tuple[Path, set[str]]]:
    found: dict[str, set[str]] = {}
    for file in split.files.tolist():
        folder, name = os.path.split(file)
        found.setdefault(folder, set()).add(name)
    for file in split.left_out:
        folder, name = os.path.split(file)
        if folder in found:
            found[folder].add(name)
    return ((split.root / folder, names) for folder, names in found.items())
