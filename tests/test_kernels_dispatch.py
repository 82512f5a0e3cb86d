"""Which way a call goes: to the kernel where there is one, to the plain form without numba, with the same results."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

pytest.importorskip("numba")

import numba

from fresh import run_python
from kernel_cases import random_boxes, random_mask, seeded
from retinanet import boxes as boxes_module
from retinanet import kernels
from retinanet.boxes import nms
from retinanet.inference import post_processing
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors
from retinanet.model.convolution import Convolution3x3


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
    monkeypatch.setattr(kernels, "_is_transformed", lambda tensor: False)
    tensor = SimpleNamespace(  # there may be no device here
        device=torch.device("cuda"), dtype=torch.float32, is_floating_point=lambda: True
    )
    assert kernels.usable(tensor)
    assert not kernels.usable(tensor, cuda=False)


def test_what_fast_paths_need():
    assert kernels._needed == {"cpu": "numba", "cuda": "triton"}


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (None, None),
        (
            ModuleNotFoundError("No module", name="PACKAGE"),
            "PACKAGE is not installed (pip install PACKAGE): ",
        ),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "PACKAGE cannot be imported (No module named 'x'): ",
        ),
        (ImportError("needs NumPy 2.4 or less"), "PACKAGE cannot be imported (needs NumPy 2.4 or less): "),
    ],
)
def test_why_there_are_no_fast_paths_is_told_once(device, failure, reason, monkeypatch, caplog):
    package = {"cpu": "numba", "cuda": "triton"}.get(device)
    if failure is not None and failure.name == "PACKAGE":
        failure = ModuleNotFoundError("No module", name=package)

    def import_module(name):
        assert name == package
        if failure is not None:
            raise failure
        return SimpleNamespace(config=SimpleNamespace(DISABLE_JIT=0))

    monkeypatch.setattr(kernels, "_available", {})
    monkeypatch.setattr(kernels, "import_module", import_module)
    for _ in range(2):
        assert kernels.available(device) is (failure is None and package is not None)
    told = [] if failure is None or package is None else [reason.replace("PACKAGE", package)]
    assert [message[: len(start)] for message, start in zip(caplog.messages, told, strict=True)] == told


def test_without_compilation_the_plain_forms_run(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_available", {})
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert not kernels.available("cpu")
    assert caplog.messages == [kernels.SLOW.format(problem="NUMBA_DISABLE_JIT is set")]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of torch's own use of it
@pytest.mark.parametrize("mode", ["torch.func", "forward_ad"])
def test_forward_mode_takes_the_plain_forms(mode):
    """Our operators have no rule for it, and torch would take their derivative for 0."""
    torch.manual_seed(0)
    x, direction = torch.randn(2, 5, 3).unbind()
    classes = torch.tensor([0, -1, 2, 1, -1])
    images, images_direction = torch.randn(2, 1, 96, 16, 16).unbind()
    convolution = Convolution3x3(96, 96, 3, padding=1)
    assert convolution._has_fast_path(images.to(memory_format=torch.channels_last))
    cases = [
        (lambda x: sigmoid_focal_loss(x, classes, reduction="sum"), x, direction),
        (lambda x: convolution(x.to(memory_format=torch.channels_last)).sum(), images, images_direction),
    ]
    for function, at, along in cases:
        if mode == "torch.func":
            _, slope = torch.func.jvp(function, (at,), (along,))
        else:
            with forward_ad.dual_level():
                slope = forward_ad.unpack_dual(function(forward_ad.make_dual(at, along))).tangent
        (gradient,) = torch.autograd.grad(function(leaf := at.clone().requires_grad_()), leaf)
        torch.testing.assert_close(slope, (gradient * along).sum(), rtol=1e-4, atol=1e-5)


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
    assert line == kernels.SLOW.format(problem="numba is not installed (pip install numba)")
    assert "pip install numba" in line


def test_nms_without_numba_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device_type: False)
    monkeypatch.setattr(boxes_module, "plain_nms", lambda *_: torch.tensor([7]))
    assert nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1).long(), 0.5).tolist() == [7]
