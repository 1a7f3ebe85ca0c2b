"""Layers fed by the same tensor share their passes over it in training: values, when, why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoraLinear
from fastlora.autograd import shrink as autograd
from fastlora.layers import FastLoraWrapper, sharing
from fastlora.testing import assert_within_budget, farthest
from tests.support.compiled import gradients
from tests.support.tiny import trainable


class Block(nn.Module):
    """Three layers fed by one tensor, and one that is fed by their sum."""

    def __init__(self, p: float = 0.0, bias: bool = True, wrapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)

        def make(n: int, r: int, k: int = 24) -> Any:
            if not wrapped:
                return FastLoraLinear(k, n, bias, r=r, lora_dropout=p, lora_bias=r == 5)
            layer = FastLoraWrapper(nn.Linear(k, n, bias))
            layer.add_adapter("default", r=r, lora_dropout=p)
            layer.set_adapter("default")
            return layer

        self.q, self.k, self.v, self.o = make(24, 4), make(24, 3), make(24, 5), make(16, 2)
        for layer in (self.q, self.k, self.v, self.o):
            nn.init.normal_(layer.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 24]`` to ``[..., 16]``."""
        return self.o(torch.tanh(self.q(x)) + self.k(x) * self.v(x))


class Wide(nn.Module):
    """Two layers fed by one tensor whose outputs are much wider than it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.up = (FastLoraLinear(24, 300, r=4) for _ in range(2))
        for layer in (self.gate, self.up):
            nn.init.normal_(layer.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 24]`` to ``[..., 300]``."""
        return self.gate(x).tanh() * self.up(x)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many s each `LoraShrink` of the block makes."""
    calls: list[int] = []
    plain = autograd.LoraShrink.apply

    def apply(*args: Any) -> Any:
        calls.append(len(args) - 5)
        return plain(*args)

    autograd.LoraShrink.apply = apply  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del autograd.LoraShrink.apply


@pytest.fixture(autouse=True)
def _any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MIN_ROWS", 0)


def apart(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """`gradients` with each layer on its own."""
    alone = copy.deepcopy(model)  # a copy has not seen its siblings
    with counted() as calls:
        result = gradients(alone, alone, x)
    assert not calls
    return result


def in_eight_orders(
    run: Callable[[torch.Tensor], list[torch.Tensor]], x: torch.Tensor, with_tokens: int = 2
) -> list[list[torch.Tensor]]:
    """What ``run`` gives for x and for its tokens in seven other orders.

    ``with_tokens`` says how many results, the first, have x's tokens.
    """
    results = [run(x)]
    for seed in range(7):
        order = torch.randperm(x.shape[-2], generator=torch.Generator().manual_seed(seed))
        found = run(x.index_select(-2, order))
        back = [tensor.index_select(-2, order.argsort()) for tensor in found[:with_tokens]]
        results.append([*back, *found[with_tokens:]])
    return results


def assert_near(
    shared: Sequence[torch.Tensor | None], model: nn.Module, x: torch.Tensor, since: int = 0
) -> None:
    """What layers share is as near to float64 as what they give apart, tokens in any order.

    ``shared`` holds the results of `gradients` from number ``since`` on, in any dtype.
    """
    double = copy.deepcopy(model).double()
    truth = apart(double, x.double())
    plain = in_eight_orders(lambda x: apart(model, x), x)
    for index, mine in enumerate(shared, since):
        assert mine is not None
        exact, runs = truth[index], (run[index].to(mine.dtype) for run in plain)
        assert_within_budget(mine, farthest(runs, exact), exact, f"result {index}")


def test_gradients_have_their_own_memory_and_few_rows_are_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shared from 1,024 rows on; each d_lora_a, though cut from one product, is its own tensor."""
    model, x = Block(), torch.randn(1024, 24)
    model(x)
    shared = gradients(model, model, x)
    assert len({t.untyped_storage().data_ptr() for t in shared}) == len(shared)
    monkeypatch.undo()
    with counted() as calls:
        model(x[1:])
        assert "below 1024 rows" in fastlora.fusion_report(model).rows[0].siblings
        assert not calls
        model(x)
    assert calls == [3]


def test_two_wide_siblings() -> None:
    model, x = Wide(), torch.randn(9, 24)
    model(x)
    with counted() as calls:
        shared = gradients(model, model, x)
    assert calls == [2]
    assert_near(shared, model, x)


def test_what_is_saved() -> None:
    """x once for the three, one s each, parameters and scalings: nothing else."""
    model, x = Block(bias=False), torch.randn(50, 24)
    model(x)
    q, k, v = model.q(x), model.k(x), model.v(x)
    (shrink,) = {
        node
        for y in (q, k, v)
        for node, _ in y.grad_fn.next_functions
        if type(node).__name__ == "LoraShrinkBackward"
    }
    saved = [t for t in shrink.saved_tensors if t is not None]
    parameters = {p.data_ptr() for p in model.parameters()}
    assert saved[0].data_ptr() == x.data_ptr()
    assert all(t.data_ptr() in parameters for t in saved[1:])
    for y, rank in ((q, 4), (k, 3), (v, 5)):
        kept = [t for t in y.grad_fn.saved_tensors if t is not None]
        rest = [tuple(t.shape) for t in kept if t.data_ptr() not in parameters]
        # v has a lora_bias, which only its forward needs.
        assert sorted(rest) == [(), (50, rank)]


def test_dropout_is_not_shared_here_and_masks_stay() -> None:
    """In PyTorch each projection masks x for itself: the same masks as ever, and the reason."""
    model, x = Block(p=0.5), torch.randn(9, 24)
    expected = apart(model, x)
    model(x)
    with counted() as calls:
        shared = gradients(model, model, x)
    assert not calls
    for mine, plain in zip(shared, expected, strict=True):
        assert torch.equal(mine, plain)
    assert "masks x for itself" in fastlora.fusion_report(model).rows[0].siblings
    model.v.lora_dropout["default"].p = 0.0  # evaluation of one, or another dropout
    model.q.lora_dropout["default"].p = 0.0
    with counted() as calls:
        model(x)
    assert calls == [2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_are_not_shared(use_reentrant: bool) -> None:
    """Neither the forward nor its repetition shares, whatever was known before."""
    model, x = Block(p=0.0), torch.randn(9, 24, requires_grad=True)
    model(x)
    with counted() as calls:
        for _ in range(2):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert not calls
    assert "activation checkpointing" in fastlora.fusion_report(model).rows[0].siblings


def test_a_first_forward_under_a_checkpoint() -> None:
    """Siblings become known between a forward and its repetition, which must save the same."""
    model, x = Block(), torch.randn(9, 24)
    y = checkpoint(model, x, use_reentrant=False)
    model(x)  # now they are known
    y.sum().backward()
    assert all(p.grad is not None for p in trainable(model))


CHANGES: dict[str, tuple[Callable[[Block], Any], str]] = {
    "hooks": (lambda m: m.v.register_forward_hook(lambda *_: None), "has hooks"),
    "factor": (lambda m: m.v.lora_A["default"].register_forward_hook(lambda *_: None), "hooked"),
    "frozen": (lambda m: m.v.lora_A["default"].requires_grad_(False), "frozen"),
    "implementation": (lambda m: setattr(m.v, "impl", "eager"), "different implementations"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_sibling_that_cannot_share(change: str) -> None:
    """It computes alone, and the others say why where too few are left."""
    model, x = Block(), torch.randn(9, 24)
    model(x)
    CHANGES[change][0](model)
    with counted() as calls:
        shared = gradients(model, model, x)
    assert calls == [2]
    assert_near(shared, model, x)
    CHANGES[change][0](_With(model.k))
    model(x)
    assert CHANGES[change][1] in fastlora.fusion_report(model).rows[0].siblings


class _With:
    """Names a layer as the changes above do."""

    def __init__(self, layer: Any) -> None:
        self.v = layer


def test_one_sibling_alone_has_a_gradient() -> None:
    """A loss of k only: k's factors get their gradients, the others' none."""
    model, x = Block(), torch.randn(9, 24)
    model(x)
    model.q(x)
    model.k(x).sum().backward()
    assert model.k.lora_A["default"].weight.grad.abs().sum() > 0
    assert model.q.lora_A["default"].weight.grad is None


def test_the_report_names_siblings() -> None:
    """Unknown before a training forward; then three share and one has no sibling."""
    model, x = Block(), torch.randn(9, 24)
    assert "no training forward" in fastlora.fusion_report(model).rows[0].siblings
    model(x)
    model(x)
    notes = [row.siblings for row in fastlora.fusion_report(model).rows]
    assert notes[:3] == ["3 share x"] * 3
    assert "3 share x" in str(fastlora.fusion_report(model))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Four backwards into the same gradients, each shared, as near to the truth as one."""
    model, x = Block(), torch.randn(4, 7, 24)
    model(x)
    with counted() as calls:
        for part in x:
            (model(part).pow(2).mean() / 4).backward()
    assert calls == [3] * 4
    assert_near([parameter.grad for parameter in trainable(model)], model, x, since=2)


def test_grad_scaler() -> None:
    """A scaled step is as good as a plain one; one that overflows is skipped, the scale halved."""
    model, x = Block(), torch.randn(9, 24)
    model(x)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def step(inputs: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.float16):
            loss = model(inputs).float().pow(2).mean()
        scaler.scale(loss).backward()

    with counted() as calls:
        step(x)
    assert calls == [3]
    scaler.unscale_(optimizer)
    with torch.autocast("cpu", torch.float16):  # unscaled, which loses more in ds
        assert_near([p.grad.half() for p in trainable(model)], model, x, since=2)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in trainable(model)]
    model.zero_grad()
    step(x * 1e4)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))
