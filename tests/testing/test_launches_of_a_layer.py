"""Launches of the seven linears of a decoder layer, Triton's and base products, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.bench.host import LINEARS, Layer, Shape
from fastlora.env import triton_interpreted
from fastlora.testing import stubbed_launches

if triton_interpreted():
    pytest.skip("launches are stubbed under Triton's compiler", allow_module_level=True)

WIDTH = 512
WIDE = Shape(WIDTH, WIDTH, WIDTH)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Base products, which accumulate on what an expand wrote."""
    seen: Counter[str] = Counter()
    addmm_ = torch.Tensor.addmm_

    def counted(self: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        seen["addmm_"] += 1
        return addmm_(self, *args)

    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    return seen


def run(rows: int, trains: bool, products: Counter[str], processors: int = 16) -> Counter[str]:
    """Launches and products of one call, once siblings are known.

    16 processors are as many as these tiles fill: on more, a linear would split K.
    """
    config = fastlora.LoraConfig(r=16, target_modules=list(LINEARS))
    model = fastlora.get_peft_model(Layer(WIDE), config).to(torch.bfloat16).train(trains)
    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, requires_grad=trains)
    with stubbed_launches(processors=processors) as launches, torch.set_grad_enabled(trains):
        for _ in range(3):
            before = len(launches)
            products.clear()
            y = model(x)
            if trains:
                y.backward(torch.ones_like(y))
    found = Counter(launch.kernel for launch in launches[before:])
    return found + products


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_decode(rows: int, products: Counter[str]) -> None:
    """A shrink and a linear for q, k and v, for gate and up, and for each of the others."""
    found = run(rows, False, products)
    assert found == {"_lora_shrink_kernel": 4, "_lora_linear_kernel": 4}


@pytest.mark.parametrize("processors", [16, 132])
def test_prefill(products: Counter[str], processors: int) -> None:
    """Beside the products one shrink and one expand for each x, and on many processors one sum."""
    found = run(2048, False, products, processors)
    expected = {"_lora_shrink_kernel": 4, "_lora_expand_kernel": 4, "addmm_": 7}
    if processors == 132:  # more than there are tiles, so shrinks split K
        expected["_plane_sums_kernel"] = 4
    assert found == expected


@pytest.mark.parametrize(("adapters", "kernel"), [(4, "linear"), (64, "expand")])
def test_decode_of_a_mixed_batch(adapters: int, kernel: str) -> None:
    """Fused where a row tile has few adapters; else an expand by pieces beside the 7 products."""
    config = fastlora.LoraConfig(r=16, target_modules=list(LINEARS))
    model = fastlora.get_peft_model(Layer(WIDE), config, adapter_name="a0")
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", config)
    model.to(torch.bfloat16).eval()
    x = torch.randn(64, WIDTH, dtype=torch.bfloat16)
    ids = [f"a{row % adapters}" for row in range(64)]
    with stubbed_launches(processors=16) as launches, torch.no_grad():
        for _ in range(3):
            with fastlora.adapters(model, ids):
                model(x)
                before = len(launches)
                model(x)
    found = Counter(launch.kernel for launch in launches[before:])
    assert found == {"_mixed_lora_shrink_kernel": 4, f"_mixed_lora_{kernel}_kernel": 4}


def test_a_training_step(products: Counter[str]) -> None:
    found = run(2048, True, products)
    assert found["_lora_expand_kernel"] == 4 + 4, "an update for each x, and for its gradient"
    assert found["addmm_"] == 14
    assert found.total() <= 52
