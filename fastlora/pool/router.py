"""Routing of a batch to the adapters of a pool, which are leased while the batch runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastlora.layers.adapter_factors import PoolAdapterSource
from fastlora.ops.backend import MAX_LAYERS_PER_LAUNCH
from fastlora.ops.seeds import draw_seeds
from fastlora.pool.address_tables import lookup_or_negative_if_out_of_range
from fastlora.routing.active import is_capturing_cuda_graph
from fastlora.routing.ids import (
    OUT_OF_RANGE,
    check_one_dimensional_integer_ids,
    check_slots_and_copy_to_cpu,
    names_and_slots,
)
from fastlora.routing.routing import Routing
from fastlora.validation import AdapterStateError, ConfigError

# Largest rank to expect in a pool without a limit.
_COMMON_RANK = 64


def lease_batch_routing(
    pool: Any,
    ids: Sequence[str | None] | torch.Tensor,
    seeds: Mapping[str, int] | None,
    validate: bool,
    exit_stack: contextlib.ExitStack,
) -> Routing:
    """Lease the adapters of a batch, and return the routing that assigns adapters to rows.

    The slots of the routing are the columns of the pool's tables.

    Args:
        pool: The `AdapterPool`.
        ids: Adapter names or slots, as in `fastlora.adapters`.
        seeds: Dropout seeds, as in `fastlora.adapters`.
        validate: Whether to check slots on a GPU, as in `fastlora.adapters`.
        exit_stack: Exit stack of the block. The lease ends when the stack is closed.
    """
    if not isinstance(ids, torch.Tensor):
        names, places = names_and_slots(None, ids)
        lease = exit_stack.enter_context(pool.lease(names))
        max_rank = lease.max_rank or 1  # if no row has an adapter, the kernels for small ranks run
        columns = torch.tensor(
            [loaded.column for loaded in lease.loaded_adapters], dtype=torch.int64, device="cpu"
        )
        columns = lookup_or_negative_if_out_of_range(columns, places)
    elif is_capturing_cuda_graph(ids):
        return graph_capture_routing(pool, ids)
    else:
        check_one_dimensional_integer_ids(ids)
        lease = exit_stack.enter_context(pool.lease_loaded())
        # A block with slot ids may be the warmup for the capture of a CUDA graph, whose buffers
        # have the size for the largest rank.
        max_rank = pool.max_rank or lease.max_rank or 1
        # The column of each slot.
        table = torch.full((pool.max_adapters,), OUT_OF_RANGE, device="cpu")
        in_slots: list[str | None] = [None] * pool.max_adapters
        for loaded in lease.loaded_adapters:
            table[loaded.slot] = loaded.column
            in_slots[loaded.slot] = loaded.name
        if not ids.is_cuda or validate:
            check_slots_and_copy_to_cpu(ids, in_slots)
        columns = lookup_or_negative_if_out_of_range(table, ids)
    loaded_adapters: list[Any] = [None] * pool.tables.rank.shape[1]
    for loaded in lease.loaded_adapters:
        loaded_adapters[loaded.column] = loaded
    by_column = tuple("" if loaded is None else loaded.name for loaded in loaded_adapters)
    source, fixed = (
        PoolAdapterSource(tuple(loaded_adapters), pool.tables.as_kernel_tables(rank, pool.dtype))
        for rank in (max_rank, pool.max_rank or lease.max_rank or 1)
    )
    drawn = draw_seeds(by_column, seeds, draw=False)  # a pool's adapters have no dropout
    # The columns are cloned, because compiled graphs would guard on a tensor that the routing also
    # references elsewhere. The pool's largest rank is used, because compiled graphs guard on the
    # rank and a batch with other adapters must not cause a recompilation.
    whole = Routing(pool.group, by_column, columns.clone(), drawn, fixed)
    return Routing(pool.group, by_column, columns, drawn, source, whole=whole)


def sample_routing_per_rank(pool: Any, ranks: Sequence[int] | None) -> list[Routing]:
    """Return an example routing of a pool for each rank.

    `warm_up` compiles kernels for the example routings. If ``ranks`` is given, there is one routing
    for each of these ranks. Otherwise, ranks that share kernel configs share one routing. The
    routing with the largest rank comes first. Each routing has as many slots as a batch of the
    pool, and all slots are empty. A launch processes the rank rows of 1 to `MAX_LAYERS_PER_LAUNCH`
    modules, in blocks of a power of two.

    Args:
        pool: The `AdapterPool`.
        ranks: Ranks of adapters, or None for all ranks that the pool accepts, or that are common.
    """
    largest = pool.max_rank or _COMMON_RANK
    if ranks is not None and pool.max_rank is not None and max(ranks) > pool.max_rank:
        raise ConfigError(f"rank {max(ranks)} exceeds the pool's max_rank {pool.max_rank}")
    if ranks is None:
        blocks = [1 << power for power in range(4, 12)]
        ends = {block // count for block in blocks for count in range(1, MAX_LAYERS_PER_LAUNCH + 1)}
        ranks = [*(rank for rank in ends if rank < largest), largest]
    nobody = (None,) * pool.tables.rank.shape[1]
    found = []
    for rank in sorted(ranks, reverse=True):
        source = PoolAdapterSource(nobody, pool.tables.as_kernel_tables(rank, pool.dtype))
        ids, seeds = (
            torch.zeros(1, dtype=torch.int64, device="cpu"),
            draw_seeds(nobody, None, draw=False),
        )
        found.append(Routing(pool.group, ("",) * len(nobody), ids, seeds, source))
    return found


def graph_capture_routing(pool: Any, ids: torch.Tensor) -> Routing:
    """Return a routing for use while a CUDA graph is captured.

    The graph looks up the adapter of each slot on the device at every replay.

    Raises:
        AdapterStateError: The pool has no ``max_rank``.
    """
    check_one_dimensional_integer_ids(ids)
    if pool.max_rank is None:
        raise AdapterStateError(
            "a CUDA graph that uses a pool needs AdapterPool(max_rank=...), because the graph's "
            "buffers are sized for the largest rank that may be loaded"
        )
    nobody = (None,) * pool.tables.rank.shape[1]
    source = PoolAdapterSource(nobody, pool.tables.as_kernel_tables(pool.max_rank, pool.dtype))
    seeds = draw_seeds(nobody, None, draw=False)
    columns = pool.tables.columns_of_slots(ids)
    return Routing(pool.group, nobody, columns, seeds, source, captured=True)
