"""Which image stands where in the stream of a run: whole epochs in random order, rare classes more often. NumPy only.

Every epoch of a run has the same length, so that the epoch of a place in the stream is a division, and where a run
stands is one number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError
from retinanet.records import Ignore

# First words of the seeds of independent random streams.
ORDER, PICTURE, SIZE, MOSAIC = 0, 1, 2, 3

# Expected repeats are counted in these parts, whole numbers: sums of floats would end beside the epoch's end.
PARTS = 1 << 32


def share_of(count: int, rank: int, processes: int) -> range:
    """Return which of `count` things in a row are those of a process: all are somebody's, and the largest share has at
    most one more than the smallest."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def generator(*words: int) -> np.random.Generator:
    """Return the random stream named by these numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def repeat_factors(dataset: Dataset, threshold: float) -> NDArray[np.float64]:
    """Return how often each image `[N]` is to be seen in an epoch, on average: at least once.

    A class in a share f of the images, f below `threshold` t, is to be seen as often as if it were in sqrt(f t) of
    them: r = max(1, sqrt(t / f)); an image as often as its rarest class. Gupta et al., 2019, section 5.1
    (https://arxiv.org/abs/1908.03195), with t = 0.001 for the 1,203 classes of LVIS. Ignored boxes do not count.

    Raises:
        ConfigError: unless 0 <= threshold <= 1; 0 repeats nothing.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"repeat_factors needs a threshold in [0, 1]; got {threshold}")
    kept = np.flatnonzero(dataset.ignore == Ignore.NO)
    images = np.searchsorted(dataset.offsets, kept, side="right") - 1
    # Each class once an image, however many boxes of it there are.
    seen = np.unique(images * len(dataset.classes) + dataset.labels[kept])
    images, labels = np.divmod(seen, len(dataset.classes))
    shares = np.bincount(labels, minlength=len(dataset.classes)) / len(dataset)
    factors = np.ones(len(dataset))
    np.maximum.at(factors, images, np.sqrt(threshold / shares[labels]))
    return factors


def epoch_length(dataset: Dataset, threshold: float) -> int:
    """Return how many images an epoch shows with the `repeat_factors` of a threshold."""
    return Epochs(len(dataset), 0, repeat_factors(dataset, threshold)).length if threshold else len(dataset)


class Epochs:
    """The order of images in every epoch, each a function of (seed, epoch).

    Args:
        count: images of the data set.
        factors: `[count]` how often each is to be seen in an epoch, on average, at least once; once each by default.
            An image with 2.3 is there twice or three times: which, is drawn by systematic sampling along the epoch's
            random order, so that the number of all is the same in every epoch.

    The length of an epoch is the sum of the factors, rounded up; what that adds is shared by all images.
    """

    def __init__(self, count: int, seed: int, factors: NDArray[np.float64] | None = None) -> None:
        self.count = count
        self.seed = seed
        self.length = count
        self._parts: NDArray[np.int64] | None = None
        if factors is not None and (factors != 1).any():
            parts = np.maximum(np.round(factors * PARTS), PARTS).astype(np.int64)
            self.length = -(-int(parts.sum()) // PARTS)
            more, rest = divmod(self.length * PARTS - int(parts.sum()), count)
            parts += more
            parts[:rest] += 1
            self._parts = parts

    def order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the images of an epoch `[length]` in order, and which of its image's copies, from 0, each is."""
        random = generator(ORDER, self.seed, epoch)
        images: NDArray[np.int64] = random.permutation(self.count)
        if self._parts is None:
            return images, np.zeros(self.count, np.int64)
        ends = np.cumsum(self._parts[images]) + random.integers(PARTS)
        times = np.diff(ends // PARTS, prepend=0)
        copies = np.arange(self.length) - np.repeat(np.cumsum(times) - times, times)
        shuffled = random.permutation(self.length)
        return np.repeat(images, times)[shuffled], copies[shuffled]
