"""Which way a call goes: to the kernel where there is one, to the plain form without numba, with the same results."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from kernel_cases import random_boxes, random_mask, run_python, seeded
from retinanet import boxes as boxes_module
from retinanet import kernels
from retinanet.boxes import nms
from retinanet.inference import post_processing
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("focal_sum", lambda: sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(2).long(), reduction="sum")),
        ("match", lambda: match_anchors(torch.zeros(5, 4), torch.zeros(3, 4))),
        ("select", lambda: post_processing._select([torch.zeros(1, 2, 3)], [0.0], 5)),
        ("nms", lambda: nms(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2).long(), 0.5)),
    ],
)
def test_the_library_calls_the_kernel(name, call, monkeypatch):
    class Called(Exception):
        pass

    def raise_called(*_):
        raise Called

    monkeypatch.setattr(kernels, name, raise_called)
    with pytest.raises(Called):
        call()


@pytest.mark.parametrize(
    ("tensors", "dtypes", "expected"),
    [
        ([torch.zeros(1)], (torch.float32,), True),
        ([torch.zeros(1).double()], (torch.float32,), False),
        ([torch.zeros(1).bfloat16()], (torch.float32, torch.bfloat16), True),
        ([torch.zeros(1, device="meta")], (torch.float32,), False),
        ([torch.zeros(1), torch.zeros(1, device="meta")], (torch.float32,), False),
    ],
)
def test_usable(tensors, dtypes, expected):
    assert kernels.usable(*tensors, dtypes=dtypes) is expected


def test_usable_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device_type: device_type == "cuda")
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)  # there may be no device here
    assert kernels.usable(tensor)
    assert not kernels.usable(tensor, cuda=False)


def test_what_fast_paths_need(monkeypatch):
    for package, expected in (("numba", {"cpu"}), ("triton", {"cuda"})):
        monkeypatch.setattr(
            kernels, "find_spec", lambda name, package=package: package if name == package else None
        )
        assert {device for device, found in kernels._installed().items() if found} == expected


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_missing_package_is_told_once(device, found, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_available", {"cpu": found, "cuda": found})
    monkeypatch.setattr(kernels, "_said", False)
    for _ in range(2):
        assert kernels.available(device) is (found and device != "mps")
    assert caplog.messages == ([kernels.MISSING] if device == "cpu" and not found else [])


# ---------------------------------------------------------------------------------- without numba


def everything(case: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Call every function that has a fast path, and each twice. Another process runs this source text."""
    import torch

    from retinanet.batches import RawPredictions
    from retinanet.boxes import BoxCoding, nms
    from retinanet.inference import post_process
    from retinanet.losses import sigmoid_focal_loss
    from retinanet.matching import match_anchors
    from retinanet.model import PostProcessing

    logits, deltas, boxes = case["logits"], case["deltas"], case["boxes"]
    found = {"loss": [], "match": [], "nms": [], "post_process": []}
    for reduction in ("none", "sum", "mean"):
        leaf = logits.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, case["classes"], reduction=reduction, weight=case["weight"])
        loss.sum().backward()
        found["loss"] += [loss.detach(), leaf.grad]
    for low_quality in (False, True):
        matches = match_anchors(case["anchors"], boxes, case["ignored"], low_quality=low_quality)
        found["match"] += [matches.state, matches.index]
    for most in (None, 5):
        found["nms"].append(nms(boxes[0], case["scores"], case["labels"], 0.4, max_kept=most))
    for dtype in (torch.float32, torch.bfloat16):
        raw = RawPredictions((logits.to(dtype),), (deltas,), ((10, 30),))
        for one in post_process(
            raw, [case["anchors"]], [(200, 200)] * 2, coding=BoxCoding(), options=PostProcessing(top_k=50)
        ):
            found["post_process"] += [one.boxes, one.scores, one.labels]
    return found


SCRIPT = f"""
import sys

sys.modules["numba"] = None
import torch
from torch import Tensor

{inspect.getsource(everything)}

torch.save(everything(torch.load(sys.argv[1])), sys.argv[2])
assert not any(name.startswith("retinanet.kernels.cpu.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def without_numba(tmp_path_factory):
    """What `everything` returns with numba and without, and what the process without it wrote to stderr."""
    generator = seeded(0)
    case = {
        "logits": torch.randint(-8, 5, (2, 300, 4), generator=generator) / 2,
        "deltas": torch.randint(-2, 3, (2, 300, 4), generator=generator) / 4,
        "classes": torch.randint(-2, 4, (2, 300), generator=generator),
        "weight": torch.randint(0, 3, (2, 300), generator=generator).float(),
        "anchors": random_boxes(300, seed=1),
        "boxes": random_boxes(2, 40, seed=2),
        "ignored": random_mask(2, 40, seed=3),
        "scores": torch.rand(40, generator=generator),
        "labels": torch.randint(0, 3, (40,), generator=generator),
    }
    folder = tmp_path_factory.mktemp("without_numba")
    torch.save(case, folder / "case.pt")
    run = run_python(SCRIPT, folder / "case.pt", folder / "found.pt")
    return everything(case), torch.load(folder / "found.pt"), run.stderr


@pytest.mark.parametrize("name", ["match", "nms", "post_process"])
def test_results_without_numba_are_the_same(name, without_numba):
    with_numba, others, _ = without_numba
    assert len(with_numba[name]) == len(others[name]) > 0
    assert all(tensor.numel() for tensor in others[name])
    assert all(map(torch.equal, with_numba[name], others[name]))


def test_losses_without_numba_are_the_same(without_numba):
    with_numba, others, _ = without_numba
    for ours, plain in zip(with_numba["loss"], others["loss"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)


def test_one_line_says_that_numba_is_missing(without_numba):
    (line,) = without_numba[2].splitlines()
    assert line == kernels.MISSING
    assert "pip install numba" in line


def test_nms_without_numba_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device_type: False)
    monkeypatch.setattr(boxes_module, "plain_nms", lambda *_: torch.tensor([7]))
    assert nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1).long(), 0.5).tolist() == [7]
