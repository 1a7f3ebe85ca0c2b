"""DoRA's rows of mixed batches under torch.compile."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastlora import LoraConfig, LoraModel
from tests.support.compiled import graph_count
from tests.support.compiled_mixed import NAMES, K, adapted, check, results

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# On layers that are fused, with a bias and without, and on one that is called as it is.
DORA: dict[str, dict[str, Any]] = {
    "e": {"r": 2, "lora_alpha": 3, "target_modules": ["gate", "up"]},
    "f": {"r": 3, "use_rslora": True, "target_modules": ["gate", "down"]},
}


def with_dora(p: float = 0.0, dora_p: float = 0.0) -> LoraModel:
    """The model with four adapters and two that use DoRA, all of which train."""
    model = adapted(p)
    for name, kind in DORA.items():
        model.add_adapter(name, LoraConfig(**kind, use_dora=True, lora_dropout=dora_p))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B.e.weight", "lora_B.f.weight")):
                parameter.normal_(std=0.3)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            parameter.requires_grad_("lora_" in name)
    return model.train()


def draw(chosen: random.Random) -> list[str | None]:
    """Adapters of four samples, any mix."""
    return [chosen.choice([*NAMES, *DORA, None]) for _ in range(4)]


def test_any_mix_is_one_graph_in_serving() -> None:
    """In evaluation no dropout acts; per token too, and after weights have changed."""
    model, chosen = with_dora(dora_p=0.4).eval(), random.Random(2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, K)
    with torch.no_grad():
        for _ in range(6):
            ids = draw(chosen)
            check(results(compiled, model, x, ids), model, x, ids)
            model.base_model.model.gate.lora_B["e"].weight.mul_(1.5)
        assert graph_count() == 1
        tokens = torch.tensor([0, 4, -1, 5, 2, 4, 4, -1, 5, 5, 1, 3])
        check(results(compiled, model, x, tokens), model, x, tokens)


def test_one_of_two_drops_and_the_base_trains() -> None:
    """Scaled rows beside dropped ones, gradients of base weights and biases; one is frozen."""
    model = with_dora(dora_p=0.5)
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.f"):
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".f." not in name)
    x, compiled = torch.randn(4, 3, K), torch.compile(model, backend="inductor", fullgraph=True)
    for ids in (["e", "f", "e", None], ["a", "f", "b", "f"]):
        check(results(compiled, model, x, ids), model, x, ids)
    assert graph_count() == 1
