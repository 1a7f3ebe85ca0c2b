"""`fastlora.testing`: what decides whether numbers are right must itself be right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.testing import assert_within_budget, random_summation_order


def test_sums_in_another_order_are_as_good() -> None:
    """Outputs and gradients lie within the budget of the machine's own order, and differ."""
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 7, bias=False))
    exact = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 7, bias=False)).double()
    exact.load_state_dict(model.state_dict())
    x = torch.randn(5, 300)

    def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    own, truth = run(model, x), run(exact, x.double())
    with random_summation_order(model, 1):
        other = run(model, x)
    assert not torch.equal(other[0], own[0])
    for a, b, c in zip(other, own, truth, strict=True):
        assert_within_budget(a, b, c)
    assert torch.equal(run(model, x)[0], own[0])


def test_other_hooks_work_on_its_result() -> None:
    """A hook that adds to an output is not undone, whenever it was registered."""
    model = nn.Linear(6, 4)
    model.register_forward_hook(lambda module, args, y: y + 100)
    with random_summation_order(model, 0):
        assert (model(torch.randn(2, 6)) > 50).all()


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
def test_a_wrong_value_fails(wrong: float) -> None:
    """One element off, or NaN, is an error; so is a truth of another dtype."""
    truth = torch.randn(8, 8, dtype=torch.float64)
    same = truth.float()
    assert_within_budget(same, same, truth)
    off = same.clone()
    off[3, 3] += wrong
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(off, same, truth)
    with pytest.raises(TypeError):
        assert_within_budget(same, same, same)
