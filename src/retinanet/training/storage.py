"""How the images of a data set are stored, and what becomes of their pixels before the network sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from retinanet.data import Dataset
from retinanet.data.auditing import ImageFacts, label_frames
from retinanet.training.findings import Stored

Decoded: TypeAlias = Sequence[tuple[Dataset, Sequence[ImageFacts | None]]]

ON_WHITE = "what is transparent shows white"
# Pillow's names of stored pixels; what begins with "I" has 16 bits.
BECOMES = {
    "RGB": ("colour, RGB", "taken as it is"),
    "1": ("black and white, 1 bit", "three equal channels"),
    "L": ("grey, 8 bits", "three equal channels"),
    "LA": ("grey with transparency", f"three equal channels; {ON_WHITE}"),
    "La": ("grey with transparency", f"three equal channels; {ON_WHITE}"),
    "RGBA": ("colour with transparency", f"RGB; {ON_WHITE}"),
    "RGBa": ("colour with transparency", f"RGB; {ON_WHITE}"),
    "P": ("palette of colours", f"RGB; {ON_WHITE}"),
    "PA": ("palette with transparency", f"RGB; {ON_WHITE}"),
    "CMYK": ("colours of print, CMYK", "converted to RGB"),
}
SIXTEEN_BITS = ("grey, 16 bits", "scaled to 8 bits (0..65535 becomes 0..255), three equal channels")
FRAMES = {
    "seen": "as people see the picture",
    "stored": "as it is stored, before it is turned",
    "either": "either way, their sizes do not tell",
    "neither": "neither way: another size altogether",
}


def label_frames_of(splits: Decoded) -> dict[str, int]:
    """Count over several splits which frame the labels of EXIF-turned images follow; see `label_frames`."""
    found = [label_frames(dataset, facts) for dataset, facts in splits]
    return {frame: sum(counts[frame] for counts in found) for frame in FRAMES}


def images_as_stored(splits: Decoded, frames: Mapping[str, int]) -> tuple[Stored, ...]:
    """Return a row a mode, the most frequent first; then, where there are any, animations and EXIF-turned images."""
    facts = [fact for _, of in splits for fact in of if fact is not None]
    modes = Counter(_words(fact.mode) for fact in facts)
    rows = [Stored(how, images, becomes) for (how, becomes), images in modes.most_common()]
    films = sum(fact.frames > 1 for fact in facts)
    if films:
        rows.append(Stored("several pictures in a file (animation, pages)", films, "the first is used"))
    turned = sum(frames.values())
    if turned:
        follow = ", ".join(f"{frames[name]:,} {words}" for name, words in FRAMES.items() if frames[name])
        rows.append(Stored("turned by EXIF", turned, f"turned upright; labels follow the image: {follow}"))
    return tuple(rows)


def _words(mode: str) -> tuple[str, str]:
    if mode.startswith("I"):
        return SIXTEEN_BITS
    return BECOMES.get(mode, (mode, "converted to RGB"))
