"""The ops in plain PyTorch: what runs wherever no kernel does, on any device.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``y [M, N]``, ``scaling`` without dimensions or ``[R]``. Factors are rounded to x's dtype; nothing
of size ``M x N`` is allocated beside the result, and x is never cast or copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LANE_BITS = 16
_LANES_PER_WORD = 64 // _LANE_BITS


def lora_shrink(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """Returns ``s = x @ lora_a.T`` in x's dtype, shape ``[M, R]``."""
    return F.linear(x, lora_a if lora_a.dtype == x.dtype else lora_a.to(x.dtype))


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """Returns ``y = x @ weight.T + bias + (scaling * s) @ lora_b.T``, shape ``[M, N]``."""
    y = F.linear(x, weight, bias)
    return lora_expand_(y, s, lora_b, scaling)


def lora_expand_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Adds ``(scaling * s) @ lora_b.T`` to ``y [M, N]`` in place and returns it."""
    if y.dtype == torch.float16:
        # scaling * s can leave fp16's range where the product does not.
        scaled_b = (lora_b.float() * scaling).to(y.dtype)
        return y.addmm_(s.to(y.dtype), scaled_b.t())
    # A scaling without dimensions leaves s in its dtype; one per rank row is fp32.
    return y.addmm_((s * scaling).to(y.dtype), lora_b.to(y.dtype).t())


def lora_dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Returns ``x`` with each element dropped with probability ``p``, the rest over ``1 - p``.

    The mask is drawn from a generator seeded with ``seed`` (one int64 value, on the CPU so that
    reading it waits for nothing), so calling again with the same seed and shape repeats it. 16
    random bits decide an element: ``p`` is rounded to a multiple of 2**-16.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    words = (x.numel() + _LANES_PER_WORD - 1) // _LANES_PER_WORD
    bits = torch.empty(words, dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = min(round(p * 2**_LANE_BITS), 2**_LANE_BITS - 1) - 2 ** (_LANE_BITS - 1)
    return torch.where(lanes >= threshold, x, 0).mul_(1.0 / (1.0 - p))
