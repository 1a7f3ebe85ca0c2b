"""The `adapters` context manager, which runs batches whose rows use different adapters, or none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastlora.deprecation import renamed_arguments
from fastlora.ops.seeds import draw_seeds
from fastlora.routing import activation_checkpointing as recompute
from fastlora.routing.active import activate_routing, is_capturing_cuda_graph
from fastlora.routing.caches import RoutedLayerProtocol
from fastlora.routing.ids import (
    NO_ADAPTER,
    OUT_OF_RANGE,
    check_one_dimensional_integer_ids,
    check_slots_and_copy_to_cpu,
    names_and_slots,
)
from fastlora.routing.routers import AdapterRouter, router_of
from fastlora.routing.routing import RoutedLayerGroup, Routing
from fastlora.sharding import has_multiple_processes, unwrap_ddp
from fastlora.validation import AdapterStateError

if TYPE_CHECKING:
    from fastlora.layers.adapter_factors import AdapterSource


@renamed_arguments(absent_gradients="unused_gradients")
@contextlib.contextmanager
def adapters(
    model: nn.Module | AdapterRouter,
    ids: Sequence[str | None] | torch.Tensor,
    *,
    seeds: Mapping[str, int] | None = None,
    validate: bool = False,
    unused_gradients: bool | None = None,
) -> Iterator[None]:
    """Context manager in which each row of a batch passed to ``model`` uses its own adapter.

    The block can be used for serving and for training. A backward pass may run after the block has
    ended and in another thread, even if it recomputes activation checkpoints. Blocks may be nested,
    and each thread has its own blocks. A pool's adapters are moved to the device when the block
    begins. They stay there, unchanged, until the block ends.

    One CUDA graph serves any mix of adapters. Run a forward pass outside of the capture first. Then
    capture the block with ids in a tensor of slots on the GPU, and write other slots into that
    tensor before a replay.

    Over a pool, a replay uses the adapters that its slots refer to at that time, including
    hot-swapped ones. Keep an `AdapterPool.lease` on these adapters open during the replay. If they
    use DoRA, take the lease after the last change of the base weights. Rows with a slot out of
    range become NaN without an error. The same happens to rows of a DoRA adapter that has never
    been leased, and to rows of any DoRA adapter if the graph was captured before the pool had its
    first DoRA adapter.

    Over other models, a replay uses the adapters as they were at the capture. The tensors that it
    reads stay in memory until `fastlora.clear_caches`. Capture the graph again if the adapters have
    changed.

    Args:
        model: A `LoraModel`, an `AdapterPool`, the model for which a pool was created, or a patched
            PEFT model. A patched PEFT model is a `PeftModel` or a model with a ``peft_config`` that
            PEFT has added LoRA layers to. The model may be wrapped in DistributedDataParallel. The
            active adapters do not matter within the block.
        ids: For each sample the name of an adapter, or None (or ``"__base__"``) for the base model
            alone. Alternatively, an int tensor of slots for each sample or token, with -1 for none.
            A slot is an index into ``list(model.peft_config)``, or for a pool the result of
            `AdapterPool.slot_of`. An empty sequence is valid for a batch without rows.
        seeds: Dropout seed of each adapter in this block. With the same seed, an adapter drops the
            same elements whatever else is in the batch. Each call of a layer in the block drops
            other elements, except in compiled graphs. Missing seeds are drawn in training, or when
            dropout first needs them. Convolutions in compiled graphs ignore the seeds.
        validate: Whether to check slots on a GPU before any work, which waits for the GPU.
            Otherwise, the host does not wait: rows with an invalid slot become NaN, and a later
            block of the model raises once the GPU has reported the error.
        unused_gradients: Whether trainable adapters without rows in the batch get gradients of
            zeros instead of None in a backward pass. DDP and FSDP2 need this if another process may
            have rows for them. The default, None, enables it if torch.distributed runs with several
            processes.

    Raises:
        AdapterNotFoundError: A name or slot does not exist.
        AdapterStateError: An adapter is merged; or a pool is closed; or a CUDA graph is being
            captured over a pool that was created without max_rank.
        RuntimeError: The blocks of a thread do not end in the reverse order of their beginning, or
            another asyncio task in this thread has an open block.
        PoolFullError: A pool is too small for the batch's adapters.
        CheckpointError: A pool cannot read one of the adapters.
        TypeError, ValueError: ``model`` or ``ids`` does not match the description above.
    """
    with contextlib.ExitStack() as held:
        if unused_gradients is None:
            unused_gradients = has_multiple_processes()
        routing = router_of(unwrap_ddp(model)).routing(ids, seeds, validate, held)
        routing.group.unchecked.raise_pending_errors()
        routing = dataclasses.replace(routing, unused_gradients=unused_gradients)
        recompute.patch_activation_checkpointing()
        with activate_routing(routing):
            yield
        if routing.ids.is_cuda and not torch.cuda.is_current_stream_capturing():
            routing.defer_id_check()


@torch.inference_mode(False)  # A backward pass may need the ids and the seeds.
def routing_from_parameters(
    group: RoutedLayerGroup,
    layers: Sequence[RoutedLayerProtocol],
    adapter_names: Sequence[str],
    source_for_names: Callable[[Sequence[str]], AdapterSource],
    ids: Sequence[str | None] | torch.Tensor,
    seeds: Mapping[str, int] | None,
    validate: bool,
) -> Routing:
    """Return the routing of a batch for layers that store their adapters as parameters.

    The routing is for one block. If ``ids`` is a tensor, it contains slots, which are indices into
    ``adapter_names``, the names of the model's adapters. ``source_for_names`` returns the
    `AdapterSource` for a sequence of these names.

    Raises:
        AdapterStateError: An adapter is merged.
        AdapterNotFoundError: A name or slot does not exist.
    """
    for module in layers:
        merged = getattr(module, "merged_adapters", None)
        if merged:
            raise AdapterStateError(
                f"adapters {merged} are merged into the base weights, which all rows share; call "
                "unmerge_adapter() first"
            )
    adapter_names = tuple(adapter_names)
    if not isinstance(ids, torch.Tensor):
        names, slots = names_and_slots(adapter_names, ids)
    elif is_capturing_cuda_graph(ids) or (ids.is_cuda and not validate):
        check_one_dimensional_integer_ids(ids)
        ids = ids.to(torch.int64)
        outside = (ids < NO_ADAPTER) | (ids >= len(adapter_names))
        names, slots = adapter_names, ids.masked_fill(outside, OUT_OF_RANGE)
    else:
        names, slots = adapter_names, check_slots_and_copy_to_cpu(ids, adapter_names)
    trains = any(layer.training for layer in layers)
    drawn = draw_seeds(names, seeds, draw=trains)
    undrawn = [] if trains else [n for n, name in enumerate(names) if name not in (seeds or ())]
    whole = Routing(
        group,
        adapter_names,
        _convert_slots_to_known(adapter_names, names, slots),
        drawn,
        source_for_names(adapter_names),
        layers,
    )
    if names != adapter_names:
        whole = dataclasses.replace(
            whole, seeds=_spread_seeds_to_known(drawn, adapter_names, names)
        )
    source = source_for_names(names)
    return Routing(group, names, slots, drawn, source, layers, whole=whole, undrawn=undrawn)


def sample_routings_from_parameters(
    group: RoutedLayerGroup,
    layers: Sequence[RoutedLayerProtocol],
    adapter_names: Sequence[str],
    source_for_names: Callable[[Sequence[str]], AdapterSource],
    max_adapters: int | None,
    allowed_ranks: Sequence[int] | None,
) -> list[Routing]:
    """Return example routings for adapters that are stored as parameters of the layers.

    `warm_up` uses these routings to cover the ranks and dtypes of the adapters. For each
    combination of rank and dtype, one routing has a single adapter. Another routing also has other
    adapters of at most this rank, up to ``max_adapters`` in total. If ``allowed_ranks`` is given,
    there are routings only for these ranks. See
    `fastlora.routing.routers.AdapterRouter.sample_routings`.
    """
    sizes: dict[str, tuple[int, torch.dtype]] = {}
    for layer in layers:
        if getattr(layer, "is_linear", False):
            for name, module in cast("Any", layer).lora_A.items():
                rank, dtype = module.weight.shape[0], module.weight.dtype
                sizes[name] = max(rank, sizes.get(name, (0, dtype))[0]), dtype
    found, sampled = [], set()
    for name in adapter_names:
        if name not in sizes or sizes[name] in sampled:
            continue
        if allowed_ranks is not None and sizes[name][0] not in allowed_ranks:
            continue
        sampled.add(sizes[name])
        others = [
            n for n in adapter_names if n != name and n in sizes and sizes[n][0] <= sizes[name][0]
        ]
        for names in dict.fromkeys(((name,), (name, *others)[:max_adapters])):
            ids = torch.zeros(1, dtype=torch.int64, device="cpu")
            found.append(
                routing_from_parameters(group, layers, names, source_for_names, ids, None, False)
            )
    return found


def _convert_slots_to_known(
    known: tuple[str, ...], names: tuple[str, ...], slots: torch.Tensor
) -> torch.Tensor:
    """Convert slots to indices into the tuple of known adapter names.

    ``slots`` contains indices into ``names``, and the result contains indices into ``known``. The
    result is always a new tensor ``[B]``, because a tensor that the routing also refers to
    elsewhere would add a guard to compiled graphs.
    """
    if names == known or not names:
        return slots.clone()
    place = {name: index for index, name in enumerate(known)}
    table = torch.tensor([*(place[name] for name in names), NO_ADAPTER], device=slots.device)
    return table[slots.clamp(min=NO_ADAPTER)]


def _spread_seeds_to_known(
    seeds: torch.Tensor, known: tuple[str, ...], seeded_names: tuple[str, ...]
) -> torch.Tensor:
    """Return a tensor with one seed for each name in ``known``.

    ``seeds`` contains the seeds for the adapters in ``seeded_names``. All other adapters get the
    seed 0.
    """
    place = {name: index for index, name in enumerate(known)}
    spread = torch.zeros(len(known), dtype=torch.int64, device="cpu")
    spread[[place[name] for name in seeded_names]] = seeds
    return spread
