"""Which invariants there are, and which cases each is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from tests.support.conformance_cases import Case


class Invariant(NamedTuple):
    """Something that holds for every case that it applies to.

    Attributes:
        check: Raises where it does not hold.
        applies: Whether a case can show it.
        per: Fields of a case; of cases that agree in all of them the first one stands for the rest.
            Empty: every case is tried.
    """

    check: Callable[[Case], None]
    applies: Callable[[Case], bool]
    per: tuple[str, ...]


INVARIANTS: list[Invariant] = []


def invariant(
    applies: Callable[[Case], bool] = lambda case: True, per: Sequence[str] = ()
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Adds a function to `INVARIANTS`."""

    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        INVARIANTS.append(Invariant(check, applies, tuple(per)))
        return check

    return add


def pairs(cases: Sequence[Case], names: Sequence[str] | None = None) -> list[pytest.param]:
    """Every invariant with each case that it is tried on, as parameters ``check`` and ``case``."""
    found = []
    for check, applies, per in INVARIANTS:
        seen = set()
        for case in cases:
            key = tuple(getattr(case, field) for field in per)
            if names is not None and check.__name__ not in names or not applies(case):
                continue
            if not per or key not in seen:
                seen.add(key)
                found.append(pytest.param(check, case, id=f"{check.__name__}-{case}"))
    return found
