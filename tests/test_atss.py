"""ATSS: against its definition object by object and anchor by anchor, and its rules one at a time."""

import itertools
import statistics

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from retinanet.anchors import AnchorSpec, all_anchors_of_image, anchors_of_image
from retinanet.atss import DEVIATIONS, _grid, match_atss
from retinanet.batches import MatchState
from retinanet.boxes import iou
from retinanet.matching import match_anchors

NEGATIVE, POSITIVE, IGNORED = MatchState.NEGATIVE, MatchState.POSITIVE, MatchState.IGNORED
SMALL = AnchorSpec(sizes=(16, 32, 64, 128, 256))


def literally(spec, height, width, boxes, ignored, deviations):
    """The definition, for one image: {anchor: box} of the positives."""
    levels = anchors_of_image(spec, height, width)
    won = {}
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = box.tolist()
        if ignored[number] or x2 <= x1 or y2 <= y1:
            continue
        candidates, first = [], 0
        for (rows, columns), stride, anchors in zip(
            spec.grids(height, width), spec.strides, levels, strict=True
        ):
            y = [(row + spec.center) * stride for row in range(rows)]
            x = [(column + spec.center) * stride for column in range(columns)]
            nearest = [
                sorted(sorted(range(len(places)), key=lambda at, m=m, p=places: abs(p[at] - m))[:3])
                for places, m in ((y, (y1 + y2) / 2), (x, (x1 + x2) / 2))
            ]
            for row, column in itertools.product(*nearest):
                inside = y1 < y[row] < y2 and x1 < x[column] < x2
                for anchor in range(spec.per_location):
                    place = (row * columns + column) * spec.per_location + anchor
                    candidates.append((first + place, iou(anchors[place], box).item(), inside))
            first += len(anchors)
        reached = [overlap for _, overlap, _ in candidates]
        enough = statistics.mean(reached) + deviations * statistics.stdev(reached)
        own = [(anchor, overlap) for anchor, overlap, inside in candidates if inside and overlap >= enough]
        best = max(candidates, key=lambda candidate: candidate[1])
        for anchor, overlap in own or [best[:2]]:
            if overlap > 0 and (anchor not in won or overlap > won[anchor][0]):
                won[anchor] = (overlap, number)
    return {anchor: number for anchor, (_, number) in won.items()}


def positives(found, image=0):
    anchors = torch.nonzero(found.state[image] == POSITIVE).squeeze(1).tolist()
    return {anchor: int(found.index[image, anchor]) for anchor in anchors}


def random_boxes(count, seed, extent):
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    width, height = extent
    corner = corner * torch.tensor([width - 8.0, height - 8.0])
    end = corner + 3 + size**3 * torch.tensor([width * 0.9, height * 0.9])
    return torch.cat((corner, end.minimum(torch.tensor([float(width), height]))), dim=1)


@pytest.mark.parametrize("spec", [SMALL, AnchorSpec(center=0.0), AnchorSpec(sizes=(24.0,), strides=(16,))])
@pytest.mark.parametrize(
    "size", [(96, 128), (256, 320), (40, 8)]
)  # of the last, most grids are smaller than 3 x 3
@pytest.mark.parametrize(("seed", "deviations"), [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)])
def test_against_the_definition(spec, size, seed, deviations):
    height, width = size
    boxes = torch.stack([random_boxes(12, 2 * seed + image, (width, height)) for image in range(2)])
    boxes[0, 5] = boxes[0, 2]  # two objects in one place
    boxes[1, 7:] = 0  # padding
    ignored = torch.zeros(2, 12, dtype=torch.bool)
    ignored[0, 3] = ignored[1, 0] = True
    found = match_atss(spec, height, width, boxes, ignored, deviations=deviations)
    assert DEVIATIONS == 2
    if deviations == DEVIATIONS:
        assert torch.equal(found.state, match_atss(spec, height, width, boxes, ignored).state)
    for image in range(2):
        wanted = literally(spec, height, width, boxes[image], ignored[image], deviations)
        assert positives(found, image) == wanted
        # What regions cover is no background, as with the paper's matching; the rest is.
        regions = torch.where(ignored[image, :, None], boxes[image], 0)
        rest = match_anchors(all_anchors_of_image(spec, height, width), regions, ignored[image]).state
        rest[[*wanted]] = POSITIVE
        assert torch.equal(found.state[image], rest)
        assert not found.index[image][found.state[image] != POSITIVE].any()


def test_threshold_is_of_each_object():
    """A slender object that no anchor fits has positives as a square one has, though their IoU is below 0.5."""
    boxes = torch.tensor([[[16.0, 16, 48, 48], [100, 4, 110, 120]]])
    found = match_atss(AnchorSpec(), 128, 128, boxes, torch.zeros(1, 2, dtype=torch.bool))
    anchors = all_anchors_of_image(AnchorSpec(), 128, 128)
    of = {0: [], 1: []}
    for anchor, number in positives(found).items():
        of[number].append(iou(anchors[anchor], boxes[0, number]).item())
    assert min(map(len, of.values())) >= 4
    assert max(of[1]) < 0.5 < max(of[0])


def test_an_object_without_a_centre_inside_has_its_best_anchor():
    boxes = torch.tensor([[[5.0, 5, 7, 7]]])  # locations stand at 4, 12, ...
    found = match_atss(AnchorSpec(), 64, 64, boxes, torch.zeros(1, 1, dtype=torch.bool))
    overlaps = iou(all_anchors_of_image(AnchorSpec(), 64, 64), boxes[0])
    assert positives(found) == {int(overlaps.argmax()): 0}


def test_an_object_that_no_candidate_meets_has_none():
    boxes = torch.tensor([[[500.0, 500, 501, 501]]])
    spec = AnchorSpec(sizes=(8.0,), strides=(8,))
    assert positives(match_atss(spec, 64, 64, boxes, torch.zeros(1, 1, dtype=torch.bool))) == {}


@pytest.mark.parametrize("count", [0, 3])
def test_without_objects_everything_is_background(count):
    found = match_atss(SMALL, 64, 96, torch.zeros(2, count, 4), torch.zeros(2, count, dtype=torch.bool))
    assert found.state.shape == (2, SMALL.count(64, 96))
    assert not found.state.any()
    assert found.state.dtype == torch.int8
    assert not found.index.any()


def test_padding_changes_nothing():
    boxes, ignored = random_boxes(10, 7, (256, 192))[None], (torch.arange(10) % 3 == 0)[None]
    bare = match_atss(SMALL, 192, 256, boxes, ignored)
    more = torch.zeros(1, 30, dtype=torch.bool)
    padded = match_atss(
        SMALL, 192, 256, torch.cat((boxes, torch.zeros(1, 30, 4)), 1), torch.cat((ignored, more), 1)
    )
    assert torch.equal(bare.state, padded.state)
    assert torch.equal(bare.index, padded.index)


def test_torchvisions_spacing_of_locations():
    """Its locations lie closer where a stride does not divide the image."""
    spec = AnchorSpec(sizes=(16.0, 200.0), strides=(8, 64), center=0.0, stride_rule="image")
    anchors = all_anchors_of_image(spec, 96, 96)
    box = anchors[-1:].clone()  # of the last location of the second level, at (48, 48)
    assert ((box[0, :2] + box[0, 2:]) / 2).tolist() == pytest.approx([48, 48], abs=1e-4)
    found = match_atss(spec, 96, 96, box[None], torch.zeros(1, 1, dtype=torch.bool))
    assert positives(found)[len(anchors) - 1] == 0


def test_on_cuda_the_host_waits_for_nothing(monkeypatch):
    """Tensors without values refuse whatever needs a value on the host."""
    monkeypatch.setattr("retinanet.kernels.usable", lambda *_, **__: True)
    sizes = []

    def match(anchors, boxes, *_):
        sizes.append(boxes.shape)
        shape = (len(boxes), len(anchors))
        return (boxes.new_zeros(shape, dtype=torch.int8), boxes.new_zeros(shape, dtype=torch.int64))

    monkeypatch.setattr("retinanet.kernels.match", match)
    monkeypatch.setattr("retinanet.kernels.prepare", lambda _: None)
    for cached in (all_anchors_of_image, _grid):
        cached.cache_clear()
    with FakeTensorMode():
        boxes = torch.empty(2, 5, 4, device="cuda")
        found = match_atss(SMALL, 64, 64, boxes, torch.empty(2, 5, dtype=torch.bool, device="cuda"))
    for cached in (all_anchors_of_image, _grid):
        cached.cache_clear()
    assert found.state.device.type == "cuda"
    assert sizes == [(2, 5, 4)]
