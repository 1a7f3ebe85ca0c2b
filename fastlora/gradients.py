"""A layer's gradients from its saved tensors, in Triton's operators or in PyTorch.

Shapes: ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``,
``s [M, R]``, ``scaling`` without dimensions or ``[R]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastlora.grad_ops  # noqa: F401  # registers the operators of a backward
from fastlora import reference

# From here on a CPU forms the d_lora_a of siblings faster as one product in fp32, in 16 bits
# always: three of rank 16 over 512 rows of 576, one Xeon core, fp32 141 us apart and 147 joined,
# bf16 128 and 67; over 2,048 rows fp32 805 and 631, bf16 505 and 302.
_JOINED_ROWS = 1024


def keep_mask(x: torch.Tensor, seed: torch.Tensor, dropout_p: float, again: bool) -> torch.Tensor:
    """Returns the dropout mask of x; see `reference.lora_keep`. Compilers see an operator."""
    if torch.compiler.is_compiling() or type(seed) is not torch.Tensor:
        return torch.ops.fastlora.lora_keep(x, seed, dropout_p, again)
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
    d_lora_b = d_bias = None
    ds, pending_bias = None, needs.bias
    if needs.lora_b and impl == "triton":
        ds, d_lora_b, d_bias = torch.ops.fastlora.lora_grad_b(
            dy, saved.s, saved.lora_b, saved.scaling, needs.bias, impl
        )
        pending_bias = False
    elif needs.lora_b:
        ds, d_lora_b, _ = reference.lora_grad_b(dy, saved.s, saved.lora_b, saved.scaling)
    if pending_bias:
        d_bias = dy.sum(0)
    if not needs.x and not needs.lora_a and not needs.s:
        return Gradients(None, None, d_lora_b, None, d_bias)
    if ds is None:
        ds = (dy @ saved.lora_b.to(dy.dtype)).mul_(saved.scaling)
    if impl == "triton":
        dx, d_lora_a = _triton_from_ds(dy, ds, weight, saved, needs, dropout_p, plan)
    else:
        dx, d_lora_a = _eager_from_ds(dy, ds, weight, saved, needs, dropout_p)
    return Gradients(dx, d_lora_a, d_lora_b, ds, d_bias)


def _triton_from_ds(
    dy: torch.Tensor,
    ds: torch.Tensor,
    weight: torch.Tensor | None,
    saved: Saved,
    needs: Needs,
    dropout_p: float,
    plan: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    dx = d_lora_a = None
    lora_a, seed = saved.lora_a, saved.seed
    if needs.lora_a:
        (d_lora_a,) = torch.ops.fastlora.lora_grad_a(
            saved.x.reshape(-1, saved.x.shape[-1]), [ds], [lora_a], seed, [dropout_p], "triton"
        )
    if needs.x and weight is not None:
        dx = torch.ops.fastlora.lora_grad_x(
            dy, weight.to(dy.dtype), ds, lora_a, seed, dropout_p, "triton", plan
        )
    elif needs.x:
        dx = ds @ lora_a.to(dy.dtype)
        if seed is not None:
            dx = torch.ops.fastlora.lora_dropout(dx, seed, dropout_p, "triton")
    return dx, d_lora_a


def _eager_from_ds(
    dy: torch.Tensor,
    ds: torch.Tensor,
    weight: torch.Tensor | None,
    saved: Saved,
    needs: Needs,
    dropout_p: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    dx = d_lora_a = keep = None
    factor = saved.lora_a.to(dy.dtype)
    rows = None if saved.x is None else saved.x.reshape(-1, saved.x.shape[-1])
    if saved.seed is not None and (needs.x or needs.lora_a):
        like = dy.new_empty(dy.shape[0], factor.shape[1]) if rows is None else rows
        keep = keep_mask(like, saved.seed, dropout_p, again=True)
        ds = ds * (1.0 / (1.0 - dropout_p))
    if needs.x and keep is not None:
        # The base's share goes into the dropped update: one buffer of x's size less to make.
        dx = reference.drop_(ds @ factor, keep)
        if weight is not None:
            dx.addmm_(dy, weight.to(dy.dtype))
    elif needs.x:
        dx = ds @ factor if weight is None else dy @ weight.to(dy.dtype)
        if weight is not None:
            dx.addmm_(ds, factor)
    if needs.lora_a and rows is not None:
        if keep is not None:
            rows = reference.select_(keep, rows)
        d_lora_a = (ds.t() @ rows).to(saved.lora_a.dtype)
    return dx, d_lora_a


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
        return torch.ops.fastlora.lora_grad_a(x, ds, lora_a, all_seeds, list(dropouts), impl)
    found: dict[int, torch.Tensor] = {}
    bare = [index for index, seed in enumerate(seeds) if seed is None]
    if len(bare) > 1 and (x.itemsize == 2 or x.shape[0] >= _JOINED_ROWS):
        joined = torch.cat([ds[index] for index in bare], dim=1).t() @ x
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
            rows = reference.select_(keep_mask(x, seed, p, again=True), x)
            gradient = gradient * (1.0 / (1.0 - p))
        found[index] = gradient.t() @ rows
    return [found[index].to(a.dtype) for index, a in enumerate(lora_a)]
