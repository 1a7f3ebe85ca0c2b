"""Layers fed by the same tensor, such as q/k/v and gate/up: found by watching, and what they share.

Names of modules say nothing here. A layer that receives the very tensor object that the layers
before it received is their sibling. That makes a shared pass over the tensor worth computing;
whether its result may be used is decided by the tensor again, at every call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.weight_marks import Kept

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer


class Family(Kept):
    """Layers that were fed by the same tensor, in the order of their calls.

    A copied or unpickled layer has one without members: it has yet to be seen.

    Attributes:
        members: The layers.
        unwritten: Whether nobody was seen to write into the tensor between their calls. Writes into
            an inference tensor are not counted: what was seen once is then relied on.
        why_not: Why the last training forward of a layer (by its ``id``) shared nothing; empty
            where it did.
        at_once: By a layer's ``id``, what `fastlora.layers.at_once` keeps for its next call.
        idle: The ``id`` of layers that were not called when something was computed for them.
    """

    def __init__(
        self, members: tuple[weakref.ref[CommonLayer], ...] = (), unwritten: bool = False
    ) -> None:
        self.members = members
        self.unwritten = unwritten
        self.why_not: dict[int, str] = {}
        self.at_once: dict[int, Any] = {}
        self.idle: set[int] = set()

    def computed(self) -> set[int]:
        """Returns the ``id`` of layers that another one's call computes at once with it."""
        return {owner for launch in self.at_once.values() for owner in launch.owners[1:]}


class _Seen:
    """Layers seen in sequence with one tensor."""

    def __init__(self, layer: CommonLayer, x: torch.Tensor) -> None:
        self.x = weakref.ref(x)
        self.members = [weakref.ref(layer)]
        self.unwritten = True
        # What the tensor was: how often written into, or where nobody counts that, its elements.
        self._state = x.clone() if x.is_inference() else x._version

    def add(self, layer: CommonLayer, x: torch.Tensor) -> None:
        """Notes the next layer with the same tensor."""
        self.members.append(weakref.ref(layer))
        if isinstance(self._state, int):
            self.unwritten &= x._version == self._state
        elif self.unwritten:
            captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
            same = not captured and torch.equal(_bits(x), _bits(self._state))  # waits, once a layer
            self.unwritten = same


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)  # a NaN is like itself


class _Shares(NamedTuple):
    """What one layer computed for its siblings; each takes its own once.

    Attributes:
        x: The tensor that it was computed from, at ``version``, which counts writes into x; 0 for
            an inference tensor, which counts none.
        context: What all shares depend on.
        own: By owner, what else the share depends on, and the share.
    """

    x: weakref.ref[torch.Tensor]
    version: int
    context: tuple[object, ...]
    own: dict[int, tuple[object, Any]]


class _Thread(threading.local):
    """The layers that a thread saw last, and what the last of them left for its siblings."""

    seen: _Seen | None = None
    shares: _Shares | None = None


_thread = _Thread()


def known_family(layer: CommonLayer) -> Family | None:
    """Returns the family of a layer, None while it is not known."""
    known: Family | None = layer.__dict__.get("_family")
    if known is not None:
        for member in known.members:
            if member() is layer:
                return known
    return None


def is_unwritten(layer: CommonLayer) -> bool:
    """Whether nobody was seen to write into the tensor of a layer's family."""
    known = known_family(layer)
    return known is not None and known.unwritten


def family_of(layer: CommonLayer, x: torch.Tensor) -> Family | None:
    """`known_family` of a layer that is called with x, which makes it known sooner or later."""
    known: Family | None = layer.__dict__.get("_family")
    if known is not None:  # as `known_family`, in no call of ours
        for reference in known.members:
            if reference() is layer:
                return known
    seen = _thread.seen
    if seen is not None and seen.x() is x and all(member() is not layer for member in seen.members):
        seen.add(layer, x)
        return None
    if seen is not None:
        family = Family(tuple(seen.members), seen.unwritten)
        for reference in seen.members:
            member = reference()
            # Another thread may have seen it beside others: no layer is of two families.
            if member is not None and known_family(member) is None:
                member.__dict__["_family"] = family
        _thread.seen = None
        known = known_family(layer)
        if known is not None:
            return known
    _thread.seen = _Seen(layer, x)
    return None


def siblings_of(layer: CommonLayer, x: torch.Tensor) -> list[Any]:
    """Returns a layer of a model and its siblings there; none while they are not known."""
    family = family_of(layer, x)
    members = () if family is None else (reference() for reference in family.members)
    return [m for m in members if m is not None and m.routed_by is layer.routed_by]


def take_share(
    x: torch.Tensor, owner: int, context: tuple[object, ...], key: object = None
) -> Any | None:
    """Returns what a sibling computed for an owner from this very tensor, unchanged since; or None.

    ``context`` is what all shares depend on, the very same objects; ``key`` what this one depends
    on beside it, equal.
    """
    shares = _thread.shares
    if shares is None:
        return None
    version = 0 if x.is_inference() else x._version
    same = shares.x() is x and shares.version == version and len(context) == len(shares.context)
    if not same or not all(map(is_, context, shares.context)):
        drop_shares()  # they hold activations
        return None
    needed, share = shares.own.get(owner, (None, None))
    if share is None or needed != key:
        return None
    del shares.own[owner]
    if not shares.own:
        _thread.shares = None
    return share


def withdraw_share(owner: int) -> bool:
    """Forgets a share that its owner cannot take; returns whether there was one."""
    shares = _thread.shares
    return shares is not None and shares.own.pop(owner, None) is not None


def has_share(owner: int) -> bool:
    """Whether a sibling left something for an owner, which need not be what it can take."""
    return _thread.shares is not None and owner in _thread.shares.own


def has_shares() -> bool:
    """Whether some of the last shares were not taken yet."""
    return _thread.shares is not None


def keep_shares(
    x: torch.Tensor, context: tuple[object, ...], own: Mapping[int, tuple[object, object]]
) -> None:
    """Keeps the key and the share of each sibling until all were taken or another tensor comes.

    Of an inference tensor only what a family's `Family.unwritten` vouches for may be kept.
    """
    if own:
        version = 0 if x.is_inference() else x._version
        _thread.shares = _Shares(weakref.ref(x, _forget), version, context, dict(own))


def _forget(x: weakref.ref[torch.Tensor]) -> None:
    """Forgets the shares of a tensor that is gone: nobody can take them."""
    shares = _thread.shares
    if shares is not None and shares.x is x:
        _thread.shares = None


def drop_shares() -> None:
    """Forgets shares that nobody took, and notes whose they were."""
    shares, _thread.shares = _thread.shares, None
    for part in () if shares is None else shares.context:
        if isinstance(part, Family) and shares is not None:
            part.at_once.clear()
            part.idle.update(shares.own)


def forget_siblings(layer: object) -> None:
    """Forgets what is kept of a layer's siblings, and what they left for each other."""
    family = getattr(layer, "__dict__", {}).get("_family")
    if family is not None:
        family.at_once.clear()
        family.idle.clear()
        _thread.shares = None
