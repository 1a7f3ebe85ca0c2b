"""One linear in training on a mixed batch: forward and backward, fastlora's kernels and by hand.

What `bench/mixed_kernels.py` times beside its forwards. Results are ``(y, dx)``, then d_lora_a and
d_lora_b of each adapter in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import Call, run
from fastlora.bench.contenders import SCALING, Contender, Results
from fastlora.bench.mixed_strategies import Rows
from fastlora.bench.shapes import MIXED_SEQUENCES, Point
from fastlora.ops.factors import Base
from fastlora.ops.rows import Rows as SortedRows
from fastlora.ops.rows import sort_rows

YARDSTICK = {"train_base": "base", "mixed_train": "segments"}


@dataclass
class MixedTrainProblem:
    """One set of random operands, for which gradients flow to x and to every factor.

    ``x [M, K]``, ``weight [N, K]``; ``y [M, N]`` is the gradient of the result; ``factors`` are
    lora_a ``[r, K]`` and lora_b ``[N, r]`` of each adapter in turn, of its own rank.
    """

    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    factors: list[torch.Tensor]
    slots: torch.Tensor
    rows: Rows
    groups: SortedRows
    scaling: torch.Tensor
    impl: str

    @classmethod
    def random(
        cls, point: Point, dtype: torch.dtype, device: torch.device, impl: str
    ) -> MixedTrainProblem:
        """Draws operands that give the base and the adapters results of the same size."""

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
            x=normal(point.m, point.k, 1.0).requires_grad_(),
            weight=normal(point.n, point.k, point.k**-0.5),
            y=normal(point.m, point.n, 1.0),
            factors=[factor.requires_grad_() for factor in factors],
            slots=slots,
            rows=Rows.of(slots, len(ranks), point.m // sequences, sorted_before=False),
            groups=sort_rows(slots, point.m, len(ranks)),
            scaling=torch.full((len(ranks),), SCALING, device=device),
            impl=impl,
        )


def truths(p: MixedTrainProblem) -> dict[str, Results]:
    """Returns the float64 results by kind."""
    x, weight, dy = (t.detach().double() for t in (p.x, p.weight, p.y))
    y, dx = x @ weight.t(), dy @ weight
    full, d_full, grads = y.clone(), dx.clone(), []
    by_row = p.slots.repeat_interleave(len(x) // len(p.slots))
    for slot in range(len(p.factors) // 2):
        lora_a, lora_b = (t.detach().double() for t in p.factors[2 * slot : 2 * slot + 2])
        own = by_row == slot
        s, ds = x[own] @ lora_a.t(), SCALING * (dy[own] @ lora_b)
        full[own] += SCALING * (s @ lora_b.t())
        d_full[own] += ds @ lora_a
        grads += [ds.t() @ x[own], SCALING * (dy[own].t() @ s)]
    return {"train_base": (y, dx), "mixed_train": (full, d_full, *grads)}


def _backward(p: MixedTrainProblem, y: torch.Tensor) -> Results:
    return (y.detach(), *torch.autograd.grad(y, (p.x, *p.factors), p.y))


def _base(p: MixedTrainProblem) -> Results:
    y = F.linear(p.x, p.weight)
    return (y.detach(), *torch.autograd.grad(y, (p.x,), p.y))


def _segments(p: MixedTrainProblem) -> Results:
    """Rows sorted by adapter and put back, and PEFT's two products on each adapter's own rows."""
    x = p.rows.there(p.x)
    y = F.linear(x, p.weight)
    parts = zip(x.split(p.rows.counts), y.split(p.rows.counts), strict=True)
    each = zip(parts, p.factors[::2], p.factors[1::2], strict=True)
    done = [
        torch.addmm(own_y, F.linear(own_x, lora_a), lora_b.t(), alpha=SCALING)
        for (own_x, own_y), lora_a, lora_b in each
    ]
    return _backward(p, p.rows.back(torch.cat(done)))


def _kernels(plan: str, p: MixedTrainProblem) -> Results:
    impl = "opaque" if p.impl == "eager" else p.impl  # the operators, in PyTorch too
    call = Call(impl, plan, (0.0,) * len(p.scaling), p.groups)
    factors: list[Any] = []
    for lora_a, lora_b in zip(p.factors[::2], p.factors[1::2], strict=True):
        factors += [lora_a, lora_b, None]
    y = run(p.x, Base(p.weight), call, p.scaling, None, factors)
    return _backward(p, y)


def _ours(plan: str) -> Contender:
    run: Callable[[Any], Results] = functools.partial(_kernels, plan)
    return Contender(plan, "mixed_train", run, ours=True)


CONTENDERS = (
    Contender("base", "train_base", _base),  # type: ignore[arg-type]
    Contender("segments", "mixed_train", _segments),  # type: ignore[arg-type]
    _ours("fused"),
    _ours("split"),
)
