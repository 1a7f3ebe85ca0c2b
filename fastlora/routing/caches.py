"""Caches for mixed batches: one per `fastlora.adapters` block, and one per model for all blocks.

A `Routing` is immutable and refers to one `RoutingCache`. A model's `RoutedLayerGroup` refers to
one `PackedAdapterSetsCache`.
`PackedAdapterSetsCache.clear` invalidates everything that is cached for the LoRA factors.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from fastlora.ops.factors import AddressTables
from fastlora.ops.rows import Rows
from fastlora.ops.torch.packed import PackedLayerFactors, has_layout_for
from fastlora.ops.torch.packed_choice import BatchSizeCategory
from fastlora.routing.adapter_changes import AdapterChangeDetector
from fastlora.routing.row_checks import RowOrderChecker
from fastlora.weights_version import weights_versions

# Number of adapter sets that one model caches as packed factors. Each set holds one or two copies
# of its adapters' factors, because few rows and many rows may need different layouts.
_MOST_SETS = 2


def cuda_stream_handle(device: torch.device) -> int:
    """Return the handle of a device's current CUDA stream.

    The handle is 0 for a device without streams. Caches use the handle in their keys.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class RoutedLayerProtocol(Protocol):
    """Protocol that a layer must implement to take part in routing.

    The layer must have the attributes below.

    Attributes:
        routing_group: The routing group of the layer's model; None outside a model.
        routing_index: The layer's number in its model.
        training: Whether dropout can be active.
        may_see_partial_rows: Whether the layer may get only some rows of the batch, and thus raises
            in a block that does not track rows.
    """

    routing_group: Any
    routing_index: int
    training: bool
    may_see_partial_rows: bool


class PackedAdapterSet:
    """A set of adapters whose factors are packed together for mixed batches.

    For each layer, the packed factors of all adapters in the set are cached. The factors of a layer
    are packed only when the layer runs with this set for the second time.

    Args:
        factors_can_change: Whether the factors can change. A pool's factors cannot.

    Attributes:
        snapshot: Detects changes of the factors since they were packed; None if they cannot change.
        weights_version: The weights version of the packed factors; None if they cannot change.
        tables: The set's address tables for kernels. None until they are created, and False if they
            cannot be created.
    """

    def __init__(self, factors_can_change: bool) -> None:
        self.snapshot = AdapterChangeDetector() if factors_can_change else None
        self.weights_version = (
            weights_versions.version_of_trainable_weights() if factors_can_change else None
        )
        self.tables: AddressTables | Literal[False] | None = None
        self._met: set[tuple[int, torch.dtype, BatchSizeCategory]] = set()
        self._packs: dict[
            tuple[int, torch.dtype, BatchSizeCategory], PackedLayerFactors | None
        ] = {}

    @property
    def has_current_weights_version(self) -> bool:
        """Whether the cached set was created for the current version of the weights.

        The packed factors of a set for another version are not valid. The value is always True if
        the factors cannot change.
        """
        return self.weights_version is None or self.weights_version is weights_versions.trained

    def is_valid(self) -> bool:
        """Return whether the values that this set caches are still valid.

        The values are the packed factors of the set's adapters. They are valid if the set's weights
        version is current and no LoRA factor has changed since the factors were packed. Each factor
        is checked.
        """
        return self.has_current_weights_version and (
            self.snapshot is None or self.snapshot.adapters_are_unchanged()
        )

    def get_or_should_pack(
        self, layer_number: int, dtype: torch.dtype, kind: BatchSizeCategory
    ) -> tuple[PackedLayerFactors | None, bool]:
        """Return a layer's packed factors, if any, and whether the caller should pack the factors.

        The result is a tuple of two items. The first item is None if no packed factors are stored
        for the layer, or if the factors cannot be packed. The second item is True only if no packed
        factors are stored and the same factors were requested before.
        """
        key = (layer_number, dtype, kind)
        pack = self._packs.get(key)
        if pack is not None or key in self._packs:
            return pack, False
        for other in BatchSizeCategory:
            pack = self._packs.get((layer_number, dtype, other))
            if pack is not None and has_layout_for(pack, dtype, kind):
                self._packs[key] = pack
                return pack, False
        if key in self._met:
            return None, True
        self._met.add(key)
        return None, False

    def put(
        self,
        layer_number: int,
        dtype: torch.dtype,
        kind: BatchSizeCategory,
        pack: PackedLayerFactors | None,
    ) -> None:
        """Store the packed factors of a layer.

        ``pack`` is None if the factors cannot be packed.
        """
        self._packs[(layer_number, dtype, kind)] = pack

    @property
    def packed_factors_nbytes(self) -> int:
        """The total size, in bytes, of all packed factors."""
        tensors = {}
        for pack in list(self._packs.values()):
            if pack is not None:
                for tensor in (pack.lora_a, *pack.lora_b, pack.lora_bias):
                    if tensor is not None:
                        tensors[tensor.data_ptr()] = tensor.nbytes
        return sum(tensors.values())


class PackedAdapterSetsCache:
    """A cache of packed adapter sets.

    The cache belongs to a model, and holds the packed factors and address tables of recently used
    adapter sets. A set is valid while its factors do not change. The cache also keeps references to
    objects that CUDA graphs read.
    """

    def __init__(self) -> None:
        self._captured: dict[int, object] = {}
        self._sets: OrderedDict[tuple[Hashable, ...], PackedAdapterSet] = OrderedDict()
        self._lock = threading.Lock()  # Threads that serve one model share its packs.

    def get(self, key: tuple[Hashable, ...], factors_can_change: bool) -> PackedAdapterSet:
        """Return the packed adapter set cached under a key, creating it if necessary.

        A new set is created if no set is cached for the key, or if the factors of the cached set
        may have changed. ``factors_can_change`` tells whether the factors of a new set can change
        at all.
        """
        with self._lock:
            known = self._sets.get(key)
            if known is None or not known.is_valid():
                # Other sets may hold memory of replaced factors too.
                if known is not None:
                    held = [(other, each) for other, each in self._sets.items() if each.is_valid()]
                    self._sets = OrderedDict(held)
                known = self._sets[key] = PackedAdapterSet(factors_can_change)
            self._sets.move_to_end(key)
            while len(self._sets) > _MOST_SETS:
                self._sets.popitem(last=False)
            return known

    def clear(self) -> None:
        """Empty the cache.

        All adapter sets are removed. Open blocks also stop using the cached sets whose factors can
        change. Clearing the cache is required if factors may have changed, or may change later,
        without the change being detected.
        """
        weights_versions.invalidate_trainable_weights()  # Open blocks have sets too.
        with self._lock:
            self._sets.clear()

    def keep_cuda_graph_references(self, *objects: object) -> None:
        """Keep references to objects that a CUDA graph reads.

        Their addresses thus stay valid.
        """
        self._captured.update((id(each), each) for each in objects)

    def drop_cuda_graph_references(self) -> None:
        """Drop the references that were kept for CUDA graphs.

        The memory of the objects that the graphs read can then be freed. The graphs must not be
        replayed afterwards.
        """
        self._captured.clear()

    @property
    def packed_factors_nbytes(self) -> int:
        """The total size, in bytes, of all packed factors."""
        with self._lock:
            return sum(known.packed_factors_nbytes for known in self._sets.values())


@dataclass(eq=False)
class RoutingCache:
    """A cache of values that are derived from a `Routing`, such as sorted rows.

    The cache belongs to one routing and lasts for one `fastlora.adapters` block. An entry is
    computed when it is first needed in the block, and is reused in the rest of the block while it
    is valid.

    Attributes:
        layers: Maps the use ("packs" or "table_launches") and the number of a layer to a key and a
            result. The result is valid for a forward pass with an equal key.
        plans: Plans for packed factors, by rows, and then by layout and element size.
        rows: Sorted rows, by number of rows, device, and stream.
        seeds: Dropout seeds by layer number, for each device, stream, and number of a layer's call.
        sets: The model's adapter sets, by key.
        is_checked: Whether the host has checked the ids.
        row_checker: Checks the rows that layers get in the block; None if every layer has been
            checked.
        ids_are_per_sample: Whether the current call of the model is known to have one id per sample
            rather than one per token.
    """

    layers: dict[tuple[str, int], tuple[Hashable, Any]] = field(default_factory=dict)
    plans: dict[Rows, dict[Any, Any]] = field(default_factory=dict)
    rows: dict[tuple[int, torch.device, int], Rows] = field(default_factory=dict)
    seeds: dict[tuple[torch.device, int, int], dict[int, torch.Tensor]] = field(
        default_factory=dict
    )
    sets: dict[tuple[Hashable, ...], PackedAdapterSet] = field(default_factory=dict)
    is_checked: bool = False
    row_checker: RowOrderChecker | None = None
    ids_are_per_sample: bool = False
