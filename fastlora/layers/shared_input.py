"""Shared-input groups: layers that receive the same tensor, such as q/k/v and gate/up.

Groups are identified by observation, because module names are not reliable. A layer that receives
the same tensor object as the layers called before it belongs to their group. A group stores the
results that one of its layers computes for the others. A result belongs to the tensor that it was
computed from and to the thread that computed it. `fastlora.layers.group_forward` computes and takes
results.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.weights_version import UncopiedCache

if TYPE_CHECKING:
    from fastlora.routing.routing import RoutedLayerGroup

# The location of a result: the thread, and the ``id`` of the tensor.
_Location = tuple[int, int]
# A number that identifies a layer. In a `SharedInputGroup`, it is the layer's ``id``.
_LayerNumber = int


@dataclass(slots=True, eq=False)  # Slots are read several times faster than a NamedTuple.
class GroupCallResults:
    """Results that one call computed for a group of layers that share an input.

    All results were computed from the same input tensor. Each layer takes its own result.

    Attributes:
        x: The input tensor.
        version: The tensor version of x, which counts writes to it; 0 for an inference tensor,
            which has none.
        context: Objects that all results depend on, compared by identity.
        computed_by: The number of the layer that computed the results.
        own: Maps the number of a layer to a tuple (cache key, result). The cache key covers the
            rest of what the layer's result depends on.
        unfinished: The model's record of pending results; None outside a model.
    """

    x: weakref.ref[torch.Tensor]
    version: int
    context: tuple[object, ...]
    computed_by: _LayerNumber
    own: dict[_LayerNumber, tuple[object, object]]
    unfinished: dict[tuple[int, int, int], SharedResultCache] | None

    def is_valid_for(self, x: torch.Tensor, context: tuple[object, ...]) -> bool:
        """Return whether the results are valid for the input ``x`` and the given ``context``.

        The results are valid if they were computed from the current values of ``x`` with the same
        context.
        """
        version = 0 if x.is_inference() else x._version
        known = self.context
        if self.x() is not x or self.version != version or len(context) != len(known):
            return False
        return all(map(is_, context, known))


# By thread, the `SharedResultCache` that it stored to last.
_put_last: dict[int, weakref.ref[SharedResultCache]] = {}


class SharedResultCache(UncopiedCache):
    """Cache of results that layers share.

    One layer computes them for other layers. Each result is taken only once. Threads do not see
    each other's results. A result is stored until it is taken, its tensor is freed, or
    `discard_untaken` is called. `discard_untaken` is called when the thread stores results for
    other layers, when it computes again for these layers, and when its forward pass of the model or
    its block ends. Layers are identified by numbers.

    Attributes:
        entries: Results by thread and by ``id`` of the tensor.
    """

    def __init__(self) -> None:
        self.entries: dict[_Location, GroupCallResults] = {}
        self._reference = weakref.ref(self)

    def put_results(
        self,
        x: torch.Tensor,
        context: tuple[object, ...],
        computed_by: _LayerNumber,
        results: Mapping[_LayerNumber, tuple[object, object]],
        model: RoutedLayerGroup | None = None,
    ) -> None:
        """Store the results that one layer has computed, so that other layers can use them.

        The results were computed from x. ``computed_by`` is the number of the layer that has
        computed the results. ``results`` maps the number of each of the other layers to a tuple
        (cache key, result).
        """
        thread, version = get_ident(), 0 if x.is_inference() else x._version
        location = thread, id(x)
        last = _put_last.get(thread)
        if last is not self._reference:
            other = None if last is None else last()
            if other is not None and other.entries:
                # x may be written to meanwhile, and not every write is counted.
                other.discard_untaken()
            _put_last[thread] = self._reference
        before = self.entries.get(location)
        if before is not None and before.is_valid_for(x, context):
            before.own.update(results)
            return
        unfinished = None if model is None else model.unfinished
        known = weakref.ref(x, functools.partial(self._drop_of_freed, location))
        self.entries[location] = GroupCallResults(
            known, version, context, computed_by, dict(results), unfinished
        )
        if unfinished is not None:
            unfinished[thread, location[1], id(self)] = self

    def pop_result(
        self,
        x: torch.Tensor,
        layer: _LayerNumber,
        context: tuple[object, ...],
        entry: GroupCallResults | None = None,
    ) -> tuple[Any, Any] | None:
        """Remove and return the result that was computed for a layer.

        ``layer`` is the layer's number. The return value is a tuple (cache key, result), or None if
        there is no result. The result was computed by this thread, from the current values of x in
        the same ``context``. ``entry`` is this thread's entry for x, if the caller has looked it
        up.
        """
        location = get_ident(), id(x)
        if entry is None:
            entry = self.entries.get(location)
        if entry is None:
            return None
        if not entry.is_valid_for(x, context):
            self._drop(location)  # The results hold activations.
            return None
        own = entry.own
        found = own.pop(layer, None)
        if not own:
            self._drop(location)
        return found

    def discard_untaken(self) -> set[_LayerNumber]:
        """Discard the results that no layer has taken.

        Returns a set with the numbers of the layers for which these results were computed. Only
        this thread's results are discarded.
        """
        untaken: set[_LayerNumber] = set()
        if self.entries:
            thread = get_ident()
            for location in [location for location in [*self.entries] if location[0] == thread]:
                entry = self._drop(location)
                untaken.update(() if entry is None else entry.own)
        return untaken

    def clear(self) -> None:
        """Clear all cached results that layers share.

        The results of all threads are discarded.
        """
        for location in [*self.entries]:
            self._drop(location)

    def _drop_of_freed(self, location: _Location, _: object) -> None:
        self._drop(location)

    def _drop(self, location: _Location) -> GroupCallResults | None:
        entry = self.entries.pop(location, None)
        if entry is not None and entry.unfinished is not None:
            entry.unfinished.pop((location[0], location[1], id(self)), None)
        return entry


class SharedInputGroup(SharedResultCache):
    """Group of layers that receive the same input tensor.

    The layers are in the order of their calls. A copied or unpickled layer has a group without
    members until a forward pass identifies its group.

    Attributes:
        members: The layers. Results are stored by their ``id``.
        unwritten: Whether no write to the tensor was observed between their calls. PyTorch does not
            count writes to an inference tensor, so the first observation is relied on.
        fallback_reasons: Maps the ``id`` of a layer to the reason why its last forward pass in
            training shared nothing, or to an empty string if it shared.
        launches: Maps the ``id`` of a layer to the launch of its call, cached for its next call.
        idle: The ``id`` of each layer that was not called after a result was computed for it.
    """

    def __init__(
        self, members: tuple[weakref.ref[nn.Module], ...] = (), unwritten: bool = False
    ) -> None:
        super().__init__()
        self.members = members
        self.unwritten = unwritten
        self.fallback_reasons: dict[_LayerNumber, str] = {}
        self.launches: dict[_LayerNumber, Any] = {}
        self.idle: set[_LayerNumber] = set()

    def discard_untaken(self) -> set[_LayerNumber]:
        """Discard the results that no layer has taken.

        Returns a set of the ids of the layers for which these results were computed. Only this
        thread's results are discarded. The layers are also recorded as idle. Nothing is computed
        for an idle layer until the layer is called again.
        """
        untaken = super().discard_untaken()
        if untaken:
            self.launches.clear()
            self.idle |= untaken
        return untaken

    def clear(self) -> None:
        """Clear everything that the group has cached.

        The results of every thread are discarded. The cached launches and the set of idle layers
        are cleared too.
        """
        super().clear()
        self.launches.clear()
        self.idle.clear()


class _SharedInputCallSequence:
    """Consecutive calls to layers that share an input tensor.

    The called layers are candidates for a shared-input group, which `form_group` forms. All calls
    of a sequence are made in the same thread.
    """

    def __init__(self, layer: nn.Module, x: torch.Tensor) -> None:
        self.thread = get_ident()
        self.x = weakref.ref(x)
        self.members = [weakref.ref(layer)]
        self.unwritten = True
        # The tensor's version, or a copy of the tensor if PyTorch does not count writes to it.
        self._state = x.clone() if x.is_inference() else x._version

    def can_append_call_to_sequence(self, layer: nn.Module, x: torch.Tensor) -> bool:
        """Return whether a call to a layer with input x can be appended to the sequence.

        The call is in this thread. It can be appended if the sequence is in this thread too, x is
        the sequence's tensor, and the layer is not in the sequence yet.
        """
        if self.thread != get_ident() or self.x() is not x:
            return False
        return all(member() is not layer for member in self.members)

    def append_call(self, layer: nn.Module, x: torch.Tensor) -> None:
        """Record that a layer is called with the input x.

        The layer is appended to the sequence. `form_group` later forms a shared-input group from
        the layers of the sequence. The method also records whether x has been written to since the
        first call.
        """
        self.members.append(weakref.ref(layer))
        if isinstance(self._state, int):
            self.unwritten &= x._version == self._state
        elif self.unwritten:
            captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
            # torch.equal waits for the device, once per layer.
            same = not captured and torch.equal(_as_bytes(x), _as_bytes(self._state))
            self.unwritten = same

    def form_group(self) -> None:
        """Form a shared-input group from the layers.

        Layers that another thread has already grouped are left out.
        """
        group = SharedInputGroup(tuple(self.members), self.unwritten)
        for reference in self.members:
            member: Any = reference()
            if member is not None and known_group(member) is None:
                member.__dict__["_shared_input_group"] = group


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)  # A NaN has the same bits as itself.


# Sequences that may continue: at most one per thread.
_open_sequences: list[_SharedInputCallSequence] = []
_sequences_lock = threading.Lock()


def known_group(layer: nn.Module) -> SharedInputGroup | None:
    """Return a layer's shared-input group, or None if the group is not known yet.

    The group becomes known when a forward pass identifies it.
    """
    known: SharedInputGroup | None = layer.__dict__.get("_shared_input_group")
    if known is not None:
        for member in known.members:
            if member() is layer:
                return known
    return None


def observe_call(layer: nn.Module, x: torch.Tensor) -> SharedInputGroup | None:
    """Record that a layer is called with x, and return the layer's shared-input group.

    Returns None if the group has not been identified yet.
    """
    known: SharedInputGroup | None = layer.__dict__.get("_shared_input_group")
    if known is not None:  # This is `known_group` without a Python call.
        for reference in known.members:
            if reference() is layer:
                return known
    with _sequences_lock:
        for sequence in [*_open_sequences]:
            if sequence.can_append_call_to_sequence(layer, x):
                sequence.append_call(layer, x)
                return None
            # A thread that calls another layer, or uses another tensor, has ended its last
            # sequence.
            if sequence.thread == get_ident() or sequence.x() is None:
                _open_sequences.remove(sequence)
                sequence.form_group()
        known = known_group(layer)
        if known is None:
            _open_sequences.append(_SharedInputCallSequence(layer, x))
    return known


def clear_group_cache(layer: object) -> None:
    """Clear the cache of a layer's shared-input group.

    The cache contains results, launches, and the set of idle layers.
    """
    group = getattr(layer, "__dict__", {}).get("_shared_input_group")
    if group is not None:
        group.clear()
