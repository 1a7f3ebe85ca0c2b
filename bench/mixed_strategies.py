"""A mixed batch in plain PyTorch by hand, in three ways that a careful user would write.

Factors are stacked beforehand, one entry per adapter. Rows come in random order. If a strategy
needs them sorted by adapter, each layer sorts its input and restores the order of its output, as a
layer without knowledge of its neighbors must. With ``sorted_before``, the batch is sorted once and
no layer moves a row, which only a model written for this purpose could do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.bench.mixed_contest import Contest, Side, last_output, twin


@dataclass(frozen=True)
class Stacked:
    """The factors of all adapters on one layer.

    Attributes:
        lora_a: ``[G, R, K]``.
        lora_b: ``[G, R, N]``.
        each: The same factors by adapter, as pairs of ``[K, R]`` and ``[R, N]``.
        scaling: Scaling of every adapter.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    each: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    scaling: float


@dataclass(frozen=True)
class Rows:
    """The adapters of the rows.

    Attributes:
        slots: The adapter of each of the B sequences, int64 ``[B]``.
        order: Rows sorted by adapter, ``[M]``; None if they are already sorted.
        inverse: Sorted position of each row, ``[M]``; None if order is None.
        counts: Number of rows of each adapter.
        ends: Cumulative sum of the counts, int32 ``[G]``.
    """

    slots: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    counts: list[int]
    ends: torch.Tensor

    @classmethod
    def of(cls, slots: torch.Tensor, adapters: int, tokens: int, sorted_before: bool) -> Rows:
        """Prepare a batch of sequences with ``tokens`` rows each."""
        by_row = slots.repeat_interleave(tokens)
        order = inverse = None
        if not sorted_before:
            order = torch.argsort(by_row, stable=True)
            inverse = torch.argsort(order)
        counts = torch.bincount(by_row, minlength=adapters)
        return cls(slots, order, inverse, counts.tolist(), counts.cumsum(0).to(torch.int32))

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """Sort rows by adapter."""
        return x if self.order is None else x.index_select(0, self.order)

    def back(self, y: torch.Tensor) -> torch.Tensor:
        """Restore the original order of rows."""
        return y if self.inverse is None else y.index_select(0, self.inverse)


Strategy = Callable[[torch.Tensor, Any, Stacked, Rows], torch.Tensor]


def segments(x: torch.Tensor, linear: Any, factors: Stacked, rows: Rows) -> torch.Tensor:
    """Run two products per adapter on its own rows, and add the second to the base product."""
    x = rows.there(x)
    y = F.linear(x, linear.weight, linear.bias)
    parts = zip(x.split(rows.counts), y.split(rows.counts), factors.each, strict=True)
    for own_x, own_y, (lora_a, lora_b) in parts:
        own_y.addmm_(torch.mm(own_x, lora_a), lora_b, alpha=factors.scaling)
    return rows.back(y)


def gathered_bmm(x: torch.Tensor, linear: Any, factors: Stacked, rows: Rows) -> torch.Tensor:
    """Gather each sequence's factors for two batched products. No row moves."""
    y = F.linear(x, linear.weight, linear.bias)
    batch = rows.slots.numel()
    lora_a = factors.lora_a.index_select(0, rows.slots)
    lora_b = factors.lora_b.index_select(0, rows.slots)
    # [B, T, K] x [B, K, R], then [B, T, R] x [B, R, N]
    s = torch.bmm(x.view(batch, -1, x.shape[1]), lora_a.transpose(1, 2))
    y.view(batch, -1, y.shape[1]).baddbmm_(s, lora_b, alpha=factors.scaling)
    return y


def grouped_mm(x: torch.Tensor, linear: Any, factors: Stacked, rows: Rows) -> torch.Tensor:
    """Compute two grouped products over the sorted rows."""
    x = rows.there(x)
    y = F.linear(x, linear.weight, linear.bias)
    s = F.grouped_mm(x, factors.lora_a.transpose(1, 2), offs=rows.ends)
    y.add_(F.grouped_mm(s, factors.lora_b, offs=rows.ends), alpha=factors.scaling)
    return rows.back(y)


STRATEGIES: dict[str, Strategy] = {
    "segments": segments,
    "gathered_bmm": gathered_bmm,
    "grouped_mm": grouped_mm,
}


@torch.no_grad()
def by_hand(
    contest: Contest,
    strategy: Strategy,
    mix: Sequence[str],
    ids: torch.Tensor,
    *,
    sorted_before: bool = False,
) -> Side:
    """Return a side of the contest in which layers use one strategy.

    Args:
        contest: Provides base weights and factors.
        strategy: One of `STRATEGIES`.
        mix: An adapter for each of the B sequences.
        ids: Token ids, int64 ``[B, T]``.
        sorted_before: Whether to sort the batch once, outside the layers.
    """
    names = sorted(set(mix), key=contest.names.index)
    slots = torch.tensor([names.index(name) for name in mix], device=ids.device)
    order = torch.argsort(slots, stable=True)
    rows = Rows.of(
        slots[order] if sorted_before else slots, len(names), ids.shape[1], sorted_before
    )
    model = twin(contest.base)
    for target in contest.targets:
        layer, linear = contest.layer(target), model.get_submodule(target)
        lora_a = torch.stack([layer.lora_A[name].weight for name in names])
        lora_b = torch.stack([layer.lora_B[name].weight.t().contiguous() for name in names])
        each = tuple(zip(lora_a.transpose(1, 2).unbind(0), lora_b.unbind(0), strict=True))
        factors = Stacked(lora_a, lora_b, each, contest.scaling)
        linear.forward = partial(_forward, strategy, linear, factors, rows)
    if not sorted_before:
        return partial(last_output, model, ids)
    inverse = torch.argsort(order)
    return lambda: last_output(model, ids[order]).index_select(0, inverse)


def _forward(
    strategy: Strategy, linear: Any, factors: Stacked, rows: Rows, x: torch.Tensor
) -> torch.Tensor:
    y = strategy(x.reshape(-1, x.shape[-1]), linear, factors, rows)
    return y.view(*x.shape[:-1], y.shape[-1])
