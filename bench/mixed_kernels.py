"""Times one linear on a mixed batch: fastlora's kernels, and the plain PyTorch ways by hand.

    python bench/mixed_kernels.py --out mixed.csv --tests pass [--seconds 110] [--device cuda]

Rows in random order, 64 sequences (or one a row, where there are fewer), every adapter as many.
`bench/gpu.sh` runs it behind `bench/linear.py`; `bench/README.md` explains the rows.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.bench.contenders import SCALING, Contender, Results
from fastlora.bench.mixed_dense import MAX_RANK_ROWS, dense_linear
from fastlora.bench.mixed_strategies import (
    Rows,
    Stacked,
    Strategy,
    gathered_bmm,
    grouped_mm,
    segments,
)
from fastlora.bench.shapes import MIXED_SEQUENCES, Point
from fastlora.ops.rows import Rows as SortedRows
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.pieces import rows_at

YARDSTICK = {"base": "base", "mixed": "segments"}


class Base(NamedTuple):
    """A linear as the strategies by hand take it."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class MixedProblem:
    """One set of random operands; all ways read the same factors.

    ``x [M, K]``, ``weight [N, K]``; factors in ``stacked`` are padded to the largest rank, those
    of `tables` end at their own. ``y`` is empty, since no way starts from a given one.
    """

    x: torch.Tensor
    base: Base
    y: torch.Tensor
    ranks: list[int]
    slots: torch.Tensor
    stacked: Stacked
    rows: Rows
    groups: SortedRows
    addresses: tuple[torch.Tensor, torch.Tensor]
    rank: torch.Tensor
    scaling: torch.Tensor

    @classmethod
    def random(
        cls, point: Point, dtype: torch.dtype, device: torch.device, impl: str = ""
    ) -> MixedProblem:
        """Draws operands that give the base and the adapters results of the same size."""

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device).mul_(scale)

        sequences = min(point.m, MIXED_SEQUENCES)
        ranks = point.ranks_of_adapters
        lora_a = normal(len(ranks), point.r, point.k, scale=point.k**-0.5)
        lora_b = normal(len(ranks), point.r, point.n, scale=1.0)
        for index, r in enumerate(ranks):
            lora_a[index, r:] = 0
            lora_b[index, r:] = 0
            lora_b[index] *= r**-0.5
        each = tuple((lora_a[index, :r].t(), lora_b[index, :r]) for index, r in enumerate(ranks))
        ids = torch.arange(sequences) % len(ranks)
        slots = ids[torch.randperm(sequences)].to(device)
        groups = sort_rows(slots, point.m, len(ranks))
        addresses = tuple(
            torch.tensor([[factor[index].data_ptr() for index in range(len(ranks))]], device=device)
            for factor in (lora_a, lora_b)
        )
        return cls(
            x=normal(point.m, point.k, scale=1.0),
            base=Base(normal(point.n, point.k, scale=point.k**-0.5)),
            y=torch.empty(0, dtype=dtype, device=device),
            ranks=ranks,
            slots=slots,
            stacked=Stacked(lora_a, lora_b, each, SCALING),
            rows=Rows.of(slots, len(ranks), point.m // sequences, sorted_before=False),
            groups=groups,
            addresses=(addresses[0], addresses[1]),
            rank=torch.tensor([ranks], dtype=torch.int32, device=device),
            scaling=torch.full((1, len(ranks)), SCALING, device=device),
        )

    @property
    def routed(self) -> list[torch.Tensor]:
        """What the operators take of the row groups."""
        return rows_at(self.groups)

    @property
    def tables(self) -> tuple[Any, ...]:
        """What the operators take of the adapters: tables of one module, and what is fixed."""
        tables = [*self.addresses, self.rank, self.scaling]
        return tables, 0, max(self.ranks), self.x.dtype


def truths(p: MixedProblem) -> dict[str, Results]:
    """Returns the float64 results by kind."""
    x, y = p.x.double(), p.x.double() @ p.base.weight.double().t()
    by_row = p.slots.repeat_interleave(len(x) // len(p.slots))
    full = y.clone()
    for slot, (lora_a, lora_b) in enumerate(p.stacked.each):
        own = by_row == slot
        full[own] += SCALING * (x[own] @ lora_a.double() @ lora_b.double())
    return {"base": (y,), "mixed": (full,)}


def _base(p: MixedProblem) -> Results:
    return (F.linear(p.x, p.base.weight),)


def _by_hand(strategy: Strategy, p: MixedProblem) -> Results:
    return (strategy(p.x, p.base, p.stacked, p.rows),)


def _linear(plan: str, p: MixedProblem) -> Results:
    linear = torch.ops.fastlora.lora_linear_at
    return (linear(p.x, p.base.weight, None, p.routed, None, *p.tables, plan)[0],)


def _add(p: MixedProblem) -> Results:
    y = F.linear(p.x, p.base.weight)
    torch.ops.fastlora.lora_add_at_(y, p.x, p.routed, *p.tables, "triton")
    return (y,)


def _dense(p: MixedProblem) -> Results:
    (a_address, b_address), route = p.addresses, p.routed
    tables = b_address[0], None, p.rank[0], p.scaling[0]
    y = dense_linear(
        *(p.x, p.base.weight, None, (route[0], route[1], route[2]), None, a_address[0], tables),
        max_rank=max(p.ranks),
        factor_dtype=p.x.dtype,
    )
    return (y,)


@functools.cache
def has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has grouped products, for this device and dtype."""
    if not hasattr(F, "grouped_mm"):
        return False
    x, factors = (
        torch.ones(shape, dtype=dtype, device=device) for shape in ((16, 16), (2, 16, 16))
    )
    ends = torch.tensor([8, 16], dtype=torch.int32, device=device)
    try:
        F.grouped_mm(x, factors, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    return True


BY_HAND = (
    Contender("base", "base", _base),
    Contender("segments", "mixed", functools.partial(_by_hand, segments)),
    Contender("gathered_bmm", "mixed", functools.partial(_by_hand, gathered_bmm)),
)
GROUPED_MM = Contender("grouped_mm", "mixed", functools.partial(_by_hand, grouped_mm))
OURS = (
    Contender("fused", "mixed", functools.partial(_linear, "fused"), ours=True),
    Contender("split", "mixed", functools.partial(_linear, "split"), ours=True),
    Contender("add", "mixed", _add, ours=True),
)
DENSE = Contender("dense", "mixed", _dense, ours=True)


def contenders_for(
    point: Point, impl: str, device: str, dtype: torch.dtype
) -> tuple[Contender, ...]:
    """Returns the contenders of a point: dense products where rank rows are few enough."""
    ranks, ours = point.ranks_of_adapters, OURS if impl == "triton" else ()
    if ours and len(ranks) * max(ranks) <= MAX_RANK_ROWS:
        ours = (*ours, DENSE)
    return (*BY_HAND, *ours, *((GROUPED_MM,) if has_grouped_mm(device, dtype) else ()))


def main() -> int:
    """Measures mixed batches."""
    from fastlora.bench import linear, shapes

    return linear.main(shapes.mixed_points, shapes.tiny_mixed_points, __doc__)


if __name__ == "__main__":
    sys.exit(main())
