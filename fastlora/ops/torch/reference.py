"""The ops in plain PyTorch: what runs wherever no kernel does, on any device.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``y [M, N]``, ``scaling`` without dimensions or ``[R]``. Factors are rounded to x's dtype; nothing
of size ``M x N`` is allocated beside the result, and x is never cast or copied.
"""

from __future__ import annotations

import torch

from fastlora.ops.torch import products

_LANE_BITS = 16
_LANES_PER_WORD = 64 // _LANE_BITS
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def column_sums(dy: torch.Tensor) -> torch.Tensor:
    """Returns the sums of ``dy [M, N]`` over its rows, in fp32 (fp64 for fp64).

    A scaling in 16 bits would overflow, and round a second time.
    """
    return dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor in a dtype; itself where it has it, for which ``.to`` takes 2 us."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def lora_shrink(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """Returns ``s = x @ lora_a.T`` in x's dtype, shape ``[M, R]``."""
    return products.linear(x, cast(lora_a, x.dtype))


def lora_expand_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Adds ``(scaling * s) @ lora_b.T`` to ``y [M, N]`` in place and returns it."""
    if y.dtype == torch.float16:
        # scaling * s can leave fp16's range where the product does not.
        scaled_b = (lora_b.float() * scaling).to(y.dtype)
        return products.addmm_(y, s.to(y.dtype), scaled_b.t())
    # A scaling without dimensions leaves s in its dtype; one per rank row is fp32.
    return products.addmm_(y, cast(s * scaling, y.dtype), cast(lora_b, y.dtype).t())


def lora_dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Returns ``x`` with each element dropped with probability ``p``, the rest over ``1 - p``.

    The mask is `lora_keep`'s.
    """
    return select_(lora_keep(x, seed, p), x).mul_(1.0 / (1.0 - p))


def lora_keep(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Returns which elements of x dropout keeps: 1 or 0, integers as wide as x's.

    Drawn from a generator seeded with ``seed`` (one int64 value, on the CPU so that reading it
    waits for nothing), so calling again with the same seed and shape repeats it. 16 random bits
    decide an element: ``p`` is rounded to a multiple of 2**-16.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    words = (x.numel() + _LANES_PER_WORD - 1) // _LANES_PER_WORD
    bits = torch.empty(words, dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = min(round(p * 2**_LANE_BITS), 2**_LANE_BITS - 1) - 2 ** (_LANE_BITS - 1)
    if x.itemsize * 8 == _LANE_BITS:
        return lanes.ge_(threshold)
    keep = torch.empty(x.shape, dtype=INTEGERS[x.itemsize], device=x.device)
    return torch.ge(lanes, threshold, out=keep)


def select_(keep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns x where ``keep`` is 1 and zero elsewhere, in the memory of ``keep``.

    A product of integers: one pass at memory's speed, where `torch.where` takes 350 us for 512 x
    576 elements and this 12 to 25 (one Xeon core). What is dropped does not matter, NaN or not.
    """
    return keep.mul_(x.view(keep.dtype)).view(x.dtype)


def drop_(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Makes x zero where ``keep`` is 0, in place, and returns it."""
    x.view(keep.dtype).mul_(keep)
    return x


def lora_ds(dy: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """Returns ``ds = scaling * dy @ lora_b``, shape ``[M, R]``."""
    return products.mm(dy, cast(lora_b, dy.dtype)).mul_(scaling)


def lora_d_b(
    dy: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Returns ``d_lora_b = dy.T @ (scaling * s)``, shape ``[N, R]``, in lora_b's dtype."""
    return cast(products.mm(dy.t(), cast(s * scaling, dy.dtype)), lora_b.dtype)
