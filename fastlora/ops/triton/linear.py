"""Kernel launches of linear layers with adapters: one for all rows, or each row's own.

The factors of a mixed batch come from a list or from tables of addresses: see
`fastlora.ops.triton.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels import lora_expand, lora_linear, mixed_lora_linear, plane_sums
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.configs import sums_s_once
from fastlora.kernels.launch import cached_launches, empty, product
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.kernels.modules import Module, Weight, are_of_a_kind, has_usual_strides
from fastlora.ops.factors import Factor, address_tables_from_tensors, replace_missing_with_empty
from fastlora.ops.plans import choose_plan
from fastlora.ops.triton.address_tables import (
    align_factors,
    dropout_tables,
    lora_b_rank_row_addresses,
    lora_b_rank_rows_from_tables,
)
from fastlora.ops.triton.expand import expand_mixed_
from fastlora.ops.triton.launch_configs import chip_of, config_of
from fastlora.ops.triton.shrink import (
    mixed_shrink,
    mixed_shrink_partials,
    reduce_split_k,
    shrink_to_partials,
    to_kernel_layout,
)
from fastlora.quantized_tensor import QuantizedData

_Tensors = Sequence[torch.Tensor]
_Operand = torch.Tensor | QuantizedData | None


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: Sequence[Factor],
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    plan: str,
) -> list[torch.Tensor]:
    """Compute the forward pass of a linear layer with adapters.

    Returns a list that starts with the output y. Unless s is given, the list also contains the
    shrink output s, which a backward pass needs.
    """
    if not rows:
        lora_a, lora_b, _ = factors
        if lora_a is None or lora_b is None:
            raise ValueError("one slot has all rows, and it has no factors")
        tensors = weight, bias, s, lora_a, lora_b, scaling, seeds
        return linear_one_adapter(x, *tensors, dropout_p[0], plan)
    weights, biases, drops = [weight], [bias], dropout_tables(seeds, dropout_p)
    ups, lora_bias = (
        align_factors(replace_missing_with_empty(factors[1::3], 1)),
        align_factors(factors[2::3]),
    )
    up = lora_b_rank_row_addresses(ups, lora_bias, scaling)
    stem, own, after_shrink = "mixed_lora_train", s, False
    plan, ys = _plan_and_base_products(stem, x, weights, biases, up, plan)
    if own is None:
        downs = replace_missing_with_empty(factors[::3], 0)
        made, after_shrink = mixed_shrink(x, rows, downs, 1, drops)
        own = made[0]
    partials = own.unsqueeze(0)
    ys = _mixed_grouped_linear(stem, x, weights, biases, ys, partials, rows, up, plan, after_shrink)
    return [*ys, own] if s is None else ys


@cached_launches
def linear_at(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
    plan: str,
    shrink_range: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Compute the output of the LoRA linear layer with the given index in the address tables.

    The address tables contain the addresses of the layers' factors, and ``index`` is the layer's
    row in the tables. The batch is mixed, so its rows may use different adapters. Returns a list
    that starts with the output y. If ``shrink_range`` is given and s is not, the list also contains
    the split-K partial sums of s for the modules in this range.
    """
    found = address_tables_from_tensors(tables, max_rank, factor_dtype)
    first, stop = shrink_range or (index, index + 1)
    invariant = plan == "invariant"
    x = to_kernel_layout(x, contiguous=invariant)
    up, base = lora_b_rank_rows_from_tables(found, index), ([weight], [bias])
    plan, ys = _plan_and_base_products("mixed_lora", x, *base, up, plan)
    partials = (
        mixed_shrink_partials(x, rows, found, slice(first, stop), invariant) if s is None else s
    )
    # The mode uses one kernel, whether or not modules share the shrink.
    after_shrink = s is None and not invariant
    own = partials[:, index - first]
    ys = _mixed_grouped_linear("mixed_lora", x, *base, ys, own, rows, up, plan, after_shrink)
    return ys if s is not None or shrink_range is None else [*ys, partials]


@cached_launches
def mixed_grouped_forward(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    rows: _Tensors,
    tables: _Tensors,
    first: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return the outputs of a group of modules for a mixed batch.

    The group has 2 to 4 modules that share the input x and have adjacent table rows. The outputs
    are computed by two launches, a shrink and a linear. If many adapters may share a row tile, the
    outputs are computed by library products, a shrink, and an expand instead. Quantized weights
    must all be of one kind.
    """
    found = address_tables_from_tensors(tables, max_rank, factor_dtype)
    own, x = slice(first, first + len(weights)), to_kernel_layout(x)
    up = lora_b_rank_rows_from_tables(found, own)
    plan, ys = _plan_and_base_products("mixed_lora", x, weights, biases, up, "auto")
    s = mixed_shrink_partials(x, rows, found, own)
    return _mixed_grouped_linear("mixed_lora", x, weights, biases, ys, s, rows, up, plan, True)


@cached_launches
def grouped_forward(
    x: torch.Tensor, dropout_p: tuple[float, ...], with_s: bool, *operands: _Operand
) -> list[torch.Tensor]:
    """Compute the forward pass of a group of LoRA linear layers that share the input x.

    The layers share launches if possible. Each layer has its own launches if there is dropout, if a
    tensor's layout is not supported in a shared launch, or if the weights, biases, or factors
    differ in kind or dtype. The result is a list of the outputs. If ``with_s`` is True, the list
    also contains the s of the layers, as in `Backend.grouped_forward`. ``operands`` are the
    weights, biases, lora_a factors, lora_b factors, scalings, and seeds of the layers, in this
    order.
    """
    count: int = len(dropout_p)
    each: Any = [operands[i : i + count] for i in range(0, 6 * count, count)]
    weights, biases, lora_a, lora_b, scalings, seeds = each
    if _can_share_launch(x, weights, biases, lora_a, lora_b, seeds):
        return _linear_in_grouped_launches(
            x, weights, biases, None, lora_a, lora_b, scalings, with_s=with_s
        )
    made = [
        linear_one_adapter(x, weight, bias, None, *own, "auto")
        for weight, bias, *own in zip(*each, dropout_p, strict=True)
    ]
    return [y for y, _ in made] + ([s for _, s in made] if with_s else [])


@cached_launches
def linear_one_adapter(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    plan: str,
) -> list[torch.Tensor]:
    """Compute the output of a linear layer with one adapter.

    Returns a list that starts with the output y. Unless s is given, the list also contains the
    shrink output s, which the backward pass uses.
    """
    own = [weight], [bias], s, [lora_a], [lora_b], [scaling]
    return _linear_in_grouped_launches(x, *own, seed, dropout_p, plan, with_s=s is None)


def _linear_in_grouped_launches(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    s: torch.Tensor | None,
    lora_a: _Tensors,
    lora_b: _Tensors,
    scalings: _Tensors,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    plan: str = "auto",
    *,
    with_s: bool,
    launch: str = "coded_lora_linear",
) -> list[torch.Tensor]:
    """Compute the outputs of one or more LoRA linear layers in grouped kernel launches.

    The layers share the input x. Each launch covers all layers. Each layer has one adapter, which
    applies to all rows. The result is a list of the outputs. If ``with_s`` is True, s is appended
    to the list.

    The launches are a shrink, unless s is given, and a linear or an expand. After an expand,
    library products accumulate into y. If the shrink splits K, the linear or the expand adds the
    partial sums of s, or a launch before the expand does so (`configs.sums_s_once`). If the linear
    splits K, a third launch adds the partial sums of y. For quantized weights, ``launch`` is
    the name under which the config of the linear is chosen, and there is no library product.
    """
    sizes, r = [b.shape[0] for b in lora_b], max(b.shape[1] for b in lora_b)
    (m, k), n = x.shape, sum(sizes)
    is_quantized = isinstance(weights[0], QuantizedData)
    if not is_quantized:
        plan = choose_plan(plan, x, weights[0], r, n=n)
        launch = "lora_expand" if plan == "split" else "lora_linear"
    fused, invariant = launch != "lora_expand", plan == "invariant" and s is None
    x = to_kernel_layout(x, contiguous=invariant)
    own = shrunk = s
    if own is None or shrunk is None:
        own, shrunk = shrink_to_partials(x, lora_a, seed, dropout_p, invariant)
    config = config_of(launch, x, m, n, k, r, batch_invariant=invariant)
    if shrunk is not own and not fused:
        tiles = sum(cdiv(size, config.block_n) for size in sizes)
        if sums_s_once(chip_of(x), m, r, shrunk.shape[0], tiles):
            reduce_split_k(own, shrunk)
            shrunk = own
    s_out = own if with_s and shrunk is not own else None
    ys = [empty(x, m, size) for size in sizes]
    written, splits = ys, config.splits
    if splits > 1:
        written = [empty(x, splits, m, size, dtype=torch.float32) for size in sizes]
    blocks = weights if fused else [None] * len(weights)
    modules = [*map(Module, written, lora_b, scalings, biases, blocks)]
    if fused:
        pdl = s is None and chip_of(x).has_pdl
        lora_linear.launch_lora_linear(modules, x, shrunk, s_out=s_out, config=config, pdl=pdl)
    else:
        lora_expand.launch_lora_expand(modules, shrunk, reads_y=False, s_out=s_out, config=config)
    if splits > 1:
        config = config_of("plane_sums", x)
        plane_sums.launch_plane_sums(ys, written, config=config, pdl=chip_of(x).has_pdl)
    if not fused:
        for y, weight in zip(ys, weights, strict=True):
            product(_add_base_product_, y, x, weight)
    return [*ys, own] if with_s else ys


def _add_base_product_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add the base product ``x @ weight.T`` to y in place."""
    return y.addmm_(x, weight.t())


def _can_share_launch(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    lora_a: _Tensors,
    lora_b: _Tensors,
    seeds: Sequence[torch.Tensor | None],
) -> bool:
    """Return whether one kernel launch can compute the outputs of all given modules.

    Raises:
        TypeError: The dtype of a weight differs from that of x.
    """
    matrices = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    for weight in matrices:
        if weight.dtype != x.dtype:
            raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} (the dtype of x)")
    own = [bias for bias in biases if bias is not None]
    return (
        all(seed is None for seed in seeds)
        and all(map(has_usual_strides, (*matrices, *own, *lora_a, *lora_b)))
        and are_of_a_kind(weights)
        and len(own) in (0, len(biases))
        and len({bias.dtype for bias in own}) < 2
        and len({a.dtype for a in lora_a}) == len({b.dtype for b in lora_b}) == 1
    )


def quantized_base_products(
    x: torch.Tensor,
    weights: Sequence[QuantizedData],
    biases: Sequence[torch.Tensor | None],
    launch: str = "coded_lora_linear",
) -> list[torch.Tensor]:
    """Return a list of the base-layer outputs of modules with quantized weights.

    One launch computes all outputs. If this launch splits K, a second launch adds the partial sums.
    """
    # An adapter of rank 0, of which nothing is read.
    none, ups = empty(x, x.shape[0], 0), [empty(x, weight.shape[0], 0) for weight in weights]
    scalings = [empty(x, 1, dtype=torch.float32)] * len(weights)
    return _linear_in_grouped_launches(
        x, weights, biases, none, (), ups, scalings, with_s=False, launch=launch
    )


def _plan_and_base_products(
    stem: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    up: RankRows,
    plan: str,
) -> tuple[str, list[torch.Tensor] | None]:
    """Choose the launch plan, and compute the base products unless a fused kernel computes them.

    Returns a tuple (plan, list of the base-layer outputs). Only the plan "split" computes the base
    products separately, before the shrink and the expand. For any other plan, the second item is
    None. For dense weights, `torch.nn.functional.linear` computes the outputs. For quantized
    weights, one fastlora GEMM computes all outputs. ``stem`` names the launches, which have their
    own plans and configs.
    """
    slots, codes = up.rank.shape[-1], [w for w in weights if isinstance(w, QuantizedData)]
    if stem == "mixed_lora_train" and codes:
        plan = "split"  # for many rows, dense weights are best
    else:
        launch, n = (
            _fused_linear_launch_name(stem, weights[0]),
            sum(weight.shape[0] for weight in weights),
        )
        plan = choose_plan(plan, x, weights[0], up.largest, launch, n=n, slots=slots)
    if plan != "split":
        return plan, None
    if codes:
        return plan, quantized_base_products(x, codes, biases)
    return plan, [product(F.linear, x, *each) for each in zip(weights, biases, strict=True)]


def _fused_linear_launch_name(stem: str, weight: Weight) -> str:
    """Return the launch name of the fused linear kernel for a weight.

    The config tables list the kernel under this name. The name depends on whether the weight is
    dense or quantized.
    """
    return f"coded_{stem}_linear" if isinstance(weight, QuantizedData) else f"{stem}_linear"


def _mixed_grouped_linear(
    stem: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    base_outputs: list[torch.Tensor] | None,
    s: torch.Tensor,
    rows: _Tensors,
    up: RankRows,
    plan: str,
    after_shrink: bool,
) -> list[torch.Tensor]:
    """Compute the outputs of a group of linear layers that share an input, for a mixed batch.

    Returns a list of the outputs. ``plan`` and ``base_outputs`` are from `_plan_and_base_products`.
    If ``base_outputs`` is None, one launch computes the base products and adds the LoRA updates.
    Otherwise, an expand adds the LoRA updates to the base-layer outputs ``base_outputs`` in place.
    The group may consist of one layer.

    s is ``[splits, M, R]``, or for several modules ``[splits, G, M, R]`` with tables ``[G, S]``.
    """
    (m, k), n = x.shape, sum(weight.shape[0] for weight in weights)
    if base_outputs is not None:
        config = config_of(f"{stem}_expand", x, m, n, k, up.largest)
        expand_mixed_(base_outputs, s, rows, up, config=config, pdl=after_shrink)
        return base_outputs
    invariant = plan == "invariant"
    launch = _fused_linear_launch_name(stem, weights[0])
    config = config_of(launch, x, m, n, k, up.largest, batch_invariant=invariant)
    base = weights, biases
    return fused_mixed_linear(x, *base, s, rows, up, config=config, pdl=after_shrink)


def fused_mixed_linear(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    dropout: DropoutTables | None = None,
) -> list[torch.Tensor]:
    """Compute the outputs of LoRA linear layers for a mixed batch in one fused launch.

    The launch computes the base products and adds the LoRA updates. Returns a list of the outputs
    of all modules. s and ``pdl`` are as in `expand_mixed_`.
    """
    ys = [empty(x, x.shape[0], weight.shape[0]) for weight in weights]
    mixed_lora_linear.launch_mixed_lora_linear(
        *(ys, x, weights, biases, s, rows, up),
        config=config,
        pdl=pdl and chip_of(x).has_pdl,
        dropout=dropout,
    )
    return ys
