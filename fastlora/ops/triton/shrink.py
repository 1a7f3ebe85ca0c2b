"""Kernel launches of the shrink ``x @ lora_a.T``: one adapter for all rows, or each row's own.

The factors of a mixed batch come from a list or from tables of addresses: see
`fastlora.ops.triton.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.kernels import lora_shrink, plane_sums
from fastlora.kernels.launch import cached_launches, empty, product
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.ops.factors import AddressTables, Factor, replace_missing_with_empty
from fastlora.ops.layout import rank_to_multiple_of_16, shrink_partials_shape
from fastlora.ops.triton.address_tables import (
    align_factors,
    dropout_tables,
    lora_a_rank_row_addresses,
    max_rank_sum_of_one_adapter,
)
from fastlora.ops.triton.launch_configs import chip_of, config_of

_Tensors = Sequence[torch.Tensor]
_UsedOneLaunch = bool


def shrink(
    x: torch.Tensor,
    rows: _Tensors,
    lora_a: Sequence[Factor],
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Return the shrink output ``s = x @ lora_a.T`` of modules that share the input x.

    Each row is multiplied by the ``lora_a.T`` of its own adapter, after dropout if there are seeds.
    For G modules, s is ``[G, M, R]``. If one slot has all rows, ``rows`` is empty, and s is
    ``[M, R]``, with the modules side by side.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    if rows:
        drops = dropout_tables(seeds, dropout_p)
        return mixed_shrink(x, rows, downs, modules, drops)[0]
    return shrink_one_adapter(x, downs, seeds, dropout_p[0])


@cached_launches
def shrink_one_adapter(
    x: torch.Tensor, lora_a: _Tensors, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """Return the shrink output s for one adapter.

    s is ``[M, R]``. The columns of all modules are side by side. If the shrink splits K, a second
    launch adds the partial sums.
    """
    s, shrunk = shrink_to_partials(x, lora_a, seed, dropout_p)
    if shrunk is not s:
        reduce_split_k(s, shrunk)
    return s


def reduce_split_k(s: torch.Tensor, partials: torch.Tensor, after_shrink: bool = True) -> None:
    """Add up the partial sums of a shrink operation, and write the result to s.

    This takes a single kernel launch. ``after_shrink`` states whether the previous launch was the
    shrink.
    """
    config, pdl = config_of("plane_sums", s), after_shrink and chip_of(s).has_pdl
    plane_sums.launch_plane_sums([s], [partials], config=config, pdl=pdl)


def shrink_to_partials(
    x: torch.Tensor,
    lora_a: _Tensors,
    seed: torch.Tensor | None,
    dropout_p: float,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the split-K partial sums of a shrink, and return them with the shrink output s.

    All rows use one adapter, and ``lora_a`` contains the adapter's factor for each module. The
    result is a tuple (s, partial sums). s is ``[M, R]``, with the modules side by side.

    If K is not split, the second item is s itself. Otherwise, s is the sum of the partial sums. The
    next launch adds the partial sums and stores the result in s, which is uninitialized until then.
    Each partial sum has M rows. The stride between partial sums is a multiple of 16 elements for
    every M, because Triton would otherwise compile another kernel.
    """
    (m, k), r = x.shape, sum(a.shape[0] for a in lora_a)
    launch = "lora_shrink"
    if seed is not None:
        # A lora_a with contiguous columns is copied: otherwise, the instruction of each warp group
        # would take fewer rank rows than the swizzle of shared memory spans.
        launch = "dropout_lora_shrink"
        lora_a = [a if a.stride(1) == 1 else product(_contiguous_copy, a) for a in lora_a]
    config = config_of(launch, x, m, k=k, r=r, batch_invariant=batch_invariant)
    s = shrunk = empty(x, m, r)
    if config.splits > 1:
        rows = -(-m // 16) * 16 if r % 16 else m
        shrunk = empty(x, config.splits, rows, r, dtype=torch.float32)[:, :m]
    lora_shrink.launch_lora_shrink(
        *(shrunk, x, lora_a), seed=seed, dropout_p=dropout_p, config=config
    )
    return s, shrunk


def to_kernel_layout(x: torch.Tensor, contiguous: bool = False) -> torch.Tensor:
    """Return x in the memory layout that the kernels expect.

    x is ``[M, K]``. Its layout consists of strides and an alignment. In the expected layout, the
    last stride is 1, x begins at a multiple of 16 bytes, and the stride between rows is a multiple
    of 16 if and only if K is. x is copied if it has any other layout, for which Triton would
    compile another kernel. A copy is contiguous, and costs one read and one write of x. For
    ``M = 1``, the stride between rows is K.

    Args:
        x: The input of a linear layer.
        contiguous: Whether the result must be contiguous.
    """
    (m, k), (between, within) = x.shape, x.stride()
    has_usual_rows = m <= 1 or (between % 16 == 0) == (k % 16 == 0)
    if contiguous:
        has_usual_rows = x.is_contiguous()
    if x.data_ptr() % 16 or within != 1 or not has_usual_rows:
        x = product(_contiguous_copy, x)
    return x.view(-1).view(x.shape) if m == 1 else x


def _contiguous_copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def mixed_shrink_partials(
    x: torch.Tensor,
    rows: _Tensors,
    tables: AddressTables,
    modules: slice,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Return the split-K partial sums of s for a mixed batch.

    The result is an fp32 tensor of shape ``[splits, G, M, R]``. G is the number of adjacent
    modules that ``modules`` selects.
    """
    (m, k), address, largest = x.shape, tables.a_address[modules], tables.max_rank
    count = address.shape[0]
    shape = shrink_partials_shape(m, k, count, largest, batch_invariant)
    s = empty(x, *shape, dtype=torch.float32)
    down = RankRows(address, None, tables.rank[modules], None, tables.dtype, largest)
    r = count * largest
    config = config_of("mixed_lora_shrink", x, m, k=k, r=r, batch_invariant=batch_invariant)
    lora_shrink.launch_mixed_lora_shrink(s, x, rows, down, config=config)
    return s


def mixed_shrink(
    x: torch.Tensor, rows: _Tensors, lora_a: _Tensors, modules: int, dropout: DropoutTables | None
) -> tuple[torch.Tensor, _UsedOneLaunch]:
    """Return the shrink output s for a mixed batch, and whether one kernel launch was enough.

    s is ``[G, M, R]`` for G modules that share the input x. If K is split, a second launch adds the
    partial sums and stores the result in s, and the second item of the result is False.
    ``dropout`` must be None unless G is 1.
    """
    (m, k), slots = x.shape, len(lora_a) // modules
    lora_a = align_factors(lora_a)
    down = lora_a_rank_row_addresses(lora_a, x.device, (modules, slots))
    columns = max_rank_sum_of_one_adapter(lora_a, slots, modules)
    config = config_of("mixed_lora_train_shrink", x, m, k=k, r=columns)
    splits = shrink_partials_shape(m, k, modules, max(down.largest, 1))[0]
    s = x.new_empty(modules, m, rank_to_multiple_of_16(down.largest))
    partials = s.unsqueeze(0)
    if splits > 1:
        partials = x.new_empty(splits, *s.shape, dtype=torch.float32)
    lora_shrink.launch_mixed_lora_shrink(partials, x, rows, down, config=config, dropout=dropout)
    if splits > 1:
        reduce_split_k(s, partials)
    return s, splits == 1
