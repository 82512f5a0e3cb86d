"""Post-processing against its literal definition: sigmoid everything, sort in Python, suppress pair by pair."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.batches import RawPredictions
from retinanet.boxes import BoxCoding, iou
from retinanet.inference.post_processing import first_largest, post_process
from retinanet.model import PostProcessing

CODING = BoxCoding()
GRIDS = ((2, 2), (1, 2), (1, 1))
CLASSES = 3


def random_case(seed):
    """Two images, three levels; logits and boxes from a coarse grid, so that scores tie and boxes coincide."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).float()

    rows = [r * c * 2 for r, c in GRIDS]
    raw = RawPredictions(
        logits=tuple(whole(-8, 5, 2, n, CLASSES) / 2 for n in rows),
        deltas=tuple(whole(-2, 3, 2, n, 4) / 4 for n in rows),
        grids=GRIDS,
    )
    corners = [whole(-6, 20, n, 2) for n in rows]
    anchors = [torch.cat((c, c + whole(2, 12, len(c), 2)), dim=1) for c in corners]
    return raw, anchors, [(16, 12), (20, 20)]


def clipped(box, size):
    width, height = size
    x1, y1, x2, y2 = box.tolist()
    return torch.tensor(
        [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)],
        dtype=torch.float32,
    )


def solid(box):
    return bool(box[2] > box[0] and box[3] > box[1])


def literal(raw, anchors, sizes, options):
    """The definition: lists of (box, score, label) an image."""
    images = []
    for image, size in enumerate(sizes):
        pool = []
        for level, threshold in enumerate(options.thresholds(len(GRIDS))):
            scores = raw.logits[level][image].sigmoid()
            boxes = CODING.decode(anchors[level], raw.deltas[level][image])
            passing = [
                (a, k) for a in range(len(scores)) for k in range(CLASSES) if scores[a, k].item() > threshold
            ]
            best = sorted(passing, key=lambda ak: (-scores[ak].item(), ak))[: options.top_k]
            pool += [(boxes[a], scores[a, k], k) for a, k in sorted(best)]
        if options.clip == "before-nms":
            pool = [(clipped(box, size), score, k) for box, score, k in pool]
            pool = [one for one in pool if solid(one[0]) or not options.drop_empty]
        kept = []
        for box, score, k in sorted(pool, key=lambda one: -one[1].item()):  # stable: ties stay in order
            if all(k != other or iou(box, b).item() <= options.nms_threshold for b, _, other in kept):
                kept.append((box, score, k))
        kept = kept[: options.max_detections]
        if options.clip == "after-nms":
            kept = [(clipped(box, size), score, k) for box, score, k in kept]
            kept = [one for one in kept if solid(one[0]) or not options.drop_empty]
        images.append(kept)
    return images


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.builds(
        PostProcessing,
        score_threshold=st.sampled_from([0.0, 0.05, 0.3, 0.9, (0.05, 0.4, 0.0)]),
        top_k=st.sampled_from([1, 3, 10, 1000]),
        nms_threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        clip=st.sampled_from(["before-nms", "after-nms"]),
        drop_empty=st.booleans(),
        max_detections=st.sampled_from([1, 4, 100]),
    ),
)
def test_it_is_its_definition(seed, options):
    raw, anchors, sizes = random_case(seed)
    found = post_process(raw, anchors, sizes, coding=CODING, options=options)
    assert len(found) == 2
    for ours, wanted in zip(found, literal(raw, anchors, sizes, options), strict=True):
        assert ours.labels.tolist() == [k for _, _, k in wanted]
        assert ours.scores.tolist() == pytest.approx([score.item() for _, score, _ in wanted], rel=1e-6)
        expected = torch.stack([box for box, _, _ in wanted]) if wanted else torch.zeros(0, 4)
        torch.testing.assert_close(ours.boxes, expected)


def one_level(logits, boxes):
    """One image, one level; deltas zero, so that anchors are the boxes."""
    logits = torch.tensor(logits)[None]
    return RawPredictions((logits,), (torch.zeros(1, len(boxes), 4),), ((1, len(boxes)),)), [
        torch.tensor(boxes)
    ]


def run(raw, anchors, size=(100, 100), **options):
    (found,) = post_process(raw, anchors, [size], coding=CODING, options=PostProcessing(**options))
    return found


def test_clip_before_and_after_nms_differ():
    # Cut to 10 x 10 both boxes are the same; as they were, IoU is 100 / 300.
    raw, anchors = one_level([[2.0], [1.0]], [[0.0, 0, 10, 10], [0.0, 0, 30, 10]])
    assert len(run(raw, anchors, (10, 10), clip="before-nms").boxes) == 1
    after = run(raw, anchors, (10, 10), clip="after-nms")
    assert after.boxes.tolist() == [[0, 0, 10, 10], [0, 0, 10, 10]]


@pytest.mark.parametrize("clip", ["before-nms", "after-nms"])
def test_a_box_outside_the_image(clip):
    raw, anchors = one_level([[2.0], [1.0]], [[200.0, 0, 210, 10], [0.0, 0, 5, 5]])
    assert run(raw, anchors, clip=clip).boxes.tolist() == [[0, 0, 5, 5]]
    assert len(run(raw, anchors, clip=clip, drop_empty=False).boxes) == 2


def test_width_and_height_are_not_swapped():
    raw, anchors = one_level([[2.0]], [[-5.0, -5, 500, 500]])
    assert run(raw, anchors, (30, 20)).boxes.tolist() == [[0, 0, 30, 20]]


def test_the_threshold_is_strict():
    raw, anchors = one_level([[0.0], [0.001]], [[0.0, 0, 5, 5], [10.0, 0, 15, 5]])
    assert len(run(raw, anchors, score_threshold=0.5).boxes) == 1


def test_a_level_of_its_own_threshold():
    raw, anchors, sizes = random_case(0)
    options = PostProcessing(score_threshold=(0.99, 0.99, 0.0), nms_threshold=1.0, drop_empty=False)
    for found in post_process(raw, anchors, sizes, coding=CODING, options=options):
        assert len(found.scores) == raw.logits[2][0].numel()


def test_nothing_found():
    raw, anchors = one_level([[-20.0, -20.0]], [[0.0, 0, 5, 5]])
    found = run(raw, anchors)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


def test_bfloat16_outputs_give_float32_boxes():
    raw, anchors = one_level([[2.0, 1.0]], [[0.0, 0, 5, 5]])
    half = dataclasses.replace(
        raw,
        logits=tuple(x.bfloat16() for x in raw.logits),
        deltas=tuple(x.bfloat16() for x in raw.deltas),
    )
    found = run(half, anchors)
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_first_largest(values, data):
    k = data.draw(st.integers(1, len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert first_largest(torch.tensor(values).float(), k).tolist() == sorted(best)
