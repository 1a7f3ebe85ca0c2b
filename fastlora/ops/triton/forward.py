"""Launches of a forward: shrink, linear and expand; dropout; DoRA's scales.

Where one slot has all rows, ``rows`` is empty and the kernels of one adapter run. Otherwise the
kernels for mixed batches read the factors behind addresses: those of a list, which is the
parameters themselves, or those of tables, which somebody else keeps. Both end in the same launches.

Arguments are those of the operators of `fastlora.ops.schema`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.kernels import (
    lora_dropout,
    lora_expand,
    lora_linear,
    lora_shrink,
    mixed_dora_scale,
    mixed_lora_expand,
    mixed_lora_linear,
    mixed_lora_shrink,
    plane_sums,
)
from fastlora.kernels.configs import KernelConfig
from fastlora.kernels.launch import empty, kept, product
from fastlora.kernels.modules import Module
from fastlora.ops.factors import Factor, Tables, present, tables_of
from fastlora.ops.layout import columns_of, planes_shape
from fastlora.ops.plans import choose_plan
from fastlora.ops.triton.configs import chip_of, config_of
from fastlora.ops.triton.tables import NO_DROP, Drop, RankRows, max_columns_of

_Tensors = Sequence[torch.Tensor]
_Factors = Sequence[Factor]


class Weights(NamedTuple):
    """Of a base layer: weight ``[N, K]``, bias ``[N]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


# ------------------------------------------------------------------------------------ operators


def shrink(
    x: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Returns s: ``[M, R]`` of one slot's modules side by side, else ``[G, M, R]``."""
    drop, downs = Drop(seeds, dropout_p), present(lora_a, 0)
    if rows:
        return _shrink_listed(x, rows, downs, modules, drop)[0]
    return _shrink_one(x, downs, seeds, dropout_p[0])


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
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
        return _linear_one(x, *tensors, dropout_p[0], plan)
    base, drop = Weights(weight, bias), Drop(seeds, dropout_p)
    up = RankRows.of_lora_b(present(factors[1::3], 1), factors[2::3], scaling)
    stem, own, after_shrink = "mixed_lora_train", s, False
    plan, y = _base_product(stem, x, base, up, plan)
    if own is None:
        made, after_shrink = _shrink_listed(x, rows, present(factors[::3], 0), 1, drop)
        own = made[0]
    y = _linear_mixed(stem, x, base, y, own.unsqueeze(0), rows, up, plan, after_shrink)
    return [y, own] if s is None else [y]


@kept
def siblings(
    x: torch.Tensor, dropout_p: tuple[float, ...], with_s: bool, *operands: torch.Tensor | None
) -> list[torch.Tensor]:
    """Returns what `fastlora.ops.backend.Backend.siblings` does.

    Two launches: a shrink, and a linear or an expand, on which the library's products accumulate;
    one more where the linear splits K. Under dropout, or in another layout than a kernel takes
    beside others, each module has its own.
    """
    count: int = len(dropout_p)
    each: Any = [operands[i : i + count] for i in range(0, 6 * count, count)]
    weights, biases, lora_a, lora_b, scalings, seeds = each
    if not _are_alike(x, weights, biases, lora_a, lora_b, seeds):
        made = [
            _linear_one(x, weight, bias, None, *own, "auto")
            for weight, bias, *own in zip(*each, dropout_p, strict=True)
        ]
        return [y for y, _ in made] + ([s for _, s in made] if with_s else [])
    sizes, r = [b.shape[0] for b in lora_b], max(b.shape[1] for b in lora_b)
    (m, k), n = x.shape, sum(sizes)
    fused = choose_plan("auto", x, weights[0], r, n=n) != "split"
    s, shrunk = _shrunk(x, lora_a, None, 0.0)
    s_out = s if with_s and shrunk is not s else None
    ys = [empty(x, m, size) for size in sizes]
    config = config_of("lora_linear" if fused else "lora_expand", x, m, n, k, r)
    written, splits = ys, config.splits
    if splits > 1:
        written = [empty(x, splits, m, size, dtype=torch.float32) for size in sizes]
    blocks = weights if fused else [None] * len(weights)
    modules = [*map(Module, written, lora_b, scalings, biases, blocks)]
    if fused:
        pdl = chip_of(x).has_pdl
        lora_linear.launch_lora_linear(modules, x, shrunk, s_out=s_out, config=config, pdl=pdl)
    else:
        lora_expand.launch_lora_expand(modules, shrunk, reads_y=False, s_out=s_out, config=config)
    if splits > 1:
        plane_sums.launch_plane_sums(ys, written, config=config_of("plane_sums", x))
    if not fused:
        for y, weight in zip(ys, weights, strict=True):
            product(_accumulate_, y, x, weight)
    return [*ys, s] if with_s else ys


def _are_alike(
    x: torch.Tensor,
    weights: _Tensors,
    biases: Sequence[torch.Tensor | None],
    lora_a: _Tensors,
    lora_b: _Tensors,
    seeds: Sequence[torch.Tensor | None],
) -> bool:
    """Whether one launch takes all modules.

    Raises:
        TypeError: A weight has not the dtype of x.
    """
    for weight in weights:
        if weight.dtype != x.dtype:
            raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    own = [bias for bias in biases if bias is not None]
    return (
        all(seed is None for seed in seeds)
        and all(t.is_contiguous() for t in (*weights, *own, *lora_a, *lora_b))
        and len(own) in (0, len(biases))
        and len({bias.dtype for bias in own}) < 2
        and len({a.dtype for a in lora_a}) == len({b.dtype for b in lora_b}) == 1
    )


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
        _expand_one_(y, s, ups[0], scaling)
        return
    up = RankRows.of_lora_b(ups, lora_bias, scaling)
    (m, n), r = y.shape, up.largest
    config = config_of("mixed_lora_train_expand", y, m, n, r=r)
    add_rank_rows_(y, s.unsqueeze(0), rows, up, config=config)


@kept
def linear_at(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
    plan: str,
    siblings: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Returns y of one module, and its siblings' s if it is the first of them."""
    found = tables_of(tables, max_rank, factor_dtype)
    first, stop = siblings or (index, index + 1)
    invariant = plan == "invariant"
    if invariant:
        x = _whole_rows(x)
    up, base = RankRows.of_tables(found, index), Weights(weight, bias)
    plan, y = _base_product("mixed_lora", x, base, up, plan)
    planes = shrink_at(x, rows, found, slice(first, stop), invariant) if s is None else s
    # One kernel in the mode, whether siblings shared the shrink or not.
    after_shrink = s is None and not invariant
    own = planes[:, index - first]
    y = _linear_mixed("mixed_lora", x, base, y, own, rows, up, plan, after_shrink)
    return [y] if s is not None or siblings is None else [y, planes]


@kept
def siblings_at(
    x: torch.Tensor,
    weights: _Tensors,
    biases: Sequence[torch.Tensor | None],
    rows: _Tensors,
    tables: _Tensors,
    first: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Returns y of 2 to 4 modules that are fed by the same x, neighbours in the tables.

    Two launches: a shrink, and a linear. Or, where many adapters may share a row tile, the
    library's products, a shrink, and an expand.
    """
    found, launch = tables_of(tables, max_rank, factor_dtype), "mixed_lora_linear"
    own = slice(first, first + len(weights))
    (m, k), n, slots = x.shape, sum(weight.shape[0] for weight in weights), found.rank.shape[1]
    fused = choose_plan("auto", x, weights[0], max_rank, launch, n=n, slots=slots) != "split"
    if fused:
        ys = [empty(x, m, weight.shape[0]) for weight in weights]
    else:
        ys = [product(F.linear, x, *each) for each in zip(weights, biases, strict=True)]
    s = shrink_at(x, rows, found, own)
    bias_address = None if found.bias_address is None else found.bias_address[own]
    up = found.b_address[own], bias_address, found.rank[own], found.scaling[own]
    options = {"factor_dtype": factor_dtype, "pdl": chip_of(x).has_pdl}
    if fused:
        config = config_of(launch, x, m, n, k, max_rank)
        mixed_lora_linear.launch_mixed_lora_linear(
            *(ys, x, weights, biases, s, *rows[:3], *up), config=config, **options
        )
    else:
        config = config_of("mixed_lora_expand", x, m, n, k, max_rank)
        mixed_lora_expand.launch_mixed_lora_expand(
            *(ys, s, *rows[:3], rows[4], *up), config=config, **options
        )
    return ys


@kept
def add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> None:
    """Adds to y in two launches, a shrink and an expand."""
    found = tables_of(tables, max_rank, factor_dtype)
    s = shrink_at(x, rows, found, slice(index, index + 1))
    (m, k), n = x.shape, y.shape[1]
    config = config_of("mixed_lora_expand", y, m, n, k, max_rank)
    up = RankRows.of_tables(found, index)
    add_rank_rows_(y, s[:, 0], rows, up, config=config, pdl=True)


@kept
def scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    scale_address: torch.Tensor,
    index: int,
) -> None:
    """Scales DoRA's rows in one launch, whatever the batch."""
    whole_bias = None if bias is None else bias.contiguous()
    mixed_dora_scale.launch_mixed_dora_scale(
        *(y, whole_bias, *rows[:3], rows[4], scale_address[index]),
        config=config_of("mixed_dora_scale", y, *y.shape),
    )


@kept
def dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Returns x ``[M, K]``, dropped."""
    (m, k), out = x.shape, empty(x, *x.shape)
    config = config_of("lora_dropout", x, m, k=k)
    lora_dropout.launch_lora_dropout(out, x, seed=seed, dropout_p=dropout_p, config=config)
    return out


# ------------------------------------------------------------------------------- one adapter


@kept
def _shrink_one(
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
def _expand_one_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    """Adds the adapter's term; one launch. Its dots are in y's dtype."""
    (m, n), r = y.shape, s.shape[1]
    config = config_of("lora_expand", y, m, n, r=r)
    lora_expand.launch_lora_expand([Module(y, lora_b, scaling)], s, reads_y=True, config=config)


@kept
def _linear_one(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    plan = choose_plan(plan, x, weight, lora_b.shape[1])
    own = s, lora_a, lora_b, scaling, seed
    if plan != "split":
        return _fused_one(x, weight, bias, *own, dropout_p, plan == "invariant" and s is None)
    y, *made = _update_one(x, bias, *own, dropout_p)
    return [product(_accumulate_, y, x, weight), *made]


def _accumulate_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Adds the base product."""
    return y.addmm_(x, weight.t())


@kept
def _update_one(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> list[torch.Tensor]:
    """Returns y of bias and adapter, for a product to accumulate on, and s unless it is given."""
    m, (n, r) = x.shape[0], lora_b.shape
    y, own, shrunk = empty(x, m, n), s, s
    if own is None or shrunk is None:
        own, shrunk = _shrunk(x, [lora_a], seed, dropout_p)
    lora_expand.launch_lora_expand(
        [Module(y, lora_b, scaling, bias)],
        shrunk,
        reads_y=False,
        s_out=None if shrunk is own else own,
        config=config_of("lora_expand", x, m, n, r=r),
    )
    return [y, own] if s is None else [y]


def _fused_one(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    batch_invariant: bool,
) -> list[torch.Tensor]:
    """Two launches: shrink, then the base GEMM with the adapter's term in its epilogue.

    Where shrink splits K, its planes go straight into that epilogue, which sums them; one more
    launch sums the planes of y where the GEMM splits K.
    """
    if batch_invariant:
        x = _whole_rows(x)
    (m, k), (n, r) = x.shape, lora_b.shape
    y, own, shrunk = empty(x, m, n), s, s
    if own is None or shrunk is None:
        own, shrunk = _shrunk(x, [lora_a], seed, dropout_p, batch_invariant)
    config = config_of("lora_linear", x, m, n, k, r, batch_invariant=batch_invariant)
    written = y if config.splits == 1 else empty(x, config.splits, m, n, dtype=torch.float32)
    lora_linear.launch_lora_linear(
        [Module(written, lora_b, scaling, bias, weight)],
        *(x, shrunk),
        s_out=None if shrunk is own else own,
        config=config,
        pdl=s is None and chip_of(x).has_pdl,
    )
    if written is not y:
        plane_sums.launch_plane_sums([y], [written], config=config_of("plane_sums", x))
    return [y, own] if s is None else [y]


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x ``[M, K]`` contiguous, at a multiple of 16 bytes, and with those strides at M = 1.

    Triton compiles kernels of their own for other layouts, and a batch may come in any.
    """
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(-1).view(x.shape)


# ------------------------------------------------------------------------------- many adapters


def shrink_at(
    x: torch.Tensor,
    rows: _Tensors,
    tables: Tables,
    modules: slice,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Returns planes of s of neighbouring modules, fp32 ``[splits, G, M, R]``."""
    (m, k), address, largest = x.shape, tables.a_address[modules], tables.max_rank
    count = address.shape[0]
    shape = planes_shape(m, k, count, largest, batch_invariant)
    s = empty(x, *shape, dtype=torch.float32)
    down = RankRows(address, None, tables.rank[modules], None, tables.dtype, largest)
    r = count * largest
    config = config_of("mixed_lora_shrink", x, m, k=k, r=r, batch_invariant=batch_invariant)
    _shrink_mixed(s, x, rows, down, config=config)
    return s


def _shrink_listed(
    x: torch.Tensor, rows: _Tensors, lora_a: _Tensors, modules: int, drop: Drop
) -> tuple[torch.Tensor, bool]:
    """Returns s ``[G, M, R]``, and whether one launch made it. Dropout is that of one module."""
    (m, k), slots = x.shape, len(lora_a) // modules
    down = RankRows.of_lora_a(lora_a, x.device, (modules, slots))
    columns = max_columns_of(lora_a, slots, modules)
    config = config_of("mixed_lora_train_shrink", x, m, k=k, r=columns)
    splits = planes_shape(m, k, modules, max(down.largest, 1))[0]
    s = x.new_empty(modules, m, columns_of(down.largest))
    planes = s.unsqueeze(0)
    if splits > 1:
        planes = x.new_empty(splits, *s.shape, dtype=torch.float32)
    _shrink_mixed(planes, x, rows, down, config=config, drop=drop)
    if splits > 1:
        plane_sums.launch_plane_sums([s], [planes], config=config_of("plane_sums", x))
    return s, splits == 1


def _shrink_mixed(
    planes: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    down: RankRows,
    *,
    config: KernelConfig,
    drop: Drop = NO_DROP,
) -> None:
    """Writes every row's s, ``[splits, G, M, R]``; one launch."""
    mixed_lora_shrink.launch_mixed_lora_shrink(
        *(planes, x, *rows[:3], rows[4], down.address, down.rank),
        factor_dtype=down.dtype,
        config=config,
        dropout=drop.tables(rows[3]),
    )


def _base_product(
    stem: str, x: torch.Tensor, base: Weights, up: RankRows, plan: str
) -> tuple[str, torch.Tensor | None]:
    """Returns the plan, and with "split" the library's GEMM: ahead of the shrink and its dependent.

    ``stem`` names the launches, which have plans and configs of their own.
    """
    slots = up.rank.shape[0]
    plan = choose_plan(plan, x, base.weight, up.largest, f"{stem}_linear", slots=slots)
    return plan, product(F.linear, x, *base) if plan == "split" else None


def _linear_mixed(
    stem: str,
    x: torch.Tensor,
    base: Weights,
    y: torch.Tensor | None,
    s: torch.Tensor,
    rows: _Tensors,
    up: RankRows,
    plan: str,
    after_shrink: bool,
) -> torch.Tensor:
    """Returns y for s ``[splits, M, R]``, plan and y as `_base_product` gave them; one launch."""
    (m, k), n = x.shape, base.weight.shape[0]
    if y is not None:
        config = config_of(f"{stem}_expand", y, m, n, k, up.largest)
        add_rank_rows_(y, s, rows, up, config=config, pdl=after_shrink)
        return y
    invariant = plan == "invariant"
    config = config_of(f"{stem}_linear", x, m, n, k, up.largest, batch_invariant=invariant)
    return product_and_rank_rows(x, base, s, rows, up, config=config, pdl=after_shrink)


def add_rank_rows_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    drop: Drop = NO_DROP,
) -> None:
    """Adds every row's rank rows to y ``[M, N]``, for s ``[splits, M, R]``; one launch.

    ``pdl`` says that the launch before is the shrink that made s.
    """
    mixed_lora_expand.launch_mixed_lora_expand(
        *([y], s, *rows[:3], rows[4], *up[:4]),
        factor_dtype=up.dtype,
        config=config,
        pdl=pdl and chip_of(y).has_pdl,
        by_column=up.by_column,
        dropout=drop.tables(rows[3]),
    )


def product_and_rank_rows(
    x: torch.Tensor,
    base: Weights,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    drop: Drop = NO_DROP,
) -> torch.Tensor:
    """Returns the base's product with every row's rank rows in it, ``[M, N]``; one launch.

    ``pdl`` is as in `add_rank_rows_`.
    """
    y = empty(x, x.shape[0], base.weight.shape[0])
    mixed_lora_linear.launch_mixed_lora_linear(
        *([y], x, [base.weight], [base.bias], s, *rows[:3], *up[:4]),
        factor_dtype=up.dtype,
        config=config,
        pdl=pdl and chip_of(x).has_pdl,
        by_column=up.by_column,
        dropout=drop.tables(rows[3]),
    )
    return y
