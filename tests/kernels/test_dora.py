"""DoRA over the kernels: a LoRA linear by Triton, and one scale per column."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from dora_truth import dora, make_problem

from fastlora import FastLoraLinear, LoraConfig, adapters, get_peft_model, ops
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")


def layer_of(problem: Any, p: float, device: torch.device) -> FastLoraLinear:
    """A layer that runs the kernels or raises, with the problem's operands."""
    n, k = problem.weight.shape
    r = problem.lora_a.shape[0]
    linear = nn.Linear(k, n, dtype=problem.weight.dtype, device=device)
    layer = FastLoraLinear.from_linear(
        linear, r=r, lora_alpha=0.75 * r, lora_dropout=p, use_dora=True
    )
    layer.impl = "triton"
    own = (
        layer.weight,
        layer.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    )
    with torch.no_grad():
        for parameter, value in zip(own, problem[1:], strict=True):
            parameter.copy_(value)
    return layer


@pytest.mark.parametrize(
    ("m", "n", "k", "r", "p"),
    [(17, 48, 80, 4, 0.0), (1, 33, 31, 16, 0.0), (70, 40, 64, 3, 0.0), (17, 32, 48, 8, 0.3)],
)
def test_values_and_gradients(
    lab: Any, monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, r: int, p: float
) -> None:
    """In fp32 and fp16, fused and split plans; with dropout the kernel's own mask."""
    for dtype in (torch.float32, torch.float16):
        problem = make_problem(m, n, k, r, dtype)
        layer = layer_of(problem, p, lab.device)
        seed = torch.tensor([5], device=lab.device)
        monkeypatch.setattr(ops, "draw_seed", lambda x, impl, seed=seed: seed)
        x = problem.x.to(lab.device).requires_grad_(True)
        y = layer(x)
        trained = [
            x,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.lora_magnitude_vector["default"].weight,
        ]
        dy = torch.randn(m, n).to(dtype)
        mine = [y, *torch.autograd.grad(y, trained, dy.to(lab.device))]
        with torch.no_grad():
            mine.append(layer(x))
        mask = None
        if p:
            ones = torch.ones(m, k, device=lab.device)
            mask = torch.ops.fastlora.lora_dropout(ones, seed, p, "triton").cpu()
        results = []
        for kind in (dtype, torch.float64):
            operands = problem.to(kind)
            y = dora(operands, 0.75, mask)
            wanted = [operands.x, operands.lora_a, operands.lora_b, operands.magnitude]
            grads = torch.autograd.grad(y, wanted, dy.to(kind))
            results.append([y.detach(), *grads, y.detach()])
        for name, own, same, truth in zip(
            ("y", "x", "lora_a", "lora_b", "magnitude", "without gradients"),
            mine,
            *results,
            strict=True,
        ):
            assert_within_budget(own.detach().cpu(), same, truth, f"{name} in {dtype}")


class Pair(nn.Module):
    """Two linears, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 33)
        self.b = nn.Linear(33, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[M, 20]`` to ``[M, 16]``."""
        return self.b(self.a(x).tanh())


def test_rows_of_a_mixed_batch(lab: Any) -> None:
    """By the mixed kernels, DoRA rows beside plain and base rows: each as it is alone."""
    torch.manual_seed(0)
    model = get_peft_model(
        Pair().to(lab.device), LoraConfig(r=3, target_modules=["a", "b"], use_dora=True)
    )
    model.add_adapter("plain", LoraConfig(r=5, target_modules=["a", "b"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["b"], use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
    model.eval()
    layers = [model.base_model.model.a, model.base_model.model.b]
    names = ["plain", "default", None, "other", "default"]
    x = torch.randn(5, 20, device=lab.device)
    results = []
    for impl in ("eager", "triton"):
        for layer in layers:
            layer.impl = impl
        with torch.no_grad(), adapters(model, names):
            results.append(model(x))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        for row, name in enumerate(names):
            if name is not None:
                model.set_adapter(name)
                torch.testing.assert_close(results[1][row : row + 1], model(x[row : row + 1]))
