"""What is kept of mixed batches: of one block, and of one model between its blocks.

A `Routing` is immutable and holds one `BlockKept`, a model's `Group` one `PackCache`. Everything
kept of factors ends with `PackCache.clear`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from fastlora.ops.factors import Tables
from fastlora.ops.rows import Rows
from fastlora.ops.torch.packed import LayerPack, is_for
from fastlora.ops.torch.packed_choice import RowsKind
from fastlora.routing.row_checks import FollowedRows
from fastlora.routing.watch import Watch
from fastlora.weight_marks import marks

# Sets of adapters that one model keeps packed. Each holds a copy of its adapters' factors, or two:
# few rows and many may want them laid out otherwise.
_MOST_SETS = 2


def stream_of(device: torch.device) -> int:
    """Returns the current stream of a device; 0 where it has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class RoutedLayer(Protocol):
    """What routing needs to know of a layer.

    Attributes:
        routed_by: What the layers of its model have in common; None outside of a model.
        routed_as: The layer's number in its model.
        training: Whether dropout can act.
        sees_part: Whether the layer raises in a block that does not follow rows.
    """

    routed_by: Any
    routed_as: int
    training: bool
    sees_part: bool


class SetPack:
    """A set of adapters, packed for those layers that have met it twice.

    Args:
        changes: Whether their factors can change, as those of a pool cannot.

    Attributes:
        watch: Tells whether the factors are still those that were packed; None if they must be.
        mark: With which they were packed; None where they cannot change.
        tables: The set's tables for kernels, once they are made; False where there can be none.
    """

    def __init__(self, changes: bool) -> None:
        self.watch = Watch() if changes else None
        self.mark = marks.of_trained() if changes else None
        self.tables: Tables | Literal[False] | None = None
        self._met: set[tuple[int, torch.dtype, RowsKind]] = set()
        self._packs: dict[tuple[int, torch.dtype, RowsKind], LayerPack | None] = {}

    @property
    def may_hold(self) -> bool:
        """Whether the factors can still be those that were packed."""
        return self.mark is None or self.mark is marks.trained

    def holds(self) -> bool:
        """Whether they are: looks at each of them."""
        return self.may_hold and (self.watch is None or self.watch.unchanged())

    def get(self, number: int, dtype: torch.dtype, kind: RowsKind) -> tuple[LayerPack | None, bool]:
        """Returns a layer's pack, or None; and whether the layer is to be packed now."""
        key = (number, dtype, kind)
        pack = self._packs.get(key)
        if pack is not None or key in self._packs:
            return pack, False
        for other in RowsKind:
            pack = self._packs.get((number, dtype, other))
            if pack is not None and is_for(pack, dtype, kind):
                self._packs[key] = pack
                return pack, False
        if key in self._met:
            return None, True
        self._met.add(key)
        return None, False

    def put(self, number: int, dtype: torch.dtype, kind: RowsKind, pack: LayerPack | None) -> None:
        """Keeps the pack of a layer; None for one whose factors cannot be packed."""
        self._packs[(number, dtype, kind)] = pack

    @property
    def nbytes(self) -> int:
        """Bytes of all packs."""
        tensors = {}
        for pack in list(self._packs.values()):
            if pack is not None:
                for tensor in (pack.lora_a, pack.lora_b, pack.lora_bias):
                    if tensor is not None:
                        tensors[tensor.data_ptr()] = tensor.nbytes
        return sum(tensors.values())


class PackCache:
    """The sets that one model keeps packed: the last ones used, and those that CUDA graphs read."""

    def __init__(self) -> None:
        self._captured: dict[int, object] = {}
        self._sets: OrderedDict[tuple[Hashable, ...], SetPack] = OrderedDict()
        self._lock = threading.Lock()  # threads that serve one model share its packs

    def get(self, key: tuple[Hashable, ...], changes: bool) -> SetPack:
        """Returns the set of adapters that a key names, a new one if unknown or if factors changed.

        ``changes`` says that they can.
        """
        with self._lock:
            known = self._sets.get(key)
            if known is None or not known.holds():
                if known is not None:  # other sets may keep memory of replaced factors too
                    held = [(other, each) for other, each in self._sets.items() if each.holds()]
                    self._sets = OrderedDict(held)
                known = self._sets[key] = SetPack(changes)
            self._sets.move_to_end(key)
            while len(self._sets) > _MOST_SETS:
                self._sets.popitem(last=False)
            return known

    def clear(self) -> None:
        """Forgets all sets: their factors may be about to change, or have changed unseen."""
        marks.end_trained()  # open blocks have sets too
        with self._lock:
            self._sets.clear()

    def pin(self, *kept: object) -> None:
        """Keeps what a CUDA graph that is being captured reads: replays find it at its address."""
        self._captured.update((id(each), each) for each in kept)

    def unpin(self) -> None:
        """Forgets what CUDA graphs read, which are not to be replayed any more."""
        self._captured.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all packs."""
        with self._lock:
            return sum(known.nbytes for known in self._sets.values())


@dataclass(eq=False)
class BlockKept:
    """What one block keeps: made at most once for its batch.

    Attributes:
        layers: By what computes a layer ("packs" or "places") and its number, a key and what was
            found. That holds for a forward that has an equal key.
        plans: By rows, then by layout and bytes of an element, how to multiply packed factors.
        rows: By number of rows, device and stream.
        seeds: By device and stream, the dropout seeds of layers by number.
        sets: What the model keeps of sets of adapters, by their keys.
        is_checked: Whether the host has looked at the ids.
        followed: What checks the rows that layers get in the block; None where all are known.
    """

    layers: dict[tuple[str, int], tuple[Hashable, Any]] = field(default_factory=dict)
    plans: dict[Rows, dict[Any, Any]] = field(default_factory=dict)
    rows: dict[tuple[int, torch.device, int], Rows] = field(default_factory=dict)
    seeds: dict[tuple[torch.device, int], dict[int, torch.Tensor]] = field(default_factory=dict)
    sets: dict[tuple[Hashable, ...], SetPack] = field(default_factory=dict)
    is_checked: bool = False
    followed: FollowedRows | None = None
