"""Splits on request: stratified by class, seeded, images of equal bytes never apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.data.image_files import digest
from retinanet.errors import ConfigError, DataError

NAMES = ("train", "val", "test")


def split_dataset(dataset: Dataset, shares: Sequence[float], *, seed: int = 0) -> dict[str, Dataset]:
    """Divide a data set into `train`, `val` and, with a third share, `test`.

    Iterative stratification: of the classes with objects left to give away, the rarest is served first; each image
    with it goes to the split that lacks most of its objects, then of images. Images without objects come last. Files of
    equal bytes are one image here and stay together. Equal data, shares and seed give equal splits; images keep their
    order. Reference: Sechidis, Tsoumakas, Vlahavas, On the Stratification of Multi-label Data (2011).

    Args:
        shares: of the images of each split, above 0, together 1.
        seed: >= 0; decides between images that serve equally.

    Raises:
        ConfigError: impossible shares or seed.
        DataError: fewer different images than splits, or a file that cannot be read.
    """
    check_shares(shares)
    if seed < 0:
        raise ConfigError(f"--seed needs 0 or more; got {seed}")
    groups = equal_images(dataset)
    if len(groups) < len(shares):
        raise DataError(
            f"{dataset.name} needs at least {len(shares)} different images for {len(shares)} splits; "
            f"it has {len(groups)}"
        )
    chosen = _assign(dataset, groups, np.array(shares), seed)
    return {
        name: replace(
            dataset.subset(np.sort(np.concatenate([groups[i] for i in np.flatnonzero(chosen == place)]))),
            split=name,
        )
        for place, name in enumerate(NAMES[: len(shares)])
    }


def check_shares(shares: Sequence[float]) -> None:
    """Refuse shares that are not two or three positive numbers that add up to 1."""
    if len(shares) not in (2, 3) or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        shown = ",".join(f"{share:g}" for share in shares)
        raise ConfigError(
            "--split-shares needs two or three numbers above 0 that add up to 1, of train, val and test, such as "
            f"0.8,0.1,0.1; got {shown}"
        )


def equal_images(dataset: Dataset) -> list[NDArray[np.int64]]:
    """Return the images grouped by the bytes of their files, in order of the first of each group.

    Only files of equal length are read.
    """
    lengths: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        try:
            lengths.setdefault(os.stat(dataset.path(index)).st_size, []).append(index)
        except OSError as error:
            raise DataError(f"{dataset.path(index)}: cannot be read: {error.strerror}") from None
    groups: dict[tuple[int, str], list[int]] = {}
    for length, images in lengths.items():
        for index in images:
            key = digest(dataset.path(index)) if len(images) > 1 else ""
            groups.setdefault((length, key), []).append(index)
    return [np.array(images) for images in sorted(groups.values())]


def _assign(
    dataset: Dataset, groups: list[NDArray[np.int64]], shares: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """Return the place of the split of each group."""
    group_of = np.empty(len(dataset), np.int64)
    for place, images in enumerate(groups):
        group_of[images] = place
    owners = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    counts = np.zeros((len(groups), len(dataset.classes)), np.int32)
    np.add.at(counts, (group_of[owners], dataset.labels), 1)
    sizes = np.array([len(images) for images in groups])
    order = np.random.default_rng(seed).permutation(len(groups))
    left = counts.sum(axis=0)  # [classes], objects not yet given away
    wanted = shares[:, None] * left  # [splits, classes], objects that each still lacks
    images_wanted = shares * len(dataset)
    chosen = np.full(len(groups), -1)

    def give(group: int, place: int) -> None:
        nonlocal left
        chosen[group] = place
        left = left - counts[group]
        wanted[place] -= counts[group]
        images_wanted[place] -= sizes[group]

    while (left > 0).any():
        label = int(np.where(left > 0, left, left.max() + 1).argmin())
        for group in order[(chosen[order] < 0) & (counts[order, label] > 0)]:
            give(group, int(np.lexsort((-images_wanted, -wanted[:, label]))[0]))
    for group in order[chosen[order] < 0]:
        give(group, int((-images_wanted).argmin()))
    for place in range(len(shares)):  # a share below one image still gets one
        if not (chosen == place).any():
            richest = int(np.bincount(chosen).argmax())
            give(int(order[chosen[order] == richest][-1]), place)
    return chosen
