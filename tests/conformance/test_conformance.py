"""Every invariant on every case that can show it, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conformance import cache_invalidation, isolation, state, values  # noqa: F401  # they fill the list
from tests.support.conformance_cases import CASES, Case
from tests.support.conformance_suite import pairs


@pytest.mark.drawn(1 / 8)
@pytest.mark.parametrize(("check", "case"), pairs(CASES))
def test_conformance(check: Callable[[Case], None], case: Case) -> None:
    check(case)
