"""Values and gradients: against float64, in every layout, for few rows, under autocast."""

from __future__ import annotations

import pytest
import torch

from tests.support.conformance_cases import Case
from tests.support.conformance_models import SHAPES, Subject, direction, drawn
from tests.support.conformance_suite import invariant
from tests.support.conformance_truth import check, read_masks


@invariant()
def values(case: Case) -> None:
    """y and every gradient are as near to float64 as plain PyTorch's; again and again."""
    subject = Subject(case)
    x = subject.x()
    masks = read_masks(subject, x)
    found = subject.step(x)
    assert found["y"].dtype == found["x"].dtype == case.x_dtype
    for name, gradient in found.items():
        adapts = name.count(".") == 2
        assert not adapts or gradient.dtype == case.factor_dtype, name
    check(subject, found, x, masks=masks)
    for training in (case.drops, False):
        subject.net.train(training)
        with torch.no_grad():
            for _ in range(2):
                check(subject, {"y": subject.forward(x)}, x, masks=masks if training else {})
            with subject.block():
                found = {"y": [subject.call(x) for _ in range(3)][-1]} if not training else None
        if found is not None:
            check(subject, found, x, masks={})
    with torch.inference_mode():
        y = subject.forward(x)
    check(subject, {"y": y.clone()}, x, masks={})
    fresh = Subject(case)  # nothing made in inference mode is kept for a backward
    with torch.inference_mode():
        fresh.forward(x)
    check(fresh, fresh.step(x), x, masks=masks)


@invariant(per=("source", "rows", "base", "feature"))
def layouts(case: Case) -> None:
    """Transposed, strided and expanded inputs and gradients, and any leading dimensions."""
    subject = Subject(case)
    x = subject.x(2)
    wide = torch.full((6, 4, 40), float("nan"), dtype=x.dtype)
    wide[:, ::2, 3:35:2] = x
    single = x[:1, :1].expand_as(x)
    inputs = {
        "transposed": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "strided": wide[:, ::2, 3:35:2],
        "expanded": single,
        "four": x.view(6, 2, 1, 16),
    }
    if case.rows != "mixed" and case.source != "pool":
        rows = torch.full((12, 40), float("nan"), dtype=x.dtype)[:, 3:35:2]
        inputs["rows"] = rows.copy_(x.view(12, 16))
    masks = read_masks(subject, x)
    n = SHAPES["o"][0]
    for what, given in inputs.items():
        shape = (*given.shape[:-1], n)
        # As sum() gives it, and as a transpose does.
        ones = torch.ones((), dtype=x.dtype).expand(shape)
        spread = drawn("dy", n, *given.shape[:-1]).to(x.dtype).movedim(0, -1)
        # A slice of the columns of what lies in memory.
        sliced = drawn("dy", *given.shape[:-1], n + 5).to(x.dtype)[..., 3:-2]
        for dy in (ones, spread, sliced) if what in ("strided", "expanded") else (spread,):
            check(subject, subject.step(given, dy=dy), given, dy=dy, masks=masks)


@invariant(per=("source", "rows", "base", "feature"))
def few_rows(case: Case) -> None:
    """No rows give no rows and no gradient; one row is like any other."""
    subject = Subject(case)
    if case.source != "shards":  # DTensor itself cannot view a tensor without elements
        found = subject.step(subject.x(0))
        assert found.pop("y").shape == (6, 0, SHAPES["o"][0])
        assert found.pop("x").shape == (6, 0, 16)
        assert not any(gradient.any() for gradient in found.values())
    subject.net.eval()
    one = subject.x(1)[:1]
    for own in (["en"], ["fr"], [None]) if case.rows == "mixed" else (subject.ids() and ["en"],):
        check(subject, subject.step(one, own), one, own, masks={})
    if subject.ids() is None:
        vector = one[0, 0]
        assert torch.equal(subject.forward(vector), subject.forward(one)[0, 0])


@invariant(lambda case: case.dtype == "float32", per=("source", "rows", "base", "feature"))
def autocast(case: Case) -> None:
    """Under autocast the products are in its dtype, and gradients in the parameters' own."""
    subject = Subject(case)
    x = subject.x()
    half = torch.float16 if case.impl == "triton" else torch.bfloat16
    masks = read_masks(subject, x)

    def run(forward: bool, backward: bool) -> dict[str, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", half, enabled=forward):
            y = subject.forward(leaf)
        with torch.autocast("cpu", half, enabled=backward):
            y.backward(direction(y))
        return {"y": y.detach(), "x": leaf.grad, **subject.gradients()}

    run(True, False)  # from the next one on groups are known
    outside = run(True, False)
    assert outside["y"].dtype == half
    assert all(t.dtype == torch.float32 for name, t in outside.items() if name != "y")
    check(subject, outside, x, dtype=half, masks=masks)
    inside = run(True, True)
    assert all(torch.equal(inside[name], tensor) for name, tensor in outside.items())
    # A backward is in its forward's dtype, but for PyTorch's own nodes.
    inside, outside = run(False, True), run(False, False)
    check(subject, inside, x, dtype=half, masks=masks)
    if case.rows == "mixed" and case.base == "plain" and case.source != "shards":
        assert all(torch.equal(inside[n], t) for n, t in outside.items() if n != "x")


@invariant(lambda case: case.trains, per=("source", "rows", "feature"))
def partly_frozen(case: Case) -> None:
    """Only what asks for a gradient gets one, and x may be a plain input."""
    subject = Subject(case)
    x = subject.x()
    masks = read_masks(subject, x)
    places = subject.places()
    wanted = {name for name, parameter in places.items() if parameter.requires_grad}
    for kept in (".A", ".B", ".en.", "q.weight", "k.", "nothing"):
        for name, parameter in places.items():
            chosen = name in wanted or kept in ("q.weight", "k.")
            parameter.requires_grad_(kept in name and chosen and subject.acts(name))
        found = subject.step(x)
        check(subject, found, x, masks=masks)
        if kept == "nothing":
            continue
        y = subject.forward(x)
        y.backward(direction(y))
        without = {"y": y.detach(), "x": found["x"], **subject.gradients()}
        check(subject, without, x, masks=masks)


@invariant(per=("source", "rows", "base", "feature"))
def backward_twice(case: Case) -> None:
    """A kept graph gives the same gradients again; one that was not kept raises."""
    subject = Subject(case)
    leaf = subject.x().requires_grad_()
    y = subject.forward(leaf)
    kept = y.detach().clone()
    results = []
    for again in (True, False):
        leaf.grad = None
        y.backward(direction(y), retain_graph=again)
        results.append({"x": leaf.grad, **subject.gradients()})
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
    assert torch.equal(y, kept)
    with pytest.raises(RuntimeError):
        y.backward(direction(y))
