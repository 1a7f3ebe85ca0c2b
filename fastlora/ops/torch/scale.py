"""DoRA's scale of columns: ``g * u + bias`` for ``u [M, N]`` and ``g [N]``, and its gradients.

g is never rounded to 16 bits: near 1, where training starts, these come in steps of 2**-8 and more.
A row whose norm is 0 has g = 0.

Shapes: u, y and dy ``[M, N]``; magnitude, squares (of `fastlora.ops.torch.norms`), g and bias
``[N]``. ``traced`` says that a compiler traces the function.
"""

from __future__ import annotations

import functools

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


# ------------------------------------------------------------------------ a scale for each column


def _in_one_pass(u: torch.Tensor, scale: torch.Tensor, traced: bool) -> bool:
    """Whether batch norm's CPU kernels scale u's columns: widened, one pass, rounded once.

    In evaluation batch norm is ``(u - mean) * weight / sqrt(variance) + bias``: DoRA, with g for a
    weight, and its weight's gradient is a sum of ``dy * u`` over rows. bf16, 512 x 1536, one core
    with AMX: 181 us instead of 224, and the backward with its column sums 357 instead of 535. Not
    in fp32, where its sums are worse than PyTorch's.
    """
    half = u.dtype in (torch.float16, torch.bfloat16) and u.numel() > 0
    eager = u.device.type == "cpu" and not traced
    return half and eager and scale.dtype == torch.float32  # fp64 over an fp64 weight


def _as_image(rows: torch.Tensor) -> torch.Tensor:
    """Views contiguous ``[M, N]`` as an image of N channels, channels last: batch norm's layout."""
    m, n = rows.shape
    return rows.as_strided((1, n, m, 1), (m * n, 1, n, n))


@functools.lru_cache(maxsize=64)
def _unit(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch norm's mean 0 and variance 1, ``[N]``, and an empty tensor. Nobody writes into them.

    Kept, like other small things here: behind large products an operation on N numbers takes 10 to
    15 us, its code no longer being in the cache.
    """
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype), torch.empty(0, dtype=dtype)


def _batch_norm(
    u: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    shift = None if bias is None else bias.detach().to(scale.dtype)
    y = torch.empty_like(u, memory_format=torch.contiguous_format) if out is None else out
    zeros, ones, unused = _unit(u.shape[1], scale.dtype)
    torch.native_batch_norm(
        *(_as_image(u.contiguous()), scale, shift, zeros, ones, False, 0.0, 0.0),
        out=(_as_image(y), unused, unused),
    )
    return y


def _batch_norm_backward(
    dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``scale * dy`` and the sums of the columns of ``dy * u``."""
    zeros, ones, _ = _unit(u.shape[1], scale.dtype)
    # Of other layouts it reads the wrong elements.
    du, sums, _ = torch.ops.aten.native_batch_norm_backward(
        *(_as_image(dy.contiguous()), _as_image(u.contiguous()), scale, zeros, ones),
        *(zeros, ones, False, 0.0, [True, True, False]),
    )
    return du.as_strided(u.shape, (u.shape[1], 1)), sums


def scale_columns(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    inplace: bool = False,
    *,
    traced: bool = False,
) -> torch.Tensor:
    """Returns ``scale * u + bias`` without recording a graph, in u itself if ``inplace``.

    Args:
        u: ``[M, N]``; contiguous if ``inplace``.
        bias: ``[N]`` or None.
        scale: g, ``[N]``, of `scale_of`.
        inplace: Whether u may be overwritten.
    """
    out = u if inplace else None
    if _in_one_pass(u, scale, traced):
        return _batch_norm(u, bias, scale, out)
    y = times(u, scale, traced, out)
    return y if bias is None else y.add_(bias)


def scaled_with_sums(
    dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, traced: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``scale * dy``, and the sums over rows of ``dy * u``, ``[N]``."""
    if _in_one_pass(u, scale, traced):
        return _batch_norm_backward(dy, u, scale)
    product = dy * u
    # fp16 sums of scaled losses can leave its range.
    sums = product.sum(0, dtype=torch.float32 if dy.dtype == torch.float16 else None)
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
