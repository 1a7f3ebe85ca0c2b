"""Which adapter each row of a forward uses: one immutable object for the whole model.

Inside ``with fastlora.adapters(model, ids):`` every LoRA layer of the model takes its rows'
adapters from a `Routing` that this module keeps for each thread. Layers see rows in any shape: ids
are per sample or per token, and a layer with M rows and B ids gives each id M / B rows in sequence.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastlora.packed import PackCache, SetPack
from fastlora.siblings import Siblings
from fastlora.validation import AdapterNotFoundError, near_names

# PEFT's name for rows without an adapter; None means the same here.
BASE = "__base__"
NO_ADAPTER = -1

_SEED_BITS = 62
_MASK_64 = 2**64 - 1


class Segment(NamedTuple):
    """Rows of one adapter, adjacent once rows are in `RowRouting.order`.

    Attributes:
        slot: The adapter's slot.
        start: First row.
        stop: Behind the last row.
    """

    slot: int
    start: int
    stop: int


class Group:
    """What the layers of one model have in common, and other models' do not.

    A copied or unpickled model gets a group of its own, which has yet to see a forward.

    Attributes:
        packs: Sets of adapters that the model keeps packed.
        siblings: Which of its layers are fed by the same tensor.
    """

    def __init__(self) -> None:
        self.packs = PackCache()
        self.siblings = Siblings()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group()

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        return Group, ()


@dataclass(frozen=True, eq=False)
class RowRouting:
    """A routing spread over the M rows of one layer's input.

    Attributes:
        slots: Slot of each row, ``[M]`` int64; -1 for none.
        order: Row indices with each adapter's rows adjacent and in their own order, ``[M]``; None
            where they lie so already.
        inverse: Where each row went, ``[M]``; None with ``order``.
        segments: One for each adapter that has rows, in order of slots.
        key: Names the adapters of the segments, in their order.
        plans: How to multiply packed factors, kept by `fastlora.packed_forward`.
    """

    slots: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    segments: tuple[Segment, ...]
    key: tuple[Any, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    _padded: dict[tuple[Segment, ...], PaddedRows] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def members(self) -> torch.Tensor:
        """Index among the segments of each row's adapter, their number for none; ``[M]`` int64."""
        slots = torch.tensor([segment.slot for segment in self.segments], device=self.slots.device)
        found = torch.searchsorted(slots, self.slots)
        return torch.where(self.slots == NO_ADAPTER, len(self.segments), found)

    def padded(self, segments: tuple[Segment, ...]) -> PaddedRows:
        """Returns how to lay out some segments' rows as a batch, made once for each choice."""
        known = self._padded.get(segments)
        if known is None:
            known = self._padded[segments] = _pad(segments, self.slots.device)
        return known


class PaddedRows(NamedTuple):
    """Segments side by side as ``[G, C]``, C the longest one's rows.

    Attributes:
        longest: C.
        rows: Row of each place, ``[G * C]``; where a segment is shorter, its first row again.
        places: The places that hold a row of their own, ``[sum of rows]``.
        targets: The row of each of these, ``[sum of rows]``.
    """

    longest: int
    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


def _pad(segments: tuple[Segment, ...], device: torch.device) -> PaddedRows:
    longest = max(segment.stop - segment.start for segment in segments)
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for index, (_, start, stop) in enumerate(segments):
        own = list(range(start, stop))
        rows += own + [start] * (longest - len(own))
        places += range(index * longest, index * longest + len(own))
        targets += own
    tensors = (torch.tensor(values, device=device) for values in (rows, places, targets))
    return PaddedRows(longest, *tensors)


@dataclass(frozen=True, eq=False)
class Routing:
    """Adapters of a batch.

    Attributes:
        group: The layers that take part; others ignore the routing.
        names: Adapter of each slot.
        ids: Slot of each sample or token, ``[B]`` int64 on the CPU; -1 for none.
        seeds: Dropout seed of each slot, for this forward.
        residents: Where a pool holds the adapters, the pool's entry of each slot; else None.
    """

    group: Group
    names: tuple[str, ...]
    ids: torch.Tensor
    seeds: tuple[int, ...]
    residents: tuple[Any, ...] | None = None
    _spread: dict[tuple[int, torch.device], RowRouting] = field(default_factory=dict, repr=False)
    _sets: dict[tuple[Any, ...], SetPack] = field(default_factory=dict, repr=False)

    def rows(self, m: int, device: torch.device) -> RowRouting:
        """Returns the routing of a layer input with ``m`` rows, made once for each ``m``.

        Raises:
            ValueError: ``m`` is no multiple of the number of ids.
        """
        known = self._spread.get((m, device))
        if known is None:
            known = self._spread[(m, device)] = _spread_rows(self, m, device)
        return known

    def set_of(self, rows: RowRouting, make_watch: Callable[[], Any]) -> SetPack:
        """Returns the packed set of the adapters with rows.

        Whether factors changed is asked once for each block and whenever the set was dropped.
        """
        known = self._sets.get(rows.key)
        if known is None or known.stale:
            watch = make_watch if self.residents is None else None
            known = self._sets[rows.key] = self.group.packs.get(rows.key, watch)
        return known

    def identity(self, slot: int) -> Any:
        """Returns what tells the adapter of a slot from all others."""
        if self.residents is None:
            return self.names[slot]
        resident = self.residents[slot]
        return resident.name, resident.version


def _spread_rows(routing: Routing, m: int, device: torch.device) -> RowRouting:
    count = routing.ids.numel()
    if not count or m % count:
        raise ValueError(
            f"a layer has {m} rows and the batch {count} adapter ids; expected as many ids as "
            "samples, or as tokens"
        )
    slots = routing.ids.repeat_interleave(m // count)
    order = torch.argsort(slots, stable=True)
    in_order = slots[order]
    present, counts = torch.unique_consecutive(in_order, return_counts=True)
    segments, start = [], 0
    for slot, rows in zip(present.tolist(), counts.tolist(), strict=True):
        if slot != NO_ADAPTER:
            segments.append(Segment(slot, start, start + rows))
        start += rows
    key = tuple(routing.identity(segment.slot) for segment in segments)
    if torch.equal(in_order, slots):
        return RowRouting(slots.to(device), None, None, tuple(segments), key)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(m)
    order, inverse = order.to(device), inverse.to(device)
    return RowRouting(slots.to(device), order, inverse, tuple(segments), key)


def layer_seed(seed: int, projection: int) -> torch.Tensor:
    """Returns the dropout seed of one layer, ``[1]`` int64: a SplitMix64 step from the adapter's.

    Method: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = (seed + (projection + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return torch.tensor([(z ^ (z >> 31)) >> (64 - _SEED_BITS)])


def make_routing(
    group: Group,
    known: Sequence[str],
    ids: Sequence[str | None] | torch.Tensor,
    seeds: Mapping[str, int] | None = None,
) -> Routing:
    """Checks ids and makes a routing.

    Args:
        group: The layers that take part.
        known: Names of the model's adapters; an id given as a number is an index into them.
        ids: A name or None (or ``"__base__"``) for each sample; or an int tensor of slots, one for
            each sample or token, -1 for none.
        seeds: Dropout seed of each adapter. Those not given are drawn from torch's generator.

    Raises:
        AdapterNotFoundError: A name or slot that is not there.
        ValueError: ``ids`` is empty or has more than one dimension.
        TypeError: ``ids`` is neither of these.
    """
    if isinstance(ids, torch.Tensor):
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise TypeError(f"ids has dtype {ids.dtype}, expected integers")
        if ids.dim() != 1:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, expected one dimension")
        numbers = ids.to(device="cpu", dtype=torch.int64)
        if numbers.numel():
            low, high = int(numbers.min()), int(numbers.max())
            if low < NO_ADAPTER or high >= len(known):
                bad = low if low < NO_ADAPTER else high
                raise AdapterNotFoundError(
                    f"no adapter in slot {bad}; expected -1 for none or 0 to {len(known) - 1}, "
                    f"the adapters {list(known)}"
                )
        names = tuple(known)
    else:
        if isinstance(ids, str):
            raise TypeError(f"ids is the string {ids!r}, expected one name for each sample")
        wanted = [None if name == BASE else name for name in ids]
        for name in wanted:
            if name is not None and name not in known:
                raise AdapterNotFoundError(
                    f"no adapter {name!r}; loaded are {list(known)}{near_names(str(name), known)}"
                )
        # In the model's order, whatever the batch's, so that a set of adapters has one name.
        place = {name: index for index, name in enumerate(known)}
        names = tuple(sorted({name for name in wanted if name is not None}, key=place.__getitem__))
        slot_of = {name: slot for slot, name in enumerate(names)}
        numbers = torch.tensor(
            [NO_ADAPTER if name is None else slot_of[name] for name in wanted], dtype=torch.int64
        )
    if not numbers.numel():
        raise ValueError("ids is empty, expected one for each sample or token")
    drawn = torch.randint(0, 2**_SEED_BITS, (len(names),)).tolist() if names else []
    given = seeds or {}
    chosen = tuple(given.get(n, d) for n, d in zip(names, drawn, strict=True))
    return Routing(group, names, numbers, chosen)


# ------------------------------------------------------------------------- the routing in force

_thread = threading.local()


def current_routing() -> Routing | None:
    """Returns the routing in force in this thread, or None."""
    return getattr(_thread, "routing", None)


def routing_of(layer: Any) -> tuple[Routing, int] | None:
    """Returns the routing in force for a layer, and the layer's number; or None."""
    routing = getattr(_thread, "routing", None)
    if routing is None or layer.routed_by is not routing.group:
        return None
    return routing, layer.routed_as


@contextlib.contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """Puts a routing in force within the block, whatever happens in it."""
    before = current_routing()
    _thread.routing = routing
    try:
        yield
    finally:
        _thread.routing = before
