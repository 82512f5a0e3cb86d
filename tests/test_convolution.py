"""The Winograd convolution gives what torch's gives, in value and in every gradient, and knows when to stand back."""

import pytest
import torch
from torch import Tensor, nn

from retinanet import kernels
from retinanet.model import BackboneSpec, build_backbone
from retinanet.model.convolution import Convolution3x3

LAST = torch.channels_last


def pair(ci: int, co: int, bias: bool = True) -> tuple[Convolution3x3, nn.Conv2d]:
    """Ours in float32 and torch's in float64 with the same weights."""
    torch.manual_seed(0)
    ours = Convolution3x3(ci, co, 3, padding=1, bias=bias).to(memory_format=LAST)
    exact = nn.Conv2d(ci, co, 3, padding=1, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def all_of(convolution: nn.Module, images: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    out = convolution(images)
    out.backward(gradient)
    return [out.detach(), images.grad, *(p.grad for p in convolution.parameters())]


@pytest.fixture
def spied(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes that met the fast path."""
    seen = []
    fast = kernels.convolve3x3
    monkeypatch.setattr(
        kernels, "convolve3x3", lambda images, *rest: seen.append(tuple(images.shape)) or fast(images, *rest)
    )
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "ci", "co", "height", "width"),
    [
        (1, 96, 96, 16, 16),
        (2, 128, 96, 17, 20),  # an odd height: the last row of tiles is half outside
        (1, 96, 100, 18, 31),
        (3, 256, 36, 15, 13),  # both odd, few outputs
        (1, 96, 96, 128, 34),  # more rows of tiles than one chunk
        (40, 96, 96, 2, 3),
    ],
)
def test_value_and_gradients(batch, ci, co, height, width, bias, spied):
    ours, exact = pair(ci, co, bias)
    images = torch.randn(batch, ci, height, width).to(memory_format=LAST)
    gradient = torch.randn(batch, co, height, width).to(memory_format=LAST)
    found = all_of(ours, images, gradient)
    wanted = all_of(exact, images.double(), gradient.double())
    assert spied == [(batch, ci, height, width)]
    assert len(found) == len(wanted) == 3 + bias
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


def test_it_is_no_less_exact_than_torch():
    ours, exact = pair(256, 256)
    torchs = nn.Conv2d(256, 256, 3, padding=1)
    torchs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 256, 32, 32).to(memory_format=LAST)
    with torch.no_grad():
        wanted = exact(images.double())
        assert (ours(images) - wanted).abs().max() <= 1.05 * (torchs(images) - wanted).abs().max()


def test_second_derivatives():
    ours, exact = pair(96, 96, bias=False)
    images = torch.randn(1, 96, 16, 16).to(memory_format=LAST)

    def penalty(convolution: nn.Module, images: Tensor) -> list[Tensor]:
        images = images.clone().requires_grad_()
        out = convolution(images).square().sum()
        of_images, of_weight = torch.autograd.grad(out, [images, convolution.weight], create_graph=True)
        total = of_images.square().sum() + of_weight.square().sum()
        return list(torch.autograd.grad(total, [images, convolution.weight]))

    for a, b in zip(penalty(ours, images), penalty(exact, images.double()), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_defaults_of_the_process_do_not_reach_it(monkeypatch):
    ours, _ = pair(96, 96)
    images = torch.randn(1, 96, 16, 16).to(memory_format=LAST)
    expected = ours(images)
    torch.set_default_dtype(torch.float64)
    try:
        found = ours(images)
        (of_weight,) = torch.autograd.grad(found.sum(), [ours.weight])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == of_weight.dtype == torch.float32
    assert torch.equal(found, expected)


def test_output_lies_channels_last_like_the_input():
    ours, _ = pair(96, 96)
    out = ours(torch.randn(2, 96, 16, 16).to(memory_format=LAST))
    assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    ours, exact = pair(96, 128)
    images = torch.randn(2, 96, 20, 20).to(memory_format=LAST)
    gradient = torch.randn(2, 128, 20, 20).to(memory_format=LAST)
    try:
        torch.set_num_threads(threads)
        found = all_of(ours, images, gradient)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, all_of(exact, images.double(), gradient.double()), strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


def test_a_nan_reaches_the_pixels_around_it_and_few_others():
    ours, _ = pair(96, 96)
    images = torch.zeros(1, 96, 16, 16).to(memory_format=LAST)
    images[0, 5, 8, 8] = float("nan")
    seen = ours(images).isnan()[0, 0]
    assert seen[7:10, 7:10].all()
    assert seen.sum() <= 36  # the tiles that it lies in


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({"stride": 2}, torch.zeros(1, 96, 32, 32)),
        ({"groups": 2}, torch.zeros(1, 96, 32, 32)),
        ({"padding": 0}, torch.zeros(1, 96, 32, 32)),
        ({"padding": 2, "dilation": 2}, torch.zeros(1, 96, 32, 32)),
        ({}, torch.zeros(1, 96, 14, 14)),  # too few tiles
    ],
)
def test_what_it_does_not_take_is_torchs_own(options, images, spied):
    convolution = Convolution3x3(96, 96, 3, **{"padding": 1, **options})
    expected = nn.functional.conv2d(
        images,
        convolution.weight,
        convolution.bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )
    assert torch.equal(convolution(images.to(memory_format=LAST)), expected)
    assert spied == []


def test_other_layouts_and_types_are_torchs_own(spied):
    ours, exact = pair(96, 96)
    images = torch.randn(1, 96, 32, 32)
    ours(images)  # channels first
    exact(images.double().to(memory_format=LAST))
    with torch.autocast("cpu", torch.bfloat16):
        ours(images.to(memory_format=LAST))
    small = Convolution3x3(64, 64, 3, padding=1)  # too few channels
    small(torch.randn(1, 64, 32, 32).to(memory_format=LAST))
    assert spied == []


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    ours, _ = pair(96, 96)
    ours.requires_grad_(False)
    monkeypatch.setattr("retinanet.kernels.cpu.winograd.weight_gradient", None)  # would fail if it was called
    images = torch.randn(1, 96, 16, 16).to(memory_format=LAST).requires_grad_()
    ours(images).sum().backward()
    assert images.grad is not None


def test_torch_knows_it_as_an_operator():
    images = torch.randn(1, 8, 6, 7).to(memory_format=LAST)
    torch.library.opcheck(kernels._convolve3x3, (images, torch.randn(5, 8, 3, 3)))
    ours, _ = pair(96, 96)
    images = torch.randn(1, 96, 16, 16).to(memory_format=LAST)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), ours(images))


def test_a_backbone_uses_it_and_keeps_its_names(spied):
    backbone = build_backbone(BackboneSpec("resnet18")).to(memory_format=LAST)
    names = set(backbone.network.state_dict())
    assert "layer2.0.conv2.weight" in names
    backbone(torch.randn(1, 3, 128, 128).to(memory_format=LAST))
    assert (1, 128, 16, 16) in spied
