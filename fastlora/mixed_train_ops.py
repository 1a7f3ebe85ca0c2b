"""The registered operators of a mixed batch's forward in training: s is kept, dropout acts.

Adapters are their parameters, and shapes are those of `fastlora.mixed_grad_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora import mixed_grad_reference as eager
from fastlora.mixed_grad_tables import (
    Route,
    addresses_of,
    aligned_blocks,
    columns_of,
    dropout_tables,
    max_rank_of,
    ranks_of,
)
from fastlora.mixed_ops import _shrunk_shape
from fastlora.ops import _FUSED_MAX_ROWS, _LIBRARY, _implements, _on_device, _precision

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


def _shrink(
    x: torch.Tensor,
    route: Route,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    lora_a: list[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: list[float],
) -> tuple[torch.Tensor, bool]:
    """Returns s, and whether one launch made it."""
    from fastlora.kernels import configs, lora_shrink, mixed_grad_configs, mixed_lora_shrink

    (m, k), max_rank, device = x.shape, max_rank_of(lora_a), x.device
    blocks = aligned_blocks(lora_a)
    config = mixed_grad_configs.mixed_train_shrink_config(
        configs.chip_of(device), max_rank, x.dtype, input_precision=_precision(x.dtype)
    )
    splits = _shrunk_shape(m, k, 1, max_rank, False)[0]
    s = x.new_empty(m, columns_of(max_rank))
    planes = s.view(1, 1, *s.shape)
    if splits > 1:
        planes = x.new_empty(splits, 1, *s.shape, dtype=torch.float32)
    mixed_lora_shrink.launch_mixed_lora_shrink(
        planes,
        x,
        *route,
        pieces,
        addresses_of(blocks, device).unsqueeze(0),
        ranks_of(lora_a, device).unsqueeze(0),
        factor_dtype=lora_a[0].dtype,
        config=config,
        dropout=dropout_tables(slot_start, seeds, dropout_p),
    )
    if splits > 1:
        lora_shrink.launch_lora_shrink_reduce(s, planes[:, 0], config=config)
    return s, splits == 1


def _tables_b(
    lora_a: list[torch.Tensor],
    blocks_b: list[torch.Tensor | None],
    blocks_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Returns what linear and expand take of lora_b: addresses, ranks and scalings."""
    device = scaling.device
    biases = None
    if any(bias is not None for bias in blocks_bias):
        biases = addresses_of(blocks_bias, device)
    return addresses_of(blocks_b, device), biases, ranks_of(lora_a, device), scaling


def _expand(
    y: torch.Tensor,
    s: torch.Tensor,
    route: Route,
    tables: Any,
    factor_dtype: torch.dtype,
) -> None:
    from fastlora.kernels import configs, mixed_grad_configs, mixed_lora_expand

    config = mixed_grad_configs.mixed_grad_x_add_config(
        configs.chip_of(y.device), *y.shape, y.dtype, input_precision=_precision(y.dtype)
    )
    mixed_lora_expand.launch_mixed_lora_expand(
        y, s.unsqueeze(0), *route, *tables, factor_dtype=factor_dtype, config=config, by_column=True
    )


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
        y = F.linear(x, weight, bias)
        s = eager.shrink(x, order, slot_start, lora_a, seeds, dropout_p)
        eager.expand_(y, s, order, slot_start, lora_b, lora_bias, scaling)
        return y, s
    from fastlora.kernels import configs, mixed_grad_configs, mixed_lora_linear

    (m, n), route = (x.shape[0], weight.shape[0]), (order, segment_of, segment_slot)
    with _on_device(x):
        s, one_launch = _shrink(x, route, slot_start, pieces, lora_a, seeds, dropout_p)
        blocks_b, blocks_bias = aligned_blocks(lora_b), aligned_blocks(lora_bias)
        tables = _tables_b(lora_a, blocks_b, blocks_bias, scaling)
        if plan == "split" or (plan == "auto" and m > _FUSED_MAX_ROWS):
            y = F.linear(x, weight, bias)
            _expand(y, s, route, tables, lora_b[0].dtype)
            return y, s
        y, chip = x.new_empty(m, n), configs.chip_of(x.device)
        mixed_lora_linear.launch_mixed_lora_linear(
            y,
            x,
            weight,
            bias,
            s.unsqueeze(0),
            *route,
            *tables,
            factor_dtype=lora_b[0].dtype,
            config=mixed_grad_configs.mixed_grad_x_config(
                chip, m, n, x.dtype, input_precision=_precision(x.dtype)
            ),
            pdl=chip.has_pdl and one_launch,
            by_column=True,
        )
    return y, s


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
        blocks_b, blocks_bias = aligned_blocks(lora_b), aligned_blocks(lora_bias)
        _expand(y, s, route, _tables_b(lora_a, blocks_b, blocks_bias, scaling), lora_b[0].dtype)
    return y, s


@torch.library.register_fake("fastlora::mixed_lora_train_linear")
def _(x: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = columns_of(max_rank_of(arguments[6]))
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], columns)


@torch.library.register_fake("fastlora::mixed_lora_train_add")
def _(y: torch.Tensor, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = columns_of(max_rank_of(arguments[5]))
    return y.new_empty(y.shape), x.new_empty(x.shape[0], columns)
