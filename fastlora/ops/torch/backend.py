"""The backend in plain PyTorch, on any device: one adapter on all rows, or segments of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.backend import Gradients, Wanted, register_backend
from fastlora.ops.factors import Operands
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products, reference, segments, single

# From so many times its rank a layer is wide enough that a CPU makes s again for under 1 % of the
# layer's products. For all layers of SmolLM2 that costs 1.2 % of a step in fp32 and saves 0.75 %
# of its peak memory (2 x 128 tokens, rank 16, one Xeon core), for the wide ones a quarter of both.
_WIDE = 64


def is_wide(lora_b: torch.Tensor) -> bool:
    """Whether s is cheap to make again beside the products of the layer."""
    n, r = lora_b.shape
    return n >= _WIDE * r


class TorchBackend:
    """See `fastlora.ops.backend.Backend`."""

    def keeps_s(self, x: torch.Tensor, lora_b: torch.Tensor) -> bool:
        """Not where a wide layer's s can be made again from the x that is read anyway."""
        return x.device.type != "cpu" or not is_wide(lora_b)

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        y: torch.Tensor | None,
        operands: Operands,
        rows: Rows | None,
        s: torch.Tensor | None,
        plan: str,
        inplace: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `fastlora.ops.backend.Backend.forward`."""
        if rows is not None and weight is not None:
            bias = None if bias is None else bias.to(x.dtype)
            return segments.linear(x, weight, bias, operands, rows, s)
        if rows is not None and y is not None:
            return segments.add(y, x, operands, rows, s, inplace)
        (lora_a,), (lora_b,), (lora_bias,), scaling = operands[:4]
        if s is None and operands.seeds is None:
            s = reference.lora_shrink(x, lora_a)
        elif s is None:
            s = single.shrink(x, lora_a, operands.seeds, operands.dropout_p[0])
        if weight is not None:
            if lora_bias is not None:
                bias = joined_bias(bias, lora_bias, scaling)
            if bias is not None and bias.dtype != x.dtype:
                bias = bias.to(x.dtype)
            y = products.linear(x, weight, bias)
        elif y is not None and not inplace:
            y = y.clone(memory_format=torch.contiguous_format)
        if y is None:
            raise ValueError("neither a base weight nor a base output is given")
        reference.lora_expand_(y, s, lora_b, scaling)
        if weight is None and lora_bias is not None:
            y += (lora_bias * scaling).to(y.dtype)
        return y, s

    def gradients(
        self,
        dy: torch.Tensor,
        weight: torch.Tensor | None,
        x: torch.Tensor | None,
        operands: Operands,
        rows: Rows | None,
        s: torch.Tensor | None,
        wanted: Wanted,
        plan: str,
    ) -> Gradients:
        """See `fastlora.ops.backend.Backend.gradients`."""
        if rows is not None and s is not None:
            return self._of_segments(dy, weight, x, operands, rows, s, wanted)
        (lora_a,), (lora_b,), (lora_bias,), scaling = operands[:4]
        wants_a, wants_b, wants_bias = wanted.factors
        found = single.gradients(
            *(dy, weight, x, lora_a, lora_b, scaling, s, operands.seeds, operands.dropout_p[0]),
            single.Wanted(wanted.x, wants_a, wants_b),
        )
        d_bias = reference.column_sums(dy) if wanted.bias or wants_bias else None
        d_lora_bias = None
        if wants_bias and d_bias is not None and lora_bias is not None:
            d_lora_bias = (d_bias * scaling).to(lora_bias.dtype)
        return Gradients(found.dx, [found.d_lora_a, found.d_lora_b, d_lora_bias], found.ds, d_bias)

    def _of_segments(
        self,
        dy: torch.Tensor,
        weight: torch.Tensor | None,
        x: torch.Tensor | None,
        operands: Operands,
        rows: Rows,
        s: torch.Tensor,
        wanted: Wanted,
    ) -> Gradients:
        wants, dx, dy = wanted.factors, None, rows.sorted(dy)
        wants_ds = wanted.x or wanted.s or any(wants[::3])
        ds, d_lora_b, d_lora_bias = segments.grad_b(dy, s, operands, rows, wants, wants_ds)
        d_lora_a: list[torch.Tensor | None] = [None] * len(d_lora_b)
        if x is not None and any(wants[::3]):
            d_lora_a = segments.grad_a(x, [ds], [operands], rows, wants[::3])
        if wanted.x:
            dx = segments.grad_x(dy, weight, ds, operands, rows)
        factors = [t for own in zip(d_lora_a, d_lora_b, d_lora_bias, strict=True) for t in own]
        return Gradients(dx, factors, ds, dy.sum(0) if wanted.bias else None)

    def shrink(
        self,
        x: torch.Tensor,
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor]:
        """See `fastlora.ops.backend.Backend.shrink`."""
        if rows is not None:
            layers = [segments.down(own) for own in lora_a]
            return list(segments.shrink(x, layers, rows).unbind())
        return single.shrink_siblings(x, [own for (own,) in lora_a], seeds, dropout_p)

    def grad_a(
        self,
        x: torch.Tensor,
        ds: Sequence[torch.Tensor],
        lora_a: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[torch.Tensor | None],
        dropout_p: Sequence[float],
        rows: Rows | None,
    ) -> list[torch.Tensor | None]:
        """See `fastlora.ops.backend.Backend.grad_a`."""
        if rows is None:
            return [*single.grad_a_siblings(x, ds, [a for (a,) in lora_a], seeds, dropout_p)]
        layers = [segments.down(own) for own in lora_a]
        return segments.grad_a(x, ds, layers, rows, [True] * sum(map(len, lora_a)))


def joined_bias(
    bias: torch.Tensor | None, lora_bias: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """Returns the base bias plus the scaled bias of one adapter."""
    scaled = lora_bias * scaling
    return scaled if bias is None else bias + scaled


register_backend("eager", TorchBackend())
