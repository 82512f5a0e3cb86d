"""Muon: the orthogonal factor against an exact decomposition, a step against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retinanet.training.muon import Muon, orthogonal_factor


def exact(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vh).to(matrix.dtype)


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (8, 8), (1, 9), (128, 64)])
def test_the_factor_has_nearly_equal_singular_values_and_the_directions_of_the_matrix(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    rank = min(shape)
    # Singular values over a factor of 32, as the gradient of a convolution has them.
    u, vh = torch.linalg.qr(torch.randn(rows, rank))[0], torch.linalg.qr(torch.randn(columns, rank))[0].T
    matrix = u * torch.logspace(0, -1.5, rank) @ vh
    factor = orthogonal_factor(matrix[None])[0]
    values = torch.linalg.svdvals(factor)
    assert values.min() > 0.5
    assert values.max() < 1.3
    # Same directions: U^T factor V is diagonal.
    core = u.T @ factor @ vh.T
    assert (core - core.diagonal().diag()).abs().max() < 1e-3
    assert torch.nn.functional.cosine_similarity(factor.flatten(), exact(matrix).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(64, 576), (48, 27), (16, 16)])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_the_factor_equals_the_plain_iteration(shape: tuple[int, int], rank: int) -> None:
    """In float64 and on X itself, as the method is written; gradients without full rank included."""
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    x = matrix.double() / matrix.double().norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonal_factor(matrix[None])[0], x.float(), atol=2e-3, rtol=2e-3)


def test_gradients_in_half_precision_are_orthogonalised_in_float32() -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(32, 4) @ torch.randn(4, 64)).bfloat16()
    factor = orthogonal_factor(matrix[None])
    assert factor.dtype == torch.bfloat16
    torch.testing.assert_close(factor.float(), orthogonal_factor(matrix[None].float()), atol=2e-3, rtol=1e-2)
    assert (orthogonal_factor(torch.zeros(1, 4, 8, dtype=torch.float16)) == 0).all()


def test_the_factor_does_not_depend_on_scale_or_on_neighbours_and_zero_stays_zero() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 16, 48)
    together = orthogonal_factor(torch.stack([first, 1e4 * second, torch.zeros(16, 48)]))
    torch.testing.assert_close(together[0], orthogonal_factor(first[None])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1], orthogonal_factor(second[None])[0], atol=1e-4, rtol=1e-4)
    assert (together[2] == 0).all()


def test_an_order_of_columns_does_not_matter() -> None:
    """What lets a convolution be flattened in the order its weights lie in memory."""
    torch.manual_seed(0)
    matrix, order = torch.randn(8, 36), torch.randperm(36)
    permuted = orthogonal_factor(matrix[None, :, order])[0]
    torch.testing.assert_close(permuted, orthogonal_factor(matrix[None])[0][:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_steps_by_the_formula(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=memory_format))
    expected = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    average = torch.zeros(16, 8, 3, 3)
    for _ in range(2):
        gradient = torch.randn(16, 8, 3, 3)
        weight.grad = gradient.to(memory_format=memory_format)
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient
        ahead = 0.1 * gradient + 0.9 * average
        factor = orthogonal_factor(ahead.reshape(1, 16, 72)).reshape(16, 8, 3, 3)
        expected = (1 - 0.1 * 0.01) * expected - 0.1 * 0.2 * 72**0.5 * factor
    torch.testing.assert_close(weight.detach(), expected, atol=1e-4, rtol=1e-4)


def test_the_size_of_a_step_is_near_that_of_adamw() -> None:
    """The quintic takes the singular values of a Gaussian matrix, .083 to .167 of its norm, to .78 on average."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64, 3, 3))
    weight.grad = torch.randn(64, 64, 3, 3)
    Muon([weight], lr=1.0).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(
        0.2, rel=0.3
    )  # singular values are 0.7 to 1.2


def test_weights_without_a_gradient_stay_and_a_closure_gives_its_loss() -> None:
    kept, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([kept, moved], lr=0.1)

    def closure() -> float:
        loss = (moved * torch.arange(16.0).view(4, 4)).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 120.0
    assert (kept == 1).all()
    assert (moved != 1).any()
