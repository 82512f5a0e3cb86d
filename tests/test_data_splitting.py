"""Splits on request: laws of shares, strata, seeds and equal images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import fuzzing, picture
from retinanet.data import Dataset, split_dataset
from retinanet.data.dataset import Annotation
from retinanet.data.splitting import equal_images
from retinanet.errors import ConfigError, DataError
from retinanet.records import Classes


def dataset_of(folder: Path, labels: list[list[int]], contents: list[int] | None = None) -> Dataset:
    """One image for each list of labels; images of equal `contents` have equal bytes."""
    contents = list(range(len(labels))) if contents is None else contents
    files = []
    for index, content in enumerate(contents):
        path = folder / f"{index}.bin"
        path.write_bytes(b"%06d" % content)
        files.append(path.name)
    annotations = [
        Annotation(image, (0, 0, 1 + place, 1), label, 1, 0, place)
        for image, own in enumerate(labels)
        for place, label in enumerate(own)
    ]
    classes = Classes(("common", "some", "rare"))
    return Dataset.build(
        name="d", split="train", root=folder, classes=classes, files=files, image_ids=list(range(len(files))),
        sizes=[(90, 90)] * len(files), annotations=annotations,
    )  # fmt: skip


def ids(parts: dict[str, Dataset]) -> dict[str, list[int]]:
    return {name: part.image_ids.tolist() for name, part in parts.items()}


def test_classes_stand_in_every_split_in_proportion(tmp_path: Path) -> None:
    # 100 images of which 10 hold something rare and 20 nothing; one that only chance would put right
    labels = [[0] * (1 + i % 3) + [1] * (i % 5 == 0) + [2] * (i % 10 == 0) for i in range(80)] + [[]] * 20
    labels = [[*own, 2] if i in (7, 17) else own for i, own in enumerate(labels)]
    dataset = dataset_of(tmp_path, labels)
    parts = split_dataset(dataset, (0.7, 0.2, 0.1), seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "val": 20, "test": 10}
    for part, share in zip(parts.values(), (0.7, 0.2, 0.1), strict=True):
        counts = np.bincount(part.labels, minlength=3)
        whole = np.bincount(dataset.labels, minlength=3)
        assert (abs(counts - share * whole) <= [3, 1.5, 1]).all(), (counts, share * whole)
        empty = int((np.diff(part.offsets) == 0).sum())
        assert abs(empty - 20 * share) <= 2
        assert part.split in parts


@settings(fuzzing, max_examples=60)
@given(
    labels=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=20),
    copies=st.lists(st.integers(0, 19), max_size=20),
    shares=st.sampled_from([(0.5, 0.5), (0.8, 0.2), (0.98, 0.01, 0.01), (0.6, 0.3, 0.1)]),
    seed=st.integers(0, 3),
)
def test_laws(tmp_path: Path, labels: list[list[int]], copies: list[int], shares: Any, seed: int) -> None:
    contents = [copies[i] if i < len(copies) else 100 + i for i in range(len(labels))]
    dataset = dataset_of(tmp_path, labels, contents)
    if len(set(contents)) < len(shares):
        with pytest.raises(DataError, match=r"d needs at least \d different images for \d splits; it has \d"):
            split_dataset(dataset, shares, seed=seed)
        return
    parts = split_dataset(dataset, shares, seed=seed)
    found = ids(parts)
    assert sorted(itertools.chain(*found.values())) == list(range(len(labels)))  # every image once
    assert all(own == sorted(own) and own for own in found.values())  # in order; none is empty
    kinds = [{contents[i] for i in own} for own in found.values()]
    assert sum(map(len, kinds)) == len(set(contents))  # equal bytes in one split
    assert ids(split_dataset(dataset, shares, seed=seed)) == found
    for part in parts.values():
        for place, image in enumerate(part.image_ids.tolist()):
            assert part.ground_truth(place).classes.tolist() == labels[image]


def test_another_seed_makes_other_splits(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [[0]] * 40)
    assert ids(split_dataset(dataset, (0.5, 0.5), seed=0)) != ids(split_dataset(dataset, (0.5, 0.5), seed=1))


def test_equal_images_are_found_by_their_bytes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    dataset = dataset_of(tmp_path, [[], [], [], []], [5, 6, 5, 7])
    assert [group.tolist() for group in equal_images(dataset)] == [[0, 2], [1], [3]]
    dataset.path(1).unlink()
    with pytest.raises(DataError, match=r"1.bin: cannot be read: No such file"):
        split_dataset(dataset, (0.5, 0.5))


@pytest.mark.parametrize(
    "shares", [(1.0,), (0.5,), (0.5, 0.4), (1.0, 0.0), (1.5, -0.5), (0.25,) * 4, (float("nan"), 0.5)]
)
def test_shares_that_are_refused(tmp_path: Path, shares: tuple[float, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"--split-shares needs two or three numbers above 0 that add up to 1"
    ):
        split_dataset(dataset_of(tmp_path, [[0]] * 9), shares)
    with pytest.raises(ConfigError, match=r"--seed needs 0 or more; got -1"):
        split_dataset(dataset_of(tmp_path, [[0]] * 9), (0.5, 0.5), seed=-1)
