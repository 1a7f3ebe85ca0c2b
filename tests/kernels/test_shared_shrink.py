"""Layers of one adapter that are not computed at once share their passes over x in training.

Those with lora_bias, over base layers that are called, or under autocast; mixed batches are in
`test_mixed_grouped_layers`, compiled graphs in `test_compile_shared_input`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.testing import assert_within_budget
from tests.support.tiny import trainable

pytestmark = pytest.mark.usefixtures("on_the_labs_device")


class Block(nn.Module):
    """Three layers fed by one tensor, and one that is fed by their sum."""

    def __init__(self, kind: str = "lora_bias", p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)

        def make(n: int, r: int) -> Any:
            layer: Any = FastLoraWrapper(nn.Linear(24, n))
            if kind != "called":
                layer = FastLoraLinear.from_linear(layer.base_layer, adapter_name=None)
            layer.add_adapter("default", r=r, lora_dropout=p, lora_bias=kind == "lora_bias")
            layer.set_adapter("default")
            layer.impl = "triton"
            nn.init.normal_(layer.lora_B["default"].weight)
            return layer

        self.q, self.k, self.v, self.o = make(24, 4), make(24, 3), make(24, 5), make(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 24]`` to ``[..., 16]``."""
        return self.o(torch.tanh(self.q(x)) + self.k(x) * self.v(x))


def known(block: Block) -> Block:
    """Has the layers see their siblings."""
    block(torch.randn(2, 24))
    return block


def run(block: Block, x: torch.Tensor, call: Any = None, autocast: bool = False) -> list[Any]:
    """The output, and the gradients of x and of every adapter."""
    torch.manual_seed(4)
    block.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.float16, enabled=autocast):
        y = (call or block)(x)
    y.float().pow(2).mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in trainable(block))]


def check(block: Block, x: torch.Tensor, found: list[Any], autocast: bool = False) -> None:
    """Compares what `run` gave with float64."""
    wide = copy.deepcopy(block).double()
    plain = copy.deepcopy(block)
    for module in (*wide.modules(), *plain.modules()):
        if hasattr(module, "impl"):
            module.impl = "eager"
    expected, truth = run(plain, x, autocast=autocast), run(wide, x.double())
    for number, (mine, same, exact) in enumerate(zip(found, expected, truth, strict=True)):
        half = mine.half() if autocast else mine
        assert_within_budget(half, same.to(half.dtype), exact, f"result {number}")


@pytest.mark.parametrize("kind", ["lora_bias", "called", "autocast", "dropout"])
def test_values_and_every_gradient(launches: Any, kind: str) -> None:
    """One pass over x makes each s, and one each d_lora_a, which is a tensor of its own."""
    autocast, p = kind == "autocast", 0.5 if kind == "dropout" else 0.0
    block, x = known(Block("lora_bias" if p else kind, p)), torch.randn(9, 24)
    with torch.autocast(x.device.type, torch.float16, enabled=autocast):
        block(x)
    launches.clear()
    found = run(block, x, autocast=autocast)
    # A mask is each layer's own.
    assert launches.of("shrink") == ([1] * 4 if p else [3, 1])
    assert launches.of("grad_a") == [1, 3]
    if p:  # the kernels' masks: a copy has not seen its siblings
        torch.testing.assert_close(found, run(copy.deepcopy(block), x))
    else:
        check(block, x, found, autocast)
    notes = [row.shared_input for row in fastlora.fusion_report(block).rows]
    assert notes == ["3 layers share x"] * 3 + ["none"]


def test_what_is_saved() -> None:
    """x once for the three, one s each, parameters and scalings: nothing else."""
    block, x = known(Block()), torch.randn(50, 24)
    outputs = block.q(x), block.k(x), block.v(x)
    (shrink,) = {
        node
        for y in outputs
        for node, _ in y.grad_fn.next_functions
        if type(node).__name__ == "GroupedLoraShrinkBackward"
    }
    saved = [t for t in shrink.saved_tensors if t is not None]
    parameters = {p.data_ptr() for p in block.parameters()}
    assert saved[0].data_ptr() == x.data_ptr()
    assert all(t.data_ptr() in parameters for t in saved[1:])
    for y, rank in zip(outputs, (4, 3, 5), strict=True):
        kept = [t for t in y.grad_fn.saved_tensors if t is not None]
        rest = [tuple(t.shape) for t in kept if t.data_ptr() not in parameters]
        assert sorted(rest) == [(), (50, rank)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_repeats_what_it_did(launches: Any, use_reentrant: bool) -> None:
    """Nothing is shared within one: not where siblings are known, nor where they become so."""
    for block in (known(Block()), Block()):
        x = torch.randn(9, 24)
        launches.clear()

        def call(x: torch.Tensor, block: Block = block) -> torch.Tensor:
            y = checkpoint(block, x, use_reentrant=use_reentrant)
            known(block)
            return y

        found = run(block, x, call)
        assert "grad_a 3" not in launches and launches.count("grad_a 1") == 4
        check(block, x, found)
    assert "activation checkpointing" in fastlora.fusion_report(block).rows[0].shared_input


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hooks": (lambda v: v.register_forward_hook(lambda *_: None), "has hooks"),
    "frozen": (lambda v: v.lora_A["default"].requires_grad_(False), "frozen"),
    "implementation": (lambda v: setattr(v, "impl", "auto"), "different implementations"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_grouped_layer_that_cannot_share(launches: Any, change: str) -> None:
    """It computes alone, and the others say why where too few are left."""
    block, x = known(Block()), torch.randn(9, 24)
    CHANGES[change][0](block.v)
    launches.clear()
    found = run(block, x)
    assert launches[0] == "shrink 2" and "grad_a 2" in launches
    check(block, x, found)
    CHANGES[change][0](block.k)
    block(x)
    assert CHANGES[change][1] in fastlora.fusion_report(block).rows[0].shared_input


def test_who_is_not_used_has_no_gradient() -> None:
    """A loss of k only: k's factors get their gradients, the others' none."""
    block, x = known(Block()), torch.randn(9, 24)
    block.q(x)
    block.k(x).sum().backward()
    assert block.k.lora_A["default"].weight.grad.abs().sum() > 0
    assert block.q.lora_A["default"].weight.grad is None


def test_gradients_accumulate(launches: Any) -> None:
    """Four backwards into the same gradients, each shared, as near to the truth as one."""
    block, x = known(Block()), torch.randn(4, 7, 24)
    launches.clear()
    for part in x:
        (block(part).pow(2).mean() / 4).backward()
    assert launches.count("shrink 3") == launches.count("grad_a 3") == 4
    found = [p.grad.clone() for p in trainable(block)]
    check(block, x, [*run(block, x)[:2], *found])
