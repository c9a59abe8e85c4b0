"""LinearPatch: its transform, its fading, and that it reverses a jump that it was measured on."""

import pytest
import torch

from megaprune.mcore.layers.linear_patch import LinearPatch, hadamard, strength_at


@pytest.mark.parametrize("size", [1, 2, 8, 12, 40])
def test_the_transform_is_orthonormal_and_its_own_inverse(size):
    matrix = hadamard(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix, matrix.T)
    assert len(matrix.abs().unique().round(decimals=12).unique()) <= 2  # one magnitude, and 0 between the blocks
    x = torch.randn(3, 2, size)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)
    assert torch.allclose(hadamard(x), x @ matrix.float(), atol=1e-5)


def test_the_patch_is_the_map_of_the_paper_and_fades_to_the_identity():
    torch.manual_seed(0)
    scale, x = torch.rand(16) + 0.5, torch.randn(5, 2, 16)
    patch, matrix = LinearPatch(scale), hadamard(torch.eye(16))
    assert patch(x) is x
    patch.strength = 1.0
    assert torch.allclose(patch(x), x @ (matrix @ torch.diag(scale) @ matrix.T), atol=1e-5)
    half = LinearPatch(scale)
    half.strength = 0.5
    assert torch.allclose(half(x), (x + patch(x)) / 2, atol=1e-5)
    assert patch(x.bfloat16()).dtype == torch.bfloat16


def test_strength_falls_to_nothing_at_half_of_the_iterations():
    assert [strength_at(iteration, 8) for iteration in range(8)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert strength_at(0, 1) == 1.0
