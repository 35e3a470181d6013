from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.quantize.gradient import rotate, straight_through


def rows(n: int = 40, d: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=draw, dtype=torch.float64) for _ in range(3))


def gradient(function, x, quantized, weight):
    leaf = x.clone().requires_grad_()
    out = function(leaf, quantized)
    assert torch.equal(out, quantized)
    (out * weight).sum().backward()
    return leaf.grad


def rotation(u: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The rotation of the plane of two unit vectors that turns u into q, from its angle."""
    cosine = u @ q
    side = q - cosine * u
    side = side / side.norm()
    sine = q @ side
    plane = torch.outer(u, u) + torch.outer(side, side)
    turn = torch.outer(side, u) - torch.outer(u, side)
    return torch.eye(len(u), dtype=u.dtype) - plane + cosine * plane + sine * turn


def test_straight_through_passes_the_gradient():
    x, quantized, weight = rows()
    assert torch.equal(gradient(straight_through, x, quantized, weight), weight)


def test_rotation_is_that_of_an_explicit_matrix():
    x, quantized, weight = rows()
    found = gradient(rotate, x, quantized, weight)
    for n in range(len(x)):
        matrix = rotation(x[n] / x[n].norm(), quantized[n] / quantized[n].norm())
        matrix = matrix * quantized[n].norm() / x[n].norm()
        torch.testing.assert_close(matrix @ x[n], quantized[n])
        torch.testing.assert_close(found[n], matrix.T @ weight[n])


def test_rotation_is_the_derivative_of_a_linear_map():
    x, quantized, _ = rows(6, 5)
    # Column d of the map, from the gradient of entry d, must give back quantized from x.
    columns = [
        gradient(rotate, x, quantized, torch.eye(5, dtype=x.dtype)[d].expand(6, 5))
        for d in range(5)
    ]
    torch.testing.assert_close((torch.stack(columns, dim=1) @ x[:, :, None])[..., 0], quantized)


def test_leading_dimensions_and_precision():
    x, quantized, weight = rows(24, 16)
    exact = gradient(rotate, x, quantized, weight)
    shaped = [t.float().reshape(2, 3, 4, 16) for t in (x, quantized, weight)]
    torch.testing.assert_close(gradient(rotate, *shaped), exact.float().reshape(2, 3, 4, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1, 100])
def test_halves_are_rotated_in_fp32(dtype, scale):
    x, noise, weight = rows(50, 64)
    # Many of these angles are above 120 degrees, and none is 180.
    x, quantized, weight = (part.to(dtype) for part in (scale * x, scale * (noise / 2 - x), weight))
    found = gradient(rotate, x, quantized, weight)
    assert found.dtype == dtype
    exact = gradient(rotate, x.double(), quantized.double(), weight.double())
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_rotation_have_a_finite_gradient(dtype):
    x, _, weight = (t.to(dtype) for t in rows(5, 6))
    zero = torch.zeros_like(x)
    assert torch.equal(gradient(rotate, zero, x, weight), weight)
    assert torch.equal(gradient(rotate, zero, zero, weight), weight)
    assert torch.equal(gradient(rotate, x, zero, weight), zero)
    # Opposite: the part along x is turned round, the rest is kept.
    along = (weight * x).sum(dim=1, keepdim=True) / x.square().sum(dim=1, keepdim=True) * x
    torch.testing.assert_close(gradient(rotate, x, -x, weight), weight - 2 * along)
    torch.testing.assert_close(gradient(rotate, x, -3 * x, weight), 3 * (weight - 2 * along))
    torch.testing.assert_close(gradient(rotate, x, 2 * x, weight), 2 * weight)


def test_no_gradient_flows_to_the_codeword():
    x, quantized, _ = rows()
    for function in (straight_through, rotate):
        leaf, word = x.clone().requires_grad_(), quantized.clone().requires_grad_()
        function(leaf, word).sum().backward()
        assert word.grad is None


def test_compiles_into_one_graph():
    x, quantized, weight = (t.float() for t in rows())
    whole = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradient(whole, x, quantized, weight), gradient(rotate, x, quantized, weight)
    )


def test_shapes_must_agree():
    for function in (straight_through, rotate):
        with pytest.raises(InvalidArgument, match="quantized"):
            function(torch.zeros(3, 2), torch.zeros(2))
