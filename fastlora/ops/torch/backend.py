"""The backend in plain PyTorch, which runs on any device.

One adapter applies to all rows, or each segment of sorted rows has its own adapter.

In a graph that a compiler traces, the rows of a mixed batch cannot be read, so the registered
operators are called instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.backend import BackwardArguments, Gradients, register_backend
from fastlora.ops.execution_mode import is_traced
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.operator_backend import OperatorBackend
from fastlora.ops.rows import Rows
from fastlora.ops.stacks import StackedWeightAdapterOperands
from fastlora.ops.torch import products, reference, segments, single, stacks


class TorchBackend(OperatorBackend):
    """Backend in plain PyTorch.

    It computes the layers of a shared-input group separately, which is as fast as together.
    """

    def __init__(self) -> None:
        super().__init__("eager")

    def forward(
        self,
        x: torch.Tensor,
        base: Base,
        operands: LayerAdapterOperands,
        rows: Rows | None,
        s: torch.Tensor | None,
        plan: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows is not None:
            if is_traced(x):
                return super().forward(x, base, operands, rows, s, plan)
            return segments.forward(x, base, operands, rows, s)
        weight, bias, y, inplace = base
        (lora_a,), (lora_b,) = operands[:2]
        if s is None and operands.seeds is None:
            s = reference.lora_shrink(x, lora_a)
        elif s is None:
            s = single.shrink(x, lora_a, operands.seeds, operands.dropout_p[0])
        if weight is not None:
            y = products.linear(x, weight, bias)
        elif y is not None and not inplace:
            y = y.clone(memory_format=torch.contiguous_format)
        if y is None:
            raise ValueError("neither a base weight nor a base output is given")
        return reference.lora_expand_(y, s, lora_b, operands.scaling), s

    def gradients(self, given: BackwardArguments) -> Gradients:
        dy, weight, x, operands, rows, s = given[:6]
        if rows is None or s is None:
            return single.gradients(given)
        if is_traced(dy):
            return super().gradients(given)
        wants, dx, dy = given.wants, None, rows.sorted(dy)
        wants_ds = given.wants_x or given.wants_s or any(wants[::3])
        ds, d_lora_b, d_lora_bias = segments.grad_b(dy, s, operands, rows, wants, wants_ds)
        d_lora_a: list[torch.Tensor | None] = [None] * len(d_lora_b)
        if x is not None and any(wants[::3]):
            d_lora_a = segments.grad_a(x, [ds], [operands], rows, wants[::3])
        if given.wants_x:
            dx = segments.grad_x(dy, weight, ds, operands, rows)
        factors = [t for own in zip(d_lora_a, d_lora_b, d_lora_bias, strict=True) for t in own]
        return dx, dy.sum(0) if given.wants_bias else None, ds, factors

    def add_stacked_updates_(
        self, y: torch.Tensor, x: torch.Tensor, operands: StackedWeightAdapterOperands, rows: Rows
    ) -> torch.Tensor:
        return stacks.add_updates_and_return_s_(y, x, operands, rows)

    def stacked_gradients(
        self,
        dy: torch.Tensor,
        x: torch.Tensor | None,
        s: torch.Tensor,
        operands: StackedWeightAdapterOperands,
        rows: Rows,
        wants_x: bool,
        wants: Sequence[bool],
        dx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        return stacks.gradients(dy, x, s, operands, rows, wants_x, wants, dx)


register_backend("eager", TorchBackend())
