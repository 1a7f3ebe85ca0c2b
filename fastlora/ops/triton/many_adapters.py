"""Launches of a forward where each row has its own adapter: shrink, linear, expand; DoRA's scales.

The kernels read factors behind addresses: see `fastlora.ops.triton.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastlora.coded_weight import Coded
from fastlora.kernels import (
    mixed_dora_scale,
    mixed_lora_expand,
    mixed_lora_linear,
    mixed_lora_shrink,
    plane_sums,
)
from fastlora.kernels.launch import empty, kept, product
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.kernels.modules import Weight
from fastlora.kernels.tables import KernelConfig
from fastlora.ops.factors import Tables, tables_of
from fastlora.ops.layout import columns_of, planes_shape
from fastlora.ops.plans import choose_plan
from fastlora.ops.triton.configs import chip_of, config_of
from fastlora.ops.triton.one_adapter import products_of_codes, whole_rows
from fastlora.ops.triton.tables import (
    aligned_blocks,
    down_rows,
    max_columns_of,
    up_rows_at,
)

_Tensors = Sequence[torch.Tensor]


@kept
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
    siblings: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Returns y of one module, and its siblings' s if it is the first of them."""
    found = tables_of(tables, max_rank, factor_dtype)
    first, stop = siblings or (index, index + 1)
    invariant = plan == "invariant"
    if invariant:
        x = whole_rows(x)
    up, base = up_rows_at(found, index), ([weight], [bias])
    plan, ys = base_products("mixed_lora", x, *base, up, plan)
    planes = shrink_at(x, rows, found, slice(first, stop), invariant) if s is None else s
    # One kernel in the mode, whether siblings shared the shrink or not.
    after_shrink = s is None and not invariant
    own = planes[:, index - first]
    ys = linears_mixed("mixed_lora", x, *base, ys, own, rows, up, plan, after_shrink)
    return ys if s is not None or siblings is None else [*ys, planes]


@kept
def siblings_at(
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    rows: _Tensors,
    tables: _Tensors,
    first: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Returns y of 2 to 4 modules that are fed by the same x, neighbours in the tables.

    Two launches: a shrink, and a linear. Or, where many adapters may share a row tile, the
    library's products, a shrink, and an expand. Codes of all are of one kind.
    """
    found = tables_of(tables, max_rank, factor_dtype)
    own = slice(first, first + len(weights))
    up = up_rows_at(found, own)
    plan, ys = base_products("mixed_lora", x, weights, biases, up, "auto")
    s = shrink_at(x, rows, found, own)
    return linears_mixed("mixed_lora", x, weights, biases, ys, s, rows, up, plan, True)


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
    up = up_rows_at(found, index)
    add_rank_rows_([y], s[:, 0], rows, up, config=config, pdl=True)


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
        *(y, whole_bias, rows, scale_address[index]),
        config=config_of("mixed_dora_scale", y, *y.shape),
    )


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


def shrink_listed(
    x: torch.Tensor, rows: _Tensors, lora_a: _Tensors, modules: int, dropout: DropoutTables | None
) -> tuple[torch.Tensor, bool]:
    """Returns s ``[G, M, R]``, and whether one launch made it. Dropout is that of one module."""
    (m, k), slots = x.shape, len(lora_a) // modules
    lora_a = aligned_blocks(lora_a)
    down = down_rows(lora_a, x.device, (modules, slots))
    columns = max_columns_of(lora_a, slots, modules)
    config = config_of("mixed_lora_train_shrink", x, m, k=k, r=columns)
    splits = planes_shape(m, k, modules, max(down.largest, 1))[0]
    s = x.new_empty(modules, m, columns_of(down.largest))
    planes = s.unsqueeze(0)
    if splits > 1:
        planes = x.new_empty(splits, *s.shape, dtype=torch.float32)
    _shrink_mixed(planes, x, rows, down, config=config, dropout=dropout)
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
    dropout: DropoutTables | None = None,
) -> None:
    """Writes every row's s, ``[splits, G, M, R]``; one launch."""
    mixed_lora_shrink.launch_mixed_lora_shrink(
        *(planes, x, rows, down),
        config=config,
        dropout=dropout,
    )


def base_products(
    stem: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    up: RankRows,
    plan: str,
) -> tuple[str, list[torch.Tensor] | None]:
    """Returns the plan, and with "split" the bases' GEMMs: ahead of the shrink and its dependent.

    They are the library's, or of codes one of ours for all. ``stem`` names the launches, which have
    plans and configs of their own.
    """
    slots, codes = up.rank.shape[-1], [w for w in weights if isinstance(w, Coded)]
    if stem == "mixed_lora_train" and codes:
        plan = "split"  # which is for many rows, where weights are matrices
    else:
        launch, n = linear_launch(stem, weights[0]), sum(weight.shape[0] for weight in weights)
        plan = choose_plan(plan, x, weights[0], up.largest, launch, n=n, slots=slots)
    if plan != "split":
        return plan, None
    if codes:
        return plan, products_of_codes(x, codes, biases)
    return plan, [product(F.linear, x, *each) for each in zip(weights, biases, strict=True)]


def linear_launch(stem: str, weight: Weight) -> str:
    """Returns the name of a fused launch over a weight."""
    return f"coded_{stem}_linear" if isinstance(weight, Coded) else f"{stem}_linear"


def linears_mixed(
    stem: str,
    x: torch.Tensor,
    weights: Sequence[Weight],
    biases: Sequence[torch.Tensor | None],
    ys: list[torch.Tensor] | None,
    s: torch.Tensor,
    rows: _Tensors,
    up: RankRows,
    plan: str,
    after_shrink: bool,
) -> list[torch.Tensor]:
    """Returns y of each module, plan and ys as `base_products` gave them; one launch.

    For s ``[splits, M, R]``, or of several modules ``[splits, G, M, R]`` and tables ``[G, S]``.
    """
    (m, k), n = x.shape, sum(weight.shape[0] for weight in weights)
    if ys is not None:
        config = config_of(f"{stem}_expand", x, m, n, k, up.largest)
        add_rank_rows_(ys, s, rows, up, config=config, pdl=after_shrink)
        return ys
    invariant = plan == "invariant"
    launch = linear_launch(stem, weights[0])
    config = config_of(launch, x, m, n, k, up.largest, batch_invariant=invariant)
    base = weights, biases
    return products_and_rank_rows(x, *base, s, rows, up, config=config, pdl=after_shrink)


def add_rank_rows_(
    ys: Sequence[torch.Tensor],
    s: torch.Tensor,
    rows: Sequence[torch.Tensor],
    up: RankRows,
    *,
    config: KernelConfig,
    pdl: bool = False,
    dropout: DropoutTables | None = None,
) -> None:
    """Adds every row's rank rows to y ``[M, N]`` of each module, s as in `linears_mixed`; a launch.

    ``pdl`` says that the launch before is the shrink that made s.
    """
    mixed_lora_expand.launch_mixed_lora_expand(
        *(ys, s, rows, up),
        config=config,
        pdl=pdl and chip_of(s).has_pdl,
        dropout=dropout,
    )


def products_and_rank_rows(
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
    """Returns each base's product with every row's rank rows in it, ``[M, N]``; one launch.

    s and ``pdl`` are as in `add_rank_rows_`.
    """
    ys = [empty(x, x.shape[0], weight.shape[0]) for weight in weights]
    mixed_lora_linear.launch_mixed_lora_linear(
        *(ys, x, weights, biases, s, rows, up),
        config=config,
        pdl=pdl and chip_of(x).has_pdl,
        dropout=dropout,
    )
    return ys
