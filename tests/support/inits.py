"""Adapters that start in the same way, ours and PEFT's, and what must agree between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.tiny import TwoLayers

peft = pytest.importorskip("peft", reason="compares with PEFT")

# r, alpha and seed of every adapter here; the scaling is 1.5.
FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"]}
SEED = 11


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model at every call."""
    torch.manual_seed(3)
    return TwoLayers().to(dtype)


SAMPLES = [torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(s)) for s in range(4)]


def run(model: nn.Module) -> Callable[[], None]:
    """One pass over the samples."""

    def over() -> None:
        for sample in SAMPLES:
            model(sample)

    return over


def train(model: nn.Module) -> Callable[[], None]:
    """Three backward passes."""

    def over() -> None:
        for sample in SAMPLES[:3]:
            model(sample).square().mean().backward()

    return over


# What looks at data: the calibration and the settings of either library, and a pass over data.
lora = pytest.importorskip("peft.tuners.lora")
of_corda = pytest.importorskip("peft.tuners.lora.corda")
METHODS: dict[Any, dict[Any, tuple[Any, Any, Any]]] = {
    "corda": {
        fastlora: (fastlora.preprocess_corda, fastlora.CordaConfig, run),
        peft: (of_corda.preprocess_corda, lora.config.CordaConfig, run),
    },
    "lora_ga": {
        fastlora: (fastlora.preprocess_loraga, fastlora.LoraGAConfig, train),
        peft: (lora.preprocess_loraga, lora.config.LoraGAConfig, train),
    },
}


def started(
    library: Any,
    base: nn.Module,
    prepare: Callable[..., object] | None = None,
    settings: Any = None,
    **fields: Any,
) -> Any:
    """A model with an adapter that has just started.

    Args:
        library: fastlora or PEFT.
        base: The model.
        prepare: Called with model and config before; None calibrates as the library does.
        settings: Of an initialization that looks at data.
        **fields: Of the config.
    """
    init = fields.get("init_lora_weights")
    if init in METHODS:
        calibrate, own, over = METHODS[init][library]
        fields[f"{init}_config"] = own(**(settings or {}))
        prepare = prepare or (lambda model, config: calibrate(model, config, over(model)))
    config = library.LoraConfig(**{**FIELDS, **fields})
    if prepare is not None:
        prepare(base, config)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, config)


def layers_of(model: Any) -> dict[str, Any]:
    """The layers with adapters, by name."""
    return {
        name: module
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def base_weight(layer: Any) -> torch.Tensor:
    """The base weight as it is stored."""
    return layer.get_base_layer().weight.detach()


def train_a_bit(model: Any) -> None:
    """Moves every factor that trains, in the same way in both libraries."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                for module in factor.values():
                    noise = torch.randn(module.weight.shape, generator=generator)
                    module.weight.add_(0.05 * noise.to(module.weight))


def assert_same_start(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    """Factors up to the signs of their rows, products and base weights agree, layer by layer."""
    mine, other = layers_of(ours), layers_of(theirs)
    assert list(mine) == list(other)
    for name, layer in mine.items():
        a, b = (getattr(layer, f)["default"].weight.detach() for f in ("lora_A", "lora_B"))
        a_, b_ = (getattr(other[name], f)["default"].weight.detach() for f in ("lora_A", "lora_B"))
        assert (a.dtype, b.dtype, a.shape, b.shape) == (a_.dtype, b_.dtype, a_.shape, b_.shape)
        torch.testing.assert_close(b @ a, b_ @ a_, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            base_weight(layer), base_weight(other[name]), atol=tolerance, rtol=tolerance
        )
        by_a = (a * a_).sum(1, keepdim=True).sign()
        by_b = (b * b_).sum(0)[:, None].sign()
        signs = torch.where(by_a == 0, torch.where(by_b == 0, 1.0, by_b), by_a)
        torch.testing.assert_close(a * signs, a_, atol=10 * tolerance, rtol=10 * tolerance)
        torch.testing.assert_close(b * signs.T, b_, atol=10 * tolerance, rtol=10 * tolerance)
        assert layer.scaling["default"] == pytest.approx(other[name].scaling["default"])
        for factor in ("lora_A", "lora_B"):
            trains = [
                getattr(m, factor)["default"].weight.requires_grad for m in (layer, other[name])
            ]
            assert trains[0] == trains[1], (name, factor)


def assert_same_step(ours: Any, theirs: Any, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Outputs and every gradient agree; those of factors through what a step would change."""
    outcomes = []
    for model in (ours, theirs):
        model.zero_grad()
        given = x.clone().requires_grad_(x.is_floating_point())
        y = model(given)
        y = getattr(y, "logits", y)
        y.float().square().mean().backward()
        steps = []
        for layer in layers_of(model).values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # d(BA) of a small step is the same whatever the signs of the rows of A.
            if a.grad is not None:
                steps.append(b.detach() @ a.grad)
            if b.grad is not None:
                steps.append(b.grad @ a.detach())
        outcomes.append([y.detach(), *([] if given.grad is None else [given.grad]), *steps])
    assert len(outcomes[0]) == len(outcomes[1])
    for mine, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
