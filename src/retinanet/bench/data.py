"""`bench data`: from JPEG files to a batch on one core: decode, flip, resize, normalise, pad."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from retinanet.bench.measuring import Contest
from retinanet.data import Dataset
from retinanet.data.dataset import Annotation
from retinanet.data.loading import training_batches
from retinanet.data.sampling import PICTURE, Epochs, generator
from retinanet.data.transforms import Augmentation
from retinanet.images import Preprocessing
from retinanet.records import Classes

WIDTH, HEIGHT, QUALITY = 640, 480, 90
SIDES = (800, 320)
COUNT, BOXES = 8, 10
# torchvision's reference resizes floats, without a filter that grows with a reduction; ours and Pillow's round to uint8
# along each axis, and its own resize of uint8 differs from theirs by one level here and there.
ONE_LEVEL = 1.01 / 57


def contests(
    sides: Sequence[int] = SIDES, count: int = COUNT, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Iterator[Contest]:
    """Our loader, and the same with Pillow and NumPy alone, with the transforms of torchvision's detection references,
    and with torchvision's on uint8, its fastest."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = _photographs(Path(folder), count, size)
        order = Epochs(count, seed=0).order(0)[0].tolist()
        flipped = [bool(generator(PICTURE, 0, 0, i).random() < Augmentation().flip) for i in order]
        files = [str(dataset.path(i)) for i in order]
        for side in sides:
            frame = Preprocessing(side, side * 5 // 3, size_rounding="floor")  # torchvision's rounding
            calls: dict[str, Callable[[], Tensor]] = {
                "Pillow and NumPy": lambda frame=frame: plain(files, flipped, frame),  # type: ignore[misc]
                "torchvision": lambda frame=frame: reference(files, flipped, frame),  # type: ignore[misc]
                "torchvision, uint8": lambda frame=frame: of_uint8(files, flipped, frame),  # type: ignore[misc]
            }
            peers = {name: _on_one_core(call) for name, call in calls.items()}
            ours = _on_one_core(lambda frame=frame: our_batch(dataset, frame))  # type: ignore[misc]
            expected = ours()
            across, down = frame.resized_size(*size)
            equal: dict[str, bool | None] = {
                name: _agree(expected, call(), exact=name.startswith("Pillow"))
                for name, call in peers.items()
            }
            if across < size[0]:
                equal["torchvision"] = None  # it shrinks without a filter, to other pixels
            yield Contest(
                "data",
                f"{count} JPEGs, {size[0]} x {size[1]} to {across} x {down}",
                ours,
                peers,
                equal,
                images=count,
            )


def our_batch(dataset: Dataset, frame: Preprocessing) -> Tensor:
    """Return the first batch of a run, of all images."""
    batches = training_batches(dataset, frame, Augmentation(), batch_size=len(dataset), seed=0, steps=1)
    return next(batches).images


def plain(files: Sequence[str], flipped: Sequence[bool], frame: Preprocessing) -> Tensor:
    """Do it as most people write it first."""
    mean, std = np.array(frame.mean, np.float32), np.array(frame.std, np.float32)
    images = []
    for file, mirrored in zip(files, flipped, strict=True):
        image = Image.open(file).convert("RGB")
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.resize(frame.resized_size(*image.size), Image.Resampling.BILINEAR)
        images.append(((np.asarray(image, np.float32) - mean) / std).transpose(2, 0, 1))
    batch = torch.zeros(len(images), 3, *_padded(images[0].shape, frame))
    for padded, pixels in zip(batch, images, strict=True):
        padded[:, : pixels.shape[1], : pixels.shape[2]] = torch.from_numpy(pixels)
    return batch


def reference(files: Sequence[str], flipped: Sequence[bool], frame: Preprocessing) -> Tensor:
    """Do it as torchvision's references/detection do: presets.py with transforms.v2, then the model's transform."""
    images = []
    for file, mirrored in zip(files, flipped, strict=True):
        transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomHorizontalFlip(p=float(mirrored)),
                v2.ToDtype(torch.float, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )
        image = Image.open(file).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(_boxes(), format="XYXY", canvas_size=(image.height, image.width))
        images.append(transform(image, {"boxes": boxes, "labels": torch.zeros(BOXES, dtype=torch.int64)})[0])
    mean, std = ([value / 255 for value in values] for values in (frame.mean, frame.std))
    resize = GeneralizedRCNNTransform(frame.image_size, frame.max_size, mean, std)
    batch: Tensor = resize(images)[0].tensors
    return batch


def of_uint8(files: Sequence[str], flipped: Sequence[bool], frame: Preprocessing) -> Tensor:
    """Do it with torchvision's fastest, its resize of uint8."""
    mean, std = ([value / 255 for value in values] for values in (frame.mean, frame.std))
    images = []
    for file, mirrored in zip(files, flipped, strict=True):
        image = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
        size = frame.resized_size(image.shape[2], image.shape[1])
        image = v2.functional.horizontal_flip(image) if mirrored else image
        image = v2.functional.resize(image, [size[1], size[0]], antialias=True)
        image = v2.functional.to_dtype(image, torch.float, scale=True)
        images.append(v2.functional.normalize(image, mean, std))
    batch = torch.zeros(len(images), 3, *_padded(images[0].shape, frame))
    for padded, pixels in zip(batch, images, strict=True):
        padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return batch


def _padded(shape: Sequence[int], frame: Preprocessing) -> tuple[int, int]:
    height, width = (-(-side // frame.divisor) * frame.divisor for side in shape[1:])
    return height, width


def _agree(ours: Tensor, theirs: Tensor, *, exact: bool) -> bool:
    """Whether pixels are the same, to the rounding of float32, or to one level of 255."""
    if ours.shape != theirs.shape:
        return False
    return float((ours - theirs).abs().max()) < (1e-5 if exact else ONE_LEVEL)


def _on_one_core(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def alone() -> Tensor:
        with _one_thread():
            return call()

    return alone


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _photographs(folder: Path, count: int, size: tuple[int, int]) -> Dataset:
    """Write JPEGs and return the data set of them."""
    files = [f"{number}.jpg" for number in range(count)]
    for number, file in enumerate(files):
        Image.fromarray(photograph(number, size)).save(folder / file, "JPEG", quality=QUALITY)
    return Dataset.build(
        name="bench",
        split="train",
        root=folder,
        classes=Classes(("thing",)),
        files=files,
        image_ids=list(range(count)),
        sizes=[size] * count,
        annotations=[
            Annotation(image, tuple(box), 0, 100.0, 0, number)
            for image in range(count)
            for number, box in enumerate(_boxes().tolist())
        ],
    )


def _boxes() -> Tensor:
    corners = torch.arange(1, BOXES + 1, dtype=torch.float32)
    return torch.stack([corners, corners, 10 * corners + 10, 10 * corners + 10], dim=1)


def photograph(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a picture with the spectrum of a photograph: the finer a detail, the fainter, and a little grain."""
    random = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 25, 50, 100, 200):
        coarse = random.integers(0, 256, (cells, cells, 3), np.uint8)
        picture += (
            np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), float) / cells**0.7
        )
    picture = (picture - picture.mean()) / picture.std() * 55 + 115 + random.normal(0, 2, picture.shape)
    pixels: NDArray[np.uint8] = picture.clip(0, 255).astype(np.uint8)
    return pixels
