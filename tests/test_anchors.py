"""Anchors: one location by hand, the paper's counts, torchvision's generator, Detectron's rounding."""

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retinanet.anchors import AnchorSpec, anchors_of_image
from retinanet.boxes import area, xyxy_to_cxcywh
from retinanet.errors import ConfigError

PAPER = AnchorSpec()
TORCHVISION = AnchorSpec(center=0.0, rounding="torchvision", order="ratio-major", stride_rule="image")


def test_one_location_by_hand():
    # A 100 px square: ratio h / w = 4 halves the width and doubles the height.
    spec = AnchorSpec(sizes=(100.0,), scales=(1.0, 2.0), ratios=(0.25, 1.0, 4.0), strides=(64,))
    (anchors,) = anchors_of_image(spec, 64, 64)
    assert anchors.tolist() == [
        [32 - 100, 32 - 25, 32 + 100, 32 + 25],  # scale 1, ratio 1/4: 200 x 50
        [32 - 50, 32 - 50, 32 + 50, 32 + 50],
        [32 - 25, 32 - 100, 32 + 25, 32 + 100],  # ratio 4: 50 x 200
        [32 - 200, 32 - 50, 32 + 200, 32 + 50],  # scale 2
        [32 - 100, 32 - 100, 32 + 100, 32 + 100],
        [32 - 50, 32 - 200, 32 + 50, 32 + 200],
    ]


def test_order_and_center():
    options = {"sizes": (100.0,), "scales": (1.0, 2.0), "ratios": (1.0, 4.0), "strides": (64,)}
    scale_major = AnchorSpec(**options).shapes(0).tolist()
    ratio_major = AnchorSpec(**options, order="ratio-major").shapes(0).tolist()
    assert scale_major == [[100, 100], [50, 200], [200, 200], [100, 400]]
    assert ratio_major == [[100, 100], [200, 200], [50, 200], [100, 400]]
    for center, first in ((0.0, 0.0), (0.5, 32.0)):
        (anchors,) = anchors_of_image(AnchorSpec(**options, center=center), 64, 64)
        assert xyxy_to_cxcywh(anchors)[:, :2].unique().tolist() == [first]


def test_rows_run_over_y_then_x_then_anchor():
    (anchors,) = anchors_of_image(
        AnchorSpec(sizes=(8.0,), scales=(1.0, 2.0), ratios=(1.0,), strides=(8,)), 16, 24
    )
    centers = xyxy_to_cxcywh(anchors)[:, :2].tolist()
    assert centers == [[x, y] for y in (4, 12) for x in (4, 12, 20) for _ in range(2)]


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(600, 600, 67_995), (600, 1000, 113_193), (800, 800, 120_087), (800, 1344, 201_600)],
)
def test_counts_of_the_paper(height, width, count):
    assert PAPER.per_location == 9
    assert PAPER.count(height, width) == count
    assert sum(len(level) for level in anchors_of_image(PAPER, height, width)) == count


def test_sizes_and_areas_of_the_paper():
    sides = torch.cat([PAPER.shapes(level) for level in range(5)]).prod(1).sqrt()
    assert sides.min().item() == pytest.approx(32)
    assert sides.max().item() == pytest.approx(813, abs=0.5)
    for level, size in enumerate((32, 64, 128, 256, 512)):
        shapes = PAPER.shapes(level)
        expected = [size**2 * 2 ** (2 * octave / 3) for octave in range(3) for _ in range(3)]
        assert shapes.prod(1).tolist() == pytest.approx(expected)
        assert (shapes[:, 1] / shapes[:, 0]).tolist() == pytest.approx([0.5, 1, 2] * 3)
    # Rounding aside, the boxes themselves have these areas too.
    anchors = anchors_of_image(PAPER, 64, 64)[0]
    assert area(anchors)[:9].tolist() == pytest.approx(PAPER.shapes(0).prod(1).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("height", "width"),
    [(800, 1344), (320, 352), (256, 256), (32, 64)],  # the first two and the last: no multiples of 128
)
def test_equals_torchvision(height, width):
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, rows, columns) for rows, columns in TORCHVISION.grids(height, width)]
    (theirs,) = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
    ours = torch.cat(anchors_of_image(TORCHVISION, height, width))
    assert torch.equal(ours, theirs)


def test_stride_of_the_image():
    # 800 x 1344: P6 has 13 x 21 locations, 800 // 13 = 61 and 1344 // 21 = 64 px apart
    assert TORCHVISION.grids(800, 1344)[3:] == ((13, 21), (7, 11))
    p6 = xyxy_to_cxcywh(anchors_of_image(TORCHVISION, 800, 1344)[3]).reshape(13, 21, 9, 4)
    assert p6[1, 1, 0, :2].tolist() == [64, 61]


def test_detectron_rounding_by_hand():
    # Stride 8, area 64. Ratio 1/2: w = round(11.31) = 11, h = round(5.5) = 6 (half to even);
    # ratio 2: w = round(5.66) = 6, h = 12. A side of 32 is 4 strides.
    spec = AnchorSpec(rounding="detectron", scales=(1.0,))
    assert spec.shapes(0).tolist() == [[44, 24], [32, 32], [24, 48]]


def test_the_cache_returns_the_same_object():
    first = anchors_of_image(PAPER, 96, 64)
    assert anchors_of_image(AnchorSpec(), 96, 64) is first
    assert anchors_of_image(PAPER, 64, 96) is not first


def test_anchors_first_made_under_inference_mode_serve_training():
    spec = AnchorSpec(sizes=(32.5,), strides=(8,))  # no other test has it in the cache
    with torch.inference_mode():
        (anchors,) = anchors_of_image(spec, 32, 32)
    deltas = torch.zeros_like(anchors).requires_grad_()
    (anchors * deltas).sum().backward()  # autograd saves the anchors
    assert deltas.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, r"AnchorSpec\.sizes needs positive numbers; got \(\)"),
        ({"scales": (0.0,)}, r"AnchorSpec\.scales needs positive numbers; got \(0\.0,\)"),
        ({"ratios": (1.0, -2.0)}, r"AnchorSpec\.ratios needs positive numbers"),
        ({"ratios": (math.inf,)}, r"AnchorSpec\.ratios needs positive numbers; got \(inf,\)"),
        ({"strides": (8, 0)}, r"AnchorSpec\.strides needs positive numbers"),
        ({"sizes": (32.0,)}, r"one size a stride; got sizes \(32\.0,\) and strides \(8, 16, 32, 64, 128\)"),
        ({"center": 1.0}, r"AnchorSpec\.center needs a share of the stride in \[0, 1\); got 1\.0"),
        ({"center": -0.5}, r"AnchorSpec\.center needs a share"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        AnchorSpec(**options)
