"""Kernel launches of a backward pass.

``rows`` selects the kernels as in `fastlora.ops.triton.forward`. Each launch is bitwise
reproducible: sums over parts of the rows are partial sums that are added in order.

Arguments are as in the operators of `fastlora.ops.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastlora.kernels import (
    lora_expand,
    lora_grad_a,
    lora_grad_b,
    lora_linear,
    plane_sums,
)
from fastlora.kernels import mixed_lora_grad_reduce as reduce
from fastlora.kernels.config_tables import (
    MAX_GROUP_SIZE,
    MAX_PARTIAL_BYTES,
    cdiv,
)
from fastlora.kernels.configs import mixed_grad_b_passes, reads_twice
from fastlora.kernels.launch import cached_launches, empty, product
from fastlora.kernels.mixed_rows import DropoutTables
from fastlora.kernels.modules import Module, Weight, has_usual_strides
from fastlora.ops.factors import number_tensor_without_sync, replace_missing_with_empty
from fastlora.ops.layout import grad_a_buffer_layout, grad_b_buffer_layout
from fastlora.ops.plans import choose_plan
from fastlora.ops.torch import products, reference
from fastlora.ops.triton.address_tables import (
    align_factors,
    dropout_tables,
    lora_a_rank_row_addresses,
    lora_b_rank_row_addresses,
    max_rank_sum_of_one_adapter,
)
from fastlora.ops.triton.expand import expand_mixed_
from fastlora.ops.triton.launch_configs import config_of
from fastlora.ops.triton.linear import fused_mixed_linear, quantized_base_products
from fastlora.quantized_tensor import QuantizedData

_Tensors = Sequence[torch.Tensor]
_Factors = Sequence[torch.Tensor | None]
_DsGradBColumnSums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_DsPackedGradBEmpty = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_MaxRowsPerProgram = int
# A result, and the partial sums that have yet to be added into it.
_Partials = tuple[torch.Tensor, torch.Tensor]

# ------------------------------------------------------------------------------------ operators


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    run: _MaxRowsPerProgram,
    lora_b: _Factors,
    with_bias: Sequence[bool],
    scaling: torch.Tensor,
    with_factors: bool,
) -> _DsGradBColumnSums:
    """Compute the gradients of the lora_b factors, of the biases, and of s.

    The batch may use one slot or be a mixed batch. The result is a tuple of three items. The first
    item, ds, is the gradient of s. The last item, the column sums of dy, is the gradient of the
    layer's bias. For a mixed batch, the gradients of lora_bias are computed instead, and are part
    of the second item.

    For one slot, the second item is the gradient of lora_b alone, and the column sums are computed
    if ``with_bias`` requests them. For a mixed batch, the second item is a buffer with the
    gradients of lora_b and lora_bias of all slots, and the column sums are empty. The buffer is
    empty unless ``with_factors`` is set. ``run`` is the largest number of sorted rows on which one
    program works.
    """
    ups = replace_missing_with_empty(lora_b, 1)
    if not rows:
        return _grad_b_one_adapter(dy, s, ups[0], scaling, with_bias[0])
    return _mixed_grad_b(dy, s, rows, run, ups, with_bias, scaling, with_factors)


def grad_x(
    dy: torch.Tensor,
    weight: Weight | None,
    ds: torch.Tensor,
    rows: Sequence[torch.Tensor],
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    plan: str,
) -> torch.Tensor:
    """Return the gradient of x, which is the sum of ``dy @ weight`` and the adapters' contribution.

    If ``weight`` is None, only the adapters' contribution is returned. Rows may have different
    adapters. If ``rows`` is empty, one slot has all rows.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    if not rows:
        p = 0.0 if seeds is None else dropout_p[0]
        return _grad_x_one_adapter(dy, weight, ds, downs[0], seeds, p, plan)
    downs, dropout = align_factors(downs), dropout_tables(seeds, dropout_p)
    (m, n), k, up = dy.shape, downs[0].shape[1], lora_a_rank_row_addresses(downs, dy.device)
    sizes, slots = (m, n, k, up.largest), len(downs)
    if weight is None:
        dx = dy.new_zeros(m, k)
    elif isinstance(weight, QuantizedData):
        (dx,) = quantized_base_products(dy, [weight.t()], [None], "coded_lora_grad_x")
    elif choose_plan(plan, dy, weight, up.largest, "mixed_lora_grad_x", slots=slots) == "fused":
        config = config_of("mixed_lora_grad_x", dy, *sizes)
        given = [weight.t()], [None], ds.unsqueeze(0), rows, up
        return fused_mixed_linear(dy, *given, config=config, dropout=dropout)[0]
    else:
        dx = products.mm(dy, weight)
    config = config_of("mixed_lora_grad_x_add", dy, *sizes)
    expand_mixed_([dx], ds.unsqueeze(0), rows, up, config=config, dropout=dropout)
    return dx


def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    run: int,
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> list[torch.Tensor]:
    """Return the lora_a gradients.

    If one slot has all rows, the list contains one tensor per module. Otherwise it contains one
    buffer with the gradients of all modules and slots.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    if not rows:
        return _grad_a_one_adapter(x, ds, downs, seeds, dropout_p)
    return [_mixed_grad_a(x, ds, rows, run, downs, dropout_tables(seeds, dropout_p))]


@cached_launches
def grouped_gradients(
    x: torch.Tensor | None,
    dropout_p: tuple[float, ...],
    wants: tuple[bool, ...],
    *tensors: torch.Tensor | QuantizedData | None,
) -> list[torch.Tensor | None]:
    """Return the gradients of a shared-input group of linear layers.

    The result is a list of the gradients of x, of the biases, and of the factors. See
    `Backend.grouped_gradients`. ``tensors`` are the dy of each module, the operands, and s.
    """
    count: int = len(dropout_p)
    each: Any = [tensors[i : i + count] for i in range(0, 8 * count, count)]
    dys, weights, _, lora_a, lora_b, scalings, seeds, s = each
    wants_x, (wants_bias, wants_a, wants_b) = (
        wants[0],
        (wants[1 + i * count : 1 + (i + 1) * count] for i in (1, 2, 3)),
    )
    if len(s) < count:
        s = s[0].split([b.shape[1] for b in lora_b], dim=1)
    found: list[torch.Tensor | None] = [None] * (3 * count)  # of biases, of lora_a, of lora_b
    ds: dict[int, torch.Tensor] = {}
    partials: list[_Partials] = []
    for i in reversed(range(count)):  # the order in which autograd would run the modules
        dy, b, scaling = dys[i], lora_b[i], scalings[i]
        if dy is None:
            continue
        if wants_b[i]:
            (ds[i], found[2 * count + i], sums), own = _grad_b_and_partials(
                dy, s[i], b, scaling, wants_bias[i]
            )
            if _bytes_of([*partials, *own]) > MAX_PARTIAL_BYTES:
                _add_gradient_partials(partials)
                partials = []
            partials += own
        else:
            ds[i] = product(reference.lora_ds, dy, b, scaling)
            sums = product(reference.column_sums, dy) if wants_bias[i] else dy
        if wants_bias[i]:
            found[i] = sums
    _add_gradient_partials(partials)
    dx = _grad_x_of_group(dys, weights, ds, lora_a, seeds, dropout_p) if wants_x else None
    some = [i for i in range(count) if i in ds and wants_a[i]]
    if some and x is not None:
        drawn = [seeds[i] for i in some]
        d_lora_a = _grad_a_of_group(
            x,
            [ds[i] for i in some],
            [lora_a[i].dtype for i in some],
            None
            if drawn == [None] * len(some)
            else product(_concat_seeds_with_arbitrary_fill, *drawn),
            [dropout_p[i] for i in some],
        )
        for i, gradient in zip(some, d_lora_a, strict=True):
            found[count + i] = gradient
    return [dx, *found]


def _concat_seeds_with_arbitrary_fill(*seeds: torch.Tensor | None) -> torch.Tensor:
    """Concatenate dropout seeds, with an arbitrary number in place of each None.

    The result is an int64 tensor ``[G]``.
    """
    any_seed = next(seed for seed in seeds if seed is not None)
    return torch.cat([any_seed if seed is None else seed for seed in seeds])


# ------------------------------------------------------------------------------- one adapter


@cached_launches
def _grad_b_one_adapter(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    with_bias: bool,
) -> _DsGradBColumnSums:
    """Return the gradients of lora_b and s for one adapter, and the column sums of dy.

    The result is a tuple (ds, lora_b gradient, column sums of dy). ds is the gradient of s. The
    column sums are the gradient of the layer's bias, and are empty unless ``with_bias`` is True.
    """
    found, partials = _grad_b_and_partials(dy, s, lora_b, scaling, with_bias)
    _add_gradient_partials(partials)
    return found


def _grad_b_and_partials(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    with_bias: bool,
) -> tuple[_DsGradBColumnSums, list[_Partials]]:
    """Return tensors for the gradients of lora_b and s, and the partial sums of these gradients.

    The result is a tuple of two items. The first item is the result of `_grad_b_one_adapter`, which
    also contains the column sums of dy. The second item is a list of partial sums of these results.
    The caller must add up the partial sums with `_add_gradient_partials`, which stores the totals
    in the tensors of the first item. Until then, the tensors for these totals are uninitialized.

    One launch reads dy. If several programs contribute to a sum, they write partial sums. If the
    partial sums of ds would cost more than another read of dy, a library product computes ds
    instead.
    """
    (m, n), r, fp32 = dy.shape, lora_b.shape[1], torch.float32
    if not dy.numel():
        sums = dy.new_zeros(n if with_bias else 0, dtype=fp32)
        return (dy.new_zeros(m, r), dy.new_zeros(n, r, dtype=lora_b.dtype), sums), []
    config = config_of("lora_grad_b", dy, m, n, r=r)
    columns, splits = cdiv(n, config.block_n), config.splits
    with_ds = not reads_twice(config, m, n, r, dy.itemsize)
    d_lora_b, d_bias = empty(dy, n, r, dtype=lora_b.dtype), empty(dy, n * with_bias, dtype=fp32)
    written_b, written_bias = d_lora_b, d_bias
    if splits > 1:
        written_b = empty(dy, splits, n, r, dtype=fp32)
        written_bias = empty(dy, splits, n, dtype=fp32) if with_bias else d_bias
    ds = written_ds = empty(dy, m, r) if with_ds else None
    if with_ds and columns > 1:
        written_ds = empty(dy, columns, m, r, dtype=fp32)
    lora_grad_b.launch_lora_grad_b(
        *(written_ds, written_b, written_bias if with_bias else None),
        *(dy, s, lora_b, scaling),
        config=config,
    )
    pairs = ((d_lora_b, written_b), (d_bias, written_bias), (ds, written_ds))
    if ds is None:
        ds = product(reference.lora_ds, dy, lora_b, scaling)
    partials = [
        (out, written)
        for out, written in pairs
        if out is not None and written is not None and out is not written
    ]
    return (ds, d_lora_b, d_bias), partials


def _bytes_of(partials: Sequence[_Partials]) -> int:
    """Return the total size of the partial sums in bytes."""
    return sum(stack.numel() * stack.itemsize for _, stack in partials)


def _add_gradient_partials(partials: Sequence[_Partials]) -> None:
    """Add up the partial sums of each gradient with a kernel.

    For each gradient, the total is stored in the gradient's tensor. One launch processes up to
    `MAX_GROUP_SIZE` gradients.
    """
    for start in range(0, len(partials), MAX_GROUP_SIZE):
        outs, stacks = zip(*partials[start : start + MAX_GROUP_SIZE], strict=True)
        config = config_of("plane_sums", outs[0])
        plane_sums.launch_plane_sums(outs, stacks, config=config)


def _grad_x_of_group(
    dys: Sequence[torch.Tensor | None],
    weights: Sequence[Weight | None],
    ds: Mapping[int, torch.Tensor],
    lora_a: _Tensors,
    seeds: Sequence[torch.Tensor | None],
    dropout_p: Sequence[float],
) -> torch.Tensor | None:
    """Return the gradient with respect to the input x that a group of modules shares.

    Return None if no module has a ds. Without dropout, one launch adds up the contributions of all
    adapters, and library products are accumulated onto the sum. With dropout, every module has its
    own launch, because it has its own mask.
    """
    some = [*ds]  # in the order in which autograd would add the dx of the modules
    chosen: Any = [[own[i] for i in some] for own in (dys, weights, lora_a, seeds)]
    if not _can_share_adapter_grad_x(*chosen):
        dx: torch.Tensor | None = None
        for i in some:
            given: Any = dys[i], weights[i], ds[i], lora_a[i], seeds[i], dropout_p[i]
            dx = _grad_x_one_adapter(*given, "auto", dx)
        return dx
    own_dys, own_weights, *_ = chosen
    all_ds, downs = [ds[i] for i in some], [lora_a[i].t() for i in some]
    dx = empty(all_ds[0], all_ds[0].shape[0], downs[0].shape[0])
    n, r = sum(dy.shape[1] for dy in own_dys), max(down.shape[1] for down in downs)
    config = config_of("lora_grad_x_add", dx, dx.shape[0], n, dx.shape[1], r)
    lora_expand.launch_summed_lora_expand(dx, downs, all_ds, config=config)
    for dy, weight in zip(own_dys, own_weights, strict=True):
        product(torch.Tensor.addmm_, dx, dy, weight)
    return dx


def _can_share_adapter_grad_x(
    dys: Sequence[torch.Tensor],
    weights: Sequence[Weight | None],
    lora_a: _Tensors,
    seeds: Sequence[torch.Tensor | None],
) -> bool:
    """Return whether a group of modules can share a launch that computes the gradient of x.

    The modules share the input x. The launch adds up the contributions of the adapters on all of
    these modules. The contributions of the base layers are computed separately.
    """
    return (
        len(dys) > 1
        and all(seed is None for seed in seeds)
        and all(dy.numel() and has_usual_strides(a) for dy, a in zip(dys, lora_a, strict=True))
        and all(
            isinstance(weight, torch.Tensor)
            and choose_plan("auto", dy, weight, a.shape[0], "lora_grad_x") != "fused"
            for dy, weight, a in zip(dys, weights, lora_a, strict=True)
        )
    )


@cached_launches
def _grad_x_one_adapter(
    dy: torch.Tensor,
    weight: Weight | None,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    plan: str,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of x for a layer with one adapter.

    It includes the base layer's contribution. The gradient is computed by one fused launch, or by a
    launch for the adapter's contribution and a library product that is added to it. Without a
    weight, the base layer's contribution is omitted.

    ``onto`` is the dx of other modules of a shared-input group, to which the gradient is added.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    if not dy.numel():
        return dy.new_zeros(m, k) if onto is None else onto
    if weight is None:
        return _grad_x_without_base(dy, ds, lora_a, seed, dropout_p, onto)
    launch = "lora_grad_x"
    if isinstance(weight, QuantizedData):
        launch = "coded_lora_grad_x"
    elif choose_plan(plan, dy, weight, r, launch) != "fused":
        dx = _grad_x_without_base(dy, ds, lora_a, seed, dropout_p, onto)
        return product(torch.Tensor.addmm_, dx, dy, weight)
    dx = empty(dy, m, k)
    lora_linear.launch_lora_linear(
        [Module(dx, lora_a.t(), None, None, weight.t())],
        *(dy, ds),
        s_out=None,
        config=config_of(launch, dy, m, n, k, r),
        pdl=False,
        seed=seed,
        dropout_p=dropout_p,
    )
    return dx if onto is None else product(torch.Tensor.add_, onto, dx)


@cached_launches
def _grad_x_without_base(
    dy: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return an adapter's contribution to the gradient of x.

    If ``onto`` is given, the contribution is added to it in place, and ``onto`` is returned.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    dx = empty(dy, m, k) if onto is None else onto
    if seed is None:  # an expand to K columns
        config = config_of("lora_expand", dy, m, n=k, k=n, r=r)
    else:
        config = config_of("lora_grad_x_add", dy, m, n, k, r)
    module, drop = Module(dx, lora_a.t(), None), {"seed": seed, "dropout_p": dropout_p}
    reads_y = onto is not None
    lora_expand.launch_lora_expand([module], ds, reads_y=reads_y, config=config, **drop)
    return dx


def _grad_a_one_adapter(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> list[torch.Tensor]:
    """Return a list of the lora_a gradients for one adapter.

    It contains one gradient per module. One launch reads x for every four modules. If rows are
    split, another launch adds partial sums.
    """
    if not x.numel():
        return [torch.zeros_like(factor) for factor in lora_a]
    result: list[torch.Tensor] = []
    for start in range(0, len(ds), MAX_GROUP_SIZE):
        part = slice(start, start + MAX_GROUP_SIZE)
        drawn = None if seeds is None else seeds[part].contiguous()
        inner = [tensor.contiguous() for tensor in ds[part]]
        dtypes = [factor.dtype for factor in lora_a[part]]
        result += _grad_a_of_group(x, inner, dtypes, drawn, list(dropout_p[part]))
    return result


@cached_launches
def _grad_a_of_group(
    x: torch.Tensor,
    ds: list[torch.Tensor],
    dtypes: list[torch.dtype],
    seeds: torch.Tensor | None,
    dropout_p: list[float],
) -> list[torch.Tensor]:
    """Return a list of the lora_a gradients of a group of modules.

    The gradients are in the given dtypes. The group has up to `MAX_GROUP_SIZE` modules.
    """
    (m, k), ranks, count = x.shape, [tensor.shape[1] for tensor in ds], len(ds)
    config = config_of("lora_grad_a", x, m, k=k, r=max(ranks), group_size=count)
    outs = [empty(x, r, k, dtype=dtype) for r, dtype in zip(ranks, dtypes, strict=True)]
    written = outs
    if config.splits > 1:
        written = [empty(x, config.splits, r, k, dtype=torch.float32) for r in ranks]
    lora_grad_a.launch_lora_grad_a(written, x, ds, seeds=seeds, dropout_p=dropout_p, config=config)
    if written is not outs:
        plane_sums.launch_plane_sums(outs, written, config=config_of("plane_sums", x))
    return outs


# ------------------------------------------------------------------------------- many adapters


def _mixed_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    run: int,
    lora_b: Sequence[torch.Tensor],
    with_bias: Sequence[bool],
    scaling: torch.Tensor,
    with_factors: bool,
) -> _DsPackedGradBEmpty:
    """Return the gradients of lora_b, lora_bias, and s for a mixed batch.

    The result is that of `grad_b`: ds, one buffer with the gradients of lora_b and lora_bias of all
    adapters, and an empty tensor. A backward kernel reads dy and writes partial sums, and a second
    kernel adds them. If the partial sums take too much memory, the backward kernel is launched
    several times, and each launch reads a part of the columns of dy.
    """
    (m, n), largest, device, fp32 = dy.shape, s.shape[1], dy.device, torch.float32
    offsets, bias_offsets, end = grad_b_buffer_layout(lora_b, with_bias)
    packed = lora_b[0].new_empty(end if with_factors else 0)
    ds, biased = torch.empty_like(s), with_factors and any(with_bias)
    config = config_of("mixed_lora_grad_b", dy, r=largest)
    count = -(-m // run) + len(lora_b)
    passes = mixed_grad_b_passes(config, m, n, largest, count, with_factors)
    of_ds = [number for number, own in enumerate(passes) if own.with_ds]
    ds_partials = dy.new_empty(cdiv(passes[0].stop, config.block_n), *s.shape, dtype=fp32)
    blocks = align_factors(lora_b)
    for number, (first, stop, with_ds, with_own_factors) in enumerate(passes):
        columns, b_partials, bias_partials = stop - first, None, None
        if with_own_factors:
            b_partials = dy.new_empty(count, columns, largest, dtype=fp32)
            bias_partials = dy.new_empty(count, columns, dtype=fp32) if biased else None
        up = lora_b_rank_row_addresses([block[first:stop] for block in blocks], (), scaling)
        lora_grad_b.launch_mixed_lora_grad_b(
            *(ds_partials if with_ds else None, b_partials, bias_partials),
            *(dy[:, first:stop], s, rows, up),
            run=run,
            config=config,
            adds_ds=with_ds and number > 0,
        )
        ends_ds = number == of_ds[-1]
        if not (with_own_factors or ends_ds):
            continue
        starts = [at + first * b.shape[1] for at, b in zip(offsets, lora_b, strict=True)]
        bias_starts = [at if at < 0 else at + first for at in bias_offsets]
        reduce.launch_mixed_lora_grad_reduce(
            packed if with_own_factors else None,
            None if b_partials is None else b_partials.transpose(1, 2).unsqueeze(1),
            *(rows, up.rank.unsqueeze(0), scaling.unsqueeze(0)),
            number_tensor_without_sync(tuple(starts), torch.int64, device).unsqueeze(0),
            m=m,
            columns=columns,
            run=run,
            by_column=True,
            config=config_of("mixed_lora_grad_reduce", dy),
            bias_partials=bias_partials,
            bias_offset=number_tensor_without_sync(
                tuple(bias_starts), torch.int64, device
            ).unsqueeze(0),
            ds=ds if ends_ds else None,
            ds_partials=ds_partials if ends_ds else None,
        )
    return ds, packed, dy.new_empty(0, dtype=fp32)


def _mixed_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    run: int,
    lora_a: Sequence[torch.Tensor],
    dropout: DropoutTables | None,
) -> torch.Tensor:
    """Return the lora_a gradients of all adapters for a mixed batch.

    The result is one buffer with the gradients of all modules and slots. Without dropout, one
    launch reads x for all modules. With dropout, each module has its own launch. A further launch
    adds the partial sums.
    """
    (m, k), modules, device = x.shape, len(ds), x.device
    slots, joined = len(lora_a) // modules, torch.stack(list(ds)) if modules > 1 else ds[0][None]
    offsets, end = grad_a_buffer_layout(lora_a)
    packed = lora_a[0].new_empty(end)
    rank = number_tensor_without_sync(tuple(a.shape[0] for a in lora_a), torch.int32, device).view(
        modules, slots
    )
    count = -(-m // run) + slots
    partials = x.new_empty(count, modules, joined.shape[2], k, dtype=torch.float32)
    each = modules if dropout is None else 1
    columns = max_rank_sum_of_one_adapter(lora_a, slots, each)
    config = config_of("mixed_lora_grad_a", x, r=columns)
    for first in range(0, modules, each):
        some, own = slice(first, first + each), slice(first * slots, (first + each) * slots)
        lora_grad_a.launch_mixed_lora_grad_a(
            *(partials[:, some], x, joined[some], rows, rank[some]),
            run=run,
            max_columns=columns,
            config=config,
            dropout=dropout and DropoutTables(*(table[own] for table in dropout)),
        )
    reduce.launch_mixed_lora_grad_reduce(
        *(packed, partials, rows, rank, None),
        number_tensor_without_sync(tuple(offsets), torch.int64, device).view(modules, slots),
        m=m,
        columns=k,
        run=run,
        by_column=False,
        config=config_of("mixed_lora_grad_reduce", x),
    )
    return packed
