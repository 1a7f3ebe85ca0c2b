"""Times one linear on a mixed batch: fastlora's kernels, and plain PyTorch by hand.

    python bench/mixed_kernels.py --out mixed.csv --tests pass [--seconds 110] [--device cuda]

Rows are in random order, from 64 sequences (or one per row, if there are fewer rows). All adapters
have the same number of sequences. `bench/gpu.sh` runs it after `bench/linear.py`, and
`bench/README.md` explains the rows.
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
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables

YARDSTICK = {"base": "base", "mixed": "segments", "train_base": "base", "mixed_train": "segments"}


class Base(NamedTuple):
    """A linear layer as the strategies by hand receive it."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class MixedProblem:
    """One set of random operands. In training, x and every factor require gradients.

    The shapes are ``x [M, K]`` and ``weight [N, K]``. In training, ``y [M, N]`` is the gradient of
    the result; otherwise it is empty. ``factors`` are lora_a ``[r, K]`` and lora_b ``[N, r]`` of
    each adapter in turn, with the adapter's own rank.
    """

    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    factors: list[torch.Tensor]
    slots: torch.Tensor
    rows: Rows
    groups: SortedRows
    impl: str

    @classmethod
    def random(
        cls, point: Point, dtype: torch.dtype, device: torch.device, impl: str = ""
    ) -> MixedProblem:
        """Draw operands for which the base term and the adapters' term are of similar magnitude."""
        trains = point.mode == "mixed_train"

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device).mul_(scale)

        sequences = min(point.m, MIXED_SEQUENCES)
        ranks = point.ranks_of_adapters
        factors = []
        for r in ranks:
            factors += [normal(r, point.k, point.k**-0.5), normal(point.n, r, r**-0.5)]
        ids = torch.arange(sequences) % len(ranks)
        slots = ids[torch.randperm(sequences)].to(device)
        return cls(
            x=normal(point.m, point.k, 1.0).requires_grad_(trains),
            weight=normal(point.n, point.k, point.k**-0.5),
            y=normal(point.m if trains else 0, point.n, 1.0),
            factors=[factor.requires_grad_(trains) for factor in factors],
            slots=slots,
            rows=Rows.of(slots, len(ranks), point.m // sequences, sorted_before=False),
            groups=sort_rows(slots, point.m, len(ranks)),
            impl=impl,
        )

    @property
    def each(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The lora_a and lora_b of each adapter."""
        return list(zip(self.factors[::2], self.factors[1::2], strict=True))

    @functools.cached_property
    def base(self) -> Base:
        """The base linear layer."""
        return Base(self.weight)

    @functools.cached_property
    def ranks(self) -> list[int]:
        """The rank of each adapter."""
        return [lora_a.shape[0] for lora_a in self.factors[::2]]

    @functools.cached_property
    def stacked(self) -> Stacked:
        """The factors side by side, padded to the largest rank."""
        count, most = len(self.ranks), max(self.ranks)
        lora_a = self.x.new_zeros(count, most, self.weight.shape[1])
        lora_b = self.x.new_zeros(count, most, self.weight.shape[0])
        for index, (own_a, own_b) in enumerate(self.each):
            lora_a[index, : own_a.shape[0]] = own_a
            lora_b[index, : own_a.shape[0]] = own_b.t()
        own = zip(lora_a, lora_b, self.ranks, strict=True)
        return Stacked(lora_a, lora_b, tuple((a[:r].t(), b[:r]) for a, b, r in own), SCALING)

    @functools.cached_property
    def addresses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Addresses of the stacked factors of one module. Each adapter uses only its own rank."""
        a, b = (
            torch.tensor([[own.data_ptr() for own in factor]], device=factor.device)
            for factor in (self.stacked.lora_a, self.stacked.lora_b)
        )
        return a, b

    @functools.cached_property
    def scaling(self) -> torch.Tensor:
        """The scaling of each adapter, for one module, ``[1, S]``."""
        return torch.full((1, len(self.ranks)), SCALING, device=self.x.device)

    @functools.cached_property
    def rank(self) -> torch.Tensor:
        """The rank of each adapter, for one module, int32 ``[1, S]``."""
        return torch.tensor([self.ranks], dtype=torch.int32, device=self.x.device)

    @property
    def routed(self) -> list[torch.Tensor]:
        """The operators' argument ``rows``."""
        return rows_argument_for_address_tables(self.groups)

    @property
    def tables(self) -> tuple[Any, ...]:
        """The operators' arguments for adapters: tables, index, max_rank, and factor_dtype."""
        tables = [*self.addresses, self.rank, self.scaling]
        return tables, 0, max(self.ranks), self.x.dtype


def truths(p: MixedProblem) -> dict[str, Results]:
    """Return the float64 results by kind, for a forward pass or for training."""
    x, weight = p.x.detach().double(), p.weight.double()
    y = x @ weight.t()
    dy = p.y.double() if len(p.y) else torch.zeros_like(y)
    dx, full = dy @ weight, y.clone()
    d_full, grads = dx.clone(), []
    by_row = p.slots.repeat_interleave(len(x) // len(p.slots))
    for slot, factors in enumerate(p.each):
        lora_a, lora_b = (t.detach().double() for t in factors)
        own = by_row == slot
        s, ds = x[own] @ lora_a.t(), SCALING * (dy[own] @ lora_b)
        full[own] += SCALING * (s @ lora_b.t())
        d_full[own] += ds @ lora_a
        grads += [ds.t() @ x[own], SCALING * (dy[own].t() @ s)]
    if not len(p.y):
        return {"base": (y,), "mixed": (full,)}
    return {"train_base": (y, dx), "mixed_train": (full, d_full, *grads)}


def _base(p: MixedProblem) -> Results:
    return (F.linear(p.x, p.weight),)


def _by_hand(strategy: Strategy, p: MixedProblem) -> Results:
    return (strategy(p.x, p.base, p.stacked, p.rows),)


def _linear(plan: str, p: MixedProblem) -> Results:
    linear = torch.ops.fastlora.lora_linear_at
    return (linear(p.x, p.weight, None, p.routed, None, *p.tables, plan)[0],)


def _add(p: MixedProblem) -> Results:
    y = F.linear(p.x, p.weight)
    torch.ops.fastlora.lora_add_at_(y, p.x, p.routed, *p.tables, "triton")
    return (y,)


def _dense(p: MixedProblem) -> Results:
    (a_address, b_address), route = p.addresses, p.routed
    tables = b_address[0], None, p.rank[0], p.scaling[0]
    y = dense_linear(
        *(p.x, p.weight, None, (route[0], route[1], route[2]), None, a_address[0], tables),
        max_rank=max(p.ranks),
        factor_dtype=p.x.dtype,
    )
    return (y,)


@functools.cache
def has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Return whether this version of PyTorch has grouped products for a device and a dtype."""
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
    """Return the contenders of a point, with dense products if there are few enough rank rows."""
    ranks, ours = point.ranks_of_adapters, OURS if impl == "triton" else ()
    if ours and len(ranks) * max(ranks) <= MAX_RANK_ROWS:
        ours = (*ours, DENSE)
    return (*BY_HAND, *ours, *((GROUPED_MM,) if has_grouped_mm(device, dtype) else ()))


def main() -> int:
    """Measure mixed batches."""
    from fastlora.bench import linear, shapes

    return linear.main(shapes.mixed_points, shapes.tiny_mixed_points, __doc__)


if __name__ == "__main__":
    sys.exit(main())
