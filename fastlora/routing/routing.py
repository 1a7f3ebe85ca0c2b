"""Which adapter each row of a forward uses: one immutable object for the whole model.

Inside ``with fastlora.adapters(model, ids):`` every LoRA layer of the model takes its rows'
adapters from a `Routing` that this module keeps for each thread. Layers see rows in any shape: ids
are per sample or per token, and a layer with M rows and B ids gives each id M / B rows in sequence.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.ops.graph_routing import GraphRouting, PoolGraphRouting
from fastlora.ops.row_groups import RowGroups, build_row_groups
from fastlora.ops.torch.packed import PackCache, SetPack
from fastlora.routing.ids import NO_ADAPTER
from fastlora.routing.siblings import Siblings
from fastlora.validation import AdapterNotFoundError

if TYPE_CHECKING:
    from fastlora.layers.factors import Source

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
        batches: How its last batches were spread over rows.
    """

    def __init__(self) -> None:
        self.packs = PackCache()
        self.siblings = Siblings()
        self.batches = _Batches()

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
        each: Adjacent rows of each id.
        plans: How to multiply packed factors, kept by `fastlora.ops.torch.packed_forward`.
    """

    slots: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    segments: tuple[Segment, ...]
    key: tuple[Any, ...] = ()
    each: int = 1
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
class KernelRouting:
    """A routing as Triton kernels read it.

    Attributes:
        columns: Column in the tables of each sample or token, ``[B]``; -1 for none, -2 for an id
            that was out of range.
        tables: Addresses, ranks and scalings: a row for each layer, a column for each adapter.
        max_rank: No adapter has a larger one.
        dtype: Of the factors.
    """

    columns: torch.Tensor
    tables: Any
    max_rank: int
    dtype: torch.dtype
    _groups: dict[tuple[int, torch.device, int], RowGroups] = field(
        default_factory=dict, repr=False
    )

    def groups(self, m: int, device: torch.device) -> RowGroups:
        """Returns the rows of a layer input sorted by adapter, made once for each ``m`` and stream.

        Raises:
            ValueError: ``m`` is no multiple of the number of ids.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (m, device, stream)
        known = self._groups.get(key)
        if known is None:
            columns = self.tables.rank.shape[1]
            known = self._groups[key] = build_row_groups(self.columns, m, columns, device)
        return known

    @property
    def device(self) -> torch.device:
        """Where tables and factors lie."""
        device: torch.device = self.tables.rank.device
        return device

    def found_invalid(self) -> bool:
        """Whether an id was out of range; waits for the GPU."""
        return any(bool(groups.invalid.item()) for groups in self._groups.values())


@dataclass(frozen=True, eq=False)
class Routing:
    """Adapters of a batch.

    Attributes:
        group: The layers that take part; others ignore the routing.
        names: Adapter of each slot.
        ids: Slot of each sample or token, ``[B]`` int64; -1 for none. On a GPU they are not
            checked yet, and -2 is an id that was out of range.
        seeds: Dropout seed of each slot, for this forward.
        layers: The model's routed modules when the block began.
        source: Where the adapters of the slots come from.
        kernels: What Triton kernels read; empty until a layer needs it.
        ready: What `fastlora.layers.mixed_compute` found out about a layer, by its number.
        training: What kernels read with gradients; empty until a layer needs it.
        absent_gradients: Whether trainable adapters without rows get zeros as gradients.
        dora: What `fastlora.layers.dora_mixed` keeps of the norms.
        graph: The same for compiled graphs; None where they cannot be.
        captured: Slots are a CUDA graph's, which are looked up at its replays: nothing is known of
            the adapters now.
    """

    group: Group
    names: tuple[str, ...]
    ids: torch.Tensor
    seeds: tuple[int, ...]
    source: Source
    layers: Sequence[Any] = ()
    kernels: list[KernelRouting] = field(default_factory=list, repr=False)
    ready: dict[int, Any] = field(default_factory=dict, repr=False)
    training: list[Any] = field(default_factory=list, repr=False)
    absent_gradients: bool = False
    dora: dict[Any, Any] = field(default_factory=dict, repr=False)
    graph: GraphRouting | PoolGraphRouting | None = None
    captured: bool = False
    _spread: dict[tuple[int, torch.device], RowRouting] = field(default_factory=dict, repr=False)
    _sets: dict[tuple[Any, ...], SetPack] = field(default_factory=dict, repr=False)

    def rows(self, m: int, device: torch.device) -> RowRouting:
        """Returns the routing of a layer input with ``m`` rows, made once for each ``m``.

        Raises:
            ValueError: ``m`` is no multiple of the number of ids.
        """
        known = self._spread.get((m, device))
        if known is None:
            known = self._spread[(m, device)] = self.group.batches.rows(self, m, device)
        return known

    def set_of(self, key: tuple[Any, ...], make_watch: Callable[[], Any]) -> SetPack:
        """Returns what the model keeps of a set of adapters.

        Whether factors changed is asked once for each block and whenever they may have.
        """
        known = self._sets.get(key)
        if known is None or not known.may_hold:
            watch = make_watch if self.residents is None else None
            known = self._sets[key] = self.group.packs.get(key, watch)
        return known

    def check_ids(self) -> None:
        """Raises if kernels met an id that was out of range; waits for the GPU.

        Raises:
            AdapterNotFoundError: Its rows came out NaN.
        """
        if any(kernels.found_invalid() for kernels in (*self.kernels, *self.training)):
            raise AdapterNotFoundError(_out_of_range(self.names) + "; its rows came out NaN")

    @property
    def residents(self) -> tuple[Any, ...] | None:
        """A pool's entry of each slot; None where adapters are parameters."""
        return self.source.residents


def is_captured(tensor: torch.Tensor) -> bool:
    """Whether a tensor is read by a CUDA graph that is being captured in this thread."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _Batches:
    """The last batches of a model: the next step of a decode has the same ids in another block."""

    _MOST, _MOST_IDS = 8, 4096

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], RowRouting] = {}

    def rows(self, routing: Routing, m: int, device: torch.device) -> RowRouting:
        """Returns `RowRouting` for a layer input with ``m`` rows, the known one for known ids."""
        ids = routing.ids.cpu()
        if ids.numel() > self._MOST_IDS or torch.compiler.is_compiling():
            return _spread_rows(routing, ids, m, device)
        key = (m, device, routing.names, tuple(ids.tolist()))
        rows = self._known.get(key)
        # A pool may have another adapter of that name by now.
        if rows is None or rows.key != _key(routing, rows.segments):
            rows = _spread_rows(routing, ids, m, device)
            known = list(self._known.items())[1 - self._MOST :]
            self._known = dict([*known, (key, rows)])  # a new one: other threads read the old one
        return rows


def _key(routing: Routing, segments: Sequence[Segment]) -> tuple[Any, ...]:
    return tuple(routing.source.identity(segment.slot) for segment in segments)


def _out_of_range(names: Sequence[str]) -> str:
    return f"an adapter id is out of range; expected -1 for none or a slot of {list(names)[:20]}"


def _spread_rows(routing: Routing, ids: torch.Tensor, m: int, device: torch.device) -> RowRouting:
    count = ids.numel()
    if not count or m % count:
        raise ValueError(
            f"a layer has {m} rows and the batch {count} adapter ids; expected as many ids as "
            "samples, or as tokens"
        )
    if ids.min() < NO_ADAPTER:
        raise AdapterNotFoundError(_out_of_range(routing.names))
    slots = ids.repeat_interleave(m // count)
    order = torch.argsort(slots, stable=True)
    in_order = slots[order]
    present, counts = torch.unique_consecutive(in_order, return_counts=True)
    segments, start = [], 0
    for slot, rows in zip(present.tolist(), counts.tolist(), strict=True):
        if slot != NO_ADAPTER:
            segments.append(Segment(slot, start, start + rows))
        start += rows
    key = _key(routing, segments)
    if torch.equal(in_order, slots):
        return RowRouting(slots.to(device), None, None, tuple(segments), key, m // count)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(m)
    order, inverse = order.to(device), inverse.to(device)
    return RowRouting(slots.to(device), order, inverse, tuple(segments), key, m // count)


def number_layers(names: Sequence[str], taken: Iterable[int] = ()) -> list[int]:
    """Returns a number for each layer of a model: its name's CRC-32, or the next free number.

    By name, so that a layer's dropout does not depend on which other modules are adapted.

    Args:
        names: Of the layers.
        taken: Numbers of other layers of the model.
    """
    used, numbers = set(taken), []
    for name in names:
        number = zlib.crc32(name.encode())
        while number in used:
            number += 1
        used.add(number)
        numbers.append(number)
    return numbers


def join_group(group: Group, layers: Sequence[tuple[str, Any]]) -> None:
    """Makes layers, given with their names, a model's; those that are keep their numbers."""
    new = [(name, layer) for name, layer in layers if layer.routed_by is not group]
    if new:
        taken = [layer.routed_as for _, layer in layers if layer.routed_by is group]
        numbers = number_layers([name for name, _ in new], taken)
        for number, (_, layer) in zip(numbers, new, strict=True):
            layer.routed_by, layer.routed_as = group, number


def layer_seed(seed: int, projection: int) -> torch.Tensor:
    """Returns the dropout seed of one layer, ``[1]`` int64: a SplitMix64 step from the adapter's.

    Method: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = (seed + (projection + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return torch.tensor([(z ^ (z >> 31)) >> (64 - _SEED_BITS)])


def draw_seeds(
    names: Sequence[str], given: Mapping[str, int] | None, *, draw: bool = True
) -> tuple[int, ...]:
    """Returns a dropout seed for each adapter: the given one, or one from torch's generator.

    Args:
        names: Adapters of the batch.
        given: Seeds of some; those of others are of no consequence.
        draw: Whether dropout can act. Otherwise the generator is left alone, and seeds are 0.

    Raises:
        TypeError: ``given`` is not a mapping to integers.
    """
    chosen = {} if given is None else given
    if not isinstance(chosen, Mapping):
        raise TypeError(f"seeds is a {type(given).__name__}, expected a mapping of names to ints")
    for name, seed in chosen.items():
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"the seed of {name!r} is {seed!r}, expected an int")
    drawn = [0] * len(names)
    if draw and names:
        drawn = torch.randint(0, 2**_SEED_BITS, (len(names),)).tolist()
    return tuple(chosen.get(n, d) for n, d in zip(names, drawn, strict=True))
