"""`adapters`: a batch whose rows belong to different adapters, or to none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.ops.seeds import draw_seeds
from fastlora.routing import checkpoints as recompute
from fastlora.routing.ids import NO_ADAPTER, OUT_OF_RANGE, check_slot_ids, checked_slots, named_ids
from fastlora.routing.in_force import is_captured, routed
from fastlora.routing.kept import RoutedLayer
from fastlora.routing.routers import Router, router_of
from fastlora.routing.routing import Group, Routing
from fastlora.sharding import several_processes, unwrapped
from fastlora.validation import AdapterStateError

if TYPE_CHECKING:
    from fastlora.layers.factors import Source


@contextlib.contextmanager
def adapters(
    model: nn.Module | Router,
    ids: Sequence[str | None] | torch.Tensor,
    *,
    seeds: Mapping[str, int] | None = None,
    validate: bool = False,
    absent_gradients: bool | None = None,
) -> Iterator[None]:
    """Within the block, every row of a forward of ``model`` uses its own adapter.

    For serving and for training: a backward may run after the block and in another thread, through
    activation checkpoints too. Blocks nest, and each thread has its own. Adapters of a pool are
    brought to the device when the block begins, and stay there, as they are, until it ends.

    One CUDA graph serves any mix: capture the block with ids in a tensor of slots on the GPU, after
    a forward outside of the capture, and write other slots into that tensor before a replay. Over a
    pool a replay finds whatever adapters its slots mean then, hot swaps included; hold a
    `AdapterPool.lease` on them meanwhile, taken after the last change of base weights where they
    use DoRA. Slots out of range give NaN rows there and no error; so do adapters with DoRA that
    nobody has leased yet, and all of them where the capture came before the pool's first. Over
    other models a replay finds the adapters as they were at the capture, and what it reads of them
    stays in memory until `fastlora.refresh`: capture again where they have changed.

    Args:
        model: A `LoraModel`, an `AdapterPool` or the model that one was made for, or a PEFT model
            that was patched; bare or in DistributedDataParallel. Which adapters are active is of no
            consequence here.
        ids: For each sample a name, or None (or ``"__base__"``) for the base model alone; or an int
            tensor of slots for each sample or token, -1 for none. A slot is an index into
            ``list(model.peft_config)``, or a pool's `AdapterPool.slot_of`. No ids are those of a
            batch without rows.
        seeds: Dropout seed of each adapter in this forward. With the same seed an adapter drops the
            same elements whatever else is in the batch. Those not given are drawn, in training.
        validate: Check slots on a GPU before any work, which waits for them. Otherwise rows whose
            slot does not exist come out NaN, and a later block of the model raises, the next one
            where the GPU has come so far: no block waits.
        absent_gradients: Whether a backward gives zeros, and not None, to adapters that train and
            have no rows here. DDP and FSDP2 need that where another process may have rows for
            them. None: where torch.distributed runs with several processes.

    Raises:
        AdapterNotFoundError: A name or slot that is not there.
        AdapterStateError: An adapter is merged, or a pool is closed, or was made without max_rank
            and a CUDA graph is being captured.
        RuntimeError: Blocks of a thread end in another order than the reverse of their beginning.
        PoolFullError: A pool is too small for the batch's adapters.
        CheckpointError: A pool cannot read one of them.
        TypeError, ValueError: ``model`` or ``ids`` is not as described.
    """
    with contextlib.ExitStack() as held:
        if absent_gradients is None:
            absent_gradients = several_processes()
        routing = router_of(unwrapped(model)).routing(ids, seeds, validate, held)
        routing.group.unchecked.check()
        routing = dataclasses.replace(routing, absent_gradients=absent_gradients)
        recompute.keep_routing()
        with routed(routing):
            yield
        if routing.ids.is_cuda and not torch.cuda.is_current_stream_capturing():
            routing.check_ids()


def parameters_routing(
    group: Group,
    layers: Sequence[RoutedLayer],
    known: Sequence[str],
    source: Callable[[Sequence[str]], Source],
    ids: Sequence[str | None] | torch.Tensor,
    seeds: Mapping[str, int] | None,
    validate: bool,
) -> Routing:
    """Returns the routing of a block to adapters that are parameters of a model's layers.

    A slot is an index into ``known``, the model's adapters; ``source`` makes the source of some.

    Raises:
        AdapterStateError: An adapter is merged.
        AdapterNotFoundError: A name or slot that is not there.
    """
    for module in layers:
        merged = getattr(module, "merged_adapters", None)
        if merged:
            raise AdapterStateError(
                f"adapters {merged} are merged into the base weights, which every row shares; "
                "call unmerge_adapter() first"
            )
    known = tuple(known)
    if not isinstance(ids, torch.Tensor):
        names, slots = named_ids(known, ids)
    elif is_captured(ids) or (ids.is_cuda and not validate):
        check_slot_ids(ids)
        ids = ids.to(torch.int64)
        outside = (ids < NO_ADAPTER) | (ids >= len(known))
        names, slots = known, ids.masked_fill(outside, OUT_OF_RANGE)
    else:
        names, slots = known, checked_slots(ids, known)
    acts = any(layer.training for layer in layers)
    drawn = draw_seeds(names, seeds, draw=acts)
    whole = Routing(group, known, _among(known, names, slots), drawn, source(known), layers)
    if names != known:
        whole = dataclasses.replace(whole, seeds=_spread(drawn, known, names))
    return Routing(group, names, slots, drawn, source(names), layers, whole=whole)


def _among(known: tuple[str, ...], names: tuple[str, ...], slots: torch.Tensor) -> torch.Tensor:
    """Returns slots ``[B]`` of ``names`` as slots of ``known``, in a tensor of its own.

    If it were a tensor that a routing has elsewhere too, compiled graphs would be guarded by that.
    """
    if names == known or not names:
        return slots.clone()
    place = {name: index for index, name in enumerate(known)}
    table = torch.tensor([*(place[name] for name in names), NO_ADAPTER], device=slots.device)
    return table[slots.clamp(min=NO_ADAPTER)]


def _spread(seeds: torch.Tensor, known: tuple[str, ...], names: tuple[str, ...]) -> torch.Tensor:
    """Returns the seeds of ``names`` among those of ``known``, zeros for others."""
    place = {name: index for index, name in enumerate(known)}
    spread = torch.zeros(len(known), dtype=torch.int64)
    spread[[place[name] for name in names]] = seeds
    return spread
