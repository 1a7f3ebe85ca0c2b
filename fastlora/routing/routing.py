"""`Routing`, an immutable object that assigns an adapter to each row of a model's forward pass.

Inside ``with fastlora.adapters(model, ids):``, every LoRA layer of the model gets the adapters of
its rows from a `Routing`, which is stored per thread. Layers may have rows in any shape. Ids are
per sample or per token. In a layer with M rows and B ids, each id applies to M / B consecutive
rows.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.ops.rows import Rows, sort_rows
from fastlora.ops.seeds import (
    derive_seeds_of_call,
    draw_seeds,
    dropout_seeds_of_layers,
)
from fastlora.routing.caches import (
    PackedAdapterSet,
    PackedAdapterSetsCache,
    RoutedLayerProtocol,
    RoutingCache,
    cuda_stream_handle,
)
from fastlora.routing.ids import (
    NO_ADAPTER,
    DeferredIdChecks,
    each_id_covers_whole_entries,
    ids_divide_rows,
)
from fastlora.routing.row_checks import ModelRowOrderChecks, raise_partial_batch
from fastlora.validation import AdapterNotFoundError, AdapterStateError
from fastlora.weights_version import UncopiedCache

if TYPE_CHECKING:
    from fastlora.layers.adapter_factors import AdapterSource

# A block keeps the dropout seeds of all layers for this many numbers of calls, on each device.
_MOST_SEEDS = 16


class RoutedLayerGroup(UncopiedCache):
    """The routing group of a model: all routed layers of the model, which use the same `Routing`.

    The group stores the state that these layers share. A copied or unpickled model gets a new
    group, which has not seen a forward pass.

    Attributes:
        packs: The cache of the model's adapter sets.
        unchecked: Batches with ids that the host has not checked yet.
        row_checks: Checks of the rows that layers get; None until layers have joined.
        unfinished: Results that layers computed for other layers and that have not been taken; see
            `fastlora.layers.shared_input.Results`. The keys are the thread, the ``id`` of the
            input, and the ``id`` of the results.
    """

    def __init__(self) -> None:
        self.packs = PackedAdapterSetsCache()
        self.unchecked = DeferredIdChecks()
        self.row_checks: ModelRowOrderChecks | None = None
        self.unfinished: dict[tuple[int, int, int], Any] = {}
        self._open = 0
        self._lock = threading.Lock()

    def change_open_blocks(self, change: int) -> None:
        """Add ``change`` to the number of open blocks.

        ``change`` is 1 or -1. The number includes the group's open blocks in all threads.
        """
        with self._lock:
            self._open += change

    def discard_unused_results(self) -> None:
        """Discard the results that were computed in advance but not used.

        These are results that this thread computed for layers that were then not called.
        """
        if self.unfinished:
            thread = threading.get_ident()
            for place in [place for place in [*self.unfinished] if place[0] == thread]:
                results = self.unfinished.pop(place, None)
                if results is not None:
                    results.discard_untaken()

    @property
    def has_open_blocks(self) -> bool:
        """Whether any blocks are open.

        The blocks of all threads count, but only those that use this group.
        """
        return bool(self._open)

    def check_no_open_blocks(self, operation: str) -> None:
        """Raise `AdapterStateError` if an operation is called while blocks are open.

        The blocks of all threads count, but only those that use this group.

        Args:
            operation: Name of the method that would change the adapters or weights of an open
                block's rows.
        """
        if self.has_open_blocks:
            raise AdapterStateError(
                f"{operation}() cannot be called while a fastlora.adapters() block is open or a "
                "call with adapter_names= is in progress for this model (open blocks in all "
                f"threads: {self._open}), because this method would remove, disable, or change "
                f"adapters or weights that are in use. Call {operation}() after these blocks and "
                "calls have finished"
            )


@dataclass(frozen=True, eq=False)
class Routing:
    """The routing of a batch, which assigns an adapter to each sample or token.

    Attributes:
        group: The group of layers that the routing applies to.
        names: Adapter of each slot; an empty string for an empty slot.
        ids: Slot of each sample or token, ``[B]`` int64; -1 for none. The caller has no reference
            to them. On a GPU they are not checked yet, and -2 stands for an id that was out of
            range.
        seeds: Dropout seed of each slot for this block, int64 ``[S]`` on the CPU.
        source: The source of the slots' adapters.
        layers: The model's routed modules when the block began.
        unused_gradients: Whether trainable adapters without rows get zeros as gradients.
        whole: The routing of the same batch for compiled graphs. It has all adapters of the model,
            so another mix changes only the contents of tensors. None if graphs are not supported.
        captured: Whether the slots belong to a CUDA graph and are looked up at its replays. The
            adapters are then unknown.
        undrawn: Slots whose seeds are drawn when dropout first needs them, because the block began
            in evaluation mode.
        dropout_calls: Number of calls with dropout in the block so far, by layer number.
        recomputes: Whether a checkpoint uses this copy of the routing to recompute a forward pass.
        cache: The cache of this routing, which lasts for the block.
    """

    group: RoutedLayerGroup
    names: tuple[str, ...]
    ids: torch.Tensor
    seeds: torch.Tensor
    source: AdapterSource
    layers: Sequence[Any] = ()
    unused_gradients: bool = False
    whole: Routing | None = None
    captured: bool = False
    undrawn: list[int] = field(default_factory=list)
    dropout_calls: dict[int, int] = field(default_factory=dict)
    recomputes: bool = False
    cache: RoutingCache = field(default_factory=RoutingCache, repr=False)

    def sorted_rows(self, m: int, device: torch.device, *, check_ids_now: bool = False) -> Rows:
        """Return the ``m`` rows of a layer input, sorted by adapter.

        The results are cached by ``m`` and stream.

        Args:
            m: Number of rows of the input.
            device: Device of the input.
            check_ids_now: Whether to check the ids immediately, because the caller reads the rows
                on the host.

        Raises:
            AdapterNotFoundError: ``check_ids_now`` is set and an id is out of range.
            ValueError: ``m`` is not a multiple of the number of ids.
        """
        cache = self.cache
        key = (m, device, cuda_stream_handle(device) if device.type == "cuda" else 0)
        known = cache.rows.get(key)
        if known is None:
            count = self.ids.numel()
            if not ids_divide_rows(m, count):
                raise ValueError(
                    f"a layer got {m} rows in a batch with {count} adapter ids; expected one id "
                    "per sample or per token"
                )
            known = cache.rows[key] = sort_rows(self.ids, m, len(self.names), device)
        if check_ids_now and not cache.is_checked:
            if self.ids.numel() and self.ids.min() < NO_ADAPTER:
                raise AdapterNotFoundError(self._out_of_range())
            cache.is_checked = True
        return known

    @property
    def may_mix(self) -> bool:
        """Whether the rows of the batch may use different adapters.

        The value is False if there is only one id.
        """
        return self.ids.numel() > 1

    def check_gets_all_rows(
        self, layer: RoutedLayerProtocol, x: torch.Tensor, compiling: bool
    ) -> None:
        """Raise an error if a layer does not receive all rows of the batch.

        The error is also raised if the layer might receive only some rows.

        Raises:
            UnsupportedLayerError: The layer receives or may receive only some rows. The message
                names the layer.
        """
        row_checker = None if compiling else self.cache.row_checker
        if row_checker is not None:
            row_checker.check_gets_all_rows_in_order(layer, x)
        elif layer.may_see_partial_rows and (compiling or self.may_mix):
            raise_partial_batch(layer)

    def check_sample_dimension(self, layer: RoutedLayerProtocol, x: torch.Tensor) -> None:
        """Check that a layer's input has a sample dimension that matches the adapter ids.

        The input ``x`` has the shape ``[..., K]``. An error is raised if the first dimension of
        ``x`` cannot be the sample dimension. The size of the first dimension may be a multiple of
        the number of ids. An input with one id per token is accepted too.

        Raises:
            ValueError: An id's rows would end inside a slice along one of the leading dimensions.
        """
        count = self.ids.numel()
        if not count or x.dim() < 3 or x.shape[0] % count == 0:
            return
        leading = x.shape[:-1]
        if ids_divide_rows(leading.numel(), count) and not each_id_covers_whole_entries(
            leading, count
        ):
            checks = self.group.row_checks
            name = type(layer).__name__ if checks is None else checks.name_of(layer)
            raise ValueError(
                f"layer {name!r} got an input of shape {list(x.shape)} in a batch with {count} "
                "adapter ids; expected one id per sample along the first dimension, or one per "
                "token"
            )

    def pause_row_order_tracking(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that pauses row tracking.

        Row tracking records how the rows of tensors relate to the rows of the batch. Use the
        context manager around code that restores the row order.
        """
        row_checker = self.cache.row_checker
        if (
            row_checker is None
            or row_checker.order is None
            or not row_checker.order.has_valid_facts
        ):
            return contextlib.nullcontext()
        return row_checker.order.pause_row_order_tracking()

    def count_dropout_call(self, layer_number: int) -> int:
        """Count a call of a layer that applies dropout, and return the number of the call.

        The number says how many such calls of the layer came before in the block. ``layer_number``
        is the ``routing_index`` of the layer. Calls in a backward pass that no checkpoint of
        `torch.utils.checkpoint` makes are not counted, because they repeat an earlier call.

        Raises:
            AdapterStateError: Such a call may repeat any of several earlier calls.
        """
        call_number = self.dropout_calls.get(layer_number, 0)
        if call_number and not self.recomputes and torch._C._current_graph_task_id() != -1:
            if call_number > 1:
                raise AdapterStateError(
                    f"the backward pass calls a layer with dropout that was called {call_number} "
                    "times in this fastlora.adapters() block, and it is not known which of these "
                    "calls it recomputes; use torch.utils.checkpoint, or open a block for each "
                    "forward pass"
                )
            return 0
        self.dropout_calls[layer_number] = call_number + 1
        return call_number

    def layer_dropout_seeds(
        self, layer_number: int, call_number: int, device: torch.device
    ) -> torch.Tensor:
        """Return the adapters' dropout seeds for one call of a layer.

        The result is an int64 tensor ``[S]`` on the given device, with one seed for each slot, and
        thus for each adapter. The seeds of a call are derived from the seeds of the routing. The
        seeds of all layers are copied to the device together. ``layer_number`` is the
        ``routing_index`` of the layer, and ``call_number`` is a result of `count_dropout_call`.
        """
        key, cached = (device, cuda_stream_handle(device), call_number), self.cache.seeds
        known = cached.get(key)
        if known is None:
            self.draw_missing_seeds()
            while len(cached) >= _MOST_SEEDS:
                cached.pop(next(iter(cached)), None)
            numbers = [layer.routing_index for layer in self.layers if hasattr(layer, "lora_A")]
            known = cached[key] = self._derive_seeds(numbers, call_number, device)
        if layer_number not in known:  # The layer was added after the block began.
            known |= self._derive_seeds([layer_number], call_number, device)
        return known[layer_number]

    def _derive_seeds(
        self, layer_numbers: Sequence[int], call_number: int, device: torch.device
    ) -> dict[int, torch.Tensor]:
        """Derive the dropout seeds of calls with the given number, by layer number."""
        with torch.inference_mode(False):  # Autograd functions save them for a backward pass.
            seeds = derive_seeds_of_call(self.seeds, call_number)
            made = dropout_seeds_of_layers(seeds, layer_numbers)
            if device.type == "cuda":
                made = made.pin_memory().to(device, non_blocking=True)
            return dict(zip(layer_numbers, made.unbind(), strict=True))

    def draw_missing_seeds(self) -> None:
        """Draw the seeds that were neither given nor drawn when the block began."""
        slots, whole = [*self.undrawn], self.whole
        if slots:
            self.undrawn.clear()
            with torch.inference_mode(False):
                self.seeds[slots] = draw_seeds(self.names, None)[slots]
                if whole is not None and whole.seeds is not self.seeds:
                    places = [whole.names.index(self.names[slot]) for slot in slots]
                    whole.seeds[places] = self.seeds[slots]

    @property
    def needs_missing_seeds(self) -> bool:
        """Whether a dropout module is in training mode, but the seeds have not been drawn yet."""
        return bool(self.undrawn) and any(map(has_active_dropout, self.layers))

    def cached_adapter_set(self, key: tuple[Hashable, ...]) -> PackedAdapterSet:
        """Return the cached `PackedAdapterSet` for a key.

        If no set is cached or the cached set is outdated, a new set is created. The set is looked
        up in the cache of this routing, which lasts for the block, and then in the cache of the
        model. Whether factors have changed is checked once per block, and again after a change of
        the weights version.
        """
        known = self.cache.sets.get(key)
        if known is None or not known.has_current_weights_version:
            known = self.cache.sets[key] = self.group.packs.get(
                key, self.source.loaded_adapters is None
            )
        return known

    def adapter_identities(self, rows: Rows) -> tuple[Hashable, ...]:
        """Return a tuple of keys that identify the adapters used by the rows.

        The keys are in the order of the slots.
        """
        return tuple(self.source.adapter_key(segment.slot) for segment in rows.segments)

    def defer_id_check(self) -> None:
        """Defer checking the adapter ids, to avoid waiting for the device.

        A later block of the model checks whether the ids are in range.
        """
        message = f"in an earlier block, {self._out_of_range()}; the outputs of its rows are NaN"
        for rows in self.cache.rows.values():
            self.group.unchecked.add(rows.invalid, message)

    def _out_of_range(self) -> str:
        names = [name for name in self.names if name]
        return (
            f"an adapter id is out of range; expected -1 for no adapter, or a slot of {names[:20]}"
        )


def has_active_dropout(layer: nn.Module) -> bool:
    """Return whether a layer has an adapter whose dropout module is in training mode."""
    return any(
        dropout.training and not isinstance(dropout, nn.Identity)
        for dropout in getattr(layer, "lora_dropout", {}).values()
    )


def layer_numbers_from_name_hashes(names: Sequence[str], taken: Iterable[int] = ()) -> list[int]:
    """For each layer name, return a number that is unique within the model.

    The number is the CRC-32 of the name, or the next unused number. The number depends on the name,
    so that a layer's dropout does not depend on which other modules are adapted. ``taken`` are the
    numbers of the model's other layers.
    """
    used, numbers = set(taken), []
    for name in names:
        number = zlib.crc32(name.encode())
        while number in used:
            number += 1
        used.add(number)
        numbers.append(number)
    return numbers


def add_to_group(
    group: RoutedLayerGroup,
    root: nn.Module,
    named_layers: Sequence[tuple[str, RoutedLayerProtocol]],
) -> None:
    """Add layers to a model's group of routed layers.

    ``named_layers`` contains each layer with its name in the model ``root``. Layers that are
    already in the group keep their numbers.
    """
    new = [(name, layer) for name, layer in named_layers if layer.routing_group is not group]
    if new:
        taken = [layer.routing_index for _, layer in named_layers if layer.routing_group is group]
        numbers = layer_numbers_from_name_hashes([name for name, _ in new], taken)
        for number, (_, layer) in zip(numbers, new, strict=True):
            layer.routing_group, layer.routing_index = group, number
    group.row_checks = ModelRowOrderChecks(root, named_layers)
