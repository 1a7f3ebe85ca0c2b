"""DoRA's scale of columns: ``g * u + bias`` for ``u [M, N]`` and ``g [N]``, and its gradients.

g is never rounded to 16 bits: near 1, where training starts, these come in steps of 2**-8 and more.
A row whose norm is 0 has g = 0.

Shapes: u, y and dy ``[M, N]``; magnitude, squares (of `fastlora.ops.torch.norms`), g and bias
``[N]``. ``traced`` says that a compiler traces the function.
"""

from __future__ import annotations

import torch


def scale_of(magnitude: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """Returns g, ``[N]``, of a magnitude and its squares; without these it is g already."""
    return magnitude if squares is None else magnitude.to(squares.dtype) * squares.rsqrt()


def times(
    u: torch.Tensor, scale: torch.Tensor, traced: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``u * scale`` in u's dtype, rounded once, in ``out`` if given; scale may be wider.

    On a GPU a wider scale makes no wider copy of u.
    """
    if u.dtype == scale.dtype:
        return torch.mul(u, scale, out=out)
    if traced:
        return (u * scale).to(u.dtype)
    return torch.mul(u, scale, out=torch.empty_like(u) if out is None else out)


def scale_columns(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    inplace: bool = False,
    *,
    traced: bool = False,
) -> torch.Tensor:
    """Returns ``scale * u + bias`` without recording a graph, in a contiguous u if ``inplace``."""
    y = times(u, scale, traced, u if inplace else None)
    return y if bias is None else y.add_(bias)


def scaled_with_sums(
    dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, traced: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``scale * dy``, and the sums over rows of ``dy * u``, ``[N]``."""
    product = dy * u
    # fp16 sums of scaled losses can leave its range, and bf16 rounds them to 8 bits.
    sums = product.sum(0, dtype=torch.float32 if dy.itemsize == 2 else None)
    # Into the same memory: fresh pages cost as much as the arithmetic on a CPU.
    return times(dy, scale, traced, product), sums


def scale_columns_backward(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor | None,
    traced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of u, and of the magnitude where u is there."""
    scale = scale_of(magnitude, squares)
    if u is None:
        return scale_columns(dy, None, scale, traced=traced), None
    du, sums = scaled_with_sums(dy, u, scale, traced)
    return du, sums if squares is None else sums * squares.rsqrt()
