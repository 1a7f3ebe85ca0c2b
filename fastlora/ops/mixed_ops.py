"""The registered operators for mixed batches: each row of x with its own adapter, over Triton.

Nothing here imports Triton before a kernel runs. Everything an operator needs to know about the mix
is a tensor on the device, so nothing waits for the host, launches and grids do not depend on the
mix, and a CUDA graph replays any.

Shapes everywhere, for a batch of M rows, S slots and G modules that share x (1 for one module):

    x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, y ``[M, N]``
    order, segment_of, segment_slot, pieces: int32, `Rows`; pieces is `pieces_of` it
    lora_a_address, lora_b_address, lora_bias_address: int64 ``[G, S]``, where blocks of factors lie
    in memory: lora_a ``[rank, K]``, lora_b as rank rows ``[rank, N]``, lora_bias ``[N]`` or 0, each
    at a multiple of 16 bytes and in ``factor_dtype``; lora_bias_address is None if none has one
    rank: int32 ``[G, S]``, 0 where an adapter leaves a module alone; scaling: fp32 ``[G, S]``
    s: fp32 ``[splits, G, M, R]``, the partial sums of ``x @ lora_a.T`` over sorted positions, R the
    largest rank there may be, ``max_rank``, rounded up to a multiple of 16

``index`` is the module's row of the tables and of s. Addresses are trusted: the memory behind them
must outlive the launch.

With ``batch_invariant``, and the plan "invariant", launches are those of the mode of that name:
`fastlora.batch_invariant`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.ops.plans import choose_plan
from fastlora.ops.rows import Rows
from fastlora.ops.schema import (
    _FUSED_MAX_ROWS,
    _LIBRARY,
    _implements,
    _on_device,
    _precision,
    _whole_rows,
)

# A split of K costs a plane of s. Four keep the shrink short enough to hide behind a base GEMM.
_MAX_SPLITS = 4
# Columns of K, and rows of all planes together, from which a split is worth a program.
_SPLIT_COLUMNS = 256
_PLANE_ROWS = 16384

# Order, segment_of, segment_slot; lora_b_address, lora_bias_address, rank, scaling of one module.
_Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Tables = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]

_ROUTE = "Tensor order, Tensor segment_of, Tensor segment_slot"
_TABLES_B = "Tensor lora_b_address, Tensor? lora_bias_address, Tensor rank, Tensor scaling"
_LIBRARY.define(
    f"mixed_lora_shrink(Tensor x, {_ROUTE}, Tensor pieces, Tensor lora_a_address, Tensor rank,"
    " int max_rank, ScalarType factor_dtype, bool batch_invariant=False) -> Tensor"
)
_LIBRARY.define(
    f"mixed_lora_linear(Tensor x, Tensor weight, Tensor? bias, {_ROUTE}, Tensor pieces, Tensor? s,"
    f" Tensor lora_a_address, {_TABLES_B}, int index, int max_rank, ScalarType factor_dtype,"
    " str plan) -> Tensor"
)
_LIBRARY.define(
    f"mixed_lora_expand_(Tensor(a!) y, Tensor s, {_ROUTE}, {_TABLES_B}, int index,"
    " ScalarType factor_dtype) -> ()"
)
_LIBRARY.define(
    f"mixed_lora_add_(Tensor(a!) y, Tensor x, {_ROUTE}, Tensor pieces, Tensor lora_a_address,"
    f" {_TABLES_B}, int index, int max_rank, ScalarType factor_dtype) -> ()"
)


def pieces_of(rows: Rows, batch_invariant: bool = False) -> torch.Tensor:
    """Returns the pieces that the operators take for these rows."""
    from fastlora.kernels.configs import piece_rows

    return rows.pieces(piece_rows(rows.m, batch_invariant))


def _shrunk_shape(
    m: int, k: int, modules: int, max_rank: int, batch_invariant: bool
) -> tuple[int, int, int, int]:
    """Returns the shape of s: splits of K, modules, rows, ranks; also of symbolic sizes.

    The splits depend on no chip and no mix, so that the fake knows them.
    """
    splits = torch.sym_min(k // _SPLIT_COLUMNS, _MAX_SPLITS)
    if not batch_invariant:
        splits = torch.sym_min(splits, -(-_PLANE_ROWS // torch.sym_max(m, 1)))
    return torch.sym_max(splits, 1), modules, m, -(-max_rank // 16) * 16


def _shrink(
    x: torch.Tensor,
    route: _Route,
    pieces: torch.Tensor,
    lora_a_address: torch.Tensor,
    rank: torch.Tensor,
    max_rank: int,
    factor_dtype: torch.dtype,
    batch_invariant: bool,
) -> torch.Tensor:
    from fastlora.kernels import chips, configs, mixed_lora_shrink

    (m, k), modules = x.shape, rank.shape[0]
    shape = _shrunk_shape(m, k, modules, max_rank, batch_invariant)
    s = x.new_empty(shape, dtype=torch.float32)
    if batch_invariant:
        x = _whole_rows(x)
    config = configs.choose(
        chips.chip_of(x.device),
        "mixed_lora_shrink",
        x.dtype,
        m=m,
        k=k,
        r=modules * max_rank,
        input_precision=_precision(x.dtype),
        batch_invariant=batch_invariant,
    )
    mixed_lora_shrink.launch_mixed_lora_shrink(
        s,
        x,
        *route,
        pieces,
        lora_a_address,
        rank,
        factor_dtype=factor_dtype,
        config=config,
    )
    return s


def _module_tables(
    index: int,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor,
) -> _Tables:
    lora_bias = None if lora_bias_address is None else lora_bias_address[index]
    return lora_b_address[index], lora_bias, rank[index], scaling[index]


def _expand(
    y: torch.Tensor,
    s: torch.Tensor,
    route: _Route,
    tables: _Tables,
    factor_dtype: torch.dtype,
) -> None:
    """Adds to y; s ``[splits, M, R]`` and the tables ``[S]`` are this module's own."""
    from fastlora.kernels import chips, configs, mixed_lora_expand

    config = configs.choose(
        chips.chip_of(y.device),
        "mixed_lora_expand",
        y.dtype,
        m=y.shape[0],
        n=y.shape[1],
        r=s.shape[-1],
        input_precision=_precision(y.dtype),
    )
    mixed_lora_expand.launch_mixed_lora_expand(
        y,
        s,
        *route,
        *tables,
        factor_dtype=factor_dtype,
        config=config,
    )


@_implements("mixed_lora_shrink")
def _mixed_lora_shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    lora_a_address: torch.Tensor,
    rank: torch.Tensor,
    max_rank: int,
    factor_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    with _on_device(x):
        route = (order, segment_of, segment_slot)
        return _shrink(
            x, route, pieces, lora_a_address, rank, max_rank, factor_dtype, batch_invariant
        )


@_implements("mixed_lora_linear")
def _mixed_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    s: torch.Tensor | None,
    lora_a_address: torch.Tensor,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
    plan: str,
) -> torch.Tensor:
    """y of one module: a shrink, unless siblings made s, then linear, or base GEMM and expand."""
    from fastlora.kernels import chips, configs, mixed_lora_linear

    (m, k), n, invariant = x.shape, weight.shape[0], plan == "invariant"
    route = (order, segment_of, segment_slot)
    tables = _module_tables(index, lora_b_address, lora_bias_address, rank, scaling)
    plan = choose_plan(plan, x, weight, rank.shape[1] * max_rank, "mixed_lora_linear")
    with _on_device(x):
        if invariant:
            x = _whole_rows(x)
        if s is None:
            only = slice(index, index + 1)
            tables_a = (lora_a_address[only], rank[only])
            made = _shrink(x, route, pieces, *tables_a, max_rank, factor_dtype, invariant)
            own = made[:, 0]
        else:
            own = s[:, index]
        if plan == "split":
            y = F.linear(x, weight, bias)
            _expand(y, own, route, tables, factor_dtype)
            return y
        y = x.new_empty(m, n)
        chip = chips.chip_of(x.device)
        config = configs.choose(
            chip,
            "mixed_lora_linear",
            x.dtype,
            m=m,
            n=n,
            k=k,
            r=max_rank,
            input_precision=_precision(x.dtype),
            batch_invariant=invariant,
        )
        mixed_lora_linear.launch_mixed_lora_linear(
            y,
            x,
            weight,
            bias,
            own,
            *route,
            *tables,
            factor_dtype=factor_dtype,
            config=config,
            # One kernel, whether siblings shared the shrink or not.
            pdl=chip.has_pdl and s is None and not invariant,
        )
    return y


@_implements("mixed_lora_expand_")
def _mixed_lora_expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor,
    index: int,
    factor_dtype: torch.dtype,
) -> None:
    tables = _module_tables(index, lora_b_address, lora_bias_address, rank, scaling)
    with _on_device(y):
        _expand(y, s[:, index], (order, segment_of, segment_slot), tables, factor_dtype)


@_implements("mixed_lora_add_")
def _mixed_lora_add_(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    lora_a_address: torch.Tensor,
    lora_b_address: torch.Tensor,
    lora_bias_address: torch.Tensor | None,
    rank: torch.Tensor,
    scaling: torch.Tensor,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> None:
    """One launch at decode sizes; beyond, where every tile of N would make s anew, two."""
    from fastlora.kernels import chips, configs, mixed_lora_add

    route = (order, segment_of, segment_slot)
    tables = _module_tables(index, lora_b_address, lora_bias_address, rank, scaling)
    with _on_device(x):
        if x.shape[0] > _FUSED_MAX_ROWS:
            only = slice(index, index + 1)
            tables_a = (lora_a_address[only], rank[only])
            s = _shrink(x, route, pieces, *tables_a, max_rank, factor_dtype, False)
            _expand(y, s[:, 0], route, tables, factor_dtype)
            return
        config = configs.choose(
            chips.chip_of(x.device),
            "mixed_lora_add",
            x.dtype,
            m=x.shape[0],
            n=y.shape[1],
            k=x.shape[1],
            r=max_rank,
            input_precision=_precision(x.dtype),
        )
        mixed_lora_add.launch_mixed_lora_add(
            y,
            x,
            *route,
            pieces,
            lora_a_address[index],
            *tables,
            factor_dtype=factor_dtype,
            config=config,
        )


@torch.library.register_fake("fastlora::mixed_lora_shrink")
def _(
    x: torch.Tensor,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    lora_a_address: torch.Tensor,
    rank: torch.Tensor,
    max_rank: int,
    factor_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    shape = _shrunk_shape(x.shape[0], x.shape[1], rank.shape[0], max_rank, batch_invariant)
    return x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("fastlora::mixed_lora_linear")
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fastlora::mixed_lora_expand_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("fastlora::mixed_lora_add_")
def _(*_: Any) -> None:
    return None
