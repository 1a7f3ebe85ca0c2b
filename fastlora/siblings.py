"""Layers fed by the same tensor, such as q/k/v and gate/up: found by watching one forward.

Names of modules say nothing here. A layer that receives the very tensor object that the layers
before it received is their sibling. That makes a shared shrink worth computing; whether it may be
used is decided by the tensor again, at every call.
"""

from __future__ import annotations

import threading
import weakref
from operator import is_
from typing import Any, NamedTuple

import torch


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
