"""A layer's gradients from its saved tensors, in Triton's operators or in PyTorch.

Shapes: ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``,
``s [M, R]``, ``scaling`` without dimensions or ``[R]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastlora.ops.schema  # noqa: F401  # registers the operators
from fastlora.ops.torch import products, reference


def keep_mask(
    x: torch.Tensor, seed: torch.Tensor, dropout_p: float, after: torch.Tensor | None
) -> torch.Tensor:
    """Returns the dropout mask of x; see `reference.lora_keep`. Compilers see an operator.

    ``after`` is a tensor of the backward that draws it, None in a forward.
    """
    if torch.compiler.is_compiling() or type(seed) is not torch.Tensor:
        return torch.ops.fastlora.lora_keep(x, seed, dropout_p, after)
    return reference.lora_keep(x, seed, dropout_p)


class Saved(NamedTuple):
    """What a backward finds: ``x [..., K]`` or None, the factors, the scaling, s, the seed."""

    x: Any  # a tensor; None, as s, where no gradient needs it
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    s: Any
    seed: torch.Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_a: bool
    lora_b: bool
    s: bool
    bias: bool = False


class Gradients(NamedTuple):
    """The results: ``dx [M, K]``, ``d_lora_a``, ``d_lora_b``, ``ds [M, R]``, ``d_bias [N]``."""

    dx: torch.Tensor | None = None
    d_lora_a: torch.Tensor | None = None
    d_lora_b: torch.Tensor | None = None
    ds: torch.Tensor | None = None
    d_bias: torch.Tensor | None = None


def layer_gradients(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    saved: Saved,
    needs: Needs,
    dropout_p: float,
    impl: str,
    plan: str,
) -> Gradients:
    """The gradients of a layer; of its LoRA term alone where ``weight`` is None.

    ``ds = scaling * dy @ lora_b``, and from it the rest. ``dy [M, N]`` in x's dtype.
    """
    compute = _triton_gradients if impl == "triton" else _eager_gradients
    return compute(dy, weight, saved, needs, dropout_p, plan)


def _triton_gradients(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    saved: Saved,
    needs: Needs,
    dropout_p: float,
    plan: str,
) -> Gradients:
    d_lora_a = d_lora_b = d_bias = dx = None
    lora_a, lora_b, seed = saved.lora_a, saved.lora_b, saved.seed
    if needs.lora_b:
        ds, d_lora_b, sums = torch.ops.fastlora.lora_grad_b(
            *(dy, saved.s, [], 0, [lora_b], [needs.bias], saved.scaling, True, "triton")
        )
        d_bias = sums if needs.bias else None
    else:
        ds = reference.lora_ds(dy, lora_b, saved.scaling)
        d_bias = dy.sum(0) if needs.bias else None
    if needs.lora_a:
        rows = saved.x.reshape(-1, saved.x.shape[-1])
        (d_lora_a,) = torch.ops.fastlora.lora_grad_a(
            rows, [ds], [], 0, [lora_a], seed, [dropout_p], "triton"
        )
    if needs.x:
        base = None if weight is None else weight.to(dy.dtype)
        dx = torch.ops.fastlora.lora_grad_x(
            dy, base, ds, [], [lora_a], seed, [dropout_p], "triton", plan
        )
    return Gradients(dx, d_lora_a, d_lora_b, ds, d_bias)


def _eager_gradients(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    saved: Saved,
    needs: Needs,
    dropout_p: float,
    plan: str,
) -> Gradients:
    """In PyTorch; s is made again where it was not saved, from the rows that d_lora_a reads."""
    d_lora_a = d_lora_b = dx = keep = None
    factor, dropped = reference.cast(saved.lora_a, dy.dtype), 1.0 / (1.0 - dropout_p)
    ds = reference.lora_ds(dy, saved.lora_b, saved.scaling)
    rows: Any = None if saved.x is None else saved.x.reshape(-1, saved.x.shape[-1])
    inner = ds
    if saved.seed is not None and (needs.x or rows is not None):
        like = dy.new_empty(dy.shape[0], factor.shape[1]) if rows is None else rows
        keep = keep_mask(like, saved.seed, dropout_p, after=ds)
        inner = ds * dropped
    if needs.x and keep is not None:
        # The base's share goes into the dropped update: one buffer of x's size less to make.
        dx = reference.drop_(products.mm(inner, factor), keep)
        if weight is not None:
            products.addmm_(dx, dy, reference.cast(weight, dy.dtype))
    elif needs.x:
        if weight is None:
            dx = products.mm(ds, factor)
        else:
            base = products.mm(dy, reference.cast(weight, dy.dtype))
            dx = products.addmm_(base, ds, factor)
    if rows is not None and keep is not None:
        rows = reference.select_(keep, rows)
    if needs.lora_a:
        d_lora_a = reference.cast(products.mm(inner.t(), rows), saved.lora_a.dtype)
    if needs.lora_b:
        s = saved.s
        if s is None:
            s = reference.lora_shrink(rows, factor)
            if keep is not None:
                s.mul_(dropped)
        d_lora_b = reference.lora_d_b(dy, s, saved.lora_b, saved.scaling)
    d_bias = dy.sum(0) if needs.bias else None
    return Gradients(dx, d_lora_a, d_lora_b, ds, d_bias)


def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor | None],
    dropouts: Sequence[float],
    impl: str,
) -> list[torch.Tensor]:
    """Returns the ``d_lora_a`` of siblings, from one read of x unless masks part them here."""
    if impl == "triton":
        all_seeds = None
        if any(seed is not None for seed in seeds):
            none = next(seed for seed in seeds if seed is not None)
            all_seeds = torch.cat([none if seed is None else seed for seed in seeds])
        return torch.ops.fastlora.lora_grad_a(x, ds, [], 0, lora_a, all_seeds, list(dropouts), impl)
    found: dict[int, torch.Tensor] = {}
    bare = [index for index, seed in enumerate(seeds) if seed is None]
    if len(bare) > 1:
        joined = products.mm(torch.cat([ds[index] for index in bare], dim=1).t(), x)
        parts = joined.split([ds[index].shape[1] for index in bare])
        # Memory of their own: a slice would keep its siblings' gradients alive.
        found = {
            index: part.to(lora_a[index].dtype, copy=True)
            for index, part in zip(bare, parts, strict=True)
        }
    for index, (gradient, seed, p) in enumerate(zip(ds, seeds, dropouts, strict=True)):
        if index in found:
            continue
        rows = x
        if seed is not None:
            rows = reference.select_(keep_mask(x, seed, p, after=gradient), x)
            gradient = gradient * (1.0 / (1.0 - p))
        found[index] = products.mm(gradient.t(), rows)
    return [reference.cast(found[index], a.dtype) for index, a in enumerate(lora_a)]
