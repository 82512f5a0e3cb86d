"""Memory of gradients is used again once nobody holds it; loss and matching need no more than they say."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from fresh import run_python
from retinanet.kernels.cpu import memory
from test_kernels_focal import focal_case, fused


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_results", [])
    monkeypatch.setattr(memory, "_scratch", [])


def floats(*shape: int) -> Tensor:
    return memory.recycled(torch.Size(shape), torch.float32)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    "held",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[90:],
        lambda tensor: tensor.view(torch.int32).view(10, 10).t(),
        lambda tensor: tensor.requires_grad_().detach(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[::-1][3:],
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_numpy(tensor.numpy()[5:]),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.clone().requires_grad_().mul(tensor).grad_fn,  # saved for a backward pass
    ],
)
def test_memory_that_is_held_is_not_handed_out(held):
    tensor = floats(100)
    address = tensor.data_ptr()
    holder = held(tensor)
    del tensor
    others = [floats(size) for size in (100, 90, 60, 100)]
    assert all(other.data_ptr() != address for other in others)
    del holder
    assert floats(100).data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
def test_no_two_tensors_share_memory():
    generator = np.random.default_rng(0)
    held: list[tuple[int, Tensor]] = []
    for number in range(400):
        held.append((number, floats(int(generator.integers(1, 60))).fill_(number)))
        if len(held) > 5:
            held.pop(int(generator.integers(0, len(held))))
        assert all((tensor == value).all() for value, tensor in held)


@pytest.mark.usefixtures("nothing_kept")
def test_one_thread_after_the_other_looks_for_memory():
    with ThreadPoolExecutor(1) as pool:
        with memory._lock:
            taken = pool.submit(floats, 10)
            with pytest.raises(TimeoutError):
                taken.result(timeout=0.2)
        assert taken.result(timeout=30).shape == (10,)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("shape", "dtype", "again"),
    [
        ((100,), torch.float32, True),
        ((5, 20), torch.float32, True),
        ((50, 1), torch.float32, True),
        ((200,), torch.bfloat16, True),
        ((30,), torch.int64, True),
        ((49,), torch.float32, False),  # less than half would be a waste
        ((101,), torch.float32, False),
    ],
)
def test_freed_memory_is_used_again(shape, dtype, again):
    address = floats(100).data_ptr()
    tensor = memory.recycled(torch.Size(shape), dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert memory.kept_bytes() == (400 if again else tensor.nbytes)
    if again:
        assert tensor.data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
def test_what_is_kept_does_not_grow_with_the_shapes_seen():
    generator = np.random.default_rng(1)
    for _ in range(300):
        size = int(generator.integers(1, 100_000))
        tensors = floats(size), floats(size)
        assert 2 * 4 * size <= memory.kept_bytes() <= 2 * 2 * 4 * size
        del tensors


@pytest.mark.usefixtures("nothing_kept")
def test_the_smallest_that_fits_is_taken():
    addresses = [tensor.data_ptr() for tensor in [floats(size) for size in (199, 120, 110, 150)]]
    assert floats(100).data_ptr() == addresses[2]


@pytest.mark.usefixtures("nothing_kept")
def test_scratch_of_other_shapes_does_not_cost_results_their_memory():
    where = memory.recycled(torch.Size((1000,)), torch.float32).data_ptr()
    for size in (10, 100_000, 30):
        memory.recycled(torch.Size((size,)), torch.float32, scratch=True)
    assert memory.recycled(torch.Size((1000,)), torch.float32).data_ptr() == where


@pytest.mark.usefixtures("nothing_kept")
def test_an_empty_tensor_takes_nothing():
    tensor = floats(3, 0, 5)
    assert tensor.shape == (3, 0, 5)
    assert memory.kept_bytes() == 0


@pytest.mark.usefixtures("nothing_kept")
def test_a_second_step_uses_the_gradient_of_the_first():
    logits, indices = focal_case(100, 10, seed=14)
    gradients = set()
    for _ in range(3):
        loss, gradient = fused(logits, indices)
        gradients.add(gradient.data_ptr())
        del loss, gradient
    assert len(gradients) == 1
    assert memory.kept_bytes() == logits.nbytes


PEAKS = """
import sys
import numpy as np
import torch
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def report(work, size, allowed):
    work(size // 50)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is in use from here on
    before = peak()
    result = work(size)
    grown = peak() - before
    control = np.ones(allowed, np.uint8)  # this must show
    print(grown, peak() - before)

generator = torch.Generator().manual_seed(0)

def random_boxes(count):
    corner, size = torch.rand(2, count, 2, generator=generator)
    return torch.cat((corner * 1000, corner * 1000 + 8 + size * 80), dim=1)

anchors, boxes, ignored = random_boxes(120_000), random_boxes(20_000), torch.arange(20_000) % 10 == 0
report(lambda n: match_anchors(anchors, boxes[:n], ignored[:n], low_quality=True), 20_000, int(sys.argv[1]))

logits, indices, weight = torch.zeros(125_000, 80), torch.arange(125_000) % 80 - 40, torch.ones(125_000)

def step(rows):
    leaf = logits[:rows].requires_grad_()
    sigmoid_focal_loss(leaf, indices[:rows], reduction="sum", weight=weight[:rows]).backward()
    return leaf.grad

report(step, 125_000, int(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    # A matrix of 120,000 anchors x 20,000 boxes would be 9.6 GB; 10 million logits have a gradient of 40 MB.
    allowed = [100 * 10**6, 40 * 10**6 + 30 * 10**6]
    for line, most in zip(run_python(PEAKS, *allowed).stdout.splitlines(), allowed, strict=True):
        grown, with_control = map(int, line.split())
        assert grown < most
        assert with_control > 0.9 * most
