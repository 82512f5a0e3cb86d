"""Which image stands where: rare classes more often, epochs of one length, a run's place one number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.loading import Request, Requests
from retinanet.data.sampling import ORDER, Epochs, epoch_length, generator, repeat_factors
from retinanet.errors import ConfigError
from retinanet.records import Classes, Ignore


def dataset_of(*labels: str, ignored: tuple[int, ...] = ()) -> Dataset:
    """One image for each text, with a box of class a, b or c for each letter; those of some images are ignored."""
    names = "abc"
    return Dataset.build(
        name="few",
        split="train",
        root=Path("."),
        classes=Classes(tuple(names)),
        files=[f"{image}.png" for image in range(len(labels))],
        image_ids=list(range(len(labels))),
        sizes=[(20, 20)] * len(labels),
        annotations=[
            Annotation(
                image,
                (1.0, 1.0, 9.0, 9.0),
                names.index(letter),
                64.0,
                Ignore.CROWD if image in ignored else Ignore.NO,
                image,
            )
            for image, letters in enumerate(labels)
            for letter in letters
        ],
    )


def test_a_rare_class_is_repeated_by_the_root_of_how_rare_it_is() -> None:
    """Of 16 images a stands in 16 (often enough), b in 4 and c in 1; wanted are 16/16 of them."""
    dataset = dataset_of(*["a"] * 12, "aab", "abb", "ab", "abc")
    factors = repeat_factors(dataset, 1.0)
    assert factors.tolist() == [1.0] * 12 + [2.0] * 3 + [4.0]  # sqrt(1 / (4/16)), sqrt(1 / (1/16))
    assert repeat_factors(dataset, 0.25).tolist() == [1.0] * 15 + [2.0]
    assert epoch_length(dataset, 0.25) == 17


def test_nothing_is_rare_without_a_threshold_or_without_objects() -> None:
    assert repeat_factors(dataset_of("a", "b", ""), 0.0).tolist() == [1.0, 1.0, 1.0]
    assert repeat_factors(dataset_of("", ""), 0.5).tolist() == [1.0, 1.0]
    assert epoch_length(dataset_of("a", "b", ""), 0.0) == 3


def test_ignored_boxes_make_no_image_rare() -> None:
    assert repeat_factors(dataset_of("a", "a", "a", "ac", ignored=(3,)), 1.0).tolist() == pytest.approx(
        [(4 / 3) ** 0.5] * 3 + [1.0]
    )


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_impossible_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"repeat_factors needs a threshold in \[0, 1\]; got"):
        repeat_factors(dataset_of("a"), threshold)


@pytest.mark.parametrize("factors", [None, np.ones(7)])
def test_without_repeats_the_order_is_a_permutation_by_seed_and_epoch(factors: np.ndarray | None) -> None:
    """Runs of earlier versions go on as they began."""
    epochs = Epochs(7, 5, factors)
    for epoch in range(4):
        images, copies = epochs.order(epoch)
        assert (images == generator(ORDER, 5, epoch).permutation(7)).all()
        assert not copies.any()
    assert epochs.length == 7


FACTORS = st.lists(st.floats(1, 9), min_size=1, max_size=30).map(np.array)


@given(factors=FACTORS, seed=st.integers(0, 1000), epoch=st.integers(0, 10**6))
def test_every_epoch_is_as_long_and_holds_every_image(factors: np.ndarray, seed: int, epoch: int) -> None:
    epochs = Epochs(len(factors), seed, factors)
    images, copies = epochs.order(epoch)
    times = np.bincount(images, minlength=len(factors))
    assert len(images) == len(copies) == epochs.length
    assert np.ceil(factors.sum() - 1e-6) <= epochs.length <= np.ceil(factors.sum() + 1e-6)
    # At least the whole part; what rounds the length up adds less than one in all.
    assert (times >= np.floor(factors - 1e-6)).all()
    assert (times <= np.ceil(factors + 1 / len(factors) + 1e-6)).all()
    for image in range(len(factors)):
        assert sorted(copies[images == image]) == list(range(times[image]))


def test_on_average_every_image_is_there_as_often_as_asked() -> None:
    factors = np.array([1.0, 1.25, 2.5, 3.25, 1.0])
    epochs = Epochs(5, 3, factors)
    assert epochs.length == 9
    counts = np.array([np.bincount(epochs.order(epoch)[0], minlength=5) for epoch in range(4000)])
    assert counts.mean(axis=0) == pytest.approx(factors, abs=0.03)
    assert (counts[:, [0, 4]] == 1).all()
    # Who is there once more is drawn for each by itself, not for all at once.
    assert len(np.unique(counts, axis=0)) > 2


def test_an_epoch_with_repeats_is_in_random_order() -> None:
    epochs = Epochs(50, 0, np.full(50, 2.0))
    first, second = epochs.order(0)[0], epochs.order(1)[0]
    assert (first != second).any()
    assert (first[1:] == first[:-1]).mean() < 0.2  # copies do not follow on each other


def requests(**options: int) -> list[list[Request]]:
    epochs = Epochs(6, 4, np.array([1.0, 2.3, 1.0, 1.7, 3.1, 1.0]))
    given = {"batch_size": 4, "steps": 30, **options}
    return list(Requests(epochs, image_sizes=(64, 96), **given))


@pytest.mark.parametrize("first_step", range(0, 30, 7))
def test_with_repeats_a_run_goes_on_anywhere_as_it_would_have(first_step: int) -> None:
    assert requests(first_step=first_step) == requests()[first_step:]


def test_with_repeats_processes_share_each_step() -> None:
    halves = [requests(rank=rank, processes=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == requests()


def test_every_copy_has_a_random_stream_of_its_own() -> None:
    stream = [request for step in requests() for request in step]
    assert max(request.copy for request in stream) >= 2
    assert len({request.words() for request in stream}) == len(stream)
    assert Request(3, 1, 64).words() == (1, 3)  # as it was before there were copies
