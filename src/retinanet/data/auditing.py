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
from numpy.typing import NDArray
from PIL import Image

from retinanet.data.dataset import Dataset, Fault
from retinanet.data.facts_cache import FactsCache
from retinanet.data.isolation import each
from retinanet.data.kinds import Kind
from retinanet.errors import ImageError
from retinanet.images import UInt8Array, examine

NEAR = 4  # of 64 bits: the same picture saved again, scaled or slightly brightened
FLAT_BITS = 8  # a difference hash with fewer bits of either kind belongs to a flat picture and tells nothing
BLOCK = 1024, 8192  # images of b and of a that are compared at a time: 32 MiB
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFacts:
    """What one decoded image file is.

    Args:
        index: position in its data set.
        width, height: pixels, as a person sees the image.
        orientation: EXIF's, 1 to 8; from 5 on the stored picture has width and height exchanged.
        mode: Pillow's name of the stored pixels: "RGB", "L", "P", "RGBA", "CMYK", "I;16" ...
        frames: pictures in the file; the first one is used.
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
    digest: str
    dhash: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the picture as it is stored, before EXIF orientation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


class NearPair(NamedTuple):
    """Two images that look alike: positions in their data sets, byte-equal or not, differing bits of 64."""

    a: int
    b: int
    equal: bool
    distance: int


def audit_images(
    dataset: Dataset,
    *,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    cache: Path | None = None,
) -> tuple[list[ImageFacts | None], list[Fault]]:
    """Decode every image and compare it with its annotations.

    Named are images that are missing, unreadable, truncated or too large (training goes on without them), that have
    another size than annotated or whose labels follow the stored, unrotated pixels (dropped likewise), and
    animations (the first frame counts). Modes are facts, not faults: `decode` makes RGB of them all.

    Args:
        workers: processes that decode; 0 decodes in this one. A decoder that crashes costs a worker its image, which
            is named, and this process its life.
        progress: called with the number of images done so far.
        cache: folder of what was found before, by path, size and time of change of a file; the platform's
            place for caches when not given. It may not lie in the data folder.

    Returns:
        One entry an image, None where it could not be decoded; and what is wrong, in the order of the images.

    Raises:
        ConfigError: the cache lies in the data folder.
    """
    facts: list[ImageFacts | None] = [None] * len(dataset)
    refused: dict[int, Fault] = {}
    done = 0
    with FactsCache(cache, outside=dataset.root) as known:
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


_Found = tuple[int, int, int, str, int, str, int]  # ImageFacts without its index


def _facts_of(path: str) -> _Found | _Refusal:
    """Decode one file; runs in a worker."""
    try:
        pixels, orientation, mode, frames = examine(path)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (ImageError, OSError) as error:
        return _Refusal(_kind_of(error, path), str(error))
    return pixels.shape[1], pixels.shape[0], orientation, mode, frames, digest, difference_hash(pixels)


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
        splits: all splits of a data set; one that is left out has all its images named.
    """
    listed: dict[Path, set[str]] = {}
    roots: dict[Path, Path] = {}
    for split in splits:
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
                    if entry.name not in names
                    and Path(entry.name).suffix.lower() in SUFFIXES
                    and entry.is_file()
                )
        except OSError:
            continue
        for name in others:
            file = os.path.relpath(folder / name, roots[folder])
            kind = Kind.UNLISTED_IMAGE
            reason = "is an image that no split lists; it is not used"
            faults.append(Fault(file, "image", reason, "dropped", kind, kind.fix))
    return faults


def _by_folder(split: Dataset) -> Iterable[tuple[Path, set[str]]]:
    found: dict[str, set[str]] = {}
    for file in split.files.tolist():
        folder, name = os.path.split(file)
        found.setdefault(folder, set()).add(name)
    return ((split.root / folder, names) for folder, names in found.items())


def near_duplicates(
    facts_a: Sequence[ImageFacts | None], facts_b: Sequence[ImageFacts | None], *, distance: int = NEAR
) -> list[NearPair]:
    """Find, for each image of b, the image of a that is equal to it or looks most like it.

    Byte-equal files come before files that only look alike: those whose difference hashes differ in at most
    `distance` of 64 bits. Flat pictures, whose hash tells nothing, are compared by their bytes only. Of equals the
    first of a is given. With the same facts on both sides an image is compared with those before it.

    Returns:
        At most one pair an image of b, in the order of b.
    """
    a, b = ([fact for fact in facts if fact is not None] for facts in (facts_a, facts_b))
    same = facts_a is facts_b
    first: dict[str, int] = {}
    for place, fact in enumerate(a):
        first.setdefault(fact.digest, place)
    pairs: dict[int, NearPair] = {}
    for place, fact in enumerate(b):
        twin = first.get(fact.digest)
        if twin is not None and not (same and twin == place):
            pairs[place] = NearPair(a[twin].index, fact.index, True, 0)
    open_b = np.array(
        [i for i, fact in enumerate(b) if i not in pairs and not _is_flat(fact.dhash)], np.int64
    )
    open_a = np.array([i for i, fact in enumerate(a) if not _is_flat(fact.dhash)], np.int64)
    signs_a, signs_b = (
        _signs([side[i].dhash for i in places]) for side, places in ((a, open_a), (b, open_b))
    )
    nearest = _nearest(signs_a, signs_b, open_a, open_b, same=same)
    for place, (twin, bits) in zip(open_b.tolist(), nearest, strict=True):
        if bits <= distance:
            pairs[place] = NearPair(a[twin].index, b[place].index, False, bits)
    return [pairs[place] for place in sorted(pairs)]


def _is_flat(dhash: int) -> bool:
    return not FLAT_BITS <= dhash.bit_count() <= 64 - FLAT_BITS


def _signs(hashes: Sequence[int]) -> NDArray[np.float32]:
    """Return `[N, 64]`, the bits of hashes as -1 and 1, whose products count agreement."""
    octets = np.array(hashes, ">u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1


def _nearest(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    places_a: NDArray[np.int64],
    places_b: NDArray[np.int64],
    *,
    same: bool,
) -> list[tuple[int, int]]:
    """Return (place in a, differing bits) for each row of b, 65 bits where there is none to compare with.

    A matrix product a block: every pair is compared, so nothing that a user brings makes it slower.
    """
    best, who = np.full(len(b), -66, np.float32), np.zeros(len(b), np.int64)
    for row in range(0, len(b), BLOCK[0]):
        rows = slice(row, row + BLOCK[0])
        for column in range(0, len(a), BLOCK[1]):
            columns = slice(column, column + BLOCK[1])
            if same and places_a[column] >= places_b[rows][-1]:
                break
            agreement = b[rows] @ a[columns].T  # 64 - 2 x differing bits, exact in float32
            if same:
                agreement[places_a[columns][None] >= places_b[rows][:, None]] = -66
            top = agreement.argmax(axis=1)
            value = agreement[np.arange(len(top)), top]
            better = value > best[rows]
            best[rows][better] = value[better]
            who[rows][better] = places_a[columns][top[better]]
    return list(zip(who.tolist(), ((64 - best) / 2).astype(np.int64).tolist(), strict=True))
