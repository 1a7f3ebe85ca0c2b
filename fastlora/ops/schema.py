"""The registered operators: schemas, fakes, and which implementation runs.

One opaque operator is crossed per launch sequence of a layer, so that `torch.compile` sees neither
Triton nor the choice of a plan. Nothing here imports Triton before a kernel runs. Everything that
depends on a batch's mix is a tensor on the device: nothing waits for the host, launches and grids
do not depend on the mix, and a CUDA graph replays any.

Two implementations: ``impl="triton"`` is `fastlora.ops.triton`. ``impl="eager"`` is PyTorch for
many slots, which compiled graphs of mixed batches call, since they cannot read where rows begin.

Shapes, for M rows, S slots (adapters) and G modules (layers) that share x:

    x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, y and dy ``[M, N]``, dx ``[M, K]``
    lora_a ``[rank, K]``, lora_b ``[N, rank]``, lora_bias ``[N]``, not scaled: one of each adapter,
        of one dtype, None where an adapter leaves the layer alone
    rows: empty where one slot has all rows. Else int32 order ``[M]``, segment_of ``[M]``,
        segment_slot, slot_start ``[S + 1]`` of `fastlora.ops.rows`, and for a shrink and the
        gradients of factors pieces: see `fastlora.ops.triton.pieces`
    s and ds: ``[M, R]`` in x's dtype. With rows they are over sorted positions, R is
        `layout.columns_of` the largest rank, and a row is written up to its adapter's rank
    scaling: fp32 ``[S]``; of one slot also ``[R]`` or without dimensions
    seeds: int64, one for each lora_a, on the device (for PyTorch on the CPU); None: no dropout
    tables: ``[G, S]`` each: int64 addresses of lora_a, of lora_b as rank rows ``[rank, N]``, int32
        rank, fp32 scaling, and if an adapter has one addresses of lora_bias. Blocks lie at
        multiples of 16 bytes in ``factor_dtype``; 0 is none. Addresses are trusted: what lies
        behind them must outlive the launch. ``max_rank`` is the largest rank there may be,
        ``index`` the module's row

A row's dropout mask is a function of its adapter's seed, its number among the adapter's rows and
the column: `fastlora.kernels.philox` with kernels; PyTorch draws its own.
"""

from __future__ import annotations

import torch

# Part of this module for its callers: what they pass to the operators comes of these.
from fastlora.ops.backend import draw_seed as draw_seed
from fastlora.ops.backend import resolve_impl as resolve_impl
from fastlora.ops.backend import triton_status as triton_status
from fastlora.ops.factors import tables_of
from fastlora.ops.layout import (
    Factor,
    columns_of,
    layout,
    layout_b,
    max_rank,
    planes_shape,
    present,
)
from fastlora.ops.library import define, fakes, implements
from fastlora.ops.torch import addresses, products, reference
from fastlora.ops.torch import listed as eager

_Tensors = list[torch.Tensor]
_Factors = list[Factor]

# In place of an address of DoRA's scales that are yet to be made: its rows become NaN. A kernel's
# hints hold for it: a multiple of 16.
PENDING = 16


# -------------------------------------------------------------------------------------- forward

_DROP = "Tensor? seeds, float[] dropout_p"
define(
    f"lora_shrink(Tensor x, Tensor[] rows, Tensor?[] lora_a, int modules, {_DROP}, str impl)"
    " -> Tensor"
)
define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s,"
    f" Tensor?[] factors, Tensor scaling, {_DROP}, str impl, str plan) -> Tensor[]"
)
define(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor[] rows, Tensor?[] lora_b, Tensor?[] lora_bias,"
    " Tensor scaling, str impl) -> ()"
)
define("lora_dropout(Tensor x, Tensor seed, float dropout_p) -> Tensor")
# ``after`` is not read. A backward gives one of its tensors, so that compilers neither take its
# mask for the forward's nor draw it there: they would save it.
define("lora_keep(Tensor x, Tensor seed, float dropout_p, Tensor? after) -> Tensor")


@implements("lora_shrink")
def _lora_shrink(
    x: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
) -> torch.Tensor:
    """s of G modules from one read of x: ``[G, M, R]``, or ``[M, R]`` side by side of one slot.

    ``lora_a`` has a module's slots side by side. Where dropout acts there is one module.
    """
    if impl == "triton":
        from fastlora.ops.triton import forward, tables

        return forward.shrink(x, rows, lora_a, modules, tables.Drop(seeds, dropout_p))
    return eager.shrink(x, rows, present(lora_a, 0), modules, seeds, dropout_p)


@fakes("lora_shrink")
def _(x: torch.Tensor, rows: _Tensors, lora_a: _Factors, modules: int, *_: object) -> torch.Tensor:
    if rows:
        return x.new_empty(modules, x.shape[0], columns_of(max_rank(lora_a, 0)))
    return x.new_empty(x.shape[0], sum(factor.shape[0] for factor in present(lora_a, 0)))


@implements("lora_linear")
def _lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
    plan: str,
) -> _Tensors:
    """y, and s unless it is given; ``factors`` are lora_a, lora_b and lora_bias of each slot."""
    if impl == "triton":
        from fastlora.ops.triton import forward, tables

        base, drop = forward.Base(weight, bias), tables.Drop(seeds, dropout_p)
        return forward.linear(x, base, rows, s, factors, scaling, drop, plan)
    y, own = products.linear(x, weight, bias), s
    if own is None:
        own = eager.shrink(x, rows, present(factors[::3], 0), 1, seeds, dropout_p)[0]
    eager.expand_(y, own, rows, present(factors[1::3], 1), factors[2::3], scaling)
    return [y, own] if s is None else [y]


@fakes("lora_linear")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    *_: object,
) -> _Tensors:
    y, largest = x.new_empty(x.shape[0], weight.shape[0]), max_rank(factors[::3], 0)
    if s is not None:
        return [y]
    return [y, x.new_empty(x.shape[0], columns_of(largest) if rows else largest)]


@implements("lora_expand_")
def _lora_expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    lora_b: _Factors,
    lora_bias: _Factors,
    scaling: torch.Tensor,
    impl: str,
) -> None:
    """Adds ``scaling * (s @ lora_b.T + lora_bias)`` to every adapter's rows of y."""
    if impl == "triton":
        from fastlora.ops.triton import forward

        forward.expand_(y, s, rows, lora_b, lora_bias, scaling)
    else:
        eager.expand_(y, s, rows, present(lora_b, 1), lora_bias, scaling)


@fakes("lora_expand_")
def _(*_: object) -> None:
    return None


@implements("lora_dropout")
def _lora_dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """x, dropped by the kernels' mask of one slot."""
    from fastlora.ops.triton import forward

    return forward.dropout(x, seed, dropout_p)


@fakes("lora_dropout")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@implements("lora_keep")
def _lora_keep(
    x: torch.Tensor, seed: torch.Tensor, dropout_p: float, after: torch.Tensor | None
) -> torch.Tensor:
    """PyTorch's mask of x; see `reference.lora_keep`."""
    return reference.lora_keep(x, seed, dropout_p)


@fakes("lora_keep")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=reference.INTEGERS[x.itemsize], device=x.device)


# ------------------------------------------------------------------------------------- backward

define(
    "lora_grad_b(Tensor dy, Tensor s, Tensor[] rows, SymInt run, Tensor?[] lora_b,"
    " bool[] with_bias, Tensor scaling, bool with_factors, str impl) -> (Tensor, Tensor, Tensor)"
)
define(
    f"lora_grad_x(Tensor dy, Tensor? weight, Tensor ds, Tensor[] rows, Tensor?[] lora_a, {_DROP},"
    " str impl, str plan) -> Tensor"
)
define(
    f"lora_grad_a(Tensor x, Tensor[] ds, Tensor[] rows, SymInt run, Tensor?[] lora_a, {_DROP},"
    " str impl) -> Tensor[]"
)


@implements("lora_grad_b")
def _lora_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    run: int,
    lora_b: _Factors,
    with_bias: list[bool],
    scaling: torch.Tensor,
    with_factors: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ds, the factors' gradients, and sums, from one read of dy.

    With rows, in runs of ``run``, the gradients are one buffer for `layout.split_grad_b`, empty
    without ``with_factors``; ``with_bias`` says which slots have a lora_bias; there are no sums.
    Of one slot they are d_lora_b; ``with_bias`` asks for the sums of dy's columns, fp32 ``[N]``.
    """
    if impl == "triton":
        from fastlora.ops.triton import backward

        return backward.grad_b(dy, s, rows, run, lora_b, with_bias, scaling, with_factors)
    ups = present(lora_b, 1)
    packed = ups[0].new_empty(layout_b(ups, with_bias)[2] if with_factors else 0)
    ds = eager.grad_b(dy, s, rows, ups, with_bias, scaling, packed if with_factors else None)
    return ds, packed, dy.new_empty(0, dtype=torch.float32)


@fakes("lora_grad_b")
def _(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    run: int,
    lora_b: _Factors,
    with_bias: list[bool],
    scaling: torch.Tensor,
    with_factors: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ups, sums = present(lora_b, 1), dy.new_empty(0, dtype=torch.float32)
    if rows:
        end = layout_b(ups, with_bias)[2] if with_factors else 0
        return torch.empty_like(s), ups[0].new_empty(end), sums
    (m, n), (up,) = dy.shape, ups
    if with_bias[0]:
        sums = dy.new_empty(n, dtype=torch.float32)
    return dy.new_empty(m, up.shape[1]), dy.new_empty(up.shape, dtype=up.dtype), sums


@implements("lora_grad_x")
def _lora_grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
    plan: str,
) -> torch.Tensor:
    """dx of one module; without a weight that of the adapters' term alone."""
    if impl == "triton":
        from fastlora.ops.triton import backward, tables

        drop = tables.Drop(seeds, dropout_p)
        return backward.grad_x(dy, weight, ds, rows, lora_a, drop, plan)
    downs = present(lora_a, 0)
    dx = products.mm(dy, weight) if weight is not None else None
    if dx is None:
        dx = dy.new_zeros(dy.shape[0], downs[0].shape[1])
    return eager.grad_x_(dx, ds, rows, downs, seeds, dropout_p)


@fakes("lora_grad_x")
def _(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    *_: object,
) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], present(lora_a, 0)[0].shape[1])


@implements("lora_grad_a")
def _lora_grad_a(
    x: torch.Tensor,
    ds: _Tensors,
    rows: _Tensors,
    run: int,
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: list[float],
    impl: str,
) -> _Tensors:
    """d_lora_a of G modules, one ds each, from one read of x unless dropout parts them.

    Of one slot each its own; with rows, in runs of ``run``, one buffer for `layout.split_grad_a`.
    """
    if impl == "triton":
        from fastlora.ops.triton import backward, tables

        return backward.grad_a(x, ds, rows, run, lora_a, tables.Drop(seeds, dropout_p))
    downs = present(lora_a, 0)
    packed = downs[0].new_empty(layout(downs)[1])
    eager.grad_a(x, ds, rows, downs, packed, seeds, dropout_p)
    return [packed]


@fakes("lora_grad_a")
def _(
    x: torch.Tensor, ds: _Tensors, rows: _Tensors, run: int, lora_a: _Factors, *_: object
) -> _Tensors:
    downs = present(lora_a, 0)
    if rows:
        return [downs[0].new_empty(layout(downs)[1])]
    return [x.new_empty(factor.shape, dtype=factor.dtype) for factor in downs]


# ----------------------------------------------------------------------------- behind addresses

_TABLES = "Tensor[] tables, int index, int max_rank, ScalarType factor_dtype"
define(
    "lora_shrink_at(Tensor x, Tensor[] rows, Tensor[] tables, int max_rank,"
    " ScalarType factor_dtype, bool batch_invariant) -> Tensor"
)
define(
    f"lora_linear_at(Tensor x, Tensor weight, Tensor? bias, Tensor[] rows, Tensor? s, {_TABLES},"
    " str plan) -> Tensor"
)
define(f"lora_add_at_(Tensor(a!) y, Tensor x, Tensor[] rows, {_TABLES}, str impl) -> ()")
define(
    "lora_scale_(Tensor(a!) y, Tensor? bias, Tensor[] rows, Tensor scale_address, int index,"
    " str impl) -> ()"
)


@implements("lora_shrink_at")
def _lora_shrink_at(
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    max_rank: int,
    factor_dtype: torch.dtype,
    batch_invariant: bool,
) -> torch.Tensor:
    """Planes of s of all modules of the tables, `layout.planes_shape`, whose sum is s."""
    from fastlora.ops.triton import forward

    return forward.shrink_at(x, rows, tables_of(tables, max_rank, factor_dtype), batch_invariant)


@fakes("lora_shrink_at")
def _(
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    max_rank: int,
    factor_dtype: torch.dtype,
    batch_invariant: bool,
) -> torch.Tensor:
    shape = planes_shape(x.shape[0], x.shape[1], tables[0].shape[0], max_rank, batch_invariant)
    return x.new_empty(shape, dtype=torch.float32)


@implements("lora_linear_at")
def _lora_linear_at(
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
) -> torch.Tensor:
    """y of one module; ``s`` is what `lora_shrink_at` made for siblings."""
    from fastlora.ops.triton import forward

    base, found = forward.Base(weight, bias), tables_of(tables, max_rank, factor_dtype)
    return forward.linear_at(x, base, rows, s, found, index, plan)


@fakes("lora_linear_at")
def _(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@implements("lora_add_at_")
def _lora_add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
    impl: str,
) -> None:
    """Adds every row's own adapter to y."""
    if impl == "triton":
        from fastlora.ops.triton import forward

        found = tables_of(tables, max_rank, factor_dtype)
        forward.add_at_(y, x, rows, found, index)
    else:
        addresses.add_at_(y, x, rows, [table[index] for table in tables], factor_dtype)


@fakes("lora_add_at_")
def _(*_: object) -> None:
    return None


@implements("lora_scale_")
def _lora_scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    scale_address: torch.Tensor,
    index: int,
    impl: str,
) -> None:
    """``y = (y - bias) * g + bias`` in the rows whose adapter has DoRA's scales g on the module.

    ``scale_address`` is int64 ``[G, S]`` of g, fp32 ``[N]``; 0 is none, see `PENDING`. Other rows
    keep their bits.
    """
    if impl == "triton":
        from fastlora.ops.triton import forward

        forward.scale_(y, bias, rows, scale_address[index])
    else:
        addresses.scale_(y, bias, rows, scale_address[index], PENDING)


@fakes("lora_scale_")
def _(*_: object) -> None:
    return None
