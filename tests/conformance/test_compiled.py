"""The same models in compiled graphs, and the operators that any of them reaches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conformance.state import changes
from tests.support.conformance_cases import Case
from tests.support.conformance_models import Subject, direction
from tests.support.conformance_operators import check_operators, reached_by, registered
from tests.support.conformance_truth import check, read_masks

CASES = [
    Case("function", "single", "plain"),
    Case("layer", "single", "plain", dtype="float64", base_trains=True),
    Case("layer", "several", "dora_dropout"),
    Case("layer", "single", "dora", base="called"),
    Case("layer", "single", "dora_dropout", dtype="float64"),
    Case("model", "single", "dropout", tokens=180),
    Case("model", "several", "bias", dtype="bfloat16", factors="float32"),
    Case("model", "mixed", "plain", base="called"),
    Case("model", "mixed", "bias", dtype="float64", base_trains=True),
    Case("model", "mixed", "dropout"),
    Case("model", "mixed", "dora_dropout", base_trains=True),
    Case("patched", "single", "rslora"),
    Case("patched", "mixed", "dora"),
    Case("pool", "mixed", "many"),
    Case("pool", "mixed", "dora", dtype="bfloat16"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(subject: Subject, **options: Any) -> Subject:
    """The subject, in one graph."""
    options = {"backend": "aot_eager", "fullgraph": True, **options}
    subject.call = torch.compile(subject.call, **options)
    return subject


def graphs() -> int:
    """How many graphs there are; none was broken."""
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    """One graph gives what float64 gives, value and gradients; a pool's without gradients."""
    plain = Subject(case)
    x = plain.x()
    masks = read_masks(plain, x)
    subject = compiled(Subject(case))
    zeros = case.rows == "mixed"
    if case.trains:
        check(subject, subject.step(x), x, zeros=zeros, masks=masks)
    subject.net.eval()
    with torch.no_grad():
        for _ in range(2):
            check(subject, {"y": subject.forward(x)}, x, masks={})
    if case.trains and zeros:
        subject.net.train(case.drops)
        masks = read_masks(plain, x, ["fr", None] * 3)
        ids = ["fr", None] * 3
        check(subject, subject.step(x, ids), x, ids, zeros=True, masks=masks)


MIXED = [case for case in CASES if case.rows == "mixed" and case.dtype == "float32"]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_mixes_and_lengths_compile_nothing(case: Case) -> None:
    """Any ids, slots, scalings and lengths are one graph in training and one in serving."""
    subject = compiled(Subject(case), dynamic=True)
    chosen = random.Random(0)
    names = [*subject.adapters, None]
    if case.trains:
        for step in range(12):
            x = subject.x(chosen.randint(5, 30))
            own = [chosen.choice(names) for _ in range(6)]
            ids: Any = own
            if step % 4 == 3:
                ids = torch.tensor([names.index(name) if name else -1 for name in own])
            if step == 4:
                changes(subject)["scale"]()
            found = subject.step(x, ids)
            if step % 5 == 4 and not case.drops:
                check(subject, found, x, own, zeros=True, masks={})
        assert graphs() == 1
    before = graphs()
    subject.net.eval()
    with torch.no_grad():
        for _ in range(12):
            subject.forward(subject.x(chosen.randint(5, 30)), [chosen.choice(names)] * 6)
    assert graphs() == before + 1


def test_switches_compile_nothing() -> None:
    """Once each active adapter had its graph, switching makes no more."""
    subject = compiled(Subject(Case("model", "single", "rslora")), dynamic=True)
    for length in range(12):
        subject.handle.set_adapter(("en", "fr", "de")[length % 3])
        y = subject.forward(subject.x(4 + length))
        y.sum().backward()
        if length == 2:
            count = graphs()
    assert graphs() == count == 3


STEPPED = [
    Case("model", "mixed", "plain"),
    Case("model", "mixed", "dora"),
    Case("model", "single", "dora", base_trains=True),
    Case("patched", "mixed", "plain"),
    Case("patched", "single", "dora"),
]


WAYS = ("eager", "compiled", "eager, eval throughout", "compiled, eval throughout", "step alone")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", STEPPED, ids=str)
def test_a_step_between_two_evaluations_is_seen(case: Case, way: str) -> None:
    """Fused optimizers write parameters without a version that tells of it."""
    subject = Subject(case)
    x, plain = subject.x(), subject.call
    train = compiled(subject).call if "compiled" in way else plain
    trained = [p for p in subject.places().values() if p.requires_grad]

    def evaluate() -> None:
        subject.call = plain
        with torch.no_grad():
            for _ in range(3):
                check(subject, {"y": subject.forward(x)}, x, masks={})

    def find_gradients() -> None:
        y = subject.forward(x)
        y.backward(direction(y))

    subject.net.eval()
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(trained, lr=0.1, **{kind: True})
        if way == "step alone":  # of gradients from before the evaluation
            find_gradients()
        evaluate()
        subject.call = train
        if way in ("eager", "compiled"):
            subject.net.train()
        if way != "step alone":
            find_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if subject.net.training:
            subject.net.eval()
        subject.read()
        evaluate()


def test_operators() -> None:
    """Schema, fake, autograd and dispatch agree, of every operator that plain PyTorch reaches."""
    subjects = [Subject(case) for case in CASES if case.rows == "mixed" or case.tokens > 3]
    reached = reached_by(subjects)
    # Those of kernels are reached in Triton's interpreter.
    assert 0 < len(reached) < len(registered())
    check_operators(reached)
