"""Launches of a forward where one adapter has all rows: shrink, linear and expand; dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.coded_weight import Coded
from fastlora.kernels import lora_dropout, lora_expand, lora_linear, lora_shrink, plane_sums
from fastlora.kernels.launch import empty, kept, product
from fastlora.kernels.modules import Module, Weight, are_of_a_kind
from fastlora.ops.plans import choose_plan
from fastlora.ops.triton.configs import chip_of, config_of

_Tensors = Sequence[torch.Tensor]
_Operand = torch.Tensor | Coded | None


@kept
def siblings(
    x: torch.Tensor, dropout_p: tuple[float, ...], with_s: bool, *operands: _Operand
) -> list[torch.Tensor]:
    """Returns what `fastlora.ops.backend.Backend.siblings` does.

    Under dropout, or in another layout than a kernel takes beside others, each module has launches
    of its own.
    """
    count: int = len(dropout_p)
    each: Any = [operands[i : i + count] for i in range(0, 6 * count, count)]
    weights, biases, lora_a, lora_b, scalings, seeds = each
    if _are_alike(x, weights, biases, lora_a, lora_b, seeds):
        return _linears(x, weights, biases, None, lora_a, lora_b, scalings, with_s=with_s)
    made = [
        linear_one(x, weight, bias, None, *own, "auto")
        for weight, bias, *own in zip(*each, dropout_p, strict=True)
    ]
    return [y for y, _ in made] + ([s for _, s in made] if with_s else [])


@kept
def linear_one(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    plan: str,
) -> list[torch.Tensor]:
    """Returns y, and s unless it is given."""
    own = [weight], [bias], s, [lora_a], [lora_b], [scaling]
    return _linears(x, *own, seed, dropout_p, plan, with_s=s is None)


def _linears(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    s: torch.Tensor | None,
    lora_a: _Tensors,
    lora_b: _Tensors,
    scalings: _Tensors,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    plan: str = "auto",
    *,
    with_s: bool,
    launch: str = "coded_lora_linear",
) -> list[torch.Tensor]:
    """Returns y of modules that one launch takes, and on request s, side by side.

    Two launches: a shrink unless s is given, and a linear or an expand, on which the library's
    products accumulate. Where shrink splits K, its planes go straight into the second, which sums
    them; one more sums those of y where a linear splits K. Over codes, which ``launch`` is for,
    there is no library's product.
    """
    sizes, r = [b.shape[0] for b in lora_b], max(b.shape[1] for b in lora_b)
    (m, k), n = x.shape, sum(sizes)
    coded = isinstance(weights[0], Coded)
    if not coded:
        plan = choose_plan(plan, x, weights[0], r, n=n)
        launch = "lora_expand" if plan == "split" else "lora_linear"
    fused, invariant = launch != "lora_expand", plan == "invariant" and s is None
    if invariant:
        x = whole_rows(x)
    own = shrunk = s
    if own is None or shrunk is None:
        own, shrunk = _shrunk(x, lora_a, seed, dropout_p, invariant)
    s_out = own if with_s and shrunk is not own else None
    ys = [empty(x, m, size) for size in sizes]
    config = config_of(launch, x, m, n, k, r, batch_invariant=invariant)
    written, splits = ys, config.splits
    if splits > 1:
        written = [empty(x, splits, m, size, dtype=torch.float32) for size in sizes]
    blocks = weights if fused else [None] * len(weights)
    modules = [*map(Module, written, lora_b, scalings, biases, blocks)]
    if fused:
        pdl = s is None and chip_of(x).has_pdl
        lora_linear.launch_lora_linear(modules, x, shrunk, s_out=s_out, config=config, pdl=pdl)
    else:
        lora_expand.launch_lora_expand(modules, shrunk, reads_y=False, s_out=s_out, config=config)
    if splits > 1:
        plane_sums.launch_plane_sums(ys, written, config=config_of("plane_sums", x))
    if not fused:
        for y, weight in zip(ys, weights, strict=True):
            product(_accumulate_, y, x, weight)
    return [*ys, own] if with_s else ys


def _accumulate_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Adds the base product."""
    return y.addmm_(x, weight.t())


def _are_alike(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    lora_a: _Tensors,
    lora_b: _Tensors,
    seeds: Sequence[torch.Tensor | None],
) -> bool:
    """Whether one launch takes all modules.

    Raises:
        TypeError: A weight has not the dtype of x.
    """
    matrices = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    for weight in matrices:
        if weight.dtype != x.dtype:
            raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    own = [bias for bias in biases if bias is not None]
    return (
        all(seed is None for seed in seeds)
        and all(t.is_contiguous() for t in (*matrices, *own, *lora_a, *lora_b))
        and are_of_a_kind(weights)
        and len(own) in (0, len(biases))
        and len({bias.dtype for bias in own}) < 2
        and len({a.dtype for a in lora_a}) == len({b.dtype for b in lora_b}) == 1
    )


@kept
def shrink_one(
    x: torch.Tensor, lora_a: _Tensors, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """Returns s ``[M, R]`` of siblings side by side: a shrink, and the sum of planes it made."""
    s, shrunk = _shrunk(x, lora_a, seed, dropout_p)
    if shrunk is not s:
        plane_sums.launch_plane_sums([s], [shrunk], config=config_of("plane_sums", x))
    return s


def _shrunk(
    x: torch.Tensor,
    lora_a: _Tensors,
    seed: torch.Tensor | None,
    dropout_p: float,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns s ``[M, R]`` of siblings side by side, and what a shrink wrote: it, or planes of it.

    What reads planes sums them, and writes s. From one to the next are M rows; in the mode a
    multiple of 16, as Triton would ask of it again.
    """
    (m, k), r = x.shape, sum(a.shape[0] for a in lora_a)
    config = config_of("lora_shrink", x, m, k=k, r=r, batch_invariant=batch_invariant)
    s = shrunk = empty(x, m, r)
    if config.splits > 1:
        rows = -(-m // 16) * 16 if batch_invariant else m
        shrunk = empty(x, config.splits, rows, r, dtype=torch.float32)[:, :m]
    lora_shrink.launch_lora_shrink(
        *(shrunk, x, lora_a), seed=seed, dropout_p=dropout_p, config=config
    )
    return s, shrunk


@kept
def expand_one_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    """Adds the adapter's term; one launch. Its dots are in y's dtype."""
    (m, n), r = y.shape, s.shape[1]
    config = config_of("lora_expand", y, m, n, r=r)
    lora_expand.launch_lora_expand([Module(y, lora_b, scaling)], s, reads_y=True, config=config)


def products_of_codes(
    x: torch.Tensor,
    weights: Sequence[Coded],
    biases: Sequence[torch.Tensor | None],
    launch: str = "coded_lora_linear",
) -> list[torch.Tensor]:
    """Returns the base product of each module, without an adapter: one launch, or two."""
    # An adapter of rank 0, of which nothing is read.
    none, ups = empty(x, x.shape[0], 0), [empty(x, weight.shape[0], 0) for weight in weights]
    scalings = [empty(x, 1, dtype=torch.float32)] * len(weights)
    return _linears(x, weights, biases, none, (), ups, scalings, with_s=False, launch=launch)


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x ``[M, K]`` contiguous, at a multiple of 16 bytes, and with those strides at M = 1.

    Triton compiles kernels of their own for other layouts, and a batch may come in any.
    """
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(-1).view(x.shape)


@kept
def dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Returns x ``[M, K]``, dropped."""
    (m, k), out = x.shape, empty(x, *x.shape)
    config = config_of("lora_dropout", x, m, k=k)
    lora_dropout.launch_lora_dropout(out, x, seed=seed, dropout_p=dropout_p, config=config)
    return out
