"""The same models in compiled graphs, and the operators that any of them reaches."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from tests.conformance.isolation import in_thread
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
    Case("model", "single", "dropout"),
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
# Those that the default compiler, which is slow, is tried on too.
INDUCTOR = [
    Case("layer", "single", "dropout"),
    Case("model", "mixed", "dora_dropout", base_trains=True),
]
BACKENDS = [("aot_eager", case) for case in CASES] + [("inductor", case) for case in INDUCTOR]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(subject: Subject, **options: Any) -> Subject:
    """The subject, in one graph; its shared-input groups are known before."""
    with torch.no_grad():
        for _ in range(2):
            subject.forward(subject.x())
    if subject.case.trains:
        subject.forward(subject.x().requires_grad_())
    options = {"backend": "aot_eager", "fullgraph": True, **options}
    subject.call = torch.compile(subject.call, **options)
    return subject


@pytest.mark.drawn(1 / 9)
@pytest.mark.parametrize(("backend", "case"), BACKENDS, ids=str)
def test_values(backend: str, case: Case) -> None:
    """One graph gives what float64 gives, value and gradients; a pool's without gradients."""
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler")
    plain = Subject(case)
    x = plain.x()
    masks = read_masks(plain, x)
    subject = compiled(Subject(case), backend=backend)
    zeros = case.rows == "mixed"
    # Inductor has a random stream of its own, unless it is told to take torch's.
    with inductor_config.patch(fallback_random=True):
        if case.trains:
            check(subject, subject.step(x), x, zeros=zeros, masks=masks)
        subject.net.eval()
        with torch.no_grad():
            for _ in range(2 if (backend, case.source) != ("inductor", "model") else 0):
                check(subject, {"y": subject.forward(x)}, x, masks={})
    if backend == "aot_eager" and case.trains and zeros:
        subject.net.train(case.drops)
        ids = ["fr", None] * 3
        masks = read_masks(plain, x, ids)
        check(subject, subject.step(x, ids), x, ids, zeros=True, masks=masks)
        for name, parameter in subject.places().items():
            parameter.requires_grad_(parameter.requires_grad and ".fr." not in name)
        check(subject, subject.step(x, ids), x, ids, zeros=True, masks=masks)


SURROUNDED = [
    Case("layer", "single", "dropout"),
    Case("model", "mixed", "dropout"),
    Case("model", "mixed", "dora"),
]


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("case", SURROUNDED, ids=str)
def test_what_is_around_a_graph_or_within(case: Case) -> None:
    """A backward behind the block in another thread, a checkpoint within, autocast."""
    plain = Subject(case)
    x, other = plain.x(), ["de"] * 6
    masks, zeros = read_masks(plain, x), case.rows == "mixed"

    def run(subject: Subject) -> dict[str, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = subject.forward(leaf)

        def backward() -> bool:
            with subject.block(other) if zeros else contextlib.nullcontext():
                y.backward(direction(y))
            return True

        in_thread(backward)
        return {"y": y.detach(), "x": leaf.grad, **subject.gradients()}

    subject = compiled(Subject(case))
    check(subject, run(subject), x, zeros=zeros, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(subject)
    check(subject, found, x, zeros=zeros, masks=masks, dtype=torch.bfloat16)
    subject = Subject(case)
    call = subject.call
    subject.call = lambda x: checkpoint(call, x, use_reentrant=False)
    check(subject, run(compiled(subject)), x, zeros=zeros, masks=masks)


STEPPED = [
    Case("model", "mixed", "plain"),
    Case("model", "mixed", "dora"),
    Case("model", "single", "dora", base_trains=True),
    Case("patched", "mixed", "plain"),
    Case("patched", "single", "dora"),
]


WAYS = (
    *("eager", "compiled", "eager, eval throughout", "compiled, eval throughout"),
    *("step alone", "step alone, frozen", "step alone, frozen, compiled", "whole, compiled"),
)


@pytest.mark.drawn(1 / 6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", STEPPED, ids=str)
def test_a_step_between_two_evaluations_is_seen(case: Case, way: str) -> None:
    """Fused optimizers write parameters without a version that tells of it."""
    subject = Subject(case)
    x, plain = subject.x(), subject.call
    train = compiled(subject).call if way.startswith("compiled") else plain
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
    kinds = ["fused", "foreach"]
    if way == "whole, compiled":  # which takes seconds a kind: cases take turns
        kinds = [kinds[STEPPED.index(case) % 2]]
    for kind in kinds:
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=0.1, **{kind: True})
        step: Callable[[], Any] = optimizer.step
        if way == "step alone, frozen, compiled":
            torch.compiler.reset()  # of the other kind's step, whose numbers would be dynamic here
            step = torch.compile(step, backend="aot_eager")
        elif way == "whole, compiled":
            whole = [find_gradients, step]
            step = torch.compile(lambda run=whole: [part() for part in run], backend="aot_eager")
        if way.startswith("step alone"):  # of gradients from before the evaluation
            find_gradients()
        if "frozen" in way:
            for parameter in trained:
                parameter.requires_grad_(False)
        evaluate()
        subject.call = train
        if way in ("eager", "compiled"):
            subject.net.train()
        if not way.startswith(("step alone", "whole")):
            find_gradients()
        step()
        optimizer.zero_grad()
        if subject.net.training:
            subject.net.eval()
        subject.read()
        evaluate()


def test_operators() -> None:
    """Schema, fake, autograd and dispatch agree, of every operator that plain PyTorch reaches."""
    subjects = [
        Subject(case) for case in CASES if case.rows == "mixed" or case.feature == "dropout"
    ]
    reached = reached_by(subjects)
    # Those of kernels are reached in Triton's interpreter.
    assert 0 < len({name for name, _ in reached}) < len(registered())
    check_operators(reached)
