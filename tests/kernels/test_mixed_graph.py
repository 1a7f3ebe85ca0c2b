"""Mixed batches on the kernels under torch.compile(fullgraph=True): counted, and right."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fastlora
from fastlora import AdapterPool, LoraConfig, LoraModel
from fastlora.model import adapter_state
from fastlora.testing import assert_within_budget
from tests.support.kernels.mixed_models import eager, use_impl
from tests.support.tiny import Gated, trainable, with_adapters

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NAMES = ("a", "b", "c")


def adapted(lab: Any, p: float = 0.0) -> LoraModel:
    """Three adapters that train, on the kernels."""
    torch.manual_seed(0)
    targets = (["gate", "up", "down"], ["gate", "down"], ["up", "down"])
    configs = {
        name: LoraConfig(r=r, target_modules=names, lora_dropout=p, lora_bias=r == 3)
        for name, r, names in zip(NAMES, (4, 3, 16), targets, strict=True)
    }
    model = with_adapters(Gated(32, 48), configs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_()
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    use_impl(model, "triton")
    return model.to(lab.device).train()


def results(call: Any, model: Any, x: torch.Tensor, ids: Any) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the factors; zeros where there is none."""
    x = x.detach().requires_grad_()
    with fastlora.adapters(model, ids, seeds={"a": 11, "b": 22, "c": 33}):
        y = call(x)
    wanted = [x, *trainable(model)]
    found = torch.autograd.grad(y.pow(2).mean(), wanted, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


@pytest.mark.usefixtures("kernel_masks")
@pytest.mark.parametrize(("p", "lengths"), [(0.0, [7, 5, 40, 3]), (0.5, [4, 4, 4])])
def test_mixes_compile_nothing_in_training(lab: Any, p: float, lengths: list[int]) -> None:
    """Near to float64; the kernels' pieces and runs follow the batch's rows: one graph."""
    model, chosen = adapted(lab, p), random.Random(0)
    dynamic = len(set(lengths)) > 1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in lengths:
        x = torch.randn(6, length, 32, device=lab.device)
        ids = [chosen.choice([*NAMES, None]) for _ in range(6)]
        plain, exact = eager(model), eager(model).double()
        found = (
            results(compiled, model, x, ids),
            results(plain, plain, x, ids),
            results(exact, exact, x.double(), ids),
        )
        for mine, near, truth in zip(*found, strict=True):
            assert_within_budget(mine, near, truth)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_mixes_and_swaps_compile_nothing_over_a_pool(lab: Any) -> None:
    """Tables are read at every call: other residents, DoRA too, hot swaps, one graph."""
    model, chosen = adapted(lab), random.Random(1)
    for name, targets in (("e", ["gate", "down"]), ("f", ["up"])):
        model.add_adapter(name, LoraConfig(r=2, target_modules=targets, use_dora=True))
    with torch.no_grad():
        for key, parameter in model.eval().named_parameters():
            if ".e." in key or ".f." in key:
                parameter.uniform_(0.2, 0.6)
    base = copy.deepcopy(model).unload()
    limits = {"max_adapters": 5, "max_rank": 16}
    pool = AdapterPool(base, target_modules=["gate", "up", "down"], **limits)
    states = {}
    for name, config in model.peft_config.items():
        own = adapter_state.collect(model, name, model.state_dict(), False)
        states[name] = {key: tensor.clone() for key, tensor in own.items()}
        pool.load(name, states[name], config=config)
    use_impl(base, "triton")
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 4, 32, device=lab.device)
    with torch.no_grad():
        for step in range(6):
            ids = [*(chosen.choice([*NAMES, None]) for _ in range(5)), ("e", "f")[step % 2]]
            found = []
            for call, owner in ((compiled, pool), (base, pool)):
                with fastlora.adapters(owner, ids):
                    found.append(call(x))
            exact = eager(model).double()
            with fastlora.adapters(exact, ids):
                assert_within_budget(*found, exact(x.double()))
            if step in (1, 3):
                name = "b" if step == 3 else "e"
                swapped = {key: tensor * 2 for key, tensor in states[name].items()}
                pool.load(name, swapped, config=model.peft_config[name])
                own = {k: t * 2 for k, t in model.state_dict().items() if f".{name}." in k}
                model.load_state_dict(own, strict=False)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
