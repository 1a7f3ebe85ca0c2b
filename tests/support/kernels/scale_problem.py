"""A batch whose rows `mixed_dora_scale` scales, and what each should be in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.ops.factors import PENDING
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import OPS, Batch

# Of two modules, of which the second is launched.
MODULES = 2


class ScaleProblem(Batch):
    """The operands of a launch.

    Args:
        lab: The fixture.
        ids: Slot of each row.
        slots: How many there are.
        n: Outputs.
        dtype: Of y and the bias.
        scaled: Slots whose adapter has scales; all where it is None.
        pending: Slots whose scales are yet to be made.
        bias: Whether there is one.
    """

    def __init__(
        self,
        lab: Lab,
        ids: Sequence[int],
        slots: int,
        n: int,
        dtype: torch.dtype,
        *,
        scaled: Sequence[int] | None = None,
        pending: Sequence[int] = (),
        bias: bool = True,
    ) -> None:
        self.lab, self.ids, self.slots, self.dtype = lab, ids, slots, dtype
        self.sort()
        self.scaled = set(range(slots) if scaled is None else scaled)
        self.pending = set(pending)
        self.y = 3 * lab.rand(len(ids), n, dtype=dtype)
        self.bias = lab.rand(n, dtype=dtype) if bias else None
        self.scales = [0.5 + torch.rand(n).to(lab.device) for _ in range(slots)]
        self.address = torch.full((MODULES, slots), PENDING, device=lab.device)
        self.write()

    def write(self) -> None:
        """Writes the table, where it lies."""
        for slot, scale in enumerate(self.scales):
            known = scale.data_ptr() if slot in self.scaled else 0
            self.address[1, slot] = PENDING if slot in self.pending else known

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """y in ``dtype``, by PyTorch."""
        y = self.y.to(dtype, copy=True)
        bias = 0.0 if self.bias is None else self.bias.to(dtype)
        for row, slot in enumerate(self.ids):
            if slot in self.scaled:
                y[row] = ((y[row] - bias) * self.scales[slot].to(dtype)) + bias
        return y

    def check(self, y: torch.Tensor) -> None:
        """Raises unless own rows are as near to float64 as PyTorch is, and others what they were.

        Rows of pending slots must be NaN.
        """
        own = self.rows_of(*self.scaled - self.pending)
        rest = self.rows_of(*{*self.ids} - self.scaled - self.pending)
        assert torch.equal(y[rest].view(torch.uint8), self.y[rest].view(torch.uint8))
        assert y[self.rows_of(*self.pending)].isnan().all()
        found = y[own], self.expected(self.dtype)[own], self.expected(torch.float64)[own]
        assert_within_budget(*found, "y")

    def arguments(self, y: torch.Tensor, impl: str = "triton") -> tuple[Any, ...]:
        """What the operator takes."""
        return (y, self.bias, self.rows(), self.address, 1, impl)

    def run(self, y: torch.Tensor | None = None, impl: str = "triton") -> torch.Tensor:
        """Returns y, scaled in place."""
        y = self.y.clone() if y is None else y
        OPS.lora_scale_(*self.arguments(y, impl))
        return y
