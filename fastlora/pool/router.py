"""Batches over a pool: the lease and the routing of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastlora.layers.factors import Pool
from fastlora.ops.graph_routing import PoolGraphRouting
from fastlora.routing.checkpoints import keep_routing
from fastlora.routing.ids import NO_ADAPTER, OUT_OF_RANGE, check_slot_ids, checked_slots, named_ids
from fastlora.routing.in_force import routed
from fastlora.routing.routing import KernelRouting, Routing, draw_seeds, is_captured
from fastlora.validation import AdapterStateError


@contextlib.contextmanager
def pool_block(pool: Any, names: Sequence[str | None]) -> Iterator[None]:
    """`fastlora.adapters` for the names of a pool's adapters, one for each sample."""
    with contextlib.ExitStack() as held:
        routing = pool_routing(pool, names, None, False, held)
        keep_routing()
        with routed(routing):
            yield


def pool_routing(
    pool: Any,
    ids: Sequence[str | None] | torch.Tensor,
    seeds: Mapping[str, int] | None,
    validate: bool,
    held: contextlib.ExitStack,
) -> Routing:
    """Returns a routing to adapters of a pool, leased until ``held`` closes.

    Args:
        pool: An `AdapterPool`.
        ids, seeds, validate: As in `fastlora.adapters`.
        held: Takes the lease.
    """
    if not isinstance(ids, torch.Tensor):
        names, slots = named_ids(None, ids)
        lease = held.enter_context(pool.lease(names))
    elif is_captured(ids):
        return captured_pool_routing(pool, ids)
    else:
        check_slot_ids(ids)
        lease = held.enter_context(pool.lease_resident())
        names = tuple(resident.name for resident in lease.residents)
        # From the pool's slots to places in the lease.
        places = torch.full((pool.max_adapters,), OUT_OF_RANGE)
        in_slots: list[str | None] = [None] * pool.max_adapters
        for place, resident in enumerate(lease.residents):
            places[resident.slot] = place
            in_slots[resident.slot] = resident.name
        if not ids.is_cuda or validate:
            checked_slots(ids, in_slots)
        slots = looked_up(places, ids)
    columns = torch.tensor([resident.column for resident in lease.residents], dtype=torch.int64)
    kernels = KernelRouting(
        looked_up(columns, slots), pool.tables, pool.max_rank or lease.max_rank, pool.dtype
    )
    # A copy: whether it is a tensor that the routing has elsewhere too would be guarded.
    columns = kernels.columns.clone()
    graph = PoolGraphRouting(columns, pool.tables, kernels.max_rank, pool.dtype)
    return Routing(
        pool.group,
        names,
        slots,
        draw_seeds(names, seeds, draw=False),  # a pool's adapters have no dropout
        Pool(lease.residents),
        kernels=[kernels],
        graph=graph,
    )


def captured_pool_routing(pool: Any, ids: torch.Tensor) -> Routing:
    """Returns the routing of a CUDA graph: slots are looked up at every replay, on the device.

    Raises:
        AdapterStateError: The pool was made without max_rank.
    """
    check_slot_ids(ids)
    if pool.max_rank is None:
        raise AdapterStateError(
            "a CUDA graph over a pool needs AdapterPool(max_rank=...): its buffers are as large "
            "as the largest rank that may ever be loaded"
        )
    kernels = KernelRouting(pool.tables.columns(ids), pool.tables, pool.max_rank, pool.dtype)
    return Routing(pool.group, (), ids, (), Pool(()), kernels=[kernels], captured=True)


def looked_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns ``table[ids]``; -1 stays, and what is out of range becomes -2. Waits for nothing."""
    table = table.to(ids.device, non_blocking=True)
    ids = ids.to(torch.int64)
    outside = (ids < 0) | (ids >= table.numel())
    found = table[ids.clamp(0, table.numel() - 1)] if table.numel() else torch.zeros_like(ids)
    return torch.where(outside, torch.where(ids == NO_ADAPTER, NO_ADAPTER, OUT_OF_RANGE), found)
