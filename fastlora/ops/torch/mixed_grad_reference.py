"""The operators of mixed batches in plain PyTorch: adapter by adapter, on its own rows.

Shapes are those of `fastlora.ops.schema`; s and ds stand at sorted positions. Where rows begin is
read on the host, and dropout draws from a generator of its own as `fastlora.ops.torch.reference`
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastlora.ops.layout import columns_of, max_rank, split_grad_a, split_grad_b
from fastlora.ops.torch import products, reference


def _slots(rows: Sequence[torch.Tensor]) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yields each slot that has rows: its number, their positions, and which rows they are."""
    order, starts = rows[0], rows[3].tolist()
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
    rows: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Returns ``s = dropout(x) @ lora_a.T`` of G modules, ``[G, M, R]``; zeros past a rank."""
    s = x.new_zeros(modules, x.shape[0], columns_of(max_rank(lora_a, 0)))
    slots = len(lora_a) // modules
    for slot, at, own in _slots(rows):
        for g in range(modules):
            place = g * slots + slot
            dropped = _dropped(x[own], seeds, dropout_p, place)
            s[g, at, : lora_a[place].shape[0]] = reference.lora_shrink(dropped, lora_a[place])
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
    for slot, at, own in _slots(rows):
        r = lora_b[slot].shape[1]
        if not r:
            continue
        part = y[own]
        reference.lora_expand_(part, s[at, :r], lora_b[slot], scaling[slot])
        bias = lora_bias[slot]
        if bias is not None:
            part += (bias * scaling[slot]).to(part.dtype)
        y[own] = part


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
    ds, parts = torch.zeros_like(s), None
    if packed is not None:
        parts = split_grad_b(packed.zero_(), lora_b, with_bias)
    for slot, at, own_rows in _slots(rows):
        own, r = dy[own_rows], lora_b[slot].shape[1]
        ds[at, :r] = products.mm(own, lora_b[slot].to(own.dtype)).mul_(scaling[slot])
        if parts is not None:
            d_lora_b, d_bias = parts[slot]
            d_lora_b.copy_(products.mm(own.t(), (s[at, :r] * scaling[slot]).to(own.dtype)))
            if d_bias is not None:
                d_bias.copy_(reference.column_sums(own) * scaling[slot])
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
    for slot, at, own in _slots(rows):
        r = lora_a[slot].shape[0]
        if r:
            update = products.mm(ds[at, :r], lora_a[slot].to(ds.dtype))
            dx[own] += _dropped(update, seeds, dropout_p, slot)
    return dx


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
    parts, slots = split_grad_a(packed.zero_(), lora_a), len(lora_a) // len(ds)
    for slot, at, own_rows in _slots(rows):
        for g, of_module in enumerate(ds):
            place = g * slots + slot
            own = _dropped(x[own_rows], seeds, dropout_p, place)
            part = parts[place]
            part.copy_(products.mm(of_module[at, : part.shape[0]].t(), own))
