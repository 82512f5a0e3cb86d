"""What a check found, in sentences for who knows the pictures and not the program; the most urgent first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from retinanet.data import Fault
from retinanet.data.kinds import Kind
from retinanet.training.anchor_advice import about_anchors
from retinanet.training.findings import Findings
from retinanet.training.sentences import Level, Sentence

NAMED = 3
# COCO's number of detections an image, which most detectors keep to.
USUAL_DETECTIONS = 100
# How many times more boxes than another a class has before a word is said, and how few boxes are few.
IMBALANCE, FEW = 10, 50
# What faults of one sort are counted as; those of several sorts, and of any other, are entries.
ABOUT_BOXES = frozenset(
    {
        Kind.NOT_A_NUMBER,
        Kind.NOT_FINITE,
        Kind.REVERSED_BOX,
        Kind.EMPTY_BOX,
        Kind.EQUAL_CORNERS,
        Kind.OUTSIDE_IMAGE,
        Kind.DUPLICATE_BOX,
        Kind.ORPHAN_ANNOTATION,
        Kind.UNKNOWN_CLASS,
        Kind.MISSING_CLASS,
    }
)
ABOUT_IMAGES = frozenset(
    {
        Kind.MISSING_IMAGE,
        Kind.DUPLICATE_LISTING,
        Kind.UNLISTED_IMAGE,
        Kind.UNREADABLE_IMAGE,
        Kind.TRUNCATED_IMAGE,
        Kind.HUGE_IMAGE,
        Kind.ANIMATED_IMAGE,
        Kind.OTHER_SIZE,
        Kind.ROTATED_LABELS,
    }
)


def sentences(found: Findings) -> list[Sentence]:
    """Return what was found, in the order in which it matters."""
    every = [
        *_about_splits(found),
        *_about_faults(found),
        *_about_leaks(found),
        *_about_classes(found),
        *_about_crowds(found),
        *(about_anchors(found.data, found.anchors) if found.anchors else ()),
        *_about_empty_images(found),
    ]
    order: tuple[Level, ...] = ("stop", "look", "good")
    return sorted(every, key=lambda sentence: order.index(sentence.level))


def exit_code(found: Findings) -> int:
    """Return 2 where the data set cannot be used, 1 where something was repaired or dropped, else 0."""
    if any(sentence.level == "stop" for sentence in _about_splits(found)):
        return 2
    return 1 if found.faults else 0


def _about_splits(found: Findings) -> Iterator[Sentence]:
    for name, reason in found.refused.items():
        yield Sentence("stop", f"The split {name} could not be read: {reason}")
    names = [split.split for split in found.splits]
    for split in found.splits:
        if split.unreadable == split.images:
            yield Sentence("stop", f"No image of the split {split.split} can be read.")
        if not split.objects and split.split in ("train", "val"):
            yield Sentence(
                "stop",
                f"The split {split.split} has no box in {_of(split.images, 'image')}: there is nothing to learn "
                "from, or to judge by. Check that the labels were exported with the images.",
            )
    for a, b in combinations(found.splits, 2):
        classes = [list(zip(split.class_ids, split.per_class, strict=True)) for split in (a, b)]
        if {a.split, b.split} == {"train", "val"} and classes[0] != classes[1]:
            of_a, of_b = (_listed([f"{name} (id {number})" for number, name in of]) for of in classes)
            yield Sentence(
                "stop",
                f"The splits have different classes: {of_a} in {a.split}, {of_b} in {b.split}. Training needs the same "
                "ones in both, with the same ids.",
            )
    if not {"train", "val"} <= {*names, *found.refused}:
        yield Sentence(
            "look",
            f"Training needs a split to learn from, train, and one to judge by, val; there is only "
            f"{' and '.join(names)}.",
        )


def _about_faults(found: Findings) -> Iterator[Sentence]:
    boxes = sum(split.objects + split.ignored for split in found.splits)
    images = sum(split.images for split in found.splits)
    unreadable = sum(split.unreadable for split in found.splits)
    if not found.faults:
        yield Sentence(
            "good",
            f"Every box and every image was readable: {_of(boxes, 'box')} in {_of(images, 'image')}. "
            "Nothing was repaired or left out.",
        )
        return
    read = (
        f"{unreadable:,} of {images:,} images cannot be read." if unreadable else "Every image was readable."
    )
    for action, done in (
        ("dropped", "left out"),
        ("repaired", "repaired, as only one thing can have been meant"),
    ):
        pairs = [pair for pair in found.faults if pair[1].action == action]
        if not pairs:
            continue
        kinds = [kind for kind, _ in Counter(fault.kind for _, fault in pairs).most_common()]
        listed = "; ".join(_of_kind(kind, [p for p in pairs if p[1].kind == kind]) for kind in kinds[:NAMED])
        more = f"; and {len(kinds) - NAMED} more kinds" if len(kinds) > NAMED else ""
        fix = f" What to do: {pairs[0][1].fix}." if len(kinds) == 1 and pairs[0][1].fix else ""
        was = "was" if len(pairs) == 1 else "were"
        yield Sentence(
            "look", f"{read} {_of(len(pairs), _noun(kinds))} {was} {done}: {listed}{more}.{fix}".strip()
        )
        read = ""


def _noun(kinds: list[str]) -> str:
    """Return what faults of these kinds are about, in one word."""
    for noun, of_it in (("box", ABOUT_BOXES), ("image", ABOUT_IMAGES)):
        if of_it.issuperset(kinds):
            return noun
    return "entry"


def _of_kind(kind: str, pairs: list[tuple[str, Fault]]) -> str:
    named = ", ".join(f"{_place(split, fault)}" for split, fault in pairs[:NAMED])
    more = f" and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else ""
    return f"{len(pairs):,} x {kind} ({named}{more})"


def _place(split: str, fault: Fault) -> str:
    within = f", {fault.record}" if fault.kind not in ABOUT_IMAGES else ""
    return f"{fault.file}{within}" + (f" in {split}" if split else "")


def _about_leaks(found: Findings) -> Iterator[Sentence]:
    pairs = sorted({(leak.split_a, leak.split_b) for leak in found.leaks})
    for a, b in pairs:
        leaks = [leak for leak in found.leaks if (leak.split_a, leak.split_b) == (a, b)]
        equal = sum(leak.equal for leak in leaks)
        first = min(leaks, key=lambda leak: (not leak.equal, leak.bits))
        same = f", {equal:,} of them byte for byte" if equal else ""
        yield Sentence(
            "look",
            f"{_of(len(leaks), 'image')} of {b} stand in {a}, too, or look like one there{same} "
            f"({first.file_b} and {first.file_a}, for one). A detector that has seen the answer is judged too well: "
            f"compare them by eye, and keep pictures of one scene in one split.",
        )
    if len(found.splits) > 1 and not found.leaks:
        yield Sentence("good", "No image stands in two splits.")


def _about_classes(found: Findings) -> Iterator[Sentence]:
    for split in found.splits:
        absent = [name for name, count in split.per_class.items() if not count]
        if absent and split.objects:
            then = "it cannot be learned" if split.split == "train" else "nobody can say how well it is found"
            yield Sentence("look", f"{_listed(absent)}: no box in {split.split}, so {then}.")
    counts = next((s for s in found.splits if s.split == "train"), found.splits[0])
    present = {name: count for name, count in counts.per_class.items() if count}
    if len(present) > 1:
        most, least = max(present, key=lambda n: present[n]), min(present, key=lambda n: present[n])
        ratio = present[most] / present[least]
        if ratio >= IMBALANCE:
            yield Sentence(
                "look",
                f"{most} has {ratio:,.0f} times as many boxes as {least} ({present[most]:,} and {present[least]:,}). "
                f"Both count alike when a detector is judged: more pictures with {least} help most.",
            )
    few = [f"{name} ({count})" for name, count in present.items() if count < FEW]
    if few:
        yield Sentence(
            "look", f"Fewer than {FEW} boxes to learn from: {_listed(few)}. Expect little, or add some."
        )


def _about_crowds(found: Findings) -> Iterator[Sentence]:
    fullest = max(found.splits, key=lambda split: split.fullest)
    if fullest.fullest <= USUAL_DETECTIONS:
        return
    enough = 100 * (fullest.fullest // 100 + 1)
    yield Sentence(
        "look",
        f"Up to {fullest.fullest:,} objects stand in an image while {USUAL_DETECTIONS} detections are kept, as most "
        f"detectors and COCO's rules have it: {fullest.fullest - USUAL_DETECTIONS:,} of those in "
        f"{fullest.fullest_file} could never be found. `retinanet train` sees it and keeps enough for the training "
        f"images; for any other command say --max-detections {enough}.",
    )


def _about_empty_images(found: Findings) -> Iterator[Sentence]:
    empty = sum(split.empty for split in found.splits)
    images = sum(split.images for split in found.splits)
    if empty:
        yield Sentence(
            "look" if empty > images / 2 else "good",
            f"{_of(empty, 'image')} of {images:,} hold no object. They teach what is not one; if nobody has "
            "labelled them yet, take them out.",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _of(number: int, noun: str) -> str:
    plural = {"box": "boxes", "entry": "entries"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"
