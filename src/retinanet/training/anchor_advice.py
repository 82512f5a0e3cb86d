"""What a check found about anchors, in sentences for who has never heard of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from retinanet.training.findings import AnchorFindings, ClassFit
from retinanet.training.sentences import Sentence, share

# Share of a class's objects with an anchor that fits from which nothing is said; classes and causes worth naming.
WELL_COVERED, NAMED, WORTH_NAMING = 0.9, 3, 0.05
# Of all objects, what another size or other anchors must add to be worth a word.
WORTH_SAYING = 0.01


def about_anchors(data: str, at: AnchorFindings) -> Iterator[Sentence]:
    """Say whether anchors fit, which classes they do not fit and why, and what helps."""
    poor = {
        name: fit
        for name, fit in at.per_class.items()
        if fit.coverage.at_50 is not None and fit.coverage.at_50 < WELL_COVERED
    }
    explained = (
        "An anchor is a box of fixed size and shape that the network starts from and moves; it fits an object when "
        "the two share half of what they cover together (IoU 0.5)."
    )
    where = f"At {at.image_size} pixels (the image's shortest side as the network sees it)"
    if not poor:
        reached = at.overall.at_50 or 0.0
        yield Sentence(
            "good",
            f"{where}, {share(reached)} of the objects have an anchor that fits, and no class falls behind. "
            f"{explained}",
        )
        return
    worst = sorted(poor, key=lambda name: poor[name].coverage.at_50 or 0.0)
    parts = [_of_class(name, poor[name], at) for name in worst[:NAMED]]
    others = len(worst) - NAMED
    more = f" The same holds for {others} more class{'es' * (others > 1)}." if others > 0 else ""
    yield Sentence("look", f"{where}, {'; '.join(parts)}.{more} {explained} {_what_to_do(data, at)}")


def _of_class(name: str, fit: ClassFit, at: AnchorFindings) -> str:
    lacking = (
        f"{share(1 - (fit.coverage.at_50 or 0.0))} of the objects of class {name} have no anchor that fits"
    )
    smallest = min(at.anchors.sizes) * min(at.anchors.scales)
    largest = max(at.anchors.sizes) * max(at.anchors.scales)
    causes = {
        f"{share(fit.too_small)} are smaller than the smallest anchor, {smallest:.0f} pixels": fit.too_small,
        f"{share(fit.too_large)} are larger than the largest anchor, {largest:.0f} pixels": fit.too_large,
        f"{share(fit.too_long)} are longer or flatter than any anchor": fit.too_long,
    }
    cause, most = max(causes.items(), key=lambda item: item[1])
    return f"{lacking} ({cause})" if most >= WORTH_NAMING else lacking


def _what_to_do(data: str, at: AnchorFindings) -> str:
    fitted = {
        row.image_size: row.coverage.at_50 or 0.0 for row in at.compared if row.anchors.name == "fitted"
    }
    # Training may take other anchors at another size: its row comes after that of the usual ones, if it has one.
    taken = {row.image_size: row.coverage.at_50 or 0.0 for row in at.compared if row.anchors.name != "fitted"}
    here = at.overall.at_50 or 0.0
    ways = []
    if fitted[at.image_size] > here + WORTH_SAYING:
        ways.append(
            f"anchors fitted to your boxes reach {share(fitted[at.image_size])} of all objects instead of "
            f"{share(here)} (retinanet data anchors {shlex.quote(data)} --image-size {at.image_size} "
            "--output anchors.yaml, then train with --anchors anchors.yaml)"
        )
    larger = [side for side in taken if side > at.image_size and taken[side] > here + WORTH_SAYING]
    if larger:
        ways.append(
            f"larger images reach {share(taken[larger[0]])} (--image-size {larger[0]}), and take longer"
        )
    return (
        f"What helps: {'; '.join(ways)}."
        if ways
        else "Neither other anchors nor larger images change that much."
    )
