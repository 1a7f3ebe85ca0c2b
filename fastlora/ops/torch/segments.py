"""Rows of many adapters in PyTorch: each adapter's rows lie together, and `single` computes them.

Rows are put in order once, so that an adapter's share is two small products on its own rows, into
the base product in place. Nothing of one adapter touches another's rows, not even a NaN.

s and ds are made of each adapter's own, ``[rows, R]``: one behind the other in a tensor of one
dimension, where they are made here; or at sorted positions of one ``[M, R]``, as operators have
them, zeros where an adapter has less than R.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.ops.factors import Operands
from fastlora.ops.rows import Rows, Segment
from fastlora.ops.torch import products, reference
from fastlora.validation import check_dropout_dtype

# From so many adapters of one rank on, stacking their factors costs less than a pair of products
# for each: 64 sequences of 64 adapters decode 2.3 times faster in bf16 (SmolLM2, one Zen 4 core).
_BATCHED_SHARES = 4


class _Share(NamedTuple):
    """One adapter that has rows.

    Attributes:
        place: Its place among the operands.
        at: The sorted positions of its rows.
        segment: The same with its slot.
        first: Where its own s begins, one adapter's behind the other's.
    """

    place: int
    at: slice
    segment: Segment
    first: int

    def part(self, s: torch.Tensor, rank: int) -> torch.Tensor:
        """Returns its own s or ds, ``[rows, R]``, a view."""
        if s.dim() == 2:
            return s[self.at, :rank]
        rows = self.segment.stop - self.segment.start
        return s[self.first : self.first + rows * rank].view(rows, rank)


def _shares(operands: Operands, rows: Rows) -> list[_Share]:
    """Returns the adapters that have rows and rank rows, in order of slots."""
    found, first, place_of = list[_Share](), 0, None
    if operands.slots is not None and operands.slots != rows.present:
        place_of = {slot: place for place, slot in enumerate(operands.slots)}
    for index, segment in enumerate(rows.segments):
        place: int | None = segment.slot if operands.slots is None else index
        if place_of is not None:
            place = place_of.get(segment.slot)
        rank = 0 if place is None else operands.lora_a[place].shape[0]
        if place is not None and rank:
            found.append(_Share(place, slice(segment.start, segment.stop), segment, first))
            first += (segment.stop - segment.start) * rank
    return found


def _dropped(rows: torch.Tensor, operands: Operands, place: int) -> torch.Tensor:
    """Returns rows of an adapter after its dropout: the same mask at every call."""
    if operands.seeds is None or not operands.dropout_p[place]:
        return rows
    check_dropout_dtype(rows.dtype)
    seed = operands.seeds[place : place + 1].cpu()
    return reference.lora_dropout(rows, seed, operands.dropout_p[place])


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Operands,
    rows: Rows,
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``y [M, N]`` of a base weight and every row's own adapter, and s."""
    x = rows.sorted(x)
    y = products.linear(x, weight, bias)
    s = _add_shares(y, x, operands, rows, s)
    return rows.restored(y), s


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: Operands,
    rows: Rows,
    s: torch.Tensor | None = None,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``y [M, N]`` plus every row's own adapter, and s; ``inplace`` allows to write y."""
    ordered = rows.sorted(y)
    if rows.in_order and not inplace:
        ordered = ordered.clone()
    s = _add_shares(ordered, rows.sorted(x), operands, rows, s)
    return rows.restored(ordered), s


def _add_shares(
    y: torch.Tensor, x: torch.Tensor, operands: Operands, rows: Rows, s: torch.Tensor | None
) -> torch.Tensor:
    """Adds every share to its own rows of y in place and returns s; rows are in order."""
    made, drops, shares = s is None, operands.seeds is not None, _shares(operands, rows)
    if s is None:
        size = 0
        if shares:
            (place, _, (_, start, stop), first) = shares[-1]
            size = first + (stop - start) * operands.lora_a[place].shape[0]
        s = x.new_empty(size)
    by_rank: dict[int, list[_Share]] = {}
    for share in shares:
        # A dropout mask belongs to a share's own rows, so those go one by one.
        alone = not made or (drops and operands.dropout_p[share.place])
        rank = -share.place - 1 if alone else operands.lora_a[share.place].shape[0]
        by_rank.setdefault(rank, []).append(share)
    for rank, group in by_rank.items():
        if len(group) >= _BATCHED_SHARES:
            _add_batched(y, x, operands, group, s, rank)
            continue
        for share in group:
            place, at = share.place, share.at
            lora_a, scaling, part = operands.lora_a[place], operands.scaling[place], y[at]
            own = share.part(s, lora_a.shape[0])
            if made:
                mine = _dropped(x[at], operands, place) if drops else x[at]
                own.copy_(reference.lora_shrink(mine, lora_a))
            reference.lora_expand_(part, own, operands.lora_b[place], scaling)
            lora_bias = operands.lora_bias[place]
            if lora_bias is not None:
                part += (lora_bias * scaling).to(y.dtype)
    return s


def _add_batched(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: Operands,
    group: list[_Share],
    s: torch.Tensor,
    rank: int,
) -> None:
    """Adds shares of one rank to y and writes s, as two batched products over stacked factors.

    Where a share has fewer rows than the longest, its own first row stands in and is dropped
    again, so that nothing of one adapter meets another's rows.
    """
    places = [share.place for share in group]
    lora_a = torch.stack([operands.lora_a[place] for place in places]).to(x.dtype)
    lora_b = torch.stack([operands.lora_b[place] for place in places]).to(x.dtype)
    scaling = torch.stack([operands.scaling[place] for place in places]).view(-1, 1, 1)
    layout = _padded(tuple(share.segment for share in group), x.device)
    spread = x.index_select(0, layout.rows).view(len(group), layout.longest, x.shape[1])
    # [G, C, K] x [G, K, R], then [G, C, R] x [G, R, N]
    made = products.bmm(spread, lora_a.transpose(1, 2))
    update = products.bmm((made * scaling).to(x.dtype), lora_b.transpose(1, 2))
    for place, index in enumerate(places):
        lora_bias = operands.lora_bias[index]
        if lora_bias is not None:
            update[place] += (lora_bias * operands.scaling[index]).to(x.dtype)
    own = update.view(-1, y.shape[1]).index_select(0, layout.places)
    y.index_add_(0, layout.targets, own.to(y.dtype))
    for place, share in enumerate(group):
        own = made[place, : share.segment.stop - share.segment.start]
        share.part(s, rank).copy_(own)


class _Padded(NamedTuple):
    """Segments side by side as ``[G, C]``, C the longest one's rows.

    Attributes:
        longest: C.
        rows: Row of each place, ``[G * C]``; where a segment is shorter, its first row again.
        places: The places that hold a row of their own, ``[sum of rows]``.
        targets: The row of each of these, ``[sum of rows]``.
    """

    longest: int
    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


@functools.lru_cache(maxsize=8)
def _padded(segments: tuple[Segment, ...], device: torch.device) -> _Padded:
    """Returns how to lay out some segments' rows as a batch; the same for every layer."""
    longest = max(segment.stop - segment.start for segment in segments)
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for index, (_, start, stop) in enumerate(segments):
        own = list(range(start, stop))
        rows += own + [start] * (longest - len(own))
        places += range(index * longest, index * longest + len(own))
        targets += own
    with torch.inference_mode(False):
        tensors = (torch.tensor(values, device=device) for values in (rows, places, targets))
        return _Padded(longest, *tensors)


# --------------------------------------------------------------------------- of sorted operands


def shrink_(s: torch.Tensor, x: torch.Tensor, operands: Operands, rows: Rows) -> None:
    """Writes every share's s."""
    for share in _shares(operands, rows):
        lora_a = operands.lora_a[share.place]
        mine = _dropped(x[share.at], operands, share.place)
        share.part(s, lora_a.shape[0]).copy_(reference.lora_shrink(mine, lora_a))


def expand_(y: torch.Tensor, s: torch.Tensor, operands: Operands, rows: Rows) -> None:
    """Adds ``scaling * (s @ lora_b.T + lora_bias)`` to every share's own rows of y."""
    _add_shares(y, y, operands, rows, s)  # x is not read where s is given


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    operands: Operands,
    rows: Rows,
    wants: Sequence[bool],
    wants_ds: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Returns ds, and d_lora_b and d_lora_bias of each adapter; None where it has no rows.

    ``wants`` says of ``lora_a, lora_b, lora_bias`` of each adapter in turn which want a gradient.
    """
    # Where operators have s and ds, nothing past a rank may be what memory held before.
    ds = torch.zeros_like(s) if s.dim() == 2 else torch.empty_like(s)
    count = len(operands.lora_b)
    d_lora_b: list[torch.Tensor | None] = [None] * count
    d_lora_bias: list[torch.Tensor | None] = [None] * count
    for share in _shares(operands, rows):
        place, at = share.place, share.at
        lora_b, lora_bias = operands.lora_b[place], operands.lora_bias[place]
        own, r, scaling = dy[at], lora_b.shape[1], operands.scaling[place]
        if wants_ds:
            share.part(ds, r)[:] = products.mm(own, lora_b.to(own.dtype)).mul_(scaling)
        if wants[3 * place + 1]:
            scaled = (share.part(s, r) * scaling).to(own.dtype)
            d_lora_b[place] = products.mm(own.t(), scaled).to(lora_b.dtype)
        if wants[3 * place + 2] and lora_bias is not None:
            d_lora_bias[place] = (reference.column_sums(own) * scaling).to(lora_bias.dtype)
    return ds, d_lora_b, d_lora_bias


def grad_x_(dx: torch.Tensor, ds: torch.Tensor, operands: Operands, rows: Rows) -> None:
    """Adds ``mask * (ds @ lora_a) / (1 - p)`` to each adapter's own rows of dx."""
    for share in _shares(operands, rows):
        place, at = share.place, share.at
        factor = operands.lora_a[place].to(ds.dtype)
        own = share.part(ds, factor.shape[0])
        if operands.seeds is None or not operands.dropout_p[place]:
            products.addmm_(dx[at], own, factor)
        else:
            dx[at] += _dropped(products.mm(own, factor), operands, place)


def grad_a(
    x: torch.Tensor, ds: torch.Tensor, operands: Operands, rows: Rows, wants: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Returns d_lora_a of each adapter; None where it has no rows. ``wants`` as in `grad_b`."""
    found: list[torch.Tensor | None] = [None] * len(operands.lora_a)
    for share in _shares(operands, rows):
        place, at = share.place, share.at
        lora_a = operands.lora_a[place]
        if wants[3 * place]:
            own = products.mm(share.part(ds, lora_a.shape[0]).t(), _dropped(x[at], operands, place))
            found[place] = own.to(lora_a.dtype)
    return found
