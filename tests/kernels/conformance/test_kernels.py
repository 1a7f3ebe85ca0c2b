"""The invariants of the conformance suite on the Triton kernels, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.env import triton_interpreted  # noqa: E402
from fastlora.ops.torch import segments  # noqa: E402
from tests.conformance import cache_invalidation, isolation, state, values  # noqa: E402, F401  # they fill the list
from tests.conformance import test_compiled as compiled  # noqa: E402
from tests.conformance import test_graphs as graphs  # noqa: E402
from tests.support.compiled import graph_count  # noqa: E402
from tests.support.conformance_cases import Case  # noqa: E402
from tests.support.conformance_models import Subject  # noqa: E402
from tests.support.conformance_operators import (  # noqa: E402
    check_operators,
    reached_by,
    registered,
)
from tests.support.conformance_suite import pairs  # noqa: E402
from tests.support.conformance_truth import check  # noqa: E402

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
    Case("model", "mixed", "dora_dropout", base="called", dtype="float16", impl="triton"),
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
    "unused_adapters",
    "checkpoints_and_threads",
    "saved_for_backward",
    "dropout",
)
KEEPS = [case for case in FEW if case.dora and case.dtype == "float32"]
FROZEN = [
    pair
    for pair in pairs([case for case in FEW if case.rows == "mixed"], ("partly_frozen",))
    if pair.values[1].feature in ("bias", "dropout")
]


@pytest.fixture(autouse=True)
def _never_in_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed batch of a model's adapters fails where it runs in PyTorch instead."""

    def fell_back(*_: object) -> None:
        raise AssertionError("a mixed batch ran in PyTorch")

    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    if case is not None and case.source == "model":
        monkeypatch.setattr(segments, "forward", fell_back)


@pytest.mark.drawn(1 / 8)
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


COMPILED = [
    Case("model", "single", "plain", impl="triton"),
    Case("model", "single", "dropout", impl="triton"),
    Case("model", "mixed", "bias", dtype="float16", factors="float32", impl="triton"),
    Case("model", "mixed", "dora_dropout", base_trains=True, impl="triton"),  # and dropout alone
]


@pytest.mark.drawn(1 / 4)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(case: Case) -> None:
    """In one graph, value and every gradient; any mix and length is the same graph."""
    compiled.test_values("aot_eager", case)
    if case.rows == "mixed" and not case.drops:  # else no mix is compared with a truth
        torch._dynamo.reset()
        counters.clear()
        graphs.test_mixes_and_lengths_compile_nothing(case)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_pool_sees_swaps() -> None:
    """Tables are read at every call: other mixes and hot swaps, DoRA's too, are the same graph."""
    case = Case("pool", "mixed", "dora", impl="triton")
    subject = compiled.compiled(Subject(case))
    subject.net.eval()
    x = subject.x()
    with torch.no_grad():
        for ids in (case.ids, case.ids[::-1], ["en", None] * 3):
            check(subject, {"y": subject.forward(x, ids)}, x, ids, masks={})
            cache_invalidation.changes(subject)["swapped"]()
    assert graph_count() == 1


REACHING = (
    "function-single-dropout-called-float16",
    "layer-single-dropout-base-trains",
    "layer-single-dora_dropout",
    "model-mixed-bias",
    "model-mixed-plain-called",
    "model-mixed-dora_dropout",
    "pool-mixed-dora",
)


def test_operators() -> None:
    """Schema, fake, autograd and dispatch agree, of every operator that kernels are reached by."""
    # Others reach nothing that these do not. Tables hold addresses of their subject's factors.
    cases = [case for case in CASES if str(case) in REACHING]
    subjects = [Subject(case) for case in cases]
    reached = reached_by(subjects)
    # PyTorch's own masks, and stacks of weights (tests/layers/test_expert_layers.py).
    others = {"lora_keep", "grouped_products"}
    others |= {"stacked_linear", "stacked_updates", "stacked_gradients"}
    assert registered() - {name for name, _ in reached} <= others
    check_operators(reached)
    assert len(subjects) == len(REACHING)
