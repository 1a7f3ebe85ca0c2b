"""The registered operators of training on mixed batches: every gradient.

As `fastlora.ops.mixed_ops`, except that adapters are their parameters: lists with an entry for each
slot, of rank 0 where an adapter leaves the module alone. Tables of their addresses, ranks and
offsets are made in the operator, go to the device without waiting for it, and are kept for the next
call with the same parameters; so a CUDA graph needs a warm-up run before its capture. Nothing
depends on the mix but what lies on the device.

Shapes, for a batch of M rows, S slots and G modules that share x:

    x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, y and dy ``[M, N]``, dx ``[M, K]``
    order, segment_of, segment_slot, slot_start, pieces: int32, of `Rows`
    lora_a ``[rank, K]``, lora_b ``[N, rank]``, lora_bias ``[N]`` or None: S each, of one dtype
    scaling: fp32 ``[S]``; seeds: int64 ``[S]`` on the device, or None; dropout_p: S numbers
    s and ds: ``[M, R]`` in x's dtype over sorted positions, R the largest rank rounded up to a
    multiple of 16; a row is written up to its adapter's rank

Gradients of a factor come as one buffer ``packed`` in the factors' dtype, which `split_grad_b` and
`split_grad_a` take apart; adapters without rows get zeros. ``pieces`` and ``rows`` of the backward
are those of `runs_b` and `runs_a`.

A row's dropout mask is a function of (its adapter's seed, its number among the adapter's rows,
column): `fastlora.kernels.philox` with kernels; ``impl="eager"`` draws its own.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops.mixed_grad_tables import (
    addresses_of,
    aligned_blocks,
    dropout_tables,
    layout,
    layout_b,
    max_columns_of,
    ranks_of,
    split_grad_a,
    split_grad_b,
    table,
)
from fastlora.ops.plans import choose_plan
from fastlora.ops.schema import _LIBRARY, _implements, _on_device, _precision
from fastlora.ops.torch import mixed_grad_reference as eager
from fastlora.ops.torch import products

_ROUTE = "Tensor order, Tensor segment_of, Tensor segment_slot, Tensor slot_start"
_DROPOUT = "Tensor? seeds, float[] dropout_p"
_LIBRARY.define(
    f"mixed_lora_grad_b(Tensor dy, Tensor s, {_ROUTE}, Tensor pieces, SymInt rows, Tensor[] lora_b,"
    " bool[] with_bias, Tensor scaling, bool with_factors, str impl) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"mixed_lora_grad_x(Tensor dy, Tensor? weight, Tensor ds, {_ROUTE}, Tensor[] lora_a,"
    f" {_DROPOUT}, str impl, str plan) -> Tensor"
)
_LIBRARY.define(
    f"mixed_lora_grad_a(Tensor x, Tensor ds, {_ROUTE}, Tensor pieces, SymInt rows, Tensor[] lora_a,"
    f" {_DROPOUT}, str impl) -> Tensor"
)


@_implements("mixed_lora_grad_b")
def _mixed_lora_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    rows: int,
    lora_b: list[torch.Tensor],
    with_bias: list[bool],
    scaling: torch.Tensor,
    with_factors: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds, and the gradients of lora_b and lora_bias (none of them without ``with_factors``)."""
    offsets, bias_offsets, end = layout_b(lora_b, with_bias)
    packed = lora_b[0].new_empty(end if with_factors else 0)
    if impl != "triton":
        ds = torch.zeros_like(s)
        parts = split_grad_b(packed, lora_b, with_bias) if with_factors else None
        eager.grad_b(dy, s, ds, parts, order, slot_start, lora_b, scaling)
        return ds, packed
    from fastlora.kernels import chips, configs, mixed_lora_grad_b
    from fastlora.kernels import mixed_lora_grad_reduce as reduce

    (m, n), max_rank, device = dy.shape, s.shape[1], dy.device
    ds, biased = torch.empty_like(s), with_factors and any(with_bias)
    with _on_device(dy):
        chip, precision = chips.chip_of(device), _precision(dy.dtype)
        config = configs.choose(
            chip, "mixed_lora_grad_b", dy.dtype, r=max_rank, input_precision=precision
        )
        count = configs.cdiv(m, rows) + len(lora_b)
        planes = [
            dy.new_empty(shape, dtype=torch.float32) if wanted else None
            for wanted, shape in (
                (True, (configs.cdiv(n, config.block_n), *s.shape)),
                (with_factors, (count, n, max_rank)),
                (biased, (count, n)),
            )
        ]
        rank = table(tuple(b.shape[1] for b in lora_b), torch.int32, device)
        blocks = aligned_blocks(lora_b)
        mixed_lora_grad_b.launch_mixed_lora_grad_b(
            *planes,
            dy,
            s,
            order,
            segment_of,
            segment_slot,
            pieces,
            addresses_of(blocks, device),
            rank,
            rows=rows,
            max_rank=max(1, *(b.shape[1] for b in lora_b)),
            factor_dtype=lora_b[0].dtype,
            config=config,
        )
        ds_planes, b_planes, bias_planes = planes
        reduce.launch_mixed_lora_grad_reduce(
            packed if with_factors else None,
            None if b_planes is None else b_planes.transpose(1, 2).unsqueeze(1),
            slot_start,
            rank.unsqueeze(0),
            scaling.unsqueeze(0),
            table(tuple(offsets), torch.int64, device).unsqueeze(0),
            m=m,
            columns=n,
            rows=rows,
            by_column=True,
            config=configs.choose(chip, "mixed_lora_grad_reduce", dy.dtype),
            bias_planes=bias_planes,
            bias_offset=table(tuple(bias_offsets), torch.int64, device).unsqueeze(0),
            ds=reduce.DsPlanes(ds, ds_planes, segment_of, segment_slot),
        )
    return ds, packed


@_implements("mixed_lora_grad_x")
def _mixed_lora_grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    lora_a: list[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
    plan: str,
) -> torch.Tensor:
    """dx of one module; without a weight that of the adapters' term alone."""
    (m, n), k, device = dy.shape, lora_a[0].shape[1], dy.device
    max_rank = max(a.shape[0] for a in lora_a)
    fused = False
    if weight is not None and impl == "triton":
        rank_rows = len(lora_a) * max_rank
        fused = choose_plan(plan, dy, weight, rank_rows, "mixed_lora_grad_x") == "fused"
    if weight is None:
        dx = dy.new_zeros(m, k)
    else:
        dx = dy.new_empty(m, k) if fused else products.mm(dy, weight)
    if impl != "triton":
        eager.grad_x_(dx, ds, order, slot_start, lora_a, seeds, dropout_p)
        return dx
    from fastlora.kernels import chips, configs, mixed_lora_expand, mixed_lora_linear

    chip = chips.chip_of(device)
    sizes: dict[str, Any] = {"m": m, "n": n, "k": k, "r": max_rank}
    sizes["input_precision"] = _precision(dy.dtype)
    with _on_device(dy):
        blocks = aligned_blocks(lora_a)
        given: dict[str, Any] = {
            "factor_dtype": lora_a[0].dtype,
            "dropout": dropout_tables(slot_start, seeds, dropout_p),
        }
        route = (order, segment_of, segment_slot)
        tables = (addresses_of(blocks, device), None, ranks_of(lora_a, device), None)
        if fused and weight is not None:
            config = configs.choose(chip, "mixed_lora_grad_x", dy.dtype, **sizes)
            mixed_lora_linear.launch_mixed_lora_linear(
                dx,
                dy,
                weight.t(),
                None,
                ds.unsqueeze(0),
                *route,
                *tables,
                config=config,
                pdl=False,
                **given,
            )
        else:
            config = configs.choose(chip, "mixed_lora_grad_x_add", dy.dtype, **sizes)
            mixed_lora_expand.launch_mixed_lora_expand(
                dx, ds.unsqueeze(0), *route, *tables, config=config, **given
            )
    return dx


@_implements("mixed_lora_grad_a")
def _mixed_lora_grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    slot_start: torch.Tensor,
    pieces: torch.Tensor,
    rows: int,
    lora_a: list[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
) -> torch.Tensor:
    """The gradients of lora_a of G modules: ds ``[G, M, R]``, a module's slots side by side.

    ``seeds`` are ``[G, S]`` here. One read of x serves all modules, except under dropout: then each
    has a mask, and a launch, of its own.
    """
    offsets, end = layout([a.numel() for a in lora_a], lora_a[0].itemsize)
    packed = lora_a[0].new_empty(end)
    modules, slots = ds.shape[0], len(lora_a) // ds.shape[0]
    if impl != "triton":
        eager.grad_a(x, ds, split_grad_a(packed, lora_a), order, slot_start, seeds, dropout_p)
        return packed
    from fastlora.kernels import chips, configs, mixed_lora_grad_a
    from fastlora.kernels import mixed_lora_grad_reduce as reduce

    (m, k), device = x.shape, x.device
    with _on_device(x):
        rank = ranks_of(lora_a, device).view(modules, slots)
        count = configs.cdiv(m, rows) + slots
        planes = x.new_empty(count, modules, ds.shape[2], k, dtype=torch.float32)
        each = 1 if seeds is not None else modules
        columns = max_columns_of(lora_a, slots, each)
        chip, precision = chips.chip_of(device), _precision(x.dtype)
        config = configs.choose(
            chip, "mixed_lora_grad_a", x.dtype, r=columns, input_precision=precision
        )
        for first in range(0, modules, each):
            some = slice(first, first + each)
            own_p = dropout_p[first * slots : (first + each) * slots]
            mixed_lora_grad_a.launch_mixed_lora_grad_a(
                planes[:, some],
                x,
                ds[some],
                order,
                segment_of,
                segment_slot,
                pieces,
                rank[some],
                rows=rows,
                max_columns=columns,
                config=config,
                dropout=dropout_tables(slot_start, None if seeds is None else seeds[first], own_p),
            )
        reduce.launch_mixed_lora_grad_reduce(
            packed,
            planes,
            slot_start,
            rank,
            None,
            table(tuple(offsets), torch.int64, device).view(modules, slots),
            m=m,
            columns=k,
            rows=rows,
            by_column=False,
            config=configs.choose(chip, "mixed_lora_grad_reduce", x.dtype),
        )
    return packed


@torch.library.register_fake("fastlora::mixed_lora_grad_b")
def _(dy: torch.Tensor, s: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lora_b, with_bias, _, with_factors, _ = arguments[6:]
    _, _, end = layout_b(lora_b, with_bias)
    return torch.empty_like(s), lora_b[0].new_empty(end if with_factors else 0)


@torch.library.register_fake("fastlora::mixed_lora_grad_x")
def _(dy: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], arguments[6][0].shape[1])


@torch.library.register_fake("fastlora::mixed_lora_grad_a")
def _(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    lora_a = arguments[7]
    _, end = layout([a.numel() for a in lora_a], lora_a[0].itemsize)
    return lora_a[0].new_empty(end)
