"""Threshold and top-k: the kernel on a CPU and the padded form for devices choose what `best_above` chooses."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from kernel_cases import seeded, torch_threads
from retinanet import kernels
from retinanet.inference import post_processing
from retinanet.inference.post_processing import best_above, best_above_padded
from retinanet.kernels.cpu import selection

NAN, INF = math.nan, math.inf


LEVELS = {
    "normal": lambda n: torch.randn(n, generator=seeded(n)) * 3,
    "ties": lambda n: torch.randint(-3, 4, (n,), generator=seeded(n)).float(),
    "all equal": lambda n: torch.ones(n),
    "all equal, below": lambda n: -torch.ones(n),
    "ascending": lambda n: torch.linspace(-1, 5, n),  # each beats all before it
    "ascending steps": lambda n: torch.arange(n).float() // 50,
    "descending": lambda n: torch.linspace(5, -1, n),
    "not finite": lambda n: torch.tensor([NAN, 1.0, -INF, INF, 0.0, -0.0, 3e38]).repeat(n // 7 + 1)[:n],
}


@pytest.mark.usefixtures("any_threads", "small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS)
def test_select(kind, dtype):
    # Around a block; a room that is filled many times; fewer than top_k.
    levels = [LEVELS[kind](n).to(dtype)[:, None] for n in (1, 127, 128, 129, 6000)]
    for limit, top_k in product((-INF, -1.0, 0.0, 1.0, 4.0, INF), (1, 10, 1000)):
        limits = [limit] * len(levels)
        found = kernels.select(levels, limits, top_k)
        for ours, level in zip(found, levels, strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, best_above(level, limit, top_k))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=400), min_size=1, max_size=4),
    st.integers(-4, 3),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_select_with_ties(levels, limit, top_k, number):
    levels = [torch.tensor(values).float()[None] for values in levels]
    with torch_threads(number), pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "LEAST", 1)
        found = kernels.select(levels, [float(limit)] * len(levels), top_k)
    for ours, level in zip(found, levels, strict=True):
        assert torch.equal(ours, best_above(level, float(limit), top_k))


def test_each_level_has_its_own_threshold():
    levels = [torch.randn(50, 3, generator=seeded(seed)) for seed in range(3)]
    limits = [-1.0, 0.0, 1.5]
    expected = [best_above(level, limit, 20) for level, limit in zip(levels, limits, strict=True)]
    assert all(map(torch.equal, kernels.select(levels, limits, 20), expected))


@pytest.mark.usefixtures("any_threads")
def test_select_from_many_logits():
    level = torch.randn(4 * selection.LEAST // 80, 80, generator=seeded(0)).mul(4).round()  # with ties
    for limit, top_k in ((-INF, 1000), (2.0, 10), (8.0, 100_000)):
        (found,) = kernels.select([level], [limit], top_k)
        assert torch.equal(found, best_above(level, limit, top_k))


def test_select_takes_a_threshold_strictly_in_float32():
    limit = math.log(0.05 / 0.95)  # which float32 has not
    level = torch.tensor([[limit], [math.nextafter(limit, 0)], [limit + 1e-6]])
    (found,) = kernels.select([level], [limit], 5)
    assert found.tolist() == best_above(level, limit, 5).tolist() == [2]


def test_a_threshold_is_not_rounded_to_bfloat16():
    limit = math.log(0.05 / 0.95)  # -2.944; the bfloat16 number next to it lies above
    level = torch.tensor([[-2.9375, -2.953125]]).bfloat16()
    (found,) = kernels.select([level], [limit], 1)
    (padded,) = best_above_padded(level[None], limit, 1)
    assert found.tolist() == best_above(level, limit, 1).tolist() == padded.tolist() == [0]


@pytest.mark.parametrize("shapes", [[(0, 3)], [(0, 3), (0, 3)], [(5, 3), (0, 3)], [(4, 0)]])
def test_select_from_nothing(shapes):
    found = kernels.select([torch.ones(shape) for shape in shapes], [0.0] * len(shapes), 5)
    assert [len(of_level) for of_level in found] == [min(5, rows * classes) for rows, classes in shapes]


def test_select_from_an_image_of_a_batch_of_bfloat16():
    logits = torch.randn(3, 40, 5, generator=seeded(1)).bfloat16().requires_grad_()
    (found,) = kernels.select([logits[1]], [0.0], 7)
    assert torch.equal(found, best_above(logits[1].detach(), 0.0, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS)
def test_the_padded_variant_for_devices(kind, dtype):
    batch = torch.stack([LEVELS[kind](120).roll(shift).reshape(40, 3) for shift in (0, 1, 17)]).to(dtype)
    batch[2] = -5.0  # an image without anything above most limits
    for limit, top_k in product((-INF, -1.0, 0.0, 1.0, 4.0, INF), (1, 10, 1000)):
        padded = best_above_padded(batch, limit, top_k)
        assert padded.shape == (3, min(top_k, 120))
        for row, image in zip(padded, batch, strict=True):
            expected = best_above(image, limit, top_k)
            filling = torch.full((padded.shape[1] - len(expected),), -1)
            assert torch.equal(row, torch.cat((expected, filling)))


def test_selection_for_devices_is_that_of_the_cpu():
    levels = [torch.randint(-3, 4, (2, rows, 3), generator=seeded(rows)).float() for rows in (50, 12, 3)]
    limits = [1.0, 0.0, -INF]
    ours, others = (
        select(levels, limits, 10) for select in (post_processing._select_on_cuda, post_processing._select)
    )
    for image, other in zip(ours, others, strict=True):
        assert all(map(torch.equal, image, other))
        assert [len(of_level) for of_level in image] == [10, 10, 9]
