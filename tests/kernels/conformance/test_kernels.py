"""The invariants of the conformance suite on the Triton kernels, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.env import triton_interpreted  # noqa: E402
from tests.conformance import isolation, kept, state, values  # noqa: E402, F401  # they fill the list
from tests.support.conformance_cases import Case  # noqa: E402
from tests.support.conformance_models import Subject  # noqa: E402
from tests.support.conformance_operators import (  # noqa: E402
    check_operators,
    reached_by,
    registered,
)
from tests.support.conformance_suite import pairs  # noqa: E402

if not triton_interpreted():
    pytest.skip("runs on CPU tensors, under TRITON_INTERPRET=1", allow_module_level=True)

# 3 one adapter; 6 mixed without gradients; 7 with; a pool's tables.
CASES = [
    Case("function", "single", "plain", impl="triton"),
    Case("function", "single", "dropout", base="called", dtype="float16", impl="triton"),
    Case("layer", "single", "dropout", base_trains=True, impl="triton"),
    Case("layer", "single", "dora_dropout", impl="triton"),
    Case("model", "several", "bias", dtype="float16", factors="float32", impl="triton"),
    Case("model", "mixed", "bias", impl="triton"),
    Case("model", "mixed", "rslora", dtype="float16", base_trains=True, impl="triton"),
    Case("model", "mixed", "dropout", impl="triton"),
    Case("model", "mixed", "plain", base="called", impl="triton"),
    Case("model", "mixed", "dora_dropout", impl="triton"),
    Case("pool", "mixed", "plain", dtype="float16", impl="triton"),
    Case("pool", "mixed", "dora", impl="triton"),
]
FEW = [case for case in CASES if case.feature not in ("rslora", "plain") or case.base == "called"]
NAMES = (
    "autocast",
    "few_rows",
    "joint_is_solo",
    "nan_in_own_row",
    "nan_in_other_factors",
    "absent_adapters",
    "checkpoints_and_threads",
    "saved_for_backward",
)
KEEPS = [case for case in FEW if case.dora]
FROZEN = [
    pair
    for pair in pairs([case for case in FEW if case.rows == "mixed"], ("partly_frozen",))
    if pair.values[1].feature in ("bias", "dropout")
]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        *pairs(CASES, ("values",)),
        *pairs(FEW, NAMES),
        *pairs(KEEPS, ("changes_are_seen",)),
        *FROZEN,
    ],
)
def test_conformance(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_operators() -> None:
    """Schema, fake, autograd and dispatch agree, of every operator that kernels are reached by."""
    reached = reached_by([Subject(case) for case in CASES])
    names = {name for name, _ in reached}
    missing = registered() - names
    assert len(missing) < len(names), sorted(missing)
    check_operators(reached)
