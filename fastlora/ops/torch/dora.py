"""DoRA in PyTorch: norms of the adapted weight, scaling of output columns, and active dropout.

The row norms ``||weight + scaling * lora_b @ lora_a||`` are computed in factored form, without
storing the sum. The largest temporary is ``[N, R]``.

The scaled output is ``g * u + bias`` for ``u [M, N]`` and the scale ``g [N]``. g is never rounded
to 16 bits: training starts near 1, where bf16 numbers are at least 2**-8 apart. A row with a norm
of 0 has g = 0.

With active dropout, the base product is computed twice, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``.
LoRA's own products are operators if Triton runs.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``; u, y,
dy, and z ``[M, N]``; magnitude, squares (of the norms), g, and bias ``[N]``; ``scaling`` has no
dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlora.ops.execution_mode import is_forward_ad_active, is_traced
from fastlora.ops.torch import products, reference
from fastlora.ops.torch.single import keep_mask
from fastlora.quantized_tensor import dequantize_if_quantized

_Gradient = torch.Tensor | None

# Number of elements of the weight that are converted to a wider dtype at a time.
_CHUNK = 1 << 18


class RowChunkedWeight(NamedTuple):
    """A weight that is read in chunks of rows.

    Each chunk is computed when it is needed, for example by dequantization.

    Attributes:
        make: Returns an iterator over parts ``[n, K]`` of the rows.
        dtype, device: Dtype and device of the parts.
    """

    make: Callable[[], Iterator[torch.Tensor]]
    dtype: torch.dtype
    device: torch.device


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def disable_autocast(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator that disables autocast while a function runs."""

    @functools.wraps(compute)
    def run(weight: torch.Tensor | RowChunkedWeight, *args: object) -> torch.Tensor:
        device_type = weight.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return compute(weight, *args)
        return compute(weight, *args)

    return run


@torch.no_grad()
def squared_row_norms(
    weight: torch.Tensor | RowChunkedWeight, in_one_pass: bool = False
) -> torch.Tensor:
    """Return the squared norm of each row of a weight.

    The result is ``[N]`` in fp32 (fp64 for an fp64 weight). 16-bit weights are converted a few rows
    at a time, so that no temporary is as large as the weight. Set ``in_one_pass`` in a graph that
    is being compiled, because the compiler avoids the temporary.
    """
    wide = _wide(weight.dtype)
    if isinstance(weight, RowChunkedWeight):
        made = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.make()]
        return torch.cat(made).square()
    if weight.dtype == wide or in_one_pass:
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    rows = max(_CHUNK // max(weight.shape[1], 1), 1)
    parts = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.split(rows)]
    return torch.cat(parts).square() if parts else weight.new_zeros(0, dtype=wide)


@disable_autocast
@torch.no_grad()
def squared_row_norms_with_update(
    weight: torch.Tensor | RowChunkedWeight,
    squares: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
) -> torch.Tensor:
    """Return the squared norm of each row of ``weight + scaling * lora_b @ lora_a``.

    The norms are computed in factored form:
    ``||W||^2 + 2 c rowsum((W A^T) * B) + c^2 rowsum((B (A A^T)) * B)``.
    The largest temporary is ``[N, R]``. If the update cancels most of a row, the result has the
    rounding error of the terms. If weight and lora_a are split into parts along K, the results for
    the parts add up to the result for whole rows.

    Args:
        weight: ``[N, K]``.
        squares: The result of `squared_row_norms`.
        lora_a: ``[R, K]``, rounded to the weight's dtype for the product with the weight.
        lora_b: ``[N, R]``.
        scaling: A number, or a tensor without dimensions.

    Returns:
        ``[N]`` in fp32 (fp64 for an fp64 weight).
    """
    wide = squares.dtype
    a, b = lora_a.to(wide), lora_b.to(wide)
    # [N, K] x [K, R], then [N, R] x [R, R]
    down = lora_a.to(weight.dtype).t()
    if isinstance(weight, RowChunkedWeight):
        cross = torch.cat([products.mm(part, down) for part in weight.make()]).to(wide)
    else:
        cross = products.mm(weight, down).to(wide)
    gram = torch.mm(a, a.t())
    if isinstance(scaling, torch.Tensor):
        inner = cross.addmm_(b, gram * scaling, beta=2.0)
        total = squares + inner.mul_(b).sum(1) * scaling
    else:  # A number is passed as alpha, without an operation of its own.
        inner = cross.addmm_(b, gram, beta=2.0, alpha=scaling)
        rows = torch.baddbmm(
            squares[:, None, None], inner[:, None, :], b[:, :, None], alpha=scaling
        )
        total = rows.view(-1)
    return total


def replace_zeros_with_infinity(sums: torch.Tensor) -> torch.Tensor:
    """Replace zeros with infinity.

    The zeros are squared norms, for which DoRA's scale then is 0 instead of NaN.
    """
    return F.threshold(sums, 0.0, float("inf"))  # keeps NaN


# --------------------------------------------------------------------------------- scale of columns


def dora_scale(magnitude: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """Compute DoRA's scale g from the magnitude and the squared row norms.

    The scale has the shape ``[N]``. If ``squares`` is None, ``magnitude`` is already the scale.
    """
    return magnitude if squares is None else magnitude.to(squares.dtype) * squares.rsqrt()


def multiply_rounded_once(
    u: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply u by a scale, and round the product only once.

    The scale may have a wider dtype than u, and the product is then computed in the wider dtype.
    The result is rounded to u's dtype, and is written to ``out`` if ``out`` is given. In traced
    code and in forward-mode differentiation, ``out`` may be ignored. On a GPU, no wider copy of u
    is made.
    """
    if is_forward_ad_active():  # PyTorch does not differentiate operations with `out`.
        return (u * scale).to(u.dtype)
    if u.dtype == scale.dtype:
        return torch.mul(u, scale, out=out)
    if is_traced(u):
        return (u * scale).to(u.dtype)
    return torch.mul(u, scale, out=torch.empty_like(u) if out is None else out)


def scale_and_add_bias(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    inplace: bool = False,
) -> torch.Tensor:
    """Scale the columns of u, and add the bias.

    The result is ``scale * u + bias``. No autograd graph is recorded. If ``inplace`` is set, the
    result overwrites u, which must be contiguous.
    """
    y = multiply_rounded_once(u, scale, u if inplace else None)
    return y if bias is None else y.add_(bias)


def scale_with_column_sums(
    dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the columns of dy, and compute the column sums of ``dy * u``.

    The result is a tuple (``scale * dy``, the column sums ``[N]``).
    """
    product = dy * u
    # In fp16, sums of scaled losses can overflow. In bf16, they would be rounded to 8 bits.
    sums = product.sum(0, dtype=torch.float32 if dy.itemsize == 2 else None)
    # The memory is reused: on a CPU, fresh pages cost as much as the arithmetic.
    return multiply_rounded_once(dy, scale, product), sums


def scale_columns_backward(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the backward pass of DoRA's column scaling.

    The forward pass is `scale_and_add_bias`. The result is a tuple (gradient of u, gradient of the
    magnitude). The gradient of the magnitude is None if u is None.
    """
    scale = dora_scale(magnitude, squares)
    if u is None:
        return scale_and_add_bias(dy, None, scale), None
    du, sums = scale_with_column_sums(dy, u, scale)
    return du, sums if squares is None else sums * squares.rsqrt()


# --------------------------------------------------------------------------- active dropout


class DoraAdapterWithDropout(NamedTuple):
    """The operands for computing the output of a DoRA adapter with active dropout.

    The operands are the adapter's factors, magnitude, scaling, and dropout settings. The tuple also
    contains the squared row norms of the adapted weight, and the name of the implementation that
    applies dropout and computes the products with the factors.

    Attributes:
        lora_a, lora_b, magnitude: ``[R, K]``, ``[N, R]``, ``[N]``.
        squares: Squared row norms of the adapted weight, ``[N]``.
        scaling: A tensor without dimensions.
        seed: Seed of the dropout mask, int64 ``[1]``.
        dropout_p: Dropout probability.
        impl: ``"triton"`` or ``"eager"``.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor
    squares: torch.Tensor
    scaling: torch.Tensor
    seed: torch.Tensor
    dropout_p: float
    impl: str

    def apply_dropout(self, rows: torch.Tensor, dependency: torch.Tensor | None) -> torch.Tensor:
        """Apply dropout to the given rows, and return the result.

        The rows have the shape ``[M, K]``. Every call uses the same mask, which depends on the
        seed. In a backward pass, ``dependency`` is a tensor of this pass, which prevents a compiler
        from computing the mask in the forward pass. In a forward pass, ``dependency`` is None.
        """
        if self.impl == "triton":
            made: torch.Tensor = torch.ops.fastlora.lora_dropout(rows, self.seed, self.dropout_p)
            return made
        keep = keep_mask(rows, self.seed, self.dropout_p, dependency)
        return reference.write_masked_x_into_mask_memory_(keep, rows).mul_(
            1.0 / (1.0 - self.dropout_p)
        )


def forward_with_dropout(
    base: torch.Tensor | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: DoraAdapterWithDropout,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward pass of a DoRA adapter with dropout.

    ``rows`` are ``[M, K]``, and no autograd graph is recorded. ``base [M, N]`` is the base layer's
    output, or None to compute it from weight and bias. If ``inplace`` is set, y overwrites
    ``base``, which must be contiguous.

    Returns:
        A tuple of ``y [M, N]``, ``s [M, R]``, and ``z [M, N]``, the product of the rows after
        dropout and the base weight.
    """
    lora_a, lora_b, magnitude, squares, scaling, _, _, impl = adapter
    weight_x, scale = dequantize_if_quantized(weight).to(rows.dtype), dora_scale(magnitude, squares)
    masked = adapter.apply_dropout(rows, None)
    z, scaled_b = products.linear(masked, weight_x), _scaled_rows(lora_b, scale, rows.dtype)
    if base is None:
        y = products.linear(rows, weight_x, None if bias is None else bias.to(rows.dtype))
    else:
        y = base if inplace else base.clone(memory_format=torch.contiguous_format)
    if impl == "triton":
        s = torch.ops.fastlora.lora_shrink(masked, [], [lora_a], 1, None, [0.0], impl)
        torch.ops.fastlora.lora_expand_(y, s, [], [scaled_b], [None], scaling, impl)
    else:
        s = reference.lora_shrink(masked, lora_a)
        reference.lora_expand_(y, s, scaled_b, scaling)
    y.addcmul_(z.to(y.dtype), (scale - 1.0).to(y.dtype))
    return y, s, z


def gradients(
    dy: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    adapter: DoraAdapterWithDropout,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    *,
    own_base: bool,
    wants_x: bool,
    wants_weight: bool,
    wants_a_b_magnitude: Sequence[bool],
) -> tuple[_Gradient, _Gradient, list[_Gradient]]:
    """Return the gradients of x, the weight, lora_a, lora_b, and the magnitude.

    This is the backward pass of `forward_with_dropout`. The result is a tuple, whose last item is a
    list of the gradients of lora_a, lora_b, and the magnitude. ``wants_a_b_magnitude`` tells which
    of these three are wanted. A gradient that is not wanted is None. ``dy [M, N]`` is in x's dtype.
    ``rows`` is x, and is needed for the gradients of the weight and lora_a. s is needed for the
    gradients of lora_b and the magnitude. z is needed for the gradient of the magnitude. If
    ``own_base`` is set, the forward pass has also computed the base layer's output, and the
    gradients include those of the base product.
    """
    lora_a, lora_b, magnitude, squares, scaling, *_ = adapter
    wants_a, wants_b, wants_magnitude = wants_a_b_magnitude
    d_weight = d_lora_a = d_lora_b = d_magnitude = dx = sums = None
    scale = dora_scale(magnitude, squares)
    if z is None or not wants_magnitude:
        through_z = multiply_rounded_once(dy, scale - 1.0)
    else:
        through_z, sums = scale_with_column_sums(dy, z, scale - 1.0)
    if s is not None and (wants_b or wants_magnitude):
        # [R, M] x [M, N]: (scaling * s)^T dy serves both.
        inner = products.mm((s * scaling).to(dy.dtype).t(), dy).to(squares.dtype)
        if wants_b:
            d_lora_b = (inner * scale).t().to(lora_b.dtype).contiguous()
        if sums is not None:
            through_s = inner.mul_(lora_b.to(dy.dtype).t()).sum(0)
            d_magnitude = through_s.add_(sums).mul_(squares.rsqrt()).to(magnitude.dtype)
    if wants_x or wants_a:
        ds = products.mm(dy, _scaled_rows(lora_b, scale, dy.dtype)).mul_(scaling)
    if wants_x:
        weight_x = dequantize_if_quantized(weight).to(dy.dtype)
        # [M, N] x [N, K], and the adapter's [M, R] x [R, K] into it
        dx = products.addmm_(products.mm(through_z, weight_x), ds, lora_a.to(dy.dtype))
        dx = adapter.apply_dropout(dx, dy)
        dx = products.addmm_(dx, dy, weight_x) if own_base else dx
    if rows is not None and (wants_a or wants_weight):
        masked = adapter.apply_dropout(rows, dy)
        if wants_a:
            d_lora_a = products.mm(ds.t(), masked).to(lora_a.dtype)
        if wants_weight:
            d_weight = products.mm(through_z.t(), masked)
            d_weight = products.addmm_(d_weight, dy.t(), rows) if own_base else d_weight
            d_weight = d_weight.to(weight.dtype)
    return dx, d_weight, [d_lora_a, d_lora_b, d_magnitude]


def _scaled_rows(lora_b: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return lora_b with its rows scaled by DoRA's scale g.

    The result is rounded once to ``dtype``.
    """
    return (lora_b.detach().to(dtype).to(scale.dtype) * scale[:, None]).to(dtype)
