"""From a data set to training batches: order, augmentation and preprocessing, in workers if wanted.

Training sees one endless stream of images: epoch after epoch, each a permutation by (seed, epoch). Step s of
batch size B takes positions s B to (s + 1) B of it. Where a run stands is therefore one number, the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from retinanet.batches import Batch, Targets
from retinanet.data.dataset import Dataset
from retinanet.data.transforms import Augmentation, moved
from retinanet.errors import DataError, ImageError, RetinaNetError
from retinanet.images import Preprocessing, decode, stack
from retinanet.records import GroundTruth, Ignore

# First words of the seeds of independent random streams.
ORDER, PICTURE, SIZE = 0, 1, 2


@dataclass(frozen=True)
class Request:
    """One place in the stream: which image, in which epoch, for which shortest side."""

    index: int
    epoch: int
    image_size: int


@dataclass(frozen=True)
class Example:
    """A prepared image `[3, h, w]`, its ground truth in the network's frame, and who could not be read for it."""

    pixels: NDArray[np.float32]
    truth: GroundTruth
    index: int
    failed: tuple[str, ...]


def generator(*words: int) -> np.random.Generator:
    """Return the random stream named by these numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


class Requests:
    """The batches of a run, as lists of requests: a batch sampler that starts at any step.

    Args:
        count: images of the data set.
        first_step, steps: the steps first_step <= s < steps are given.
        rank, processes: each process takes its share of every step's images.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        image_sizes: Sequence[int],
        steps: int,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.image_sizes = tuple(image_sizes)
        self.steps = steps
        self.first_step = first_step
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Request]]:
        known: tuple[int, NDArray[np.int64]] | None = None
        for step in range(self.first_step, self.steps):
            which = int(generator(SIZE, self.seed, step).integers(len(self.image_sizes)))
            first = (step * self.processes + self.rank) * self.batch_size
            requests = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.count)
                if known is None or known[0] != epoch:
                    known = epoch, generator(ORDER, self.seed, epoch).permutation(self.count)
                requests.append(Request(int(known[1][place]), epoch, self.image_sizes[which]))
            yield requests


class Examples(TorchDataset[Example | RetinaNetError]):
    """Prepared training images by request.

    An error is returned, not raised: what a worker raises reaches a person as a traceback of the worker.
    """

    def __init__(
        self, dataset: Dataset, preprocessing: Preprocessing, augmentation: Augmentation, seed: int
    ) -> None:
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, request: Request) -> Example | RetinaNetError:
        """Prepare an image. One that cannot be read is replaced by the next that can, and named."""
        failed: list[str] = []
        while len(failed) < len(self.dataset):
            index = (request.index + len(failed)) % len(self.dataset)
            try:
                image = decode(self.dataset.path(index))
            except ImageError as error:
                failed.append(str(error))
                continue
            try:
                return self._prepare(image, dataclasses.replace(request, index=index), tuple(failed))
            except RetinaNetError as error:
                return type(error)(f"{self.dataset.path(index)}: {error}")
        return DataError(f"training needs images that can be read; none of {len(failed)} can. {failed[0]}")

    def _prepare(self, image: NDArray[np.uint8], request: Request, failed: tuple[str, ...]) -> Example:
        random = generator(PICTURE, self.seed, request.epoch, request.index)
        image, truth = self.augmentation(image, self.dataset.ground_truth(request.index), random)
        size = request.image_size
        preprocessing = dataclasses.replace(
            self.preprocessing, image_size=size, max_size=max(size, self.preprocessing.max_size)
        )
        pixels, geometry = preprocessing.prepare(image)
        return Example(pixels, moved(truth, geometry.to_network(truth.boxes)), request.index, failed)


def collate(examples: Sequence[Example], divisor: int) -> Batch:
    """Pad images and ground truth of a batch."""
    most = max(len(example.truth) for example in examples)
    boxes = np.zeros((len(examples), most, 4), np.float32)
    classes = np.zeros((len(examples), most), np.int64)
    ignored = np.zeros((len(examples), most), bool)
    for row, example in enumerate(examples):
        count = len(example.truth)
        boxes[row, :count] = example.truth.boxes
        classes[row, :count] = example.truth.classes
        ignored[row, :count] = example.truth.ignore != Ignore.NO
    return Batch(
        images=torch.from_numpy(stack([example.pixels for example in examples], divisor)),
        targets=Targets(torch.from_numpy(boxes), torch.from_numpy(classes), torch.from_numpy(ignored)),
        indices=tuple(example.index for example in examples),
        failed=tuple(name for example in examples for name in example.failed),
    )


class _Collate:
    """`collate` with its divisor, in a form that spawned workers can receive."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, examples: Sequence[Example | RetinaNetError]) -> Batch | RetinaNetError:
        sound = [example for example in examples if isinstance(example, Example)]
        wrong = [example for example in examples if isinstance(example, RetinaNetError)]
        return wrong[0] if wrong else collate(sound, self.divisor)


def training_batches(
    dataset: Dataset,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    first_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield one batch a step; what it gives does not depend on `workers`.

    Args:
        pin_memory: for a CUDA device, which then copies while the host goes on.
    """
    requests = Requests(
        len(dataset),
        batch_size=batch_size,
        seed=seed,
        image_sizes=augmentation.image_sizes(preprocessing.image_size),
        steps=steps,
        first_step=first_step,
        rank=rank,
        processes=processes,
    )
    loader = DataLoader(
        Examples(dataset, preprocessing, augmentation, seed),
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=_Collate(preprocessing.divisor),
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, RetinaNetError):
            raise batch
        yield batch
