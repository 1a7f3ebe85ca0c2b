"""The registered operators of a mixed batch's forward in training: s is kept, dropout acts.

Adapters are their parameters, and shapes are those of `fastlora.ops.mixed_grad_ops`. A module
shrinks for itself, or takes the s that `mixed_lora_train_shrink` made for all modules that share x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.ops.mixed_grad_tables import (
    Route,
    addresses_of,
    aligned_blocks,
    columns_of,
    dropout_tables,
    max_columns_of,
    max_rank_of,
    ranks_of,
    table,
)
from fastlora.ops.mixed_ops import _shrunk_shape
from fastlora.ops.plans import choose_plan
from fastlora.ops.schema import _LIBRARY, _implements, _on_device, _precision
from fastlora.ops.torch import mixed_grad_reference as eager
from fastlora.ops.torch import products

_ROUTE = "Tensor order, Tensor segment_of, Tensor segment_slot, Tensor slot_start"
_DROPOUT = "Tensor? seeds, float[] dropout_p"
_FACTORS = f"Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_bias, Tensor scaling, {_DROPOUT}"
_LIBRARY.define(
    f"mixed_lora_train_linear(Tensor x, Tensor weight, Tensor? bias, {_ROUTE}, Tensor pieces,"
    f" {_FACTORS}, str impl, str plan) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"mixed_lora_train_add(Tensor y, Tensor x, {_ROUTE}, Tensor pieces, {_FACTORS}, str impl)"
    " -> (Tensor, Tensor)"
)
_FACTORS_B = "Tensor[] lora_b, Tensor?[] lora_bias, Tensor scaling"
_LIBRARY.define(
    f"mixed_lora_train_shrink(Tensor x, {_ROUTE}, Tensor pieces, Tensor[] lora_a, int modules,"
    " str impl) -> Tensor"
)
_LIBRARY.define(
    f"mixed_lora_train_linear_of(Tensor x, Tensor weight, Tensor? bias, {_ROUTE}, Tensor s,"
    f" {_FACTORS_B}, str impl, str plan) -> Tensor"
)
_LIBRARY.define(
    f"mixed_lora_train_add_of(Tensor y, {_ROUTE}, Tensor s, {_FACTORS_B}, str impl) -> Tensor"
)


def _shrink(
    x: torch.Tensor,
    route: Route,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    lora_a: list[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    modules: int = 1,
) -> tuple[torch.Tensor, bool]:
    """Returns s ``[G, M, R]`` of so many modules, and whether one launch made it.

    Dropout is that of the one module, ``G = 1``.
    """
    from fastlora.kernels import chips, configs, lora_shrink, mixed_lora_shrink

    (m, k), max_rank, device = x.shape, max_rank_of(lora_a), x.device
    blocks, slots = aligned_blocks(lora_a), len(lora_a) // modules
    config = configs.choose(
        chips.chip_of(device),
        "mixed_lora_train_shrink",
        x.dtype,
        m=m,
        k=k,
        r=max_columns_of(lora_a, slots, modules),
        input_precision=_precision(x.dtype),
    )
    splits = _shrunk_shape(m, k, modules, max_rank, False)[0]
    s = x.new_empty(modules, m, columns_of(max_rank))
    planes = s.unsqueeze(0)
    if splits > 1:
        planes = x.new_empty(splits, *s.shape, dtype=torch.float32)
    mixed_lora_shrink.launch_mixed_lora_shrink(
        planes,
        x,
        *route,
        pieces,
        addresses_of(blocks, device).view(modules, slots),
        ranks_of(lora_a, device).view(modules, slots),
        factor_dtype=lora_a[0].dtype,
        config=config,
        dropout=dropout_tables(slot_start, seeds, dropout_p),
    )
    if splits > 1:
        lora_shrink.launch_lora_shrink_reduce(s.flatten(0, 1), planes.flatten(1, 2), config=config)
    return s, splits == 1


def _tables_b(
    lora_b: list[torch.Tensor],
    blocks_b: list[torch.Tensor | None],
    blocks_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Returns what linear and expand take of lora_b: addresses, ranks and scalings."""
    device = scaling.device
    biases = None
    if any(bias is not None for bias in blocks_bias):
        biases = addresses_of(blocks_bias, device)
    ranks = table(tuple(b.shape[1] for b in lora_b), torch.int32, device)
    return addresses_of(blocks_b, device), biases, ranks, scaling


def _expand(
    y: torch.Tensor,
    s: torch.Tensor,
    route: Route,
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
) -> None:
    """Adds every row's own adapter to y ``[M, N]``, for s ``[M, R]``."""
    from fastlora.kernels import chips, configs, mixed_lora_expand

    blocks_b, blocks_bias = aligned_blocks(lora_b), aligned_blocks(lora_bias)
    config = configs.choose(
        chips.chip_of(y.device),
        "mixed_lora_train_expand",
        y.dtype,
        m=y.shape[0],
        n=y.shape[1],
        r=max(b.shape[1] for b in lora_b),
        input_precision=_precision(y.dtype),
    )
    mixed_lora_expand.launch_mixed_lora_expand(
        y,
        s.unsqueeze(0),
        *route,
        *_tables_b(lora_b, blocks_b, blocks_bias, scaling),
        factor_dtype=lora_b[0].dtype,
        config=config,
        by_column=True,
    )


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    route: Route,
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    plan: str,
    after_shrink: bool,
) -> torch.Tensor:
    """Returns y for s ``[M, R]``: linear, or base GEMM and expand.

    ``after_shrink`` says that the launch before is the shrink that made s.
    """
    from fastlora.kernels import chips, configs, mixed_lora_linear

    (m, k), n, max_rank = x.shape, weight.shape[0], max(b.shape[1] for b in lora_b)
    rank_rows = len(lora_b) * max_rank
    if choose_plan(plan, x, weight, rank_rows, "mixed_lora_train_linear") == "split":
        y = F.linear(x, weight, bias)
        _expand(y, s, route, lora_b, lora_bias, scaling)
        return y
    blocks_b, blocks_bias = aligned_blocks(lora_b), aligned_blocks(lora_bias)
    y, chip = x.new_empty(m, n), chips.chip_of(x.device)
    mixed_lora_linear.launch_mixed_lora_linear(
        y,
        x,
        weight,
        bias,
        s.unsqueeze(0),
        *route,
        *_tables_b(lora_b, blocks_b, blocks_bias, scaling),
        factor_dtype=lora_b[0].dtype,
        config=configs.choose(
            chip,
            "mixed_lora_train_linear",
            x.dtype,
            m=m,
            n=n,
            k=k,
            r=max_rank,
            input_precision=_precision(x.dtype),
        ),
        pdl=chip.has_pdl and after_shrink,
        by_column=True,
    )
    return y


@_implements("mixed_lora_train_shrink")
def _mixed_lora_train_shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    lora_a: list[torch.Tensor],
    modules: int,
    impl: str,
) -> torch.Tensor:
    """s ``[G, M, R]`` of G modules without dropout, from one read of x; R is the same for all.

    A module's slots stand side by side in ``lora_a``.
    """
    slots = len(lora_a) // modules
    if impl != "triton":
        s = x.new_zeros(modules, x.shape[0], columns_of(max_rank_of(lora_a)))
        for g in range(modules):
            own = lora_a[g * slots : (g + 1) * slots]
            made = eager.shrink(x, order, slot_start, own, None, [0.0] * slots)
            s[g, :, : made.shape[1]] = made
        return s
    with _on_device(x):
        route = (order, segment_of, segment_slot)
        return _shrink(x, route, slot_start, pieces, lora_a, None, [0.0] * slots, modules)[0]


@_implements("mixed_lora_train_linear")
def _mixed_lora_train_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and s of one module: a shrink, then linear, or base GEMM and expand."""
    if impl != "triton":
        y = products.linear(x, weight, bias)
        s = eager.shrink(x, order, slot_start, lora_a, seeds, dropout_p)
        eager.expand_(y, s, order, slot_start, lora_b, lora_bias, scaling)
        return y, s
    route = (order, segment_of, segment_slot)
    with _on_device(x):
        s, one_launch = _shrink(x, route, slot_start, pieces, lora_a, seeds, dropout_p)
        factors = (lora_b, lora_bias, scaling)
        y = _linear(x, weight, bias, s[0], route, *factors, plan, one_launch)
    return y, s.squeeze(0)


@_implements("mixed_lora_train_linear_of")
def _mixed_lora_train_linear_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    s: torch.Tensor,
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    impl: str,
    plan: str,
) -> torch.Tensor:
    """y of one module for its s ``[M, R]``, R no smaller than any of its ranks."""
    factors = (lora_b, lora_bias, scaling)
    if impl != "triton":
        y = products.linear(x, weight, bias)
        eager.expand_(y, s, order, slot_start, *factors)
        return y
    with _on_device(x):
        route = (order, segment_of, segment_slot)
        return _linear(x, weight, bias, s, route, *factors, plan, False)


@_implements("mixed_lora_train_add")
def _mixed_lora_train_add(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = y.clone(memory_format=torch.contiguous_format)
    if impl != "triton":
        s = eager.shrink(x, order, slot_start, lora_a, seeds, dropout_p)
        eager.expand_(y, s, order, slot_start, lora_b, lora_bias, scaling)
        return y, s
    route = (order, segment_of, segment_slot)
    with _on_device(x):
        s, _ = _shrink(x, route, slot_start, pieces, lora_a, seeds, dropout_p)
        _expand(y, s[0], route, lora_b, lora_bias, scaling)
    return y, s.squeeze(0)


@_implements("mixed_lora_train_add_of")
def _mixed_lora_train_add_of(
    y: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    s: torch.Tensor,
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    impl: str,
) -> torch.Tensor:
    y = y.clone(memory_format=torch.contiguous_format)
    if impl != "triton":
        eager.expand_(y, s, order, slot_start, lora_b, lora_bias, scaling)
        return y
    with _on_device(y):
        _expand(y, s, (order, segment_of, segment_slot), lora_b, lora_bias, scaling)
    return y


@torch.library.register_fake("fastlora::mixed_lora_train_shrink")
def _(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    lora_a, modules, _ = arguments[5:]
    return x.new_empty(modules, x.shape[0], columns_of(max_rank_of(lora_a)))


@torch.library.register_fake("fastlora::mixed_lora_train_linear_of")
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fastlora::mixed_lora_train_add_of")
def _(y: torch.Tensor, *_: Any) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake("fastlora::mixed_lora_train_linear")
def _(x: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = columns_of(max_rank_of(arguments[6]))
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], columns)


@torch.library.register_fake("fastlora::mixed_lora_train_add")
def _(y: torch.Tensor, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = columns_of(max_rank_of(arguments[5]))
    return y.new_empty(y.shape), x.new_empty(x.shape[0], columns)
