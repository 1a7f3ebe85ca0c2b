"""Which launches make a linear: plans as data, by chip, dtype and size.

- ``fused``: shrink, then one Triton GEMM with the LoRA term in its epilogue.
- ``split``: the library's GEMM, shrink, and an in-place update.
- ``augmented``: shrink, then the library's GEMM over ``[x | s] @ [W | scaling * lora_b].T``; for
  one adapter.
- ``dense``: the library's GEMMs through the rank rows of all slots, masked between the two; for a
  mixed batch. See `fastlora.ops.mixed_dense`.

A table is rows in order; the first whose limits hold gives the plan. Tables are for measurements to
fill. None has been made yet, so every chip has `DEFAULT`, the design's: up to 64 rows a linear is
bound by its weight's bytes, above that the library's GEMM is ahead of a Triton one. ``augmented``
copies x and the weight at every call, ``dense`` all factors, so no default names them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PlanRow(NamedTuple):
    """A plan, and up to which sizes it is the one: rows, and rank; None for any."""

    plan: str
    max_rows: int | None = None
    max_rank: int | None = None

    def covers(self, m: int, r: int) -> bool:
        """Whether the row holds for M rows and rank R."""
        rows = self.max_rows is None or m <= self.max_rows
        return rows and (self.max_rank is None or r <= self.max_rank)


DEFAULT = (PlanRow("fused", max_rows=64), PlanRow("split"))

# By family of chips (`Chip.family`) and dtype.
MEASURED: dict[tuple[str, torch.dtype], tuple[PlanRow, ...]] = {}

# The same for mixed batches; a row's rank is that of all slots together.
MIXED_MEASURED: dict[tuple[str, torch.dtype], tuple[PlanRow, ...]] = {}

# The same for their training, forward and dx, which has ``fused`` and ``split``.
MIXED_TRAIN_MEASURED: dict[tuple[str, torch.dtype], tuple[PlanRow, ...]] = {}


def plan_for(family: str, dtype: torch.dtype, m: int, r: int) -> str:
    """Returns the plan of a linear with M rows and rank R.

    Args:
        family: The chip's, as in `MEASURED`.
        dtype: Of x.
        m: Rows.
        r: Rank, of all adapters of a row together.
    """
    table = MEASURED.get((family, dtype), DEFAULT)
    return next(row.plan for row in table if row.covers(m, r))


def mixed_plan_for(family: str, dtype: torch.dtype, m: int, rank_rows: int) -> str:
    """Returns the plan of a mixed batch's linear.

    Args:
        family: The chip's, as in `MIXED_MEASURED`.
        dtype: Of x.
        m: Rows.
        rank_rows: Slots times the largest rank there may be.
    """
    table = MIXED_MEASURED.get((family, dtype), DEFAULT)
    return next(row.plan for row in table if row.covers(m, rank_rows))


def mixed_train_plan_for(family: str, dtype: torch.dtype, m: int, rank_rows: int) -> str:
    """The same in training; the table is `MIXED_TRAIN_MEASURED`."""
    table = MIXED_TRAIN_MEASURED.get((family, dtype), DEFAULT)
    return next(row.plan for row in table if row.covers(m, rank_rows))
