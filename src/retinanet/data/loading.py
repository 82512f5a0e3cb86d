"""From a data set to training batches: order, augmentation and preprocessing, in workers if wanted.

Training sees one endless stream of images: epoch after epoch, each in an order by (seed, epoch). Step s of
batch size B takes positions s B to (s + 1) B of it. Where a run stands is therefore one number, the step,
and what a step sees does not depend on how many processes share it.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from retinanet.batches import Batch, Targets
from retinanet.data.dataset import Dataset
from retinanet.data.mosaic import mosaic_window, partners
from retinanet.data.sampling import MOSAIC, PICTURE, SIZE, Epochs, generator, repeat_factors, share_of
from retinanet.data.transforms import Augmentation, moved
from retinanet.errors import DataError, ImageError, RetinaNetError
from retinanet.images import Preprocessing, UInt8Array, decode
from retinanet.preparing import prepare_batch
from retinanet.records import GroundTruth, Ignore


@dataclass(frozen=True)
class Request:
    """One place in the stream: which image, in which epoch, for which shortest side, and which of its copies there."""

    index: int
    epoch: int
    image_size: int
    copy: int = 0

    def words(self) -> tuple[int, ...]:
        """Return what tells the random streams of this place from those of others."""
        return (self.epoch, self.index, self.copy) if self.copy else (self.epoch, self.index)


@dataclass(frozen=True)
class Example:
    """An augmented image, uint8 `[h, w, 3]` or a view of such, its ground truth, and who could not be read for it."""

    image: UInt8Array
    truth: GroundTruth
    index: int
    image_size: int
    failed: tuple[str, ...]


class Requests:
    """The batches of a run, as lists of requests: a batch sampler that starts at any step.

    Args:
        epochs: the order of images.
        batch_size: images a step, of all processes together.
        first_step, steps: the steps first_step <= s < steps are given.
        rank, processes: each process takes its share of every step's images, neighbours in the stream; where they do
            not come out even, some take one more.
    """

    def __init__(
        self,
        epochs: Epochs,
        *,
        batch_size: int,
        image_sizes: Sequence[int],
        steps: int,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.image_sizes = tuple(image_sizes)
        self.steps = steps
        self.first_step = first_step
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Request]]:
        known = -1
        share = share_of(self.batch_size, self.rank, self.processes)
        for step in range(self.first_step, self.steps):
            which = int(generator(SIZE, self.epochs.seed, step).integers(len(self.image_sizes)))
            first = step * self.batch_size
            requests = []
            for position in range(first + share.start, first + share.stop):
                epoch, place = divmod(position, self.epochs.length)
                if known != epoch:
                    known, (images, copies) = epoch, self.epochs.order(epoch)
                requests.append(
                    Request(int(images[place]), epoch, self.image_sizes[which], int(copies[place]))
                )
            yield requests


class Examples(TorchDataset[Example | RetinaNetError]):
    """Augmented training images by request.

    An error is returned, not raised: what a worker raises reaches a person as a traceback of the worker.
    """

    def __init__(self, dataset: Dataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, request: Request) -> Example | RetinaNetError:
        """Read and augment an image. One that cannot be read is replaced by the next that can, and named."""
        failed: list[str] = []
        try:
            image, index = self._read(request.index, failed)
        except DataError as error:
            return error
        try:
            return self._augmented(image, dataclasses.replace(request, index=index), failed)
        except RetinaNetError as error:
            return type(error)(f"{self.dataset.path(index)}: {error}")

    def _read(self, index: int, failed: list[str]) -> tuple[UInt8Array, int]:
        """Return an image or the next one that can be read, and which it is; name those that cannot in `failed`."""
        for attempt in range(len(self.dataset)):
            following = (index + attempt) % len(self.dataset)
            try:
                image = decode(self.dataset.path(following))
                self.dataset.require_size(following, image.shape[1], image.shape[0])
                return image, following
            except ImageError as error:
                failed.append(str(error))
        raise DataError(f"training needs images that can be read; none of {len(failed)} can. {failed[0]}")

    def _augmented(self, image: UInt8Array, request: Request, failed: list[str]) -> Example:
        truth = self.dataset.ground_truth(request.index)
        random = generator(MOSAIC, self.seed, *request.words())
        others = partners(random, len(self.dataset), self.augmentation.mosaic)
        if others:
            read = [self._read(other, failed) for other in others]
            pictures = [(image, truth), *((pixels, self.dataset.ground_truth(i)) for pixels, i in read)]
            image, truth = mosaic_window(pictures, random, min_visible=self.augmentation.min_visible)
        random = generator(PICTURE, self.seed, *request.words())
        image, truth = self.augmentation(image, truth, random)
        return Example(image, truth, request.index, request.image_size, tuple(dict.fromkeys(failed)))


def collate(examples: Sequence[Example], preprocessing: Preprocessing) -> Batch:
    """Resize images for the network, to the shortest side that they were requested for, and pad them and their ground
    truth to a batch."""
    size = examples[0].image_size
    frame = dataclasses.replace(preprocessing, image_size=size, max_size=max(size, preprocessing.max_size))
    images, geometries = prepare_batch([example.image for example in examples], frame)
    truths = [
        moved(example.truth, geometry.to_network(example.truth.boxes))
        for example, geometry in zip(examples, geometries, strict=True)
    ]
    most = max(len(truth) for truth in truths)
    boxes = np.zeros((len(examples), most, 4), np.float32)
    classes = np.zeros((len(examples), most), np.int64)
    ignored = np.zeros((len(examples), most), bool)
    for row, truth in enumerate(truths):
        boxes[row, : len(truth)] = truth.boxes
        classes[row, : len(truth)] = truth.classes
        ignored[row, : len(truth)] = truth.ignore != Ignore.NO
    return Batch(
        images=images,
        targets=Targets(torch.from_numpy(boxes), torch.from_numpy(classes), torch.from_numpy(ignored)),
        indices=tuple(example.index for example in examples),
        failed=tuple(name for example in examples for name in example.failed),
    )


class _Collate:
    """`collate` with its preprocessing, in a form that spawned workers can receive."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, examples: Sequence[Example | RetinaNetError]) -> Batch | RetinaNetError:
        sound = [example for example in examples if isinstance(example, Example)]
        wrong = [example for example in examples if isinstance(example, RetinaNetError)]
        return wrong[0] if wrong else collate(sound, self.preprocessing)


def _leave_signals_to_the_run(_: int) -> None:
    """Let a worker outlive the Ctrl-C or `kill` that its whole group gets: the run ends it when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
    repeat_rare: float = 0.0,
) -> Iterator[Batch]:
    """Yield one batch a step; what it gives does not depend on `workers`.

    Args:
        batch_size, rank, processes: as in `Requests`.
        pin_memory: for a CUDA device, which then copies while the host goes on.
        repeat_rare: classes in a smaller share of the images are seen more often: see `sampling.repeat_factors`.
    """
    requests = Requests(
        Epochs(len(dataset), seed, repeat_factors(dataset, repeat_rare) if repeat_rare else None),
        batch_size=batch_size,
        image_sizes=augmentation.image_sizes(preprocessing.image_size),
        steps=steps,
        first_step=first_step,
        rank=rank,
        processes=processes,
    )
    loader = DataLoader(
        Examples(dataset, augmentation, seed),
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=_Collate(preprocessing),
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_run,
    )
    for batch in loader:
        if isinstance(batch, RetinaNetError):
            raise batch
        yield batch
