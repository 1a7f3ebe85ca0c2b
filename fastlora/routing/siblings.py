"""Layers fed by the same tensor, such as q/k/v and gate/up: found by watching one forward.

Names of modules say nothing here. A layer that receives the very tensor object that the layers
before it received is their sibling. That makes a shared shrink worth computing; whether it may be
used is decided by the tensor again, at every call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


class _Run(NamedTuple):
    """Layers seen in sequence with one tensor."""

    x: weakref.ref[torch.Tensor]
    numbers: list[int]


class Siblings:
    """Which layers of one model are siblings.

    Attributes:
        layers: A layer by its number.
    """

    def __init__(self) -> None:
        self.layers: dict[int, weakref.ref[Any]] = {}
        self._known: dict[int, tuple[int, ...]] = {}
        self._thread = threading.local()

    def of(self, layer: Any, number: int, x: torch.Tensor) -> tuple[int, ...] | None:
        """Returns the numbers of a layer and its siblings, None while they are not known yet."""
        known = self._known.get(number)
        if known is None:
            self._see(layer, number, x)
        return known

    def _see(self, layer: Any, number: int, x: torch.Tensor) -> None:
        self.layers[number] = weakref.ref(layer)
        run: _Run | None = getattr(self._thread, "run", None)
        if run is not None and run.x() is x and number not in run.numbers:
            run.numbers.append(number)
            return
        if run is not None:
            for seen in run.numbers:
                self._known.setdefault(seen, tuple(run.numbers))
        self._thread.run = _Run(weakref.ref(x), [number])


class Shared(NamedTuple):
    """What a layer computed for its siblings too.

    Attributes:
        x: The tensor that it was computed from, at ``version``.
        version: Counts writes into x.
        key: What else it depends on.
        value: The result.
        left: Numbers of the layers that have yet to take it.
    """

    x: weakref.ref[torch.Tensor]
    version: int
    key: tuple[Any, ...]
    value: Any
    left: set[int]


_thread = threading.local()


def shared(x: torch.Tensor, number: int, key: tuple[Any, ...]) -> Any | None:
    """Returns what a sibling computed from this very tensor, unchanged since; or None."""
    kept: Shared | None = getattr(_thread, "kept", None)
    if kept is None or kept.x() is not x or kept.version != x._version:
        return None
    if number not in kept.left or len(kept.key) != len(key) or not all(map(is_, kept.key, key)):
        return None
    kept.left.discard(number)
    if not kept.left:
        _thread.kept = None
    return kept.value


def share(
    x: torch.Tensor, number: int, members: tuple[int, ...], key: tuple[Any, ...], value: Any
) -> None:
    """Keeps a result for the siblings of a layer, until all have taken it or another comes."""
    left = set(members) - {number}
    # Writes into an inference tensor are not counted: nothing could be taken from it safely.
    if left and not x.is_inference():
        _thread.kept = Shared(weakref.ref(x), x._version, key, value, left)


# --------------------------------------------------------------- layers that no model has numbered


class Family:
    """Layers that were fed by the same tensor, in the order of their calls.

    A copied or unpickled layer has one without members: it has yet to be seen.

    Attributes:
        members: The layers.
        why_not: Why the last training forward of a layer (by its ``id``) shared nothing; empty
            where it did.
    """

    def __init__(self, members: tuple[weakref.ref[Any], ...] = ()) -> None:
        self.members = members
        self.why_not: dict[int, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return Family()

    def __reduce__(self) -> tuple[type[Family], tuple[()]]:
        return Family, ()


class _FamilyRun(NamedTuple):
    """Layers seen in sequence with one tensor."""

    x: weakref.ref[torch.Tensor]
    members: list[weakref.ref[Any]]


def known_family(layer: Any) -> Family | None:
    """Returns the family of a layer, None while it is not known."""
    known: Family | None = layer.__dict__.get("_family")
    if known is not None:
        for member in known.members:
            if member() is layer:
                return known
    return None


def family_of(layer: Any, x: torch.Tensor) -> Family | None:
    """`known_family` of a layer that is called with x, which makes it known sooner or later."""
    known = known_family(layer)
    if known is not None:
        return known
    run: _FamilyRun | None = getattr(_thread, "family_run", None)
    if run is not None and run.x() is x and all(member() is not layer for member in run.members):
        run.members.append(weakref.ref(layer))
        return None
    if run is not None:
        family = Family(tuple(run.members))
        for member in run.members:
            seen = member()
            if seen is not None:
                seen.__dict__["_family"] = family
        _thread.family_run = None
        known = known_family(layer)
        if known is not None:
            return known
    _thread.family_run = _FamilyRun(weakref.ref(x), [weakref.ref(layer)])
    return None


class _KeptShares(NamedTuple):
    """What one layer computed for its family; each takes its own once."""

    x: weakref.ref[torch.Tensor]
    version: int
    context: Any
    shares: list[tuple[weakref.ref[Any], Any, Any]]


def take_share(layer: Any, x: torch.Tensor, context: Any, key: Any) -> Any | None:
    """Returns what a sibling computed for this layer from this very tensor; or None.

    Args:
        layer: Who takes.
        x: Unchanged since.
        context: What all shares depend on.
        key: What this layer's depends on.
    """
    kept: _KeptShares | None = getattr(_thread, "family_kept", None)
    if kept is None:
        return None
    if kept.x() is not x or kept.version != x._version or kept.context != context:
        _thread.family_kept = None  # it holds activations
        return None
    for place, (owner, needed, value) in enumerate(kept.shares):
        if owner() is layer:
            del kept.shares[place]
            if not kept.shares:
                _thread.family_kept = None
            return value if needed == key else None
    return None


def keep_shares(x: torch.Tensor, context: Any, shares: list[tuple[Any, Any, Any]]) -> None:
    """Keeps ``(layer, key, value)`` of siblings until each took its own or another tensor comes."""
    kept = [(weakref.ref(layer), key, value) for layer, key, value in shares]
    _thread.family_kept = _KeptShares(weakref.ref(x), x._version, context, kept)


# ------------------------------------------------------------------------ within a graph's tracing


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor of a graph that is being traced."""
    return isinstance(x, (FakeTensor, FunctionalTensor))


class _Made(NamedTuple):
    """What the first of several equal calls made."""

    x: weakref.ref[torch.Tensor]
    tensors: list[weakref.ref[torch.Tensor]]
    versions: list[int]
    key: Any
    value: Any
    left: list[None]


def take_made(x: torch.Tensor, tensors: Sequence[torch.Tensor], key: Any) -> Any | None:
    """Returns what an equal call made from these very tensors, unchanged since; or None.

    Args:
        x: As in that call.
        tensors: Likewise.
        key: What else it depends on.
    """
    made: _Made | None = getattr(_thread, "made", None)
    if made is None:
        return None
    found = [reference() for reference in (made.x, *made.tensors)]
    same = len(found) == len(tensors) + 1 and all(map(is_, found, (x, *tensors)))
    if not same or made.key != key or made.versions != _versions(x, tensors):
        _thread.made = None  # it may hold activations
        return None
    made.left.pop()
    if not made.left:
        _thread.made = None
    return made.value


def keep_made(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], key: Any, value: Any, calls: int
) -> None:
    """Keeps what the first of ``calls`` equal calls made, until all were served or others come."""
    if x.is_inference():
        return
    references = [weakref.ref(tensor) for tensor in tensors]
    left = [None] * (calls - 1)
    versions = _versions(x, tensors)
    _thread.made = _Made(weakref.ref(x), references, versions, key, value, left)


def _versions(x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in (x, *tensors)]
