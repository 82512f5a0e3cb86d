"""Batches in one pass: the same numbers as Pillow and NumPy give image by image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet import kernels
from retinanet.errors import ConfigError, ImageError
from retinanet.images import Geometry, Preprocessing
from retinanet.preparing import plain_prepare_batch, prepare_batch

pytest.importorskip("numba")

from retinanet.kernels.cpu import resampling

VIEWS = {
    "as it is": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "turned": np.rot90,
    "cropped": lambda image: image[1:, : -(image.shape[1] // 3)],
    "cropped and mirrored": lambda image: image[1:, : -(image.shape[1] // 3)][:, ::-1],
    "without red and blue": lambda image: image[:, :, 1:2].repeat(3, axis=2),
}


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(images, preprocessing):
    ours, geometries = prepare_batch(images, preprocessing)
    expected, theirs = plain_prepare_batch(images, preprocessing)
    assert geometries == theirs
    assert ours.stride() == expected.stride()
    return torch.equal(ours, expected)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("side", [20, 64, 75, 150])  # smaller, one side as it is, larger
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_every_view_gives_the_same_numbers(view, side, channel_order):
    preprocessing = Preprocessing(side, 300, channel_order=channel_order)
    assert same([VIEWS[view](noise(97, 75)), VIEWS[view](noise(64, 80, 1))], preprocessing)


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 120),
    ratio=st.floats(0.2, 4),
    side=st.integers(8, 160),
    longest=st.integers(160, 200),
    rounding=st.sampled_from(["nearest", "floor"]),
    mirrored=st.booleans(),
)
def test_any_size_gives_the_same_numbers(width, ratio, side, longest, rounding, mirrored):
    """Also where Pillow resamples along columns first."""
    image = noise(width, max(1, round(width * ratio)))
    assert same([image[:, ::-1] if mirrored else image], Preprocessing(side, longest, size_rounding=rounding))


def test_both_orders_of_pillow_are_met():
    assert resampling.rows_first((100, 60), 50)
    assert resampling.rows_first((300, 60), 400)
    assert not resampling.rows_first((300, 60), 200)


@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_plain_colours_stay_what_they_are(value):
    """Weights that add up to a little more than 1 must not turn white into black."""
    for old, new in ((64, 23), (3, 100), (997, 31), (50, 49)):
        weights = resampling.taps(old, new, False)[1].astype(np.int64)
        assert ((weights.sum(axis=1) * value + resampling.HALF >> resampling.PRECISION) == value).all()


def test_taps_stay_in_the_image():
    for old, new in ((1, 9), (2, 3), (5, 5), (640, 1067), (640, 100), (7, 1)):
        for mirrored in (False, True):
            first, weights = resampling.taps(old, new, mirrored)
            assert first.min() >= 0
            assert first.max() + weights.shape[1] <= old


def test_images_of_a_batch_are_padded_to_the_largest():
    batch, geometries = prepare_batch([noise(40, 30), noise(30, 40)], Preprocessing(60, 200))
    assert batch.shape == (2, 3, 96, 96)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert geometries == [Geometry((40, 30), (80, 60)), Geometry((30, 40), (60, 80))]
    assert not batch[0, :, 60:].any()
    assert not batch[0, :, :, 80:].any()
    assert (batch[0, :, :60, :80] != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("numba", "resize", "fast"),
    [(True, "antialias", True), (True, "linear", False), (False, "antialias", False)],
)
def test_which_way_a_batch_goes(numba, resize, fast, monkeypatch):
    asked = []
    whole = kernels.prepare_images
    monkeypatch.setattr(kernels, "available", lambda _: numba)
    monkeypatch.setattr(kernels, "prepare_images", lambda *given: asked.append(1) or whole(*given))
    preprocessing = Preprocessing(45, 80, resize=resize)
    assert same([noise(40, 30)], preprocessing)
    assert bool(asked) == fast


def test_threads_share_a_batch(any_threads):
    assert same([noise(40 + k, 30, k) for k in range(5)], Preprocessing(45, 80))


@pytest.mark.parametrize("available", [True, False])
def test_what_is_no_decoded_image_is_refused(available, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda _: available)
    with pytest.raises(ImageError, match=r"prepare needs a decoded image, uint8 \[H, W, 3\]; got float64"):
        prepare_batch([np.zeros((4, 4, 3))], Preprocessing())
    with pytest.raises(ConfigError, match="prepare_batch needs at least one image; got none"):
        prepare_batch([], Preprocessing())


def test_torchs_resize_of_uint8_has_other_pixels():
    """Why it is not used, though it is fast."""
    image = noise(640, 480)
    pillows = np.asarray(Image.fromarray(image).resize((1067, 800), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    torchs = torch.nn.functional.interpolate(planes, (800, 1067), mode="bilinear", antialias=True)
    difference = np.abs(torchs[0].permute(1, 2, 0).numpy().astype(int) - pillows)
    assert difference.max() <= 1
