"""Which adapter each row of a forward uses: one immutable object for the whole model.

Inside ``with fastlora.adapters(model, ids):`` every LoRA layer of the model takes its rows'
adapters from a `Routing` that this module keeps for each thread. Layers see rows in any shape: ids
are per sample or per token, and a layer with M rows and B ids gives each id M / B rows in sequence.
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
from fastlora.ops.seeds import layer_seeds, seeds_of_layer
from fastlora.routing.ids import NO_ADAPTER, Unchecked, fits, is_aligned
from fastlora.routing.kept import (
    BlockKept,
    PackCache,
    RoutedLayer,
    SetPack,
    stream_of,
)
from fastlora.routing.row_checks import RowChecks, refuse_part
from fastlora.validation import AdapterNotFoundError, AdapterStateError
from fastlora.weight_marks import Kept

if TYPE_CHECKING:
    from fastlora.layers.factors import Source


class Group(Kept):
    """What the layers of one model have in common, and other models' do not.

    A copied or unpickled model gets a group of its own, which has yet to see a forward.

    Attributes:
        packs: Sets of adapters that the model keeps packed.
        unchecked: Batches whose ids the host has not seen yet.
        row_checks: What is known of the rows that layers get; None until layers have joined.
        unfinished: What layers computed for others that have yet to take it; see
            `fastlora.layers.shared_input.Results`. By thread, and by ``id`` of their input.
    """

    def __init__(self) -> None:
        self.packs = PackCache()
        self.unchecked = Unchecked()
        self.row_checks: RowChecks | None = None
        self.unfinished: dict[tuple[int, int, int], Any] = {}
        self._open = 0
        self._lock = threading.Lock()

    def count_block(self, change: int) -> None:
        """Counts a block of the model that opens (1) or closes (-1), in any thread."""
        with self._lock:
            self._open += change

    def end_forward(self) -> None:
        """Drops what this thread's forward or block computed for layers that were not called."""
        if self.unfinished:
            thread = threading.get_ident()
            for place in [place for place in [*self.unfinished] if place[0] == thread]:
                results = self.unfinished.pop(place, None)
                if results is not None:
                    results.discard()

    def check_closed(self, operation: str) -> None:
        """Raises `AdapterStateError` while a block of the model is open in any thread.

        Args:
            operation: The method that would change what the rows of the block use.
        """
        if self._open:
            raise AdapterStateError(
                f"{operation}() while {self._open} fastlora.adapters() or adapter_names= blocks of "
                "this model are open, in this thread or another: their rows would lose their "
                "adapters or get other weights; call it after the blocks have ended"
            )


@dataclass(frozen=True, eq=False)
class Routing:
    """Adapters of a batch.

    Attributes:
        group: The layers that take part; others ignore the routing.
        names: Adapter of each slot; empty for a slot that has none.
        ids: Slot of each sample or token, ``[B]`` int64; -1 for none. On a GPU they are not
            checked yet, and -2 is an id that was out of range.
        seeds: Dropout seed of each slot for this forward, int64 ``[S]`` on the CPU.
        source: Where the adapters of the slots come from.
        layers: The model's routed modules when the block began.
        absent_gradients: Whether trainable adapters without rows get zeros as gradients.
        whole: The same batch as compiled graphs read it: over all adapters that the model has, so
            that another mix is other contents of the same tensors; None where graphs cannot.
        captured: Slots are a CUDA graph's, which are looked up at its replays: nothing is known of
            the adapters now.
        kept: What is made of the batch at most once.
    """

    group: Group
    names: tuple[str, ...]
    ids: torch.Tensor
    seeds: torch.Tensor
    source: Source
    layers: Sequence[Any] = ()
    absent_gradients: bool = False
    whole: Routing | None = None
    captured: bool = False
    kept: BlockKept = field(default_factory=BlockKept, repr=False)

    def rows(self, m: int, device: torch.device, *, host: bool = False) -> Rows:
        """Returns the rows of a layer input with ``m`` rows, made once for each ``m`` and stream.

        Args:
            m: Rows of the input.
            device: Of the input.
            host: Whether the caller reads them on the host; then ids are checked at once.

        Raises:
            AdapterNotFoundError: ``host``, and an id is out of range.
            ValueError: ``m`` is no multiple of the number of ids.
        """
        kept = self.kept
        key = (m, device, stream_of(device) if device.type == "cuda" else 0)
        known = kept.rows.get(key)
        if known is None:
            count = self.ids.numel()
            if not fits(m, count):
                raise ValueError(
                    f"a layer has {m} rows and the batch {count} adapter ids; expected as many "
                    "ids as samples, or as tokens"
                )
            # A copy: rows read ids later too, when the caller may have written others there.
            ids = self.ids if self.ids.is_cuda else self.ids.clone()
            known = kept.rows[key] = sort_rows(ids, m, len(self.names), device)
        if host and not kept.is_checked:
            if self.ids.numel() and self.ids.min() < NO_ADAPTER:
                raise AdapterNotFoundError(self._out_of_range())
            kept.is_checked = True
        return known

    @property
    def may_mix(self) -> bool:
        """Whether rows can have different adapters: not with a single id."""
        return self.ids.numel() > 1

    def check_rows(self, layer: RoutedLayer, x: torch.Tensor, compiling: bool) -> None:
        """Raises where a layer gets only some rows of the batch, or may in compiled code.

        Raises:
            UnsupportedLayerError: It does; the error names the layer.
        """
        followed = None if compiling else self.kept.followed
        if followed is not None:
            followed.check(layer, x)
        elif layer.sees_part and (compiling or self.may_mix):
            refuse_part(layer)

    def check_dimensions(self, layer: RoutedLayer, x: torch.Tensor) -> None:
        """Raises where the samples cannot be along the first dimension of ``x [..., K]``.

        Raises:
            ValueError: The rows of an id would end within an entry of the first dimensions.
        """
        count = self.ids.numel()
        if not count or x.dim() < 3 or x.shape[0] % count == 0:
            return
        leading = x.shape[:-1]
        if fits(leading.numel(), count) and not is_aligned(leading, count):
            checks = self.group.row_checks
            name = type(layer).__name__ if checks is None else checks.name_of(layer)
            raise ValueError(
                f"layer {name!r} got {list(x.shape)} in a batch with {count} adapter ids; expected "
                "the samples along the first dimension, with as many entries each, or tokens"
            )

    def resting(self) -> contextlib.AbstractContextManager[None]:
        """Within the block rows are not followed: layers sort them, and put them back."""
        followed = self.kept.followed
        if followed is None or followed.order is None or not followed.order.sees:
            return contextlib.nullcontext()
        return followed.order.resting()

    def seeds_of(self, number: int, device: torch.device) -> torch.Tensor:
        """Returns the dropout seeds of layer ``number``, int64 ``[S]``, on a device.

        One copy brings those of all layers.
        """
        key = (device, stream_of(device))
        known = self.kept.seeds.get(key)
        if known is None:
            numbers = [layer.routed_as for layer in self.layers if hasattr(layer, "lora_A")]
            with torch.inference_mode(False):  # functions save them for a backward
                made = layer_seeds(self.seeds, numbers)
            if device.type == "cuda":
                made = made.pin_memory().to(device, non_blocking=True)
            known = self.kept.seeds[key] = dict(zip(numbers, made.unbind(), strict=True))
        if number not in known:  # a layer that came after the block began
            with torch.inference_mode(False):
                known[number] = seeds_of_layer(self.seeds, number).to(device)
        return known[number]

    def set_of(self, key: tuple[Hashable, ...]) -> SetPack:
        """Returns what the model keeps of a set of adapters.

        Whether factors changed is asked once for each block and whenever they may have.
        """
        known = self.kept.sets.get(key)
        if known is None or not known.may_hold:
            known = self.kept.sets[key] = self.group.packs.get(key, self.source.residents is None)
        return known

    def identities(self, rows: Rows) -> tuple[Hashable, ...]:
        """Returns what names the adapters that have rows, in order of slots."""
        return tuple(self.source.identity(segment.slot) for segment in rows.segments)

    def check_ids(self) -> None:
        """Has a later block of the model ask whether an id was out of range; nothing waits."""
        message = f"in an earlier block {self._out_of_range()}; its rows came out NaN"
        for rows in self.kept.rows.values():
            self.group.unchecked.add(rows.invalid, message)

    def _out_of_range(self) -> str:
        names = [name for name in self.names if name]
        return f"an adapter id is out of range; expected -1 for none or a slot of {names[:20]}"


def number_layers(names: Sequence[str], taken: Iterable[int] = ()) -> list[int]:
    """Returns a number for each layer of a model: its name's CRC-32, or the next free number.

    By name, so that a layer's dropout does not depend on which other modules are adapted. ``taken``
    are the numbers of other layers of the model.
    """
    used, numbers = set(taken), []
    for name in names:
        number = zlib.crc32(name.encode())
        while number in used:
            number += 1
        used.add(number)
        numbers.append(number)
    return numbers


def join_group(group: Group, root: nn.Module, layers: Sequence[tuple[str, RoutedLayer]]) -> None:
    """Makes layers, given with their names in it, a model's; those that are keep their numbers."""
    new = [(name, layer) for name, layer in layers if layer.routed_by is not group]
    if new:
        taken = [layer.routed_as for _, layer in layers if layer.routed_by is group]
        numbers = number_layers([name for name, _ in new], taken)
        for number, (_, layer) in zip(numbers, new, strict=True):
            layer.routed_by, layer.routed_as = group, number
    group.row_checks = RowChecks(root, layers)
