"""What the data set and the device decide: image size, anchors, and how many steps."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from retinanet.anchors import AnchorSpec
from retinanet.data import Dataset
from retinanet.data.anchor_fit import fit_anchors
from retinanet.data.coverage import best_overlaps, coverage_by_class, objects_in_network
from retinanet.data.sampling import epoch_length
from retinanet.errors import ConfigError
from retinanet.images import Preprocessing
from retinanet.records import Ignore
from retinanet.training.anchor_file import AskedAnchors
from retinanet.training.configuration import TrainingOptions
from retinanet.training.recipes import Recipe

# Objects whose anchors are looked up at most.
OBJECTS_SAMPLED = 20_000
# An object's side in the network input that anchors and stride 8 still resolve: two cells of P3.
COMFORTABLE_SIDE = 16
# Share of objects that some anchor reaches with IoU 0.5, for which images are enlarged beyond the comfortable.
WELL_COVERED = 0.9
# Share of a class's objects below which a run says what to do, and classes named.
POORLY_COVERED, CLASSES_NAMED = 0.7, 5
# What fitted anchors must add to that share to be taken.
WORTH_FITTING = 0.1
# What a larger image must add to that share, and how many sides are tried.
WORTH_LARGER, SIDES_TRIED = 0.02, 6
# Objects from which a class's size is known.
KNOWN_FROM = 5
# Images are planned for a longest side of this times the shortest, the paper's 800 / 1333, which keeps a 3:5 picture at
# its shortest side; where more than a tenth of the images are longer, for theirs.
USUAL_LENGTH, KEPT_WHOLE = 1333 / 800, 0.9
# Of images of the usual length; of longer ones as many pixels.
LARGEST_SIDE = {"cpu": 256, "cuda": 640}
# A CPU's images may be larger still if as many pixels as the recipe sees then show as many objects.
OBJECTS_SEEN, LARGEST_OF_ALL = 30_000, 640
# How many pixels a second --time is taken for there before a trial says it: ResNet-18's on two cores in fp32.
PIXELS_A_SECOND = 100_000
# Objects that a step shows, by which a CPU's batch becomes smaller than the recipe's.
OBJECTS_A_STEP = 80
# Images from which the padding of batches is estimated, at least.
LEAST_SAMPLE = 1000


def choose_preprocessing(
    recipe: Recipe,
    options: TrainingOptions,
    train: Dataset,
    choices: Sequence[AnchorSpec],
    device: torch.device,
    reasons: list[tuple[str, str, str]],
    *,
    speed: float = PIXELS_A_SECOND,
) -> Preprocessing:
    """Take the sides asked for or the recipe's, else those that the objects need; append the reason.

    Args:
        speed: pixels a second that `--time` is taken for.
    """
    if recipe.image_size is None:
        limit = _limit_of_device(recipe, options, train, device, speed)
        size, why = _image_size(recipe, train, choices, limit)
    else:
        size, why = recipe.image_size, "asked for" if options.image_size else f"recipe {recipe.name}"
    if options.weights is not None:
        why += f"; the model had {recipe.model.preprocessing.image_size}"
    frame = _frame(recipe, train, size)
    if recipe.max_size is None and (length := _length(train)) > USUAL_LENGTH:
        why += f"; {KEPT_WHOLE:.0%} of the images are at most {length:.2g} times as long as that"
    reasons.append(("image size", f"shortest side {frame.image_size}, longest {frame.max_size}", why))
    return frame


def _frame(recipe: Recipe, train: Dataset, size: int) -> Preprocessing:
    longest = recipe.max_size or longest_of(size, train)
    if longest < size:
        raise ConfigError(f"--max-size needs at least the shortest side, {size}; got {longest}")
    return replace(recipe.model.preprocessing, image_size=size, max_size=longest)


def longest_of(size: int, train: Dataset) -> int:
    """Return what the longest side may measure where nobody says, for a shortest side: in a frame that is shorter than
    most images, all of them would be smaller than the shortest side says.
    """
    return round(size * _length(train))


def _length(train: Dataset) -> float:
    """Return how many times its shortest side an image may be long and keep it."""
    longest, shortest = np.maximum(train.widths, train.heights), np.minimum(train.widths, train.heights)
    return max(USUAL_LENGTH, float(np.quantile(longest / shortest, KEPT_WHOLE)))


def _of_as_many_pixels(side: int, train: Dataset) -> int:
    """Return a side, in whole 32 px, at which images have as many pixels as those of the usual length at that side."""
    return max(32, 32 * round(side * math.sqrt(USUAL_LENGTH / _length(train)) / 32))


def _image_size(
    recipe: Recipe, train: Dataset, choices: Sequence[AnchorSpec], of_device: tuple[int, str]
) -> tuple[int, str]:
    """Choose the shortest side so that the usual object of every class gets a comfortable size and most objects
    have an anchor, within the device's means. Every class counts alike, as in AP: a rare class of small objects
    sets the size. Objects are measured by the images that they are in, which may be of many sizes.
    """
    native = int(np.median(np.minimum(train.widths, train.heights)))
    smallest = _smallest_class(train)
    limits = [of_device, (2 * native, "at most twice their size")]
    if recipe.max_size is not None:
        limits.append((recipe.max_size, f"--max-size {recipe.max_size}"))
    most, limit = min(limits)
    if smallest is None:
        return min(native, most), "no objects to go by"
    name, share = smallest
    wanted = COMFORTABLE_SIDE / share
    comfortable = max(min(128, most), min(32 * round(wanted / 32), 32 * (most // 32)))
    size, at_first, covered = _covering_size(recipe, train, choices, comfortable, most)
    percent = f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.0f}"
    why = f"half of class {name} is below {percent}% of its image's shortest side"
    if size > comfortable:
        why += f"; from {comfortable}, where anchors reach {at_first:.0%} of objects, to {size}, where {covered:.0%}"
    return size, f"{why}; {limit}"


def _limit_of_device(
    recipe: Recipe, options: TrainingOptions, train: Dataset, device: torch.device, speed: float
) -> tuple[int, str]:
    """Return the largest side that a device has time for, and why: a CPU's grows as long as what the recipe, or the
    time, shows at that side are objects enough, of images enough; more images than that, where they are asked for, make
    it no larger.
    """
    most, largest = LARGEST_SIDE["cuda" if device.type == "cuda" else "cpu"], LARGEST_OF_ALL
    if recipe.max_size is None:
        most, largest = _of_as_many_pixels(most, train), _of_as_many_pixels(largest, train)
    else:
        largest = min(largest, recipe.max_size)
    if not sized_by_pixels(recipe, device):
        return most, f"{most} at most on {device.type}"
    images, seconds = _images_asked_for(recipe, options, train), options.seconds()
    # What a run sees whatever its images cost; --time ends before.
    least = 0.0 if seconds is not None or images is not None else _least_images(recipe, train)
    few = images is not None and images * _objects_an_image(train) < OBJECTS_SEEN
    within = f" for {images:,.0f} images" if few else ""
    why = f"{most} at most on {device.type}{within if seconds is None else f' in {options.time}'}"
    pixels = recipe.pixels_seen if seconds is None else seconds * speed
    for size in range(most + 32, largest + 1, 32):
        affordable = pixels / padded_pixels(train, _frame(recipe, train, size), recipe.batch_size)
        seen = affordable if images is None else min(images, affordable)
        if affordable < least or seen * _objects_an_image(train) < OBJECTS_SEEN:
            break
        most = size
        means = f"{seen:,.0f} images" if seen == images else f"{pixels / 1e6:,.0f} megapixels"
        in_time = "" if seconds is None else f" in {options.time}"
        why = f"{most} at most on {device.type}, where {means}{in_time} show {OBJECTS_SEEN:,} objects"
    return most, why


def sized_by_pixels(recipe: Recipe, device: torch.device) -> bool:
    """Return whether how many pixels there is time for has a say in the size of images."""
    return device.type != "cuda" and recipe.pixels_seen > 0 and recipe.image_size is None


def _images_asked_for(recipe: Recipe, options: TrainingOptions, train: Dataset) -> float | None:
    """Return how many images the run sees, where the user says it."""
    if options.steps is not None:
        return options.steps * recipe.batch_size
    return None if options.epochs is None else options.epochs * epoch_length(train, recipe.repeat_rare)


def _least_images(recipe: Recipe, train: Dataset) -> float:
    return max(recipe.images_seen, recipe.epochs * epoch_length(train, recipe.repeat_rare))


def choose_batch(
    recipe: Recipe,
    options: TrainingOptions,
    train: Dataset,
    device: torch.device,
    reasons: list[tuple[str, str, str]],
    *,
    own: int,
) -> Recipe:
    """Return a CPU's recipe with fewer images a step where they are full of objects, at the rate of its `own` number;
    append the reason. From that rate goes what a batch that was asked for has.
    """
    objects = _objects_an_image(train)
    fitting = 2 ** round(math.log2(max(1.0, OBJECTS_A_STEP / max(objects, 1.0))))
    if device.type != "cpu" or not recipe.pixels_seen or fitting >= own:
        return recipe
    batch_size = options.asked_batch()
    if batch_size is None:
        batch_size = fitting
        why = f"an image holds {objects:.0f} objects{'' if options.lr else f'; at the rate of {own}'}"
        reasons.append(("batch size", str(fitting), why))
    ratio = own / fitting
    # `choose_rate` will divide by as much.
    rate = recipe.lr if options.lr else recipe.lr * (ratio if recipe.optimizer == "sgd" else math.sqrt(ratio))
    return replace(recipe, batch_size=batch_size, lr=rate)


def _objects_an_image(train: Dataset) -> float:
    return int((train.ignore == Ignore.NO).sum()) / max(1, len(train.widths))


def _covering_size(
    recipe: Recipe, train: Dataset, choices: Sequence[AnchorSpec], least: int, most: int
) -> tuple[int, float, float]:
    """Return the smallest side from `least` on at which anchors reach `WELL_COVERED` of the objects or, if none does,
    nearly as many as at the best; and the shares that they reach at `least` and there.
    """
    step = 32 * max(1, -(-(most - least) // (32 * SIDES_TRIED)))
    shares: dict[int, float] = {}
    for size in range(least, most + 1, step):
        frame = _frame(recipe, train, size)
        shares[size] = max(coverage(spec, train, frame) for spec in choices)
        if shares[size] >= WELL_COVERED:
            break
    enough = min(WELL_COVERED, max(shares.values()) - WORTH_LARGER)
    size = next(size for size, share in shares.items() if share >= enough)
    return size, shares[least], shares[size]


def _smallest_class(train: Dataset) -> tuple[str, float] | None:
    """Return the class whose median object has the smallest side, the square root of its area, as a share of its
    image's shortest side, and that share. Classes of a few objects count only where no other is known: one box drawn
    by mistake would set the size for all.
    """
    kept = train.ignore == Ignore.NO
    boxes, labels = train.boxes[kept], train.labels[kept]
    of_image = np.repeat(np.minimum(train.widths, train.heights), np.diff(train.offsets))[kept]
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / of_image
    of_class = {name: sides[labels == label] for label, name in enumerate(train.classes.names)}
    least = min(KNOWN_FROM, max(map(len, of_class.values()), default=0))
    medians = {name: float(np.median(own)) for name, own in of_class.items() if len(own) >= max(1, least)}
    return min(medians.items(), key=lambda item: item[1]) if medians else None


def anchor_choices(options: TrainingOptions, recipe: Recipe, *, of_model: bool) -> list[AnchorSpec]:
    """Return the anchors asked for alone; else the recipe's and, where they may fit the data, those of half and of a
    quarter of their size.

    Args:
        of_model: the anchors belong to a model to start from, whose heads know as many a location.
    """
    usual, asked = recipe.model.anchors, options.asked_anchors()
    if asked is not None:
        spec = with_anchors(usual, asked)
        if of_model and spec.per_location != usual.per_location:
            raise ConfigError(
                f"--anchors needs {usual.per_location} anchors a location (scales times ratios), as the model of "
                f"--weights has; got {spec.per_location}"
            )
        return [spec]
    factors = (1.0,) if of_model or not recipe.anchors_fit else (1.0, 0.5, 0.25)
    return [replace(usual, sizes=tuple(size * f for size in usual.sizes)) for f in factors]


def with_anchors(usual: AnchorSpec, asked: AskedAnchors) -> AnchorSpec:
    """Return the usual anchors with the sizes, scales and ratios that are asked for; a model of one level has the first
    size.
    """
    sizes = asked.sizes[: len(usual.sizes)]
    return replace(
        usual, sizes=sizes, scales=asked.scales or usual.scales, ratios=asked.ratios or usual.ratios
    )


class Taken(NamedTuple):
    """The anchors that training takes at an input size, the share of objects that each choice reaches, and the share
    that these reach, where they were fitted to the data, or that such reached where they were not worth it."""

    spec: AnchorSpec
    shares: list[float]
    fitted: float | None = None
    rejected: float | None = None


def anchors_at(choices: Sequence[AnchorSpec], train: Dataset, preprocessing: Preprocessing) -> Taken:
    """Return which anchors training takes at an input size: fitted ones where there is a choice and all of them are
    poor."""
    shares = [coverage(spec, train, preprocessing) for spec in choices]
    # Smaller anchors must earn their place: with equal coverage the usual ones stand.
    best = max(range(len(choices)), key=lambda i: shares[i] - 0.01 * i)
    if len(choices) > 1 and shares[best] < POORLY_COVERED:
        objects = objects_in_network(train, preprocessing, most=OBJECTS_SAMPLED)
        fitted = fit_anchors(choices[best], objects, train.labels[objects.rows])
        share = coverage(fitted, train, preprocessing)
        if share >= shares[best] + WORTH_FITTING:
            return Taken(fitted, shares, share)
        return Taken(choices[best], shares, rejected=share)
    return Taken(choices[best], shares)


def choose_anchors(
    options: TrainingOptions,
    train: Dataset,
    choices: Sequence[AnchorSpec],
    preprocessing: Preprocessing,
    reasons: list[tuple[str, str, str]],
    stands: str,
) -> AnchorSpec:
    """Take the anchors that cover most objects, fitted ones where the usual cover few; append the reason, and which
    classes they miss.

    Args:
        stands: whose anchors a single choice is, where they were not asked for.
    """
    spec, shares, fitted, rejected = anchors_at(choices, train, preprocessing)
    asked = options.asked_anchors()
    shown = [", ".join(f"{size:.4g}" for size in spec.sizes)]
    shown += [
        f"{name} " + ", ".join(f"{value:.3g}" for value in getattr(spec, name))
        for name in ("scales", "ratios")
        if fitted is not None or (asked and getattr(asked, name))
    ]
    if len(choices) > 1:
        compared = ", ".join(
            f"{share:.0%} from {spec.sizes[0]:g}" for share, spec in zip(shares, choices, strict=True)
        )
        if fitted is not None:
            compared += f", {fitted:.0%} from these, fitted to the data"
        if rejected is not None:
            compared += f", {rejected:.0%} from anchors fitted to the data"
        reasons.append(("anchors", "; ".join(shown), f"objects that reach IoU 0.5: {compared}"))
    else:
        why = "asked for" if options.anchors else stands
        if asked and asked.image_size not in (None, preprocessing.image_size):
            why += f" and fitted at shortest side {asked.image_size}, not {preprocessing.image_size}"
        if asked and asked.max_size not in (None, preprocessing.max_size):
            why += f" and fitted at longest side {asked.max_size}, not {preprocessing.max_size}"
        reasons.append(("anchors", "; ".join(shown), f"{why}; {shares[0]:.0%} of objects reach IoU 0.5"))
    if missed := _missed(spec, train, preprocessing):
        reasons.append(
            (
                "anchors miss",
                missed,
                f"no anchor reaches IoU 0.5 with them; below {POORLY_COVERED:.0%} of a class, "
                + _help_for_missed(
                    options, preprocessing.image_size, fitted is not None or rejected is not None
                ),
            )
        )
    return spec


def _missed(spec: AnchorSpec, train: Dataset, preprocessing: Preprocessing) -> str:
    """Return "28% of Platelets, ..." for the classes of which too few objects have an anchor."""
    objects = objects_in_network(train, preprocessing, most=OBJECTS_SAMPLED)
    classes = coverage_by_class(train, objects.rows, best_overlaps(spec, objects))
    poor = {name: 1 - of.at_50 for name, of in classes.items() if of.at_50 is not None}
    poor = {name: share for name, share in poor.items() if share > 1 - POORLY_COVERED}
    worst = sorted(poor.items(), key=lambda item: -item[1])
    more = f" and {len(worst) - CLASSES_NAMED} more classes" if len(worst) > CLASSES_NAMED else ""
    return ", ".join(f"{share:.0%} of {name}" for name, share in worst[:CLASSES_NAMED]) + more


def _help_for_missed(options: TrainingOptions, size: int, fitted: bool) -> str:
    """Return what helps; anchors that were asked for are fitted anew only where they were fitted at another size."""
    asked = options.asked_anchors()
    if fitted or (asked and asked.image_size in (None, size)):
        return "a larger --image-size helps"
    # The file that was asked for may have the usual name.
    file = f"anchors-{size}.yaml" if asked else "anchors.yaml"
    return (
        f"a larger --image-size or fitted anchors help: retinanet data anchors {shlex.quote(options.data)} "
        f"--image-size {size} --output {file}, then --anchors {file}"
    )


def coverage(spec: AnchorSpec, train: Dataset, preprocessing: Preprocessing) -> float:
    """Return the share of a sample of objects whose best anchor reaches IoU 0.5, in the network's frame."""
    overlaps = best_overlaps(spec, objects_in_network(train, preprocessing, most=OBJECTS_SAMPLED))
    return float((overlaps >= 0.5).mean()) if len(overlaps) else 1.0


def choose_max_detections(
    options: TrainingOptions, train: Dataset, reasons: list[tuple[str, str, str]]
) -> int:
    """Return COCO's 100 detections an image, or the hundred above what the fullest image holds; append the reason."""
    image = np.searchsorted(train.offsets, np.flatnonzero(train.ignore == Ignore.NO), side="right")
    fullest = int(np.bincount(image).max(initial=0))
    most = options.max_detections or max(100, 100 * (fullest // 100 + 1))
    why = "asked for" if options.max_detections else f"the fullest image holds {fullest:,} objects"
    reasons.append(("detections", f"at most {most} an image", why))
    return most


def choose_steps(
    recipe: Recipe, options: TrainingOptions, train: Dataset, preprocessing: Preprocessing
) -> tuple[int, str]:
    """Return how many steps are asked for, or those of the recipe; and why."""
    if options.steps is not None:
        return options.steps, "asked for"
    if options.epochs is not None:
        images = options.epochs * epoch_length(train, recipe.repeat_rare)
        return _steps(images, recipe), f"{options.epochs:g} epochs asked for"
    why = f"recipe {recipe.name}"
    images = _least_images(recipe, train)
    if recipe.pixels_seen:
        pixels = padded_pixels(train, preprocessing, recipe.batch_size)
        if recipe.pixels_seen / pixels > images:
            images = recipe.pixels_seen / pixels
            why += f": {recipe.pixels_seen / 1e6:,.0f} megapixels, of {pixels / 1e6:.3f} an image with its padding"
        elif images == recipe.images_seen:
            why += f": at least {images:,} images"
    return _steps(images, recipe), why


def padded_pixels(train: Dataset, preprocessing: Preprocessing, batch_size: int) -> float:
    """Return the mean pixels of an image as the network sees it: padded to the largest of its batch."""
    images = len(train.widths)
    sizes = np.array([preprocessing.resized_size(*train.size(i)) for i in range(images)])
    # Of random batches, as the padding of images of many shapes is a matter of who comes together.
    random, epochs = np.random.default_rng(0), -(-max(LEAST_SAMPLE, batch_size) // images)
    order = np.concatenate([random.permutation(images) for _ in range(epochs)])
    batches = sizes[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size, 2)
    sides = -(-batches.max(axis=1) // preprocessing.divisor) * preprocessing.divisor
    return float(sides.prod(axis=1).mean())


def _steps(images: float, recipe: Recipe) -> int:
    return max(1, math.ceil(images / recipe.batch_size))
