"""One linear in training on a mixed batch: forward and backward, by fastlora's kernels and by hand.

`bench/mixed_kernels.py` times these contenders in addition to its forward passes. Results are
``(y, dx)``, then d_lora_a and d_lora_b of each adapter in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.lora_linear import run_adapters
from fastlora.bench.contenders import SCALING, Contender, Results
from fastlora.bench.mixed_kernels import MixedProblem
from fastlora.ops.factors import Base, LayerAdapterOperands


def _backward(p: MixedProblem, y: torch.Tensor) -> Results:
    return (y.detach(), *torch.autograd.grad(y, (p.x, *p.factors), p.y))


def _base(p: MixedProblem) -> Results:
    y = F.linear(p.x, p.weight)
    return (y.detach(), *torch.autograd.grad(y, (p.x,), p.y))


def _segments(p: MixedProblem) -> Results:
    """Sort rows by adapter, run PEFT's two products on each adapter's rows, and restore order."""
    x = p.rows.there(p.x)
    y = F.linear(x, p.weight)
    parts = zip(x.split(p.rows.counts), y.split(p.rows.counts), strict=True)
    done = [
        torch.addmm(own_y, F.linear(own_x, lora_a), lora_b.t(), alpha=SCALING)
        for (own_x, own_y), (lora_a, lora_b) in zip(parts, p.each, strict=True)
    ]
    return _backward(p, p.rows.back(torch.cat(done)))


def _kernels(plan: str, p: MixedProblem) -> Results:
    count, (lora_a, lora_b) = len(p.ranks), zip(*p.each, strict=True)
    operands = LayerAdapterOperands(
        [*lora_a], [*lora_b], [None] * count, p.scaling[0], (0.0,) * count
    )
    y = run_adapters(p.x, Base(p.weight), operands, p.impl, plan, p.groups)
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
