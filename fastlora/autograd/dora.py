"""DoRA's arithmetic: the norm in factored form, and the autograd functions above a LoRA result.

With ``u = x @ weight.T + scaling * s @ lora_b.T`` the layer's output is ``g * u + bias``, where
``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` per output row, and the norm is detached.
So a LoRA forward by any implementation gives u, and what remains is one scale per column of u.

With active dropout the base product meets the dropped input too, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``
(`fastlora.autograd.dora_dropped`).

g is never rounded to 16 bits: near 1, where training starts, these come in steps of 2**-8 and more.
A row whose norm is 0 has g = 0.

Method: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
sections 4.1 and 4.3 (the detached norm); PEFT 0.21.2, ``tuners/lora/dora.py``, for dropout.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``u`` and ``y [M, N]``, ``magnitude [N]``, ``scaling`` without dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import plain_backward
from fastlora.ops.torch import products

# Elements of the weight that a norm widens at once.
_CHUNK = 1 << 18


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def outside_autocast(compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Calls ``compute`` with tensors of one device, the first of the arguments among them."""
    device_type = args[0].device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return compute(*args)
    return compute(*args)


@torch.no_grad()
def square_norms(weight: torch.Tensor) -> torch.Tensor:
    """Returns ``||weight||^2`` of each row, ``[N]`` in fp32 (fp64 for fp64).

    16-bit weights are widened a few rows at a time: no temporary is as large as the weight.
    """
    wide = _wide(weight.dtype)
    if weight.dtype == wide or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    rows = max(_CHUNK // max(weight.shape[1], 1), 1)
    parts = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.split(rows)]
    return torch.cat(parts).square() if parts else weight.new_zeros(0, dtype=wide)


def adapted_squares(
    weight: torch.Tensor,
    squares: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    cross: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `adapted_sums` of whole rows, infinity where they are 0; see `nonzero`."""
    return nonzero(adapted_sums(weight, squares, lora_a, lora_b, scaling, cross))


@torch.no_grad()
def adapted_sums(
    weight: torch.Tensor,
    squares: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    cross: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``||weight + scaling * lora_b @ lora_a||^2`` of each row.

    In factored form,
    ``||W||^2 + 2 c rowsum((W A^T) * B) + c^2 rowsum((B (A A^T)) * B)``: the largest temporary is
    ``[N, R]``. Where the update cancels most of a row, what remains has the rounding of its terms.
    Sums over parts of the columns, each of weight and lora_a, add up to those of the whole rows.

    Args:
        weight: ``[N, K]``.
        squares: Of `square_norms`.
        lora_a: ``[R, K]``; rounded to the weight's dtype for the product with it.
        lora_b: ``[N, R]``.
        scaling: A number, or a tensor without dimensions.
        cross: ``weight @ lora_a.T``, ``[N, R]``, where somebody has it; may be overwritten.

    Returns:
        ``[N]`` in fp32 (fp64 for an fp64 weight).
    """
    wide = squares.dtype
    a, b = lora_a.to(wide), lora_b.to(wide)
    # [N, K] x [K, R], then [N, R] x [R, R]
    if cross is None:
        cross = products.mm(weight, lora_a.to(weight.dtype).t())
    cross = cross.to(wide)
    gram = torch.mm(a, a.t())
    if isinstance(scaling, torch.Tensor):
        inner = cross.addmm_(b, gram * scaling, beta=2.0)
        total = squares + inner.mul_(b).sum(1) * scaling
    else:  # numbers cost no operations of their own
        inner = cross.addmm_(b, gram, beta=2.0, alpha=scaling)
        rows = torch.baddbmm(
            squares[:, None, None], inner[:, None, :], b[:, :, None], alpha=scaling
        )
        total = rows.view(-1)
    return total


def nonzero(sums: torch.Tensor) -> torch.Tensor:
    """Returns squared norms with infinity for 0: a row whose norm is 0 has g = 0, not NaN."""
    return F.threshold(sums, 0.0, float("inf"))  # keeps NaN


def norm_joins(x: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
    """Whether lora_a's rows join those of x, ``[..., K]``, in the base product, for ``cross``.

    That saves reading the weight again and costs a copy of x, where there is none anyway. SmolLM2's
    linears, 512 rows, fp32, one AVX2 core: cross 97 to 753 us, the copy 99 to 388, no gain at
    N = 192. The result is a view of the product, whose last R rows live as long: an eighth at most.
    """
    m, n = x.shape[:-1].numel(), weight.shape[0]
    return weight.dtype == x.dtype and 8 * rank <= m <= n


def scale_of(magnitude: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Returns g, ``[N]``, of a magnitude and `adapted_squares`."""
    return magnitude.detach().to(squares.dtype) * squares.rsqrt()


def times(u: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``u * scale`` in u's dtype, rounded once, in ``out`` if given; scale may be wider.

    On a GPU a wider scale makes no wider copy of u.
    """
    if u.dtype == scale.dtype:
        return torch.mul(u, scale, out=out)
    if torch.compiler.is_compiling():
        return (u * scale).to(u.dtype)
    return torch.mul(u, scale, out=torch.empty_like(u) if out is None else out)


# ------------------------------------------------------------------------ a scale for each column


def _in_one_pass(u: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether batch norm's CPU kernels scale u's columns: widened, one pass, rounded once.

    In evaluation batch norm is ``(u - mean) * weight / sqrt(variance) + bias``: DoRA, with g for a
    weight, and its weight's gradient is a sum of ``dy * u`` over rows. bf16, 512 x 1536, one core
    with AMX: 181 us instead of 224, and the backward with its column sums 357 instead of 535. Not
    in fp32, where its sums are worse than PyTorch's.
    """
    half = u.dtype in (torch.float16, torch.bfloat16) and u.numel() > 0
    eager = u.device.type == "cpu" and not torch.compiler.is_compiling()
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
    u: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, inplace: bool = False
) -> torch.Tensor:
    """Returns ``scale * u + bias`` without recording a graph, in u itself if ``inplace``.

    Args:
        u: ``[M, N]``; contiguous if ``inplace``.
        bias: ``[N]`` or None.
        scale: g, ``[N]``, of `scale_of`.
        inplace: Whether u may be overwritten.
    """
    out = u if inplace else None
    if _in_one_pass(u, scale):
        return _batch_norm(u, bias, scale, out)
    y = times(u, scale, out)
    return y if bias is None else y.add_(bias)


def scaled_with_sums(
    dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``scale * dy``, and the sums over rows of ``dy * u``, ``[N]``."""
    if _in_one_pass(u, scale):
        return _batch_norm_backward(dy, u, scale)
    product = dy * u
    # fp16 sums of scaled losses can leave its range.
    sums = product.sum(0, dtype=torch.float32 if dy.dtype == torch.float16 else None)
    # Into the same memory: fresh pages cost as much as the arithmetic on a CPU.
    return times(dy, scale, product), sums


def scale_columns_backward(
    dy: torch.Tensor, u: torch.Tensor | None, magnitude: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of u, and of the magnitude where u is there."""
    scale = scale_of(magnitude, squares)
    if u is None:
        return scale_columns(dy, None, scale), None
    du, sums = scaled_with_sums(dy, u, scale)
    return du, sums * squares.rsqrt()


class DoraScale(torch.autograd.Function):
    """``y = g * u + bias``, for one magnitude or for segments of rows with one each.

    Saves u, which only the magnitude's gradient needs, where that is wanted; and N numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        bias: torch.Tensor | None,
        lengths: tuple[int, ...] | None,
        *pairs: torch.Tensor,
    ) -> torch.Tensor:
        """``pairs`` holds magnitude and `adapted_squares` of each segment in turn.

        ``u [..., N]``; ``lengths`` are the rows of each segment, None for one segment of all rows.
        """
        rows = u.reshape(-1, u.shape[-1])
        if lengths is None:
            y = scale_columns(rows, bias, scale_of(*pairs))
        else:
            parts = zip(rows.split(lengths), pairs[::2], pairs[1::2], strict=True)
            y = torch.cat([scale_columns(part, bias, scale_of(m, sq)) for part, m, sq in parts])
        ctx.lengths, ctx.bias_dtype = lengths, None if bias is None else bias.dtype
        ctx.save_for_backward(u if any(ctx.needs_input_grad[3:]) else None, *pairs)
        return torch.ops.aten._unsafe_view(y, u.shape)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, *pairs = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        lengths = (dy.shape[0],) if ctx.lengths is None else ctx.lengths
        grads = dy.split(lengths)
        parts = grads if u is None else u.reshape(dy.shape).split(lengths)
        scaled: list[torch.Tensor] = []
        d_pairs: list[torch.Tensor | None] = []
        for i, (dy_own, part) in enumerate(zip(grads, parts, strict=True)):
            magnitude, squares = pairs[2 * i : 2 * i + 2]
            wanted = ctx.needs_input_grad[3 + 2 * i]
            du, d_own = scale_columns_backward(dy_own, part if wanted else None, magnitude, squares)
            scaled.append(du)
            d_pairs += [None if d_own is None else d_own.to(magnitude.dtype), None]
        d_bias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        du = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        return du.view(grad.shape) if ctx.needs_input_grad[0] else None, d_bias, None, *d_pairs
