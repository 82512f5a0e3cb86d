"""What a check found, in sentences for who knows the pictures and not the program; the most urgent first."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from retinanet.data import Fault
from retinanet.data.kinds import Kind
from retinanet.training.anchor_advice import about_anchors
from retinanet.training.findings import Findings
from retinanet.training.sentences import Level, Sentence

NAMED = 3
EVERY_IMAGE = "Every image was readable."
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
        Kind.DARK_IMAGE,
        Kind.OTHER_SIZE,
        Kind.ROTATED_LABELS,
    }
)
# Images of which there is nothing to look at, and labels of which there is nothing to read.
LOST_IMAGES = frozenset({Kind.MISSING_IMAGE, Kind.UNREADABLE_IMAGE, Kind.TRUNCATED_IMAGE, Kind.HUGE_IMAGE})
# Faults that cost more than a box: a whole image, or all its boxes.
WORST = LOST_IMAGES | {
    Kind.MISSING_ANNOTATION,
    Kind.UNREADABLE_LABELS,
    Kind.BAD_FILE_NAME,
    Kind.OTHER_SIZE,
    Kind.ROTATED_LABELS,
}
# Splits that training cannot do without.
NEEDED = ("train", "val")


def sentences(found: Findings) -> list[Sentence]:
    """Return what was found, in the order in which it matters."""
    every = [
        *_about_splits(found),
        *_about_bare_splits(found),
        *_about_faults(found),
        *_about_leaks(found),
        *_about_doubles(found),
        *_about_classes(found),
        *_about_crowds(found),
        *(about_anchors(found.data, found.anchors) if found.anchors else ()),
        *_about_empty_images(found),
    ]
    order: tuple[Level, ...] = ("stop", "look", "good")
    return sorted(every, key=lambda sentence: order.index(sentence.level))


def exit_code(found: Findings) -> int:
    """Return 2 where the data set cannot be used, 1 where something was repaired, dropped or not read, else 0."""
    if any(sentence.level == "stop" for sentence in _about_splits(found)):
        return 2
    return 1 if found.fault_total or found.refused else 0


def _about_splits(found: Findings) -> Iterator[Sentence]:
    for name, reason in found.refused.items():
        yield Sentence(_level_of(name), f"The split {name} could not be read: {reason}")
    names = [split.split for split in found.splits]
    for split in found.splits:
        if split.unreadable == split.images:
            yield Sentence(_level_of(split.split), f"No image of the split {split.split} can be read.")
        if not split.objects and split.split in NEEDED:
            yield Sentence(
                "stop",
                f"The split {split.split} has no box in {_of(split.images, 'image')}: there is nothing to learn "
                "from, or to judge by. Check that the labels were exported with the images."
                + "".join(f" {fault.file}: {fault.reason}." for fault in _bare(found, split.split)),
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
    there = {*names, *found.refused}
    if not there.issuperset(NEEDED):
        has = (
            "this is one set without splits"
            if found.one_set and "train" in there
            else f"there is only {' and '.join(sorted(there))}"
        )
        divide = (
            " Make them, a fifth of the images for val: retinanet data convert "
            f"{shlex.quote(found.data)} OUT --format coco --split-shares 0.8,0.2"
        )
        can_divide = len(there) == 1 or "val" not in there
        yield Sentence(
            "look",
            f"Training needs a split to learn from, train, and one to judge by, val; {has}."
            + divide * can_divide,
        )


def _level_of(split: str) -> Level:
    return "stop" if split in NEEDED else "look"


def _about_faults(found: Findings) -> Iterator[Sentence]:
    boxes = sum(split.objects + split.ignored for split in found.splits)
    images = sum(split.images for split in found.splits)
    if not found.fault_total:
        whose = f" of {' and '.join(split.split for split in found.splits)}" if found.refused else ""
        yield Sentence(
            "good",
            f"Every box and every image{whose} was readable: {_of(boxes, 'box')} in {_of(images, 'image')}."
            + ("" if found.refused else " Nothing was repaired or left out."),
        )
        return
    read = _how_readable(found, images)
    for action, done in (
        ("dropped", "left out"),
        ("repaired", "repaired, as only one thing can have been meant"),
    ):
        counts: Counter[str] = Counter()
        for of in found.fault_counts:
            counts[of.kind] += of.count * (of.action == action and not _is_bare(of.kind, action))
        counts = +counts
        if not counts:
            continue
        kinds = sorted(counts, key=lambda kind: (kind not in WORST, -counts[kind]))
        kept = {
            kind: [p for p in found.faults if (p[1].kind, p[1].action) == (kind, action)] for kind in kinds
        }
        listed = "; ".join(_of_kind(kind, counts[kind], kept[kind]) for kind in kinds[:NAMED])
        rest = kinds[NAMED:]
        more = f"; and {_of(len(rest), 'more kind')} ({', '.join(rest)})" if rest else ""
        fix = _what_to_do({kind: kept[kind] for kind in kinds[:NAMED]})
        number = counts.total()
        was = "was" if number == 1 else "were"
        yield Sentence(
            "look", f"{read} {_of(number, _noun(kinds))} {was} {done}: {listed}{more}.{fix}".strip()
        )
        read = ""
    if read == EVERY_IMAGE:
        yield Sentence("good", read)


def _is_bare(kind: str, action: str) -> bool:
    """Return whether this is a split without any label file, which gets a sentence of its own."""
    return (kind, action) == (Kind.MISSING_ANNOTATION, "repaired")


def _about_bare_splits(found: Findings) -> Iterator[Sentence]:
    for split in found.splits:
        # Of a split that needs boxes it is said already that there are none.
        for fault in _bare(found, split.split) if split.split not in NEEDED else ():
            yield Sentence("look", f"{fault.file}: {fault.reason}. What to do: {fault.fix}.")


def _bare(found: Findings, split: str) -> list[Fault]:
    return [fault for name, fault in found.faults if name == split and _is_bare(fault.kind, fault.action)]


def _what_to_do(pairs: Mapping[str, Sequence[tuple[str, Fault]]]) -> str:
    """Return what mends each kind of fault; of unknown classes the first ones, which are not alike."""
    advice = {}
    for kind, of_kind in pairs.items():
        fixes = list(dict.fromkeys(fault.fix for _, fault in of_kind if fault.fix))
        if fixes:
            advice[kind] = "; ".join(fixes[: NAMED if kind == Kind.UNKNOWN_CLASS else 1])
    if len(pairs) == 1:
        return "".join(f" What to do: {fix}." for fix in advice.values())
    return "".join(f" What to do about {kind}: {fix}." for kind, fix in advice.items())


def _how_readable(found: Findings, images: int) -> str:
    """Say whether images and labels could be read, whoever found out: the reader, which drops, or the decoder."""
    lost = sum(of.count for of in found.fault_counts if of.kind in LOST_IMAGES)
    labels = sum(of.count for of in found.fault_counts if of.kind == Kind.UNREADABLE_LABELS)
    parts = []
    if lost:
        still_counted = sum(split.unreadable for split in found.splits)
        parts.append(f"{lost:,} of {images + max(0, lost - still_counted):,} images cannot be read.")
    if labels:
        parts.append(f"{_of(labels, 'image')} {'has' if labels == 1 else 'have'} labels that cannot be read.")
    return " ".join(parts) or EVERY_IMAGE


def _noun(kinds: list[str]) -> str:
    """Return what faults of these kinds are about, in one word."""
    for noun, of_it in (("box", ABOUT_BOXES), ("image", ABOUT_IMAGES)):
        if of_it.issuperset(kinds):
            return noun
    return "entry"


def _of_kind(kind: str, number: int, pairs: list[tuple[str, Fault]]) -> str:
    named = ", ".join(f"{_place(split, fault)}" for split, fault in pairs[:NAMED])
    if not named:  # counted only: others came first
        return f"{number:,} x {kind}"
    more = f" and {number - len(pairs[:NAMED]):,} more" if number > len(pairs[:NAMED]) else ""
    return f"{number:,} x {kind} ({named}{more})"


def _place(split: str, fault: Fault) -> str:
    # An image that is listed wrongly is one line of a list; any other is its own file.
    of_list = fault.record.startswith(("line ", "images["))
    within = f", {fault.record}" if of_list or fault.kind not in ABOUT_IMAGES else ""
    return f"{fault.file}{within}" + (f" in {split}" if split else "")


def _about_leaks(found: Findings) -> Iterator[Sentence]:
    pairs = sorted({(leak.split_a, leak.split_b) for leak in found.leaks})
    for a, b in pairs:
        leaks = [leak for leak in found.leaks if (leak.split_a, leak.split_b) == (a, b)]
        equal = sum(leak.equal for leak in leaks)
        first = min(leaks, key=lambda leak: (not leak.equal, leak.bits))
        one = len(leaks) == 1
        stand, look = ("stands", "looks") if one else ("stand", "look")
        alike = ", byte for byte" if equal == len(leaks) else f", or {look} like one there"
        if 0 < equal < len(leaks):
            alike += f", {equal:,} of them byte for byte"
        names = " and ".join(dict.fromkeys((first.file_b, first.file_a))) + ("" if one else ", for one")
        yield Sentence(
            "look",
            f"{_of(len(leaks), 'image')} of {b} {stand} in {a}, too{alike} ({names}). "
            "A detector that has seen the answer is judged too well: compare them by eye, and keep pictures of one "
            "scene in one split.",
        )
    if len(found.splits) > 1 and not found.leaks:
        which = "the splits that could be read" if found.refused else "splits"
        yield Sentence("good", f"No image stands in two {'of ' * bool(found.refused)}{which}.")


def _about_doubles(found: Findings) -> Iterator[Sentence]:
    for name in dict.fromkeys(double.split for double in found.doubles):
        own = [double for double in found.doubles if double.split == name]
        have = "is byte for byte an earlier one" if len(own) == 1 else "are byte for byte earlier ones"
        yield Sentence(
            "look",
            f"{_of(len(own), 'image')} of {name} {have} there under another name ({own[0].again} and {own[0].file}, "
            "for one). Such a picture counts several times, and boxes that differ contradict each other: keep one.",
        )


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
            f"{_of(empty, 'image')} of {images:,} hold{'s' * (empty == 1)} no object. They teach what is not "
            "one; if nobody has labelled them yet, take them out.",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _of(number: int, noun: str) -> str:
    plural = {"box": "boxes", "entry": "entries"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"
