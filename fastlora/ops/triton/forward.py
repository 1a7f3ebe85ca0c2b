"""The operators of a forward, which run the launches of one adapter or of many.

Where one slot has all rows, ``rows`` is empty and the kernels of one adapter run. Otherwise the
kernels for mixed batches read the factors behind addresses: those of a list, which is the
parameters themselves, or those of tables, which somebody else keeps. Both end in the same launches.

Arguments are those of the operators of `fastlora.ops.schema`, which finds operators here by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.kernels.modules import Weight
from fastlora.ops.factors import Factor, present
from fastlora.ops.triton import many_adapters, one_adapter
from fastlora.ops.triton.configs import config_of
from fastlora.ops.triton.tables import aligned_blocks, dropout_tables, up_rows

_Tensors = Sequence[torch.Tensor]
_Factors = Sequence[Factor]

dropout, siblings = one_adapter.dropout, one_adapter.siblings
linear_at, siblings_at = many_adapters.linear_at, many_adapters.siblings_at
add_at_, scale_ = many_adapters.add_at_, many_adapters.scale_


def shrink(
    x: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Returns s: ``[M, R]`` of one slot's modules side by side, else ``[G, M, R]``."""
    downs = present(lora_a, 0)
    if rows:
        drops = dropout_tables(seeds, dropout_p)
        return many_adapters.shrink_listed(x, rows, downs, modules, drops)[0]
    return one_adapter.shrink_one(x, downs, seeds, dropout_p[0])


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    plan: str,
) -> list[torch.Tensor]:
    """Returns y, and s unless that was given."""
    if not rows:
        lora_a, lora_b, _ = factors
        if lora_a is None or lora_b is None:
            raise ValueError("one slot has all rows, and it has no factors")
        tensors = weight, bias, s, lora_a, lora_b, scaling, seeds
        return one_adapter.linear_one(x, *tensors, dropout_p[0], plan)
    weights, biases, drops = [weight], [bias], dropout_tables(seeds, dropout_p)
    ups, lora_bias = aligned_blocks(present(factors[1::3], 1)), aligned_blocks(factors[2::3])
    up = up_rows(ups, lora_bias, scaling)
    stem, own, after_shrink = "mixed_lora_train", s, False
    plan, ys = many_adapters.base_products(stem, x, weights, biases, up, plan)
    if own is None:
        downs = present(factors[::3], 0)
        made, after_shrink = many_adapters.shrink_listed(x, rows, downs, 1, drops)
        own = made[0]
    planes = own.unsqueeze(0)
    ys = many_adapters.linears_mixed(
        stem, x, weights, biases, ys, planes, rows, up, plan, after_shrink
    )
    return [*ys, own] if s is None else ys


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    lora_b: _Factors,
    lora_bias: _Factors,
    scaling: torch.Tensor,
) -> None:
    """Adds every row's adapter to y ``[M, N]``, for s ``[M, R]``."""
    ups = present(lora_b, 1)
    if not rows:
        one_adapter.expand_one_(y, s, ups[0], scaling)
        return
    ups, biases = aligned_blocks(ups), aligned_blocks(lora_bias)
    up = up_rows(ups, biases, scaling)
    (m, n), r = y.shape, up.largest
    config = config_of("mixed_lora_train_expand", y, m, n, r=r)
    many_adapters.add_rank_rows_([y], s.unsqueeze(0), rows, up, config=config)
