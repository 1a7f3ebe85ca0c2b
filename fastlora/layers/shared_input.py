"""Layers that are fed by the same tensor, such as q/k/v and gate/up: one shared-input group.

A group is found by watching, since names of modules say nothing here. A layer that receives the
very tensor object that the layers before it received is in their group. The group holds what one
of its layers computes for the others. A result belongs to the tensor that it was computed from and
to the thread that computed it. `fastlora.layers.group_forward` computes results and takes them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.weight_marks import Kept

if TYPE_CHECKING:
    from fastlora.routing.routing import Group

# Of a thread, and of the tensor by its ``id``.
_Place = tuple[int, int]


class Made(NamedTuple):
    """What was computed from one tensor for several layers.

    Attributes:
        x: The tensor, at ``version``, which counts writes into x; 0 for an inference tensor, which
            counts none.
        context: What all results depend on, compared by identity.
        by: The layer that computed it.
        own: By layer, what else its result depends on, and the result.
        unfinished: Where the model notes that there are results; None outside of a model.
    """

    x: weakref.ref[torch.Tensor]
    version: int
    context: tuple[object, ...]
    by: int
    own: dict[int, tuple[object, object]]
    unfinished: dict[tuple[int, int, int], Results] | None

    def holds(self, x: torch.Tensor, context: tuple[object, ...]) -> bool:
        """Whether it was computed from this very tensor, unchanged since, in this context."""
        version = 0 if x.is_inference() else x._version
        known = self.context
        if self.x() is not x or self.version != version or len(context) != len(known):
            return False
        return all(map(is_, context, known))


# By thread, what a layer computed for others last.
_put_last: dict[int, weakref.ref[Results]] = {}


class Results(Kept):
    """What layers computed for others; each of these takes its own once.

    Threads do not see each other's. A result is kept until it is taken, its tensor is gone, or
    `discard` is called: where the thread computes again, for these layers or others, and where its
    forward of the model or its block ends. Layers are known by numbers.

    Attributes:
        made: By thread, and by ``id`` of the tensor.
    """

    def __init__(self) -> None:
        self.made: dict[_Place, Made] = {}

    def put(
        self,
        x: torch.Tensor,
        context: tuple[object, ...],
        by: int,
        own: Mapping[int, tuple[object, object]],
        model: Group | None = None,
    ) -> None:
        """Keeps a key and a result of each layer, which layer ``by`` computed from x."""
        place, version = (get_ident(), id(x)), 0 if x.is_inference() else x._version
        last = _put_last.get(place[0])
        other = None if last is None else last()
        if other is not None and other is not self:
            other.discard()  # x may be written meanwhile, and not every write is counted
        _put_last[place[0]] = weakref.ref(self)
        before = self.made.get(place)
        if before is not None and before.holds(x, context):
            before.own.update(own)
            return
        unfinished = None if model is None else model.unfinished
        known = weakref.ref(x, lambda _: self._drop(place))
        self.made[place] = Made(known, version, context, by, dict(own), unfinished)
        if unfinished is not None:
            unfinished[place[0], place[1], id(self)] = self

    def take(
        self, x: torch.Tensor, layer: int, context: tuple[object, ...], made: Made | None = None
    ) -> tuple[Any, Any] | None:
        """Returns the key and the result that this thread computed for a layer, and forgets them.

        None if there is none from this very tensor, unchanged since, in the very same ``context``.
        ``made`` is what this thread has of x, where the caller looked it up.
        """
        place = get_ident(), id(x)
        if made is None:
            made = self.made.get(place)
        if made is None:
            return None
        if not made.holds(x, context):
            self._drop(place)  # they hold activations
            return None
        own = made.own
        found = own.pop(layer, None)
        if not own:
            self._drop(place)
        return found

    def discard(self) -> set[int]:
        """Forgets what this thread computed and nobody took; returns for which layers."""
        untaken: set[int] = set()
        if self.made:
            thread = get_ident()
            for place in [place for place in [*self.made] if place[0] == thread]:
                made = self._drop(place)
                untaken.update(() if made is None else made.own)
        return untaken

    def clear(self) -> None:
        """Forgets what every thread computed."""
        for place in [*self.made]:
            self._drop(place)

    def _drop(self, place: _Place) -> Made | None:
        made = self.made.pop(place, None)
        if made is not None and made.unfinished is not None:
            made.unfinished.pop((place[0], place[1], id(self)), None)
        return made


class SharedInputGroup(Results):
    """Layers that were fed by the same tensor, in the order of their calls, and their results.

    A copied or unpickled layer has one without members: it has yet to be seen.

    Attributes:
        members: The layers; results are theirs by ``id``.
        unwritten: Whether nobody was seen to write into the tensor between their calls. Writes into
            an inference tensor are not counted: what was seen once is then relied on.
        why_alone: Why the last training forward of a layer (by its ``id``) shared nothing; empty
            where it did.
        launches: By a layer's ``id``, what its call computes; kept for its next call.
        idle: The ``id`` of layers that were not called when something was computed for them.
    """

    def __init__(
        self, members: tuple[weakref.ref[nn.Module], ...] = (), unwritten: bool = False
    ) -> None:
        super().__init__()
        self.members = members
        self.unwritten = unwritten
        self.why_alone: dict[int, str] = {}
        self.launches: dict[int, Any] = {}
        self.idle: set[int] = set()

    def discard(self) -> set[int]:
        """As `Results.discard`; nothing more is computed for these layers until they are called."""
        untaken = super().discard()
        if untaken:
            self.launches.clear()
            self.idle |= untaken
        return untaken

    def clear(self) -> None:
        """Forgets what every thread computed, and what was found for later calls."""
        super().clear()
        self.launches.clear()
        self.idle.clear()


class _Sequence:
    """Layers that one thread called one after the other with one tensor."""

    def __init__(self, layer: nn.Module, x: torch.Tensor) -> None:
        self.thread = get_ident()
        self.x = weakref.ref(x)
        self.members = [weakref.ref(layer)]
        self.unwritten = True
        # What the tensor was: how often written into, or where nobody counts that, its elements.
        self._state = x.clone() if x.is_inference() else x._version

    def takes(self, layer: nn.Module, x: torch.Tensor) -> bool:
        """Whether a layer that this thread calls with x is the next one."""
        if self.thread != get_ident() or self.x() is not x:
            return False
        return all(member() is not layer for member in self.members)

    def add(self, layer: nn.Module, x: torch.Tensor) -> None:
        """Notes the next layer."""
        self.members.append(weakref.ref(layer))
        if isinstance(self._state, int):
            self.unwritten &= x._version == self._state
        elif self.unwritten:
            captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
            same = not captured and torch.equal(_bits(x), _bits(self._state))  # waits, once a layer
            self.unwritten = same

    def end(self) -> None:
        """Makes the layers a group, but those that another thread has seen beside others."""
        group = SharedInputGroup(tuple(self.members), self.unwritten)
        for reference in self.members:
            member: Any = reference()
            if member is not None and known_group(member) is None:
                member.__dict__["_shared_input"] = group


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)  # a NaN is like itself


# Sequences that may go on: at most one of each thread.
_watched: list[_Sequence] = []
_watching = threading.Lock()


def known_group(layer: nn.Module) -> SharedInputGroup | None:
    """Returns the group of a layer, None while it is not known."""
    known: SharedInputGroup | None = layer.__dict__.get("_shared_input")
    if known is not None:
        for member in known.members:
            if member() is layer:
                return known
    return None


def group_of(layer: nn.Module, x: torch.Tensor) -> SharedInputGroup | None:
    """`known_group` of a layer that is called with x, which makes it known sooner or later."""
    known: SharedInputGroup | None = layer.__dict__.get("_shared_input")
    if known is not None:  # as `known_group`, in no call of ours
        for reference in known.members:
            if reference() is layer:
                return known
    with _watching:
        for sequence in [*_watched]:
            if sequence.takes(layer, x):
                sequence.add(layer, x)
                return None
            # A thread that calls another layer, or with another tensor, is through with its last.
            if sequence.thread == get_ident() or sequence.x() is None:
                _watched.remove(sequence)
                sequence.end()
        known = known_group(layer)
        if known is None:
            _watched.append(_Sequence(layer, x))
    return known


def forget_group(layer: object) -> None:
    """Forgets what a layer's group holds for later calls."""
    group = getattr(layer, "__dict__", {}).get("_shared_input")
    if group is not None:
        group.clear()
