"""The operations of LoRA in plain PyTorch, which run on any device.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``y [M, N]``; ``scaling`` has no dimensions, or the shape ``[R]``. Factors are rounded to x's dtype.
Nothing of size ``M x N`` is allocated besides the result, and x is never cast or copied.
"""

from __future__ import annotations

import torch

from fastlora.ops.execution_mode import is_forward_ad_active
from fastlora.ops.torch import products

_LANE_BITS = 16
_LANES_PER_WORD = 64 // _LANE_BITS
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def column_sums(dy: torch.Tensor) -> torch.Tensor:
    """Return the column sums of dy, which are needed for the gradient of a bias.

    ``dy`` has the shape ``[M, N]``. Each sum is over all rows of dy. The sums are in fp32 (fp64 for
    an fp64 dy). In a 16-bit dtype, the scaled sums could overflow and would be rounded a second
    time.
    """
    return dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor converted to a dtype.

    If it already has the dtype, the function avoids the call of ``Tensor.to``, which takes 2 us.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def add_rows_(y: torch.Tensor, rows: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Add ``update`` to the given rows of y in place, and return y.

    ``rows`` contains P different indices of rows of ``y [M, N]``. ``update`` is ``[P, N]``.
    """
    if y.is_contiguous():
        return y.index_add_(0, rows, update)
    # For 256 rows of 576 columns of a larger tensor, index_add_ takes 244 us, and this 106 us (one
    # Zen 4 core).
    y[rows] = y.index_select(0, rows).add_(update)
    return y


def lora_shrink(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """Return the shrink output ``s = x @ lora_a.T``.

    It has the shape ``[M, R]`` and x's dtype.
    """
    return products.linear(x, cast(lora_a, x.dtype))


def lora_expand_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Add the LoRA update ``(scaling * s) @ lora_b.T`` to y in place.

    All rows use the same lora_b. The function returns y.
    """
    if y.dtype == torch.float16:
        # scaling * s can overflow in fp16 even if the product does not.
        scaled_b = (lora_b.float() * scaling).to(y.dtype)
        return products.addmm_(y, s.to(y.dtype), scaled_b.t())
    # A scaling without dimensions does not change the dtype of s. A scaling of shape [R] is fp32.
    return products.addmm_(y, cast(s * scaling, y.dtype), cast(lora_b, y.dtype).t())


def lora_expand(
    s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the LoRA update ``(scaling * s) @ lora_b.T``.

    It has the shape ``[M, N]`` and is in ``dtype``. The operands are rounded as in `lora_expand_`.
    """
    if dtype == torch.float16:
        return products.mm(s.to(dtype), (lora_b.float() * scaling).to(dtype).t())
    return products.mm(cast(s * scaling, dtype), cast(lora_b, dtype).t())


def lora_dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Return x with dropout applied.

    Each element is dropped with probability ``p``, and the rest is divided by ``1 - p``.
    `draw_keep_mask` computes the mask.
    """
    return write_masked_x_into_mask_memory_(draw_keep_mask(x, seed, p), x).mul_(1.0 / (1.0 - p))


def draw_keep_mask(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Draw the dropout mask for x with the given seed.

    The mask is 1 for a kept element and 0 for a dropped one. Each element is dropped with
    probability ``p``. The mask has an integer dtype of the width of x's dtype. The random bits come
    from a `torch.Generator` with the given seed. Calls with the same seed and shape return the same
    mask. ``seed`` is one int64 value, on the CPU so that reading it does not wait for the device.
    16 random bits decide each element, so ``p`` is rounded to a multiple of 2**-16.
    """
    dropped = round(p * 2**_LANE_BITS)
    if dropped == 2**_LANE_BITS:  # No 16-bit integer is that large.
        return torch.zeros(x.shape, dtype=INTEGERS[x.itemsize], device=x.device)
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    words = (x.numel() + _LANES_PER_WORD - 1) // _LANES_PER_WORD
    bits = torch.empty(words, dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = dropped - 2 ** (_LANE_BITS - 1)
    if x.itemsize * 8 == _LANE_BITS:
        return lanes.ge_(threshold)
    keep = torch.empty(x.shape, dtype=INTEGERS[x.itemsize], device=x.device)
    return torch.ge(lanes, threshold, out=keep)


def write_masked_x_into_mask_memory_(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Write x, with its dropped elements set to zero, into the memory of the dropout mask.

    The function returns the memory of the mask as a tensor in x's dtype. The tensor is x where the
    mask was 1, and zero elsewhere. The kept elements are not scaled. Dropped elements may be NaN.

    No memory is allocated. The product of integers is one pass at the speed of memory. For
    512 x 576 elements, the product takes 12 to 25 us, and `torch.where` takes 350 us (one Xeon
    core).
    """
    if is_forward_ad_active():  # Integers have no tangents.
        return torch.where(mask.bool(), x, 0)
    return mask.mul_(x.view(mask.dtype)).view(x.dtype)


def zero_dropped_(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Zero the elements of x that dropout drops, in place.

    The dropout mask ``keep`` is 0 where an element is dropped. Elements do not change where the
    mask is 1. The function returns x.
    """
    x.view(keep.dtype).mul_(keep)
    return x


def lora_ds(dy: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """Return the gradient of s, ``ds = scaling * dy @ lora_b``.

    It has the shape ``[M, R]``.
    """
    return products.mm(dy, cast(lora_b, dy.dtype)).mul_(scaling)


def lora_b_grad(
    dy: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of lora_b.

    The gradient is ``dy.T @ (scaling * s)``. It has the shape ``[N, R]`` and lora_b's dtype.
    """
    return cast(products.mm(dy.t(), cast(s * scaling, dy.dtype)), lora_b.dtype)
