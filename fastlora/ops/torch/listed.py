"""The operators over lists of factors in PyTorch, for rows that come as tensors.

Shapes are those of `fastlora.ops.schema`. What is computed is `fastlora.ops.torch.segments`; s and
ds are ``[M, R]`` at sorted positions, zeros past a rank, and gradients are written into a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.factors import Operands
from fastlora.ops.layout import columns_of, max_rank, split_grad_a, split_grad_b
from fastlora.ops.rows import rows_of
from fastlora.ops.torch import segments


def _down(
    lora_a: Sequence[torch.Tensor], seeds: torch.Tensor | None, dropout_p: Sequence[float]
) -> Operands:
    """Returns operands of which only lora_a and dropout are read."""
    unread = lora_a[0].new_empty(0)
    return Operands(list(lora_a), [], [], unread, tuple(dropout_p), seeds)


def _up(
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scaling: torch.Tensor,
) -> Operands:
    """Returns operands of which only ranks, lora_b and lora_bias are read."""
    ranks = [b.t() for b in lora_b]
    return Operands(ranks, list(lora_b), list(lora_bias), scaling, (0.0,) * len(ranks))


def shrink(
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Returns ``s = dropout(x) @ lora_a.T`` of G modules, ``[G, M, R]``."""
    batch, slots = rows_of(rows), len(lora_a) // modules
    s = x.new_zeros(modules, x.shape[0], columns_of(max_rank(lora_a, 0)))
    x = batch.sorted(x)
    for g, own in enumerate(s):
        some = slice(g * slots, (g + 1) * slots)
        drop = None if seeds is None else seeds[some], dropout_p[some]
        segments.shrink_(own, x, _down(lora_a[some], *drop), batch)
    return s


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scaling: torch.Tensor,
) -> None:
    """Adds ``scaling * (s @ lora_b.T + lora_bias)`` to the adapter's own rows of y."""
    batch = rows_of(rows)
    ordered = batch.sorted(y)
    segments.expand_(ordered, s, _up(lora_b, lora_bias, scaling), batch)
    if not batch.in_order:
        y.copy_(batch.restored(ordered))


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    with_bias: Sequence[bool],
    scaling: torch.Tensor,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """Returns ds, and writes every adapter's d_lora_b and d_lora_bias into ``packed``."""
    batch = rows_of(rows)
    # Of a lora_bias only the dtype is read.
    biases = [b if has else None for b, has in zip(lora_b, with_bias, strict=True)]
    wants = [packed is not None] * (3 * len(lora_b))
    ds, *found = segments.grad_b(batch.sorted(dy), s, _up(lora_b, biases, scaling), batch, wants)
    if packed is not None:
        parts = split_grad_b(packed.zero_(), lora_b, with_bias)
        for part, own in zip(parts, zip(*found, strict=True), strict=True):
            for out, gradient in zip(part, own, strict=True):
                if out is not None and gradient is not None:
                    out.copy_(gradient)
    return ds


def grad_x_(
    dx: torch.Tensor,
    ds: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Adds ``mask * (ds @ lora_a) / (1 - p)`` to the adapter's own rows of dx; returns dx."""
    batch = rows_of(rows)
    ordered = batch.sorted(dx)
    segments.grad_x_(ordered, ds, _down(lora_a, seeds, dropout_p), batch)
    return batch.restored(ordered)


def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    packed: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> None:
    """Writes every adapter's d_lora_a into ``packed``; one ds a module."""
    batch, slots = rows_of(rows), len(lora_a) // len(ds)
    parts, x = split_grad_a(packed.zero_(), lora_a), batch.sorted(x)
    for g, own in enumerate(ds):
        some = slice(g * slots, (g + 1) * slots)
        drop = None if seeds is None else seeds[some], dropout_p[some]
        down = _down(lora_a[some], *drop)
        found = segments.grad_a(x, own, down, batch, [True] * (3 * slots))
        for part, gradient in zip(parts[some], found, strict=True):
            if gradient is not None:
                part.copy_(gradient)
