"""A mixed batch with gradients: adapters as parameters, and what every gradient should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.ops.layout import split_grad_a, split_grad_b
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.ops.triton.rows_argument import (
    rows_and_run_length_for_gradients,
    rows_argument_for_factor_lists,
)
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import OPS, Batch, Results
from tests.support.sums import yardstick

# One adapter without a part in the module; slots 5 and up get rows only where a test says so.
RANKS = (1, 3, 8, 16, 64, 0, 16)
PS = (0.5, 0.1, 0.0, 0.25, 0.3, 0.0, 0.2)


def mix(m: int) -> list[int]:
    """Slots of m rows out of order: rows without an adapter, an empty slot, one without rows."""
    return [(5 * row + row // 3) % 7 - 1 for row in range(m)]


@dataclass
class GradProblem(Batch):
    """The operands of a module's forward and backward, S adapters as parameters.

    Args:
        lab: The fixture.
        ids: Slot of each row.
        n, k: The module's sides.
        dtype: Of x, the base and the gradients that flow.
        factor_dtype: Of the factors; x's where it is None.
        ranks: Of the adapters.
        biased: Slots with a lora_bias.
        dropout: Whether each adapter drops with its own of `PS`.
        run_rows: Positions of a run in the backward; None for what a layer takes.
    """

    lab: Lab
    ids: Sequence[int]
    n: int
    k: int
    dtype: torch.dtype
    factor_dtype: torch.dtype | None = None
    ranks: Sequence[int] = RANKS
    biased: Sequence[int] = (1, 4)
    dropout: bool = False
    run_rows: int | None = None

    def __post_init__(self) -> None:
        lab, self.slots = self.lab, len(self.ranks)
        self.sort()
        factor_dtype = self.factor_dtype or self.dtype
        self.x = lab.rand(self.m, self.k, dtype=self.dtype)
        self.dy = lab.rand(self.m, self.n, dtype=self.dtype)
        self.weight = lab.rand(self.n, self.k, dtype=self.dtype).div_(self.k**0.5)
        self.lora_a = [
            (lab.rand(r, self.k) / self.k**0.5).to(self.dtype).to(factor_dtype) for r in self.ranks
        ]
        self.lora_b = [
            (lab.rand(self.n, r) / max(r, 1) ** 0.5).to(self.dtype).to(factor_dtype)
            for r in self.ranks
        ]
        self.lora_bias = [
            lab.rand(self.n, dtype=self.dtype).to(factor_dtype) if slot in self.biased else None
            for slot in range(self.slots)
        ]
        # rsLoRA's among them.
        self.scaling = torch.tensor(
            [16 / max(r, 1) ** (0.5 if slot % 2 else 1) for slot, r in enumerate(self.ranks)]
        ).to(lab.device)
        self.seeds = None
        if self.dropout:
            self.seeds = torch.tensor([2**61 + 977 * slot for slot in range(self.slots)])
            self.seeds = self.seeds.to(lab.device)
        self.ps = [PS[slot % len(PS)] if self.dropout else 0.0 for slot in range(self.slots)]
        self.with_bias = [bias is not None for bias in self.lora_bias]

    @property
    def rows_in_pieces(self) -> list[torch.Tensor]:
        """What the forward's operators take of the row groups."""
        return rows_argument_for_factor_lists(self.groups)

    @property
    def factors(self) -> list[torch.Tensor | None]:
        """Those of each slot in turn."""
        slots = zip(self.lora_a, self.lora_b, self.lora_bias, strict=True)
        return [tensor for own in slots for tensor in own]

    # ------------------------------------------------------------------ operators

    def forward_arguments(self, plan: str, impl: str = "triton") -> tuple[Any, ...]:
        """Of ``lora_linear``."""
        drop = self.seeds, self.ps
        base = self.x, self.weight, None, self.rows_in_pieces, None
        return (*base, self.factors, self.scaling, *drop, impl, plan)

    def shrink_arguments(self, impl: str = "triton") -> tuple[Any, ...]:
        """Of ``lora_shrink``, whose s the group shares."""
        return (self.x, self.rows_in_pieces, self.lora_a, 1, self.seeds, self.ps, impl)

    def grad_b_arguments(
        self, s: torch.Tensor, impl: str = "triton", factors: bool = True
    ) -> tuple[Any, ...]:
        """Of ``lora_grad_b``."""
        runs = self._runs("mixed_lora_grad_b", self.n, impl)
        return (self.dy, s, *runs, self.lora_b, self.with_bias, self.scaling, factors, impl)

    def _runs(self, launch: str, columns: int, impl: str) -> tuple[list[torch.Tensor], int]:
        """Returns rows, with pieces for kernels, and how many make a run."""
        rows = self.groups.operator_arguments()
        if impl == "eager":
            return rows, 0
        if self.run_rows is not None:
            return [*rows, self.groups.piece_starts(self.run_rows)], self.run_rows
        return rows_and_run_length_for_gradients(launch, self.groups, self.dtype, columns)

    def grad_x_arguments(
        self, ds: torch.Tensor, plan: str, impl: str = "triton", base: bool = True
    ) -> tuple[Any, ...]:
        """Of ``lora_grad_x``."""
        weight, rows = self.weight if base else None, self.rows_in_pieces
        return (self.dy, weight, ds, rows, self.lora_a, self.seeds, self.ps, impl, plan)

    def grad_a_arguments(self, ds: torch.Tensor, impl: str = "triton") -> tuple[Any, ...]:
        """Of ``lora_grad_a``."""
        runs = self._runs("mixed_lora_grad_a", self.k, impl)
        return (self.x, [ds], *runs, self.lora_a, self.seeds, self.ps, impl)

    def run(self, plan: str = "fused", impl: str = "triton") -> Results:
        """Returns y, dx and every factor's gradient, by name and slot."""
        y, s = OPS.lora_linear(*self.forward_arguments(plan, impl))
        ds, packed, _ = OPS.lora_grad_b(*self.grad_b_arguments(s, impl))
        found = {"y": y, "dx": OPS.lora_grad_x(*self.grad_x_arguments(ds, plan, impl))}
        self.take_b(found, packed)
        (packed,) = OPS.lora_grad_a(*self.grad_a_arguments(ds, impl))
        for slot, gradient in enumerate(split_grad_a(packed, self.lora_a)):
            found[f"d_lora_a {slot}"] = gradient
        return found

    def take_b(self, found: Results, packed: torch.Tensor) -> None:
        """Adds the gradients of lora_b and lora_bias."""
        parts = split_grad_b(packed, self.lora_b, self.with_bias)
        for slot, (gradient, bias) in enumerate(parts):
            found[f"d_lora_b {slot}"] = gradient
            if bias is not None:
                found[f"d_lora_bias {slot}"] = bias

    # ---------------------------------------------------------------------- truth

    def masks(self, slot: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """What dropout multiplies an adapter's rows by, ``[count, K]``."""
        p = self.ps[slot]
        if self.seeds is None or not count:
            return torch.ones(count, self.k, dtype=dtype, device=self.lab.device)
        keep = philox_keep_mask(int(self.seeds[slot]), count, self.k, p)
        return (keep.to(dtype) / (1 - p)).to(self.lab.device)

    def results(self, dtype: torch.dtype) -> Results:
        """Returns what `run` should, adapter by adapter in PyTorch's products in ``dtype``."""
        x, dy, weight = self.x.to(dtype), self.dy.to(dtype), self.weight.to(dtype)
        # Sums of all terms, in any order: adapters' first, and base products added to them.
        y, dx = x.new_zeros(len(x), self.n), x.new_zeros(len(x), self.k)
        found: Results = {}
        for slot in range(self.slots):
            rows = self.rows_of(slot)
            a, b = self.lora_a[slot].to(dtype), self.lora_b[slot].to(dtype)
            c = self.scaling[slot].to(dtype)
            mask = self.masks(slot, len(rows), dtype)
            # By selection: nothing of a dropped element is left.
            dropped = torch.where(mask > 0, x[rows] * mask, 0)
            s = dropped @ a.t()
            delta = s @ b.t()
            if self.with_bias[slot]:
                delta = delta + self.lora_bias[slot].to(dtype)
                found[f"d_lora_bias {slot}"] = c * dy[rows].sum(0)
            ds = c * (dy[rows] @ b)
            y[rows] += c * delta
            dx[rows] += torch.where(mask > 0, (ds @ a) * mask, 0)
            found[f"d_lora_b {slot}"] = dy[rows].t() @ (c * s)
            found[f"d_lora_a {slot}"] = ds.t() @ dropped
        return {**found, "y": torch.addmm(y, x, weight.t()), "dx": torch.addmm(dx, dy, weight)}

    def check(self, found: Results) -> None:
        """Raises unless each result is as near to float64 as PyTorch is in the same dtype."""
        exact = self.results(torch.float64)
        near = yardstick(lambda: self.results(self.dtype), exact)
        for name, actual in found.items():
            kind = self.dtype if name in ("y", "dx") else self.lora_a[0].dtype
            assert actual.dtype == kind, name
            assert_within_budget(actual.to(self.dtype), near[name], exact[name], name)
