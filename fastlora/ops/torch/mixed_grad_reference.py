"""The operators of training on mixed batches in plain PyTorch: adapter by adapter, on its own rows.

Shapes are those of `fastlora.ops.mixed_grad_ops`; s and ds stand at sorted positions. Where rows
begin is read on the host, and dropout draws from a generator of its own as
`fastlora.ops.torch.reference` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastlora.ops.mixed_grad_tables import columns_of, max_rank_of
from fastlora.ops.torch import products, reference


def _slots(
    order: torch.Tensor, slot_start: torch.Tensor
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yields each slot that has rows: its number, their positions, and which rows they are."""
    starts = slot_start.tolist()
    for slot, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if stop > start:
            yield slot, slice(start, stop), order[start:stop].long()


def _dropped(
    rows: torch.Tensor, seeds: torch.Tensor | None, dropout_p: Sequence[float], slot: int
) -> torch.Tensor:
    if seeds is None or not dropout_p[slot]:
        return rows
    return reference.lora_dropout(rows, seeds[slot : slot + 1].cpu(), dropout_p[slot])


def shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    slot_start: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Returns ``s = dropout(x) @ lora_a.T``, ``[M, R]``; zeros past a rank."""
    s = x.new_zeros(x.shape[0], columns_of(max_rank_of(lora_a)))
    for slot, at, rows in _slots(order, slot_start):
        dropped = _dropped(x[rows], seeds, dropout_p, slot)
        s[at, : lora_a[slot].shape[0]] = reference.lora_shrink(dropped, lora_a[slot])
    return s


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    order: torch.Tensor,
    slot_start: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    lora_bias: Sequence[torch.Tensor | None],
    scaling: torch.Tensor,
) -> None:
    """Adds ``scaling * (s @ lora_b.T + lora_bias)`` to the adapter's own rows of y."""
    for slot, at, rows in _slots(order, slot_start):
        r = lora_b[slot].shape[1]
        if not r:
            continue
        part = y[rows]
        reference.lora_expand_(part, s[at, :r], lora_b[slot], scaling[slot])
        bias = lora_bias[slot]
        if bias is not None:
            part += (bias * scaling[slot]).to(part.dtype)
        y[rows] = part


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    ds: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]] | None,
    order: torch.Tensor,
    slot_start: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    scaling: torch.Tensor,
) -> None:
    """Writes ds, which comes with zeros, and every adapter's d_lora_b and d_lora_bias."""
    for d_lora_b, d_bias in parts or ():
        d_lora_b.zero_()
        if d_bias is not None:
            d_bias.zero_()
    for slot, at, rows in _slots(order, slot_start):
        own, r = dy[rows], lora_b[slot].shape[1]
        ds[at, :r] = products.mm(own, lora_b[slot].to(own.dtype)).mul_(scaling[slot])
        if parts is not None:
            d_lora_b, d_bias = parts[slot]
            d_lora_b.copy_(products.mm(own.t(), (s[at, :r] * scaling[slot]).to(own.dtype)))
            if d_bias is not None:
                d_bias.copy_(own.sum(0) * scaling[slot])


def grad_x_(
    dx: torch.Tensor,
    ds: torch.Tensor,
    order: torch.Tensor,
    slot_start: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> None:
    """Adds ``mask * (ds @ lora_a) / (1 - p)`` to the adapter's own rows of dx."""
    for slot, at, rows in _slots(order, slot_start):
        r = lora_a[slot].shape[0]
        if r:
            update = products.mm(ds[at, :r], lora_a[slot].to(ds.dtype))
            dx[rows] += _dropped(update, seeds, dropout_p, slot)


def grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    parts: Sequence[torch.Tensor],
    order: torch.Tensor,
    slot_start: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> None:
    """Writes every adapter's d_lora_a; ds and seeds have a dimension of modules in front."""
    slots = len(parts) // ds.shape[0]
    for part in parts:
        part.zero_()
    for slot, at, rows in _slots(order, slot_start):
        for g in range(ds.shape[0]):
            part = parts[g * slots + slot]
            own_p = dropout_p[g * slots : (g + 1) * slots]
            own = _dropped(x[rows], None if seeds is None else seeds[g], own_p, slot)
            part.copy_(products.mm(ds[g, at, : part.shape[0]].t(), own))
