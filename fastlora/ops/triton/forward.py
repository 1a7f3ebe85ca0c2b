"""Launches of a forward: shrink, linear and expand; dropout; DoRA's scales.

Where one slot has all rows, ``rows`` is empty and the kernels of one adapter run. Otherwise the
kernels for mixed batches read the factors behind addresses: those of a list, which is the
parameters themselves, or those of tables, which somebody else keeps. Both end in the same launches.

See `fastlora.ops.schema` for shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from fastlora.kernels import (
    lora_dropout,
    lora_expand,
    lora_linear,
    lora_shrink,
    mixed_dora_scale,
    mixed_lora_add,
    mixed_lora_expand,
    mixed_lora_linear,
    mixed_lora_shrink,
)
from fastlora.kernels.configs import FUSED_MAX_ROWS, KernelConfig
from fastlora.ops.factors import Tables
from fastlora.ops.layout import columns_of, max_rank, planes_shape, present
from fastlora.ops.plans import choose_plan
from fastlora.ops.triton.configs import chip_of, config_of
from fastlora.ops.triton.tables import (
    NO_DROP,
    Drop,
    RankRows,
    addresses_of,
    aligned_blocks,
    max_columns_of,
    ranks_of,
)

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_Factors = Sequence[torch.Tensor | None]


def launches(
    function: Callable[Concatenate[torch.Tensor, _Given], _Made],
) -> Callable[Concatenate[torch.Tensor, _Given], _Made]:
    """Makes a function launch on its first argument's device, which need not be the current one."""

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        if not x.is_cuda:
            return function(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return function(x, *args, **kwargs)

    return run


class Base(NamedTuple):
    """A base layer: weight ``[N, K]``, bias ``[N]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


# ------------------------------------------------------------------------------------ operators


@launches
def shrink(
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_a: _Factors,
    modules: int,
    drop: Drop,
) -> torch.Tensor:
    """Returns s: ``[M, R]`` of one slot's modules side by side, else ``[G, M, R]``."""
    if rows:
        return _shrink_listed(x, rows, lora_a, modules, drop)[0]
    downs = present(lora_a, 0)
    lora_a_of_all = downs[0]
    if len(downs) > 1:
        lora_a_of_all = torch.cat([down.to(x.dtype) for down in downs])
    return _shrink_one(x, lora_a_of_all, drop)


@launches
def linear(
    x: torch.Tensor,
    base: Base,
    rows: Sequence[torch.Tensor],
    s: torch.Tensor | None,
    factors: _Factors,
    scaling: torch.Tensor,
    drop: Drop,
    plan: str,
) -> list[torch.Tensor]:
    """Returns y, and s unless that was given; factors are three of each slot in turn."""
    if not rows:
        lora_a, lora_b, _ = factors
        if lora_a is None or lora_b is None:
            raise ValueError("one slot has all rows, and it has no factors")
        return _linear_one(x, base, s, lora_a, lora_b, scaling, drop, plan)
    ups, biases, own, after_shrink = present(factors[1::3], 1), factors[2::3], s, False
    if own is None:
        made, after_shrink = _shrink_listed(x, rows, factors[::3], 1, drop)
        own = made[0]
    (m, k), n, largest = x.shape, base.weight.shape[0], max(b.shape[1] for b in ups)
    rank_rows = len(ups) * largest
    plan = choose_plan(plan, x, base.weight, rank_rows, "mixed_lora_train_linear")
    if plan == "split":
        y = F.linear(x, *base)
        expand_(y, own, rows, ups, biases, scaling)
    else:
        up = RankRows.of_lora_b(ups, biases, scaling)
        config = config_of("mixed_lora_train_linear", x, m, n, k, largest)
        y = product_and_rank_rows(
            x, base, own.unsqueeze(0), rows, up, config=config, pdl=after_shrink
        )
    return [y, own] if s is None else [y]


@launches
def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_b: _Factors,
    lora_bias: _Factors,
    scaling: torch.Tensor,
) -> None:
    """Adds every row's adapter to y ``[M, N]``, for s ``[M, R]``."""
    ups = present(lora_b, 1)
    if not rows:
        _expand_one_(y, s, ups[0], scaling)
        return
    (m, n), largest = y.shape, max(b.shape[1] for b in ups)
    up = RankRows.of_lora_b(ups, lora_bias, scaling)
    config = config_of("mixed_lora_train_expand", y, m, n, r=largest)
    add_rank_rows_(y, s.unsqueeze(0), rows, up, config=config)


@launches
def shrink_at(
    x: torch.Tensor, rows: Sequence[torch.Tensor], tables: Tables, batch_invariant: bool
) -> torch.Tensor:
    """Returns planes of s, fp32 ``[splits, G, M, R]``."""
    (m, k), modules = x.shape, tables.rank.shape[0]
    shape = planes_shape(m, k, modules, tables.max_rank, batch_invariant)
    s = x.new_empty(shape, dtype=torch.float32)
    if batch_invariant:
        x = _whole_rows(x)
    rank_rows = modules * tables.max_rank
    config = config_of("mixed_lora_shrink", x, m, k=k, r=rank_rows, batch_invariant=batch_invariant)
    mixed_lora_shrink.launch_mixed_lora_shrink(
        *(s, x, *rows[:3], rows[4], tables.a_address, tables.rank),
        factor_dtype=tables.dtype,
        config=config,
    )
    return s


@launches
def linear_at(
    x: torch.Tensor,
    base: Base,
    rows: Sequence[torch.Tensor],
    s: torch.Tensor | None,
    tables: Tables,
    index: int,
    plan: str,
) -> torch.Tensor:
    """Returns y of one module: a shrink unless siblings made s; then linear, or GEMM and expand."""
    (m, k), n, r = x.shape, base.weight.shape[0], tables.max_rank
    rank_rows = tables.rank.shape[1] * r
    plan = choose_plan(plan, x, base.weight, rank_rows, "mixed_lora_linear")
    invariant = plan == "invariant"
    if invariant:
        x = _whole_rows(x)
    own = shrink_at(x, rows, _only(tables, index), invariant)[:, 0] if s is None else s[:, index]
    up = RankRows.of_tables(tables, index)
    if plan == "split":
        y = F.linear(x, *base)
        _expand_at_(y, own, rows, up)
        return y
    config = config_of("mixed_lora_linear", x, m, n, k, r, batch_invariant=invariant)
    # One kernel in the mode, whether siblings shared the shrink or not.
    pdl = s is None and not invariant
    return product_and_rank_rows(x, base, own, rows, up, config=config, pdl=pdl)


@launches
def add_at_(
    y: torch.Tensor, x: torch.Tensor, rows: Sequence[torch.Tensor], tables: Tables, index: int
) -> None:
    """Adds to y: one launch at decode sizes; two where every tile of N would make s anew."""
    up = RankRows.of_tables(tables, index)
    if x.shape[0] > FUSED_MAX_ROWS:
        s = shrink_at(x, rows, _only(tables, index), False)
        _expand_at_(y, s[:, 0], rows, up)
        return
    (m, k), n = x.shape, y.shape[1]
    mixed_lora_add.launch_mixed_lora_add(
        *(y, x, *rows[:3], rows[4], tables.a_address[index], *up[:4]),
        factor_dtype=tables.dtype,
        config=config_of("mixed_lora_add", x, m, n, k, tables.max_rank),
    )


@launches
def scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    address: torch.Tensor,
) -> None:
    """Scales DoRA's rows in one launch, whatever the batch."""
    mixed_dora_scale.launch_mixed_dora_scale(
        *(y, None if bias is None else bias.contiguous(), *rows[:3], rows[4], address),
        config=config_of("mixed_dora_scale", y, *y.shape),
    )


@launches
def dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Returns x ``[M, K]``, dropped."""
    (m, k), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = config_of("lora_dropout", x, m, k=k)
    lora_dropout.launch_lora_dropout(out, x, seed=seed, dropout_p=dropout_p, config=config)
    return out


# ------------------------------------------------------------------------------- one adapter


def _shrink_one(x: torch.Tensor, lora_a: torch.Tensor, drop: Drop) -> torch.Tensor:
    """Runs shrink, and its reduction where K was split."""
    (m, k), r = x.shape, lora_a.shape[0]
    config = config_of("lora_shrink", x, m, k=k, r=r)
    given = {"seed": drop.seeds, "dropout_p": drop.p[0], "config": config}
    s = x.new_empty(m, r)
    if config.splits == 1:
        lora_shrink.launch_lora_shrink(s, x, lora_a, **given)
        return s
    planes = x.new_empty(config.splits, m, r, dtype=torch.float32)
    lora_shrink.launch_lora_shrink(planes, x, lora_a, **given)
    lora_shrink.launch_lora_shrink_reduce(s, planes, config=config)
    return s


def _expand_one_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    (m, n), r = y.shape, s.shape[1]
    config = config_of("lora_expand", s, m, n, r=r)
    lora_expand.launch_lora_expand(y, s, lora_b, scaling, config=config)


def _linear_one(
    x: torch.Tensor,
    base: Base,
    s: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    drop: Drop,
    plan: str,
) -> list[torch.Tensor]:
    plan = choose_plan(plan, x, base.weight, lora_b.shape[1])
    own = s
    if own is None:
        if plan != "split":
            return _fused_one(x, base, lora_a, lora_b, scaling, drop, plan == "invariant")
        own = _shrink_one(x, lora_a, drop)
    if plan == "split":
        y = F.linear(x, *base)
        _expand_one_(y, own, lora_b, scaling)
    else:
        (m, k), (n, r) = x.shape, lora_b.shape
        y = x.new_empty(m, n)
        lora_linear.launch_lora_linear(
            *(y, x, base.weight, own, lora_b, scaling),
            bias=base.bias,
            s_out=None,
            config=config_of("lora_linear", x, m, n, k, r),
            pdl=False,
        )
    return [y, own] if s is None else [y]


def _fused_one(
    x: torch.Tensor,
    base: Base,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    drop: Drop,
    batch_invariant: bool,
) -> list[torch.Tensor]:
    """Two launches: shrink, then the base GEMM with the LoRA term in its epilogue.

    Where shrink splits K, its planes go straight into that epilogue, which sums them.
    """
    (m, k), (n, r) = x.shape, lora_b.shape
    # From one plane to the next; in the mode a multiple of 16, as Triton would ask of it again.
    plane_rows = m
    if batch_invariant:
        x, plane_rows = _whole_rows(x), -(-m // 16) * 16
    sizes = (m, n, k, r)
    shrink_config = config_of("lora_shrink", x, *sizes, batch_invariant=batch_invariant)
    linear_config = config_of("lora_linear", x, *sizes, batch_invariant=batch_invariant)
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    split = shrink_config.splits > 1
    shrunk = s
    if split:
        planes = x.new_empty(shrink_config.splits, plane_rows, r, dtype=torch.float32)
        shrunk = planes[:, :m]
    lora_shrink.launch_lora_shrink(
        *(shrunk, x, lora_a), seed=drop.seeds, dropout_p=drop.p[0], config=shrink_config
    )
    lora_linear.launch_lora_linear(
        *(y, x, base.weight, shrunk, lora_b, scaling),
        bias=base.bias,
        s_out=s if split else None,
        config=linear_config,
        pdl=chip_of(x).has_pdl,
    )
    return [y, s]


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x ``[M, K]`` contiguous, at a multiple of 16 bytes, and with those strides at M = 1.

    Triton compiles kernels of their own for other layouts, and a batch may come in any.
    """
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(-1).view(x.shape)


# ------------------------------------------------------------------------------- many adapters


def _only(tables: Tables, index: int) -> Tables:
    """Returns one module's tables for a shrink, ``[1, S]``."""
    only = slice(index, index + 1)
    return tables._replace(a_address=tables.a_address[only], rank=tables.rank[only])


def _shrink_listed(
    x: torch.Tensor, rows: Sequence[torch.Tensor], lora_a: _Factors, modules: int, drop: Drop
) -> tuple[torch.Tensor, bool]:
    """Returns s ``[G, M, R]``, and whether one launch made it. Dropout is that of one module."""
    downs = present(lora_a, 0)
    (m, k), largest, device = x.shape, max_rank(downs, 0), x.device
    blocks, slots = aligned_blocks(downs), len(downs) // modules
    columns = max_columns_of(downs, slots, modules)
    config = config_of("mixed_lora_train_shrink", x, m, k=k, r=columns)
    splits = planes_shape(m, k, modules, largest)[0]
    s = x.new_empty(modules, m, columns_of(largest))
    planes = s.unsqueeze(0)
    if splits > 1:
        planes = x.new_empty(splits, *s.shape, dtype=torch.float32)
    addresses, ranks = addresses_of(blocks, device), ranks_of(downs, device)
    mixed_lora_shrink.launch_mixed_lora_shrink(
        *(
            planes,
            x,
            *rows[:3],
            rows[4],
            addresses.view(modules, slots),
            ranks.view(modules, slots),
        ),
        factor_dtype=downs[0].dtype,
        config=config,
        dropout=drop.tables(rows[3]),
    )
    if splits > 1:
        lora_shrink.launch_lora_shrink_reduce(s.flatten(0, 1), planes.flatten(1, 2), config=config)
    return s, splits == 1


def _expand_at_(
    y: torch.Tensor, s: torch.Tensor, rows: Sequence[torch.Tensor], up: RankRows
) -> None:
    (m, n), r = y.shape, s.shape[-1]
    add_rank_rows_(y, s, rows, up, config=config_of("mixed_lora_expand", y, m, n, r=r))


def add_rank_rows_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    drop: Drop = NO_DROP,
) -> None:
    """Adds every row's rank rows to y ``[M, N]``, for s ``[splits, M, R]``; one launch."""
    mixed_lora_expand.launch_mixed_lora_expand(
        *(y, s, *rows[:3], *up[:4]),
        factor_dtype=up.dtype,
        config=config,
        by_column=up.by_column,
        dropout=drop.tables(rows[3]),
    )


def product_and_rank_rows(
    x: torch.Tensor,
    base: Base,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    drop: Drop = NO_DROP,
) -> torch.Tensor:
    """Returns the base's product with every row's rank rows in it, ``[M, N]``; one launch.

    ``pdl`` says that the launch before is the shrink that made s.
    """
    y = x.new_empty(x.shape[0], base.weight.shape[0])
    mixed_lora_linear.launch_mixed_lora_linear(
        *(y, x, *base, s, *rows[:3], *up[:4]),
        factor_dtype=up.dtype,
        config=config,
        pdl=pdl and chip_of(x).has_pdl,
        by_column=up.by_column,
        dropout=drop.tables(rows[3]),
    )
    return y
