"""DoRA over the kernels: a LoRA linear by Triton, and one scale per column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraConfig, adapters, get_peft_model
from fastlora.ops.seeds import seeds_of_layer
from fastlora.ops.torch import segments
from fastlora.testing import assert_within_budget
from fastlora.train import train_adapters
from fastlora.validation import ImplementationError
from tests.support.dora_truth import Problem, dora

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("called", [False, True], ids=["plain", "called"])
def test_a_hooked_factor_is_not_run_in_pytorch_instead(
    lab: Any, use_dora: bool, called: bool
) -> None:
    """A named implementation is never replaced; the automatic one calls the module."""
    kind = type("Called", (nn.Linear,), {}) if called else nn.Linear
    config = LoraConfig(r=2, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(kind(8, 8, device=lab.device)), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, device=lab.device)
    assert model(x).isfinite().all()
    layer.impl = "triton"
    with pytest.raises(ImplementationError, match="'default' has a factor that is hooked"):
        model(x)


@pytest.mark.parametrize("kind", ["fused", "called", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixed_rows_with_dropout(
    lab: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    """By kernels throughout, DoRA rows that drop beside others; in and out of the slots' order."""

    def fell_back(*_: Any) -> None:
        raise AssertionError("a mixed batch ran in PyTorch")

    monkeypatch.setattr(segments, "forward", fell_back)
    torch.manual_seed(0)
    linear = type("Called", (nn.Linear,), {}) if kind == "called" else nn.Linear
    base = nn.Sequential(linear(20, 33, dtype=dtype, device=lab.device))
    dora_too = {"target_modules": ["0"], "use_dora": True}
    model = get_peft_model(
        base, LoraConfig(r=3, lora_dropout=0.3, **dora_too), "drops", autocast_adapter_dtype=False
    )
    model.add_adapter("plain", LoraConfig(r=5, target_modules=["0"]), autocast_adapter_dtype=False)
    model.add_adapter("scaled", LoraConfig(r=2, **dora_too), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.impl = "triton"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5).add_(torch.rand(parameter.shape).to(parameter))
    train_adapters(model, ["drops", "plain", "scaled"])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    call: Any = model.base_model.model
    if kind == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    seed = 77
    for ids in (
        ["plain", "drops", None, "scaled", "drops", "drops", "plain"],
        ["drops", "drops", "scaled", "scaled"],
    ):
        x = torch.randn(len(ids), 20).to(lab.device, dtype).requires_grad_(True)
        dy = torch.randn(len(ids), 33).to(lab.device, dtype)
        with adapters(model, ids, seeds=dict.fromkeys(set(ids) - {None}, seed)):
            y = call(x)
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        mine = [y, *torch.autograd.grad(y, trained, dy, materialize_grads=True)]
        own_seed = seeds_of_layer(torch.tensor([seed]), layer.routed_as).to(lab.device)
        ones = torch.ones(ids.count("drops"), 20, device=lab.device)
        mask = torch.ops.fastlora.lora_dropout(ones, own_seed, 0.3)
        results = []
        for wide in (dtype, torch.float64):
            values = {n: p.detach().to(wide) for n, p in model.named_parameters()}
            for name in names:
                values[name].requires_grad_(True)
            weight, bias = (
                next(v for n, v in values.items() if n.endswith(f".{end}") and "lora" not in n)
                for end in ("weight", "bias")
            )
            operand = x.detach().to(wide).requires_grad_(True)
            expected = operand @ weight.t() + bias
            for adapter in sorted(set(ids) - {None}):
                rows = [row for row, own in enumerate(ids) if own == adapter]
                a, b, *magnitude = (
                    values[n] for n in names if f".{adapter}." in n
                )  # in this order
                scaling = layer.scaling[adapter]
                if magnitude:
                    problem = Problem(operand[rows], weight, bias, a, b, *magnitude)
                    part = dora(problem, scaling, mask if adapter == "drops" else None)
                else:
                    part = expected[rows] + scaling * (operand[rows] @ a.t()) @ b.t()
                expected = expected.index_copy(0, torch.tensor(rows, device=lab.device), part)
            wanted = [operand, *(values[name] for name in names)]
            grads = torch.autograd.grad(expected, wanted, dy.to(wide), materialize_grads=True)
            results.append([expected.detach(), *grads])
        for name, own, same, truth in zip(("y", "x", *names), mine, *results, strict=True):
            assert_within_budget(own.detach(), same, truth, name)
