"""The norms that DoRA divides by, in factored form.

``||weight + scaling * lora_b @ lora_a||`` of each output row, without that sum: the largest
temporary is ``[N, R]``.

Shapes: ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``scaling`` without dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlora.ops.torch import products

# Elements of the weight that a norm widens at once.
_CHUNK = 1 << 18


class InRows(NamedTuple):
    """A weight ``[N, K]`` that is made some rows at a time, as quantised ones are.

    Attributes:
        make: Yields them, ``[n, K]``.
        dtype, device: Of the rows.
    """

    make: Callable[[], Iterator[torch.Tensor]]
    dtype: torch.dtype
    device: torch.device


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def outside_autocast(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Has a function of a weight and others compute in their dtypes, whatever surrounds it."""

    @functools.wraps(compute)
    def run(weight: torch.Tensor | InRows, *args: object) -> torch.Tensor:
        device_type = weight.device.type
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return compute(weight, *args)
        return compute(weight, *args)

    return run


@torch.no_grad()
def square_norms(weight: torch.Tensor | InRows, at_once: bool = False) -> torch.Tensor:
    """Returns ``||weight||^2`` of each row, ``[N]`` in fp32 (fp64 for fp64).

    16-bit weights are widened a few rows at a time: no temporary is as large as the weight.
    ``at_once`` is for graphs, where compilers see to that.
    """
    wide = _wide(weight.dtype)
    if isinstance(weight, InRows):
        made = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.make()]
        return torch.cat(made).square()
    if weight.dtype == wide or at_once:
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    rows = max(_CHUNK // max(weight.shape[1], 1), 1)
    parts = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in weight.split(rows)]
    return torch.cat(parts).square() if parts else weight.new_zeros(0, dtype=wide)


@outside_autocast
@torch.no_grad()
def adapted_sums(
    weight: torch.Tensor | InRows,
    squares: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
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

    Returns:
        ``[N]`` in fp32 (fp64 for an fp64 weight).
    """
    wide = squares.dtype
    a, b = lora_a.to(wide), lora_b.to(wide)
    # [N, K] x [K, R], then [N, R] x [R, R]
    down = lora_a.to(weight.dtype).t()
    if isinstance(weight, InRows):
        cross = torch.cat([products.mm(part, down) for part in weight.make()]).to(wide)
    else:
        cross = products.mm(weight, down).to(wide)
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
