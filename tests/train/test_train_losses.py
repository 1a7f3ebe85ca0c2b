"""Losses in mixed batches: each adapter's is what it would have alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastlora.testing import assert_within_budget
from fastlora.train import AdapterOptimizers, adapter_losses, causal_lm_losses, count_tokens
from tests.support.mixed_training import (
    CONFIGS,
    NAMES,
    OPTIMIZERS,
    batch,
    build,
    gradients,
    losses_of,
    only,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_those_of_transformers(dtype: torch.dtype) -> None:
    """Shift, -100, base rows: each adapter's loss is transformers' over its samples alone."""
    hf = pytest.importorskip("transformers.loss.loss_utils", reason="compares with transformers")
    _, labels, names = batch(NAMES)
    logits = torch.randn(len(names), 6, 5).to(dtype)
    losses = causal_lm_losses(logits, labels, names)
    assert list(losses.by_adapter) == ["b", "a", "c", "d"]
    for name, loss in losses.by_adapter.items():
        keep = [i for i, n in enumerate(names) if n == name]
        theirs = hf.ForCausalLMLoss(logits[keep], labels[keep], 5)
        exact = cross_entropy(
            logits[keep][:, :-1].double().flatten(0, 1), labels[keep][:, 1:].flatten()
        )
        assert_within_budget(loss, theirs, exact, name)
        assert torch.tensor(losses.values[name]) == loss
        assert losses.tokens[name] == (labels[keep][:, 1:] != -100).sum()
    assert losses.tokens == count_tokens(labels, names)


def test_gradients_are_the_solo_runs() -> None:
    """The sum of the losses gives every adapter the gradient of its own loss alone."""
    data = batch(NAMES)
    mixed = build()
    losses_of(mixed, data).total.backward()
    for name in CONFIGS:
        solo, truth = build(), build(torch.float64)
        losses_of(solo, only(data, name)).total.backward()
        x, *rest = only(data, name)
        losses_of(truth, (x.double(), *rest)).total.backward()
        alone, exact = gradients(solo, name), gradients(truth, name)
        for key, gradient in gradients(mixed, name).items():
            assert_within_budget(gradient, alone[key], exact[key], key)


def test_losses_for_each_sample_and_mask() -> None:
    """Losses of any shape; what the mask leaves out adds nothing, a NaN neither."""
    values = torch.tensor([1.0, 2.0, 6.0, float("nan")], requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    losses = adapter_losses(values, ["a", "b", "a", "a"], mask=mask)
    assert losses.values == {"a": 3.5, "b": 2.0}
    losses.total.backward()
    assert values.grad.tolist() == [0.5, 1.0, 0.5, 0.0]


def test_an_adapter_without_tokens_contributes_nothing() -> None:
    """No NaN, no step: it counts as absent, and so do base rows."""
    x, labels, names = batch(["a", "b", None])
    labels[0] = -100
    model = build()
    optimizers = AdapterOptimizers(model, OPTIMIZERS)
    losses = losses_of(model, (x, labels, names))
    assert list(losses.by_adapter) == ["b"]
    optimizers.backward(losses)
    assert optimizers.step().stepped == ("b",)
    nothing = losses_of(model, (x[2:], labels[2:], names[2:]))
    assert nothing.by_adapter == {} and nothing.total.item() == 0
    optimizers.backward(nothing)
    assert optimizers.step().stepped == ()


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
BAD_LOSSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "names": (
        lambda: causal_lm_losses(LOGITS, LABELS, ["a"]),
        ValueError,
        "adapters has 1 entries; expected 2",
    ),
    "labels": (
        lambda: causal_lm_losses(LOGITS, LABELS[:1], ["a", "b"]),
        ValueError,
        r"labels has shape \(1, 3\), expected \(2, 3\)",
    ),
    "logits": (
        lambda: causal_lm_losses(LOGITS[0], LABELS, ["a", "b"]),
        ValueError,
        r"logits has shape \(3, 5\), expected \[B, T, V\]",
    ),
    "string": (lambda: count_tokens(LABELS, "ab"), TypeError, "is the string 'ab'"),
    "slots": (lambda: count_tokens(LABELS, [0, 1]), TypeError, r"adapters\[0\] is 0, expected a n"),
    "dtype": (lambda: adapter_losses(LABELS, ["a", "b"]), TypeError, "torch.int64"),
    "scalar": (lambda: adapter_losses(torch.zeros(()), ["a"]), ValueError, "has no dimensions"),
    "mask": (
        lambda: adapter_losses(LOGITS, ["a", "b"], mask=LABELS > 0),
        ValueError,
        r"mask has shape \(2, 3\), expected \(2, 3, 5\)",
    ),
    "mask_dtype": (
        lambda: adapter_losses(LOGITS, ["a", "b"], mask=LOGITS),
        TypeError,
        "torch.float32, expected torch.bool",
    ),
    "no_count": (
        lambda: causal_lm_losses(LOGITS, LABELS, ["a", "b"], tokens={"a": 4}),
        ValueError,
        "tokens argument has no entry for adapter 'b', which has 2 tokens in this batch",
    ),
    "zero": (
        lambda: causal_lm_losses(LOGITS, LABELS, ["a", "b"], tokens={"a": 0, "b": 2}),
        ValueError,
        r"tokens\['a'\] is 0, expected at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_raise(case: str) -> None:
    """One clear error that names the value and what was expected."""
    call, error, message = BAD_LOSSES[case]
    with pytest.raises(error, match=message):
        call()
