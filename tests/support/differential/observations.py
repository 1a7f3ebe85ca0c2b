"""Where two observations differ by more than the rounding of float64 explains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.support.differential.sides import Observation

EPS = torch.finfo(torch.float64).eps
SINGLE = torch.finfo(torch.float32).eps
HALFWAY = (EPS / SINGLE) ** 0.5


class Difference(NamedTuple):
    """One thing in which the sides differ; ``what`` is a key of an observation."""

    what: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        if isinstance(self.ours, torch.Tensor) and isinstance(self.theirs, torch.Tensor):
            if self.ours.shape == self.theirs.shape:
                error = (self.ours - self.theirs).abs().max().item()
                return f"{self.what}: error {error:.3e} of {self.theirs.abs().max().item():.3e}"
            return f"{self.what}: {tuple(self.ours.shape)}, expected {tuple(self.theirs.shape)}"
        if isinstance(self.ours, dict) and isinstance(self.theirs, dict):
            keys = [*self.ours, *(key for key in self.theirs if key not in self.ours)]
            parts = [
                f"{key}: {self.ours.get(key)!r}, expected {self.theirs.get(key)!r}"
                for key in keys
                if self.ours.get(key) != self.theirs.get(key)
            ]
            return f"{self.what}: " + ("; ".join(parts[:6]) or "another order")
        if isinstance(self.ours, list) and isinstance(self.theirs, list):
            extra = [each for each in self.ours if each not in self.theirs]
            missing = [each for each in self.theirs if each not in self.ours]
            if extra or missing:
                return f"{self.what}: too many {extra[:8]}, missing {missing[:8]}"
        return f"{self.what}: {_short(self.ours)}, expected {_short(self.theirs)}"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Exception):
        return f"{type(value).__name__}({str(value)[:200]!r})"
    return "none" if isinstance(value, Observation) else repr(value)


def differences(
    ours: Observation, theirs: Observation, single: Observation
) -> Iterator[Difference]:
    """Yields where our side differs from PEFT's.

    Values of one group, such as the gradients of one backward, are one vector. From float32 to
    float64 a rounding error shrinks by the ratio of the unit roundoffs, and a fault does not shrink
    at all. So PEFT's own error in float32 says how large rounding is, and a difference in float64
    is a fault unless it is smaller by the square root of that ratio, halfway between the two.

    Args:
        ours: What is tested, in float64.
        theirs: PEFT's, in float64.
        single: PEFT's, in float32.
    """
    for what in dict.fromkeys((*theirs.facts, *ours.facts)):
        if ours.facts.get(what) != theirs.facts.get(what):
            yield Difference(what, ours.facts.get(what), theirs.facts.get(what))
    budgets = _budgets(theirs, single)
    for what in dict.fromkeys((*theirs.values, *ours.values)):
        own, expected = ours.values.get(what), theirs.values.get(what)
        if own is None or expected is None or own.shape != expected.shape:
            if own is not expected:
                yield Difference(what, own, expected)
        elif not _farthest(own, expected) <= budgets[_group(what)]:  # also catches NaN
            yield Difference(what, own, expected)


def _budgets(theirs: Observation, single: Observation) -> dict[str, float]:
    """The largest error that a value of each group may have."""
    errors: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for what, expected in theirs.values.items():
        group, rounded = _group(what), single.values[what]
        if expected is not None and rounded is not None:
            errors[group] = max(errors[group], _farthest(rounded.double(), expected))
            sizes[group] = max(sizes[group], _farthest(expected))
    return {group: errors[group] * HALFWAY + 2 * _eps(group) * sizes[group] for group in sizes}


def _eps(group: str) -> float:
    # PEFT rounds the weights of a sum to float32.
    return SINGLE if group == "update" else EPS


def _group(what: str) -> str:
    return what.partition("/")[0]


def _farthest(found: torch.Tensor, expected: torch.Tensor | float = 0.0) -> float:
    return (found - expected).abs().max().item() if found.numel() else 0.0
