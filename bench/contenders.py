"""The implementations that are timed: fastlora's plans, and ways to compute the same without it.

Each contender receives a `Problem` and returns its results in a fixed order, so that one float64
result checks all contenders of a kind. The order is ``(y,)`` for a forward pass and
``(y, dx, d_lora_a, d_lora_b)`` for training (``(y, dx)`` for the base alone). Contenders of the
kind ``"part"`` add to ``problem.y``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from fastlora.autograd.adapter import run_adapter
from fastlora.bench.shapes import DECODE_MAX_ROWS, Point
from fastlora.ops.execution_mode import execution_mode_of
from fastlora.ops.factors import Base, Factors

SCALING = 2.0  # alpha = 2 r, a common choice, and large enough to reveal a missing term
Results = tuple[torch.Tensor, ...]


@dataclass
class Problem:
    """One set of random operands. A benchmark rotates through several sets to keep caches cold.

    Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``y`` and
    ``dy [M, N]``. The fp32 factors have the same values as the others. In training, x and the
    factors require gradients.
    """

    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_a_fp32: torch.Tensor
    lora_b_fp32: torch.Tensor
    y: torch.Tensor
    scaling: torch.Tensor
    impl: str

    @classmethod
    def random(cls, point: Point, dtype: torch.dtype, device: torch.device, impl: str) -> Problem:
        """Draw operands for which the base term and the adapter's term are of similar magnitude."""

        def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device).mul_(scale)

        lora_a = normal(point.r, point.k, point.k**-0.5)
        lora_b = normal(point.n, point.r, point.r**-0.5)
        problem = cls(
            x=normal(point.m, point.k, 1.0),
            weight=normal(point.n, point.k, point.k**-0.5),
            lora_a=lora_a,
            lora_b=lora_b,
            lora_a_fp32=lora_a.float() if dtype != torch.float32 else lora_a.clone(),
            lora_b_fp32=lora_b.float() if dtype != torch.float32 else lora_b.clone(),
            y=normal(point.m, point.n, 1.0),
            scaling=torch.tensor(SCALING, dtype=torch.float32, device=device),
            impl=impl,
        )
        if point.mode == "train":
            for tensor in (problem.x, *problem.factors(False), *problem.factors(True)):
                tensor.requires_grad_()
        return problem

    def factors(self, fp32: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return lora_a and lora_b, in fp32 or in x's dtype."""
        return (self.lora_a_fp32, self.lora_b_fp32) if fp32 else (self.lora_a, self.lora_b)


@dataclass(frozen=True)
class Contender:
    """A named way to solve a problem.

    Attributes:
        name: Name in the results.
        kind: Kind of the problem, which selects the float64 result and the floor
            (`shapes.floor_us`).
        run: Function that solves a problem.
        ours: Whether fastlora computes it.
    """

    name: str
    kind: str
    run: Callable[[Problem], Results]
    ours: bool = False


# ---------------------------------------------------------------------------------- other libraries


def _base(p: Problem) -> Results:
    return (F.linear(p.x, p.weight),)


def _peft_term(p: Problem, y: torch.Tensor, fp32: bool) -> torch.Tensor:
    """Add PEFT's adapter term to y, as `peft.tuners.lora.Linear.forward` does without dropout."""
    lora_a, lora_b = p.factors(fp32)
    dtype = y.dtype
    y = y + F.linear(F.linear(p.x.to(lora_a.dtype), lora_a), lora_b) * SCALING
    return y.to(dtype)


def _peft(p: Problem, fp32: bool) -> Results:
    return (_peft_term(p, F.linear(p.x, p.weight), fp32),)


def _peft_part(p: Problem) -> Results:
    return (_peft_term(p, p.y, False),)


def _add_term(p: Problem, y: torch.Tensor) -> torch.Tensor:
    return y.addmm_(F.linear(p.x, p.lora_a), p.lora_b.t(), alpha=SCALING)


def _addmm(p: Problem) -> Results:
    return (_add_term(p, F.linear(p.x, p.weight)),)


def _addmm_part(p: Problem) -> Results:
    return (_add_term(p, p.y),)


class _AddmmFunction(torch.autograd.Function):
    """Unsloth's LoRA linear with handwritten GEMMs (`LoRA_W`, `unsloth/kernels/fast_lora.py`)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        y = F.linear(x, weight)
        return y.addmm_(F.linear(x, lora_a), lora_b.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_a, lora_b = ctx.saved_tensors
        ds = dy @ lora_b
        d_lora_a = torch.empty_like(lora_a)
        d_lora_a.addmm_(ds.t(), x, alpha=SCALING, beta=0)
        d_lora_b = torch.empty_like(lora_b)
        d_lora_b.addmm_(dy.t(), x @ lora_a.t(), alpha=SCALING, beta=0)
        dx = dy @ weight
        dx.addmm_(ds, lora_a, alpha=SCALING)
        return dx, None, d_lora_a, d_lora_b


def addmm_linear(
    weight: torch.Tensor, r: int, trains: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward function that adds its own factors to a linear ``[N, K]`` by ``addmm_``."""
    n, k = weight.shape
    lora_a, lora_b = weight.new_empty(r, k), weight.new_empty(n, r)
    if trains:
        lora_a.requires_grad_(), lora_b.requires_grad_()
        return lambda x: _AddmmFunction.apply(x, weight, lora_a, lora_b)
    add = {"alpha": SCALING}
    return lambda x: F.linear(x, weight).addmm_(F.linear(x, lora_a), lora_b.t(), **add)


def _augmented(p: Problem) -> Results:
    """Compute one GEMM over K + R, which rounds once. Both operands are copied."""
    x = torch.cat([p.x, F.linear(p.x, p.lora_a)], dim=1)
    weight = torch.cat([p.weight, (p.lora_b.float() * p.scaling).to(p.weight.dtype)], dim=1)
    return (F.linear(x, weight),)


# ----------------------------------------------------------------------------------------- fastlora


def _linear(p: Problem, plan: str, fp32: bool = False) -> Results:
    lora_a, lora_b = p.factors(fp32)
    factors = Factors(lora_a, lora_b, p.scaling)
    conditions = execution_mode_of(p.x, p.impl, plan)
    return (run_adapter(p.x, Base(p.weight), factors, conditions, plan),)


def _shrink_expand(p: Problem) -> Results:
    factors = Factors(p.lora_a, p.lora_b, p.scaling)
    base, conditions = Base(y=p.y, inplace=True), execution_mode_of(p.x, p.impl)
    return (run_adapter(p.x, base, factors, conditions),)


@functools.cache
def _without(feature: str) -> tuple[Any, ...]:
    """Return (object, attribute, replacement) patches that turn off a feature of the fused plan."""
    from fastlora.kernels import configs, lora_linear, plane_sums
    from fastlora.kernels import launch as launches

    chosen = configs.choose
    changes = {"launch_dependents": False} if feature == "pdl" else {"splits": 1}
    stems = ("lora_shrink",) if feature == "pdl" else ("lora_shrink", "lora_linear")

    def choose(chip: Any, stem: str, *args: Any, **kwargs: Any) -> Any:
        config = chosen(chip, stem, *args, **kwargs)
        return replace(config, **changes) if stem in stems else config

    def without_pdl(launch: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **kwargs: launch(*args, **{**kwargs, "pdl": False})

    # Cached launches would not use another config.
    patches: tuple[Any, ...] = ((configs, "choose", choose), (launches, "_CAN_CACHE", False))
    if feature == "pdl":
        for module, name in (
            (lora_linear, "launch_lora_linear"),
            (plane_sums, "launch_plane_sums"),
        ):
            patches += ((module, name, without_pdl(getattr(module, name))),)
    return patches


def _fused_without(p: Problem, feature: str) -> Results:
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _without(feature):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        return _linear(p, "fused")


# ----------------------------------------------------------------------------------------- tables


def _training(forward: Callable[[Problem], Results], fp32: bool = False) -> Any:
    """Return a contender that runs a forward function and its backward pass."""

    def run(p: Problem) -> Results:
        (y,) = forward(p)
        return (y.detach(), *torch.autograd.grad(y, (p.x, *p.factors(fp32)), p.y))

    return run


def _training_base(p: Problem) -> Results:
    (y,) = _base(p)
    return (y.detach(), *torch.autograd.grad(y, (p.x,), p.y))


FORWARD = (
    Contender("base", "base", _base),
    Contender("peft", "full", lambda p: _peft(p, False)),
    Contender("fused", "full", lambda p: _linear(p, "fused"), ours=True),
    Contender("split", "full", lambda p: _linear(p, "split"), ours=True),
    Contender("peft_fp32", "full", lambda p: _peft(p, True)),
    Contender("addmm", "full", _addmm),
    Contender("augmented", "full", _augmented),
    Contender("peft_part", "part", _peft_part),
    Contender("shrink_expand", "part", _shrink_expand, ours=True),
    Contender("addmm_part", "part", _addmm_part),
)
FUSED_VARIANTS = (
    Contender("fused_no_pdl", "full", lambda p: _fused_without(p, "pdl"), ours=True),
    Contender("fused_no_split_k", "full", lambda p: _fused_without(p, "split_k"), ours=True),
)
TRAIN = (
    Contender("base", "train_base", _training_base),
    Contender("peft", "train", _training(lambda p: _peft(p, False))),
    Contender("fused", "train", _training(lambda p: _linear(p, "fused")), ours=True),
    Contender("split", "train", _training(lambda p: _linear(p, "split")), ours=True),
    Contender(
        "split_fp32", "train", _training(lambda p: _linear(p, "split", True), True), ours=True
    ),
    Contender("peft_fp32", "train", _training(lambda p: _peft(p, True), True)),
    Contender(
        "addmm",
        "train",
        _training(lambda p: (_AddmmFunction.apply(p.x, p.weight, p.lora_a, p.lora_b),)),
    ),
)
# For each kind, the contender whose error sets the error budget: plain PyTorch in the tested dtype.
YARDSTICK = {
    "base": "base",
    "full": "peft",
    "part": "peft_part",
    "train_base": "base",
    "train": "peft",
}


def contenders_for(point: Point, impl: str, *_: object) -> tuple[Contender, ...]:
    """Return the contenders of a point. The base is first, and yardsticks precede their kind."""
    if point.mode == "train":
        return TRAIN
    if impl == "triton" and point.m <= DECODE_MAX_ROWS:
        return (*FORWARD, *FUSED_VARIANTS)
    return FORWARD


def truths(point: Point, p: Problem) -> dict[str, Results]:
    """Return the float64 results by kind, in the order in which contenders return their results."""
    x, weight, lora_a, lora_b, y = (
        t.detach().double() for t in (p.x, p.weight, p.lora_a, p.lora_b, p.y)
    )
    base = x @ weight.t()
    s = x @ lora_a.t()
    term = SCALING * (s @ lora_b.t())
    if point.mode == "forward":
        return {"base": (base,), "full": (base + term,), "part": (y + term,)}
    ds = SCALING * (y @ lora_b)
    dx = y @ weight
    return {
        "train_base": (base, dx),
        "train": (base + term, dx + ds @ lora_a, ds.t() @ x, SCALING * (y.t() @ s)),
    }
