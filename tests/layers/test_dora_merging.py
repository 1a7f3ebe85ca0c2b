"""DoRA beside other active adapters on one layer, as PEFT has it, and merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.validation import AdapterStateError
from tests.support.tiny import adapted

peft = pytest.importorskip("peft", reason="compares with PEFT")

KINDS = [
    ["plain"],
    ["dora"],
    ["dora", "dora"],
    ["plain", "dora"],
    ["dora", "plain", "plain", "dora"],
    ["biased", "dora"],
    ["biased", "dora", "biased"],
]


def several(kinds: list[str], wrapped: bool = False) -> tuple[Any, Any]:
    """A layer of ours and PEFT's with the same active adapters, in float64."""
    linear = nn.Linear(20, 24).double()
    names = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    options = [
        {"r": i + 2, "lora_alpha": 3, "use_dora": k == "dora", "lora_bias": k == "biased"}
        for i, k in enumerate(kinds)
    ]
    layer: Any = FastLoraLinear.from_linear(copy.deepcopy(linear), adapter_name=None)
    if wrapped:
        layer = FastLoraWrapper(copy.deepcopy(linear))
    for name, option in zip(names, options, strict=True):
        layer.add_adapter(name, **option)
    first, *rest = [peft.LoraConfig(**option) for option in options]
    theirs = peft.tuners.lora.Linear(linear, names[0], first, r=2, lora_alpha=3)
    for name, config in zip(names[1:], rest, strict=True):
        theirs.update_layer(name, config.r, config.lora_alpha, config=config)
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(1 + torch.randn(parameter.shape) / 2)
                own[name].copy_(parameter)
    layer.set_adapter(names)
    theirs.set_adapter(names)
    return layer, theirs


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_several_active_adapters_are_pefts(kinds: list[str], wrapped: bool) -> None:
    """One after the other: DoRA scales what came before it."""
    layer, theirs = several(kinds, wrapped)
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, theirs):
        y = module(x)
        named = dict(module.named_parameters())
        trained = [named[n] for n in sorted(named) if named[n].requires_grad and "lora_" in n]
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *trained])])
        with torch.no_grad():
            results[-1].append(module(x))
    assert len(results[0]) == len(results[1]) >= 3 + 3 * kinds.count("dora")
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_merging(kinds: list[str], keep_base: bool) -> None:
    """The merged layer is the layer, biases too; and unmerging gives the weight back."""
    layer, theirs = several(kinds)
    x = torch.randn(5, 20, dtype=torch.float64)
    before, bias = layer.weight.clone(), layer.bias.clone()
    expected = layer(x)
    for name in layer.active_adapters:  # one by one: norms are those of the unmerged weight
        layer.merge(safe_merge=True, adapter_names=[name], keep_base=keep_base)
    torch.testing.assert_close(layer(x), expected)
    assert layer.merged_adapters == layer.active_adapters
    assert (layer._unmerged is not None) == keep_base
    if "biased" not in kinds:  # PEFT's merge forgets to scale a lora_bias that came before
        theirs.merge()
        torch.testing.assert_close(layer.weight, theirs.base_layer.weight)
    layer.unmerge()
    if keep_base:
        assert torch.equal(layer.weight, before) and torch.equal(layer.bias, bias)
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(layer.bias, bias)
    torch.testing.assert_close(layer(x), expected)


def test_merging_in_16_bits_and_into_conv1d() -> None:
    """bf16 rounds once, and Conv1D of transformers has its weight the other way round."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 20).double()
    layer = FastLoraWrapper(conv)
    layer.add_adapter("a", r=3, use_dora=True, init_lora_weights=False)
    layer.set_adapter("a")
    nn.init.uniform_(layer.lora_magnitude_vector["a"].weight, 0.5, 2.0)
    x = torch.randn(5, 20, dtype=torch.float64)
    weight, delta = conv.weight.t().double(), layer.get_delta_weight("a").t().double()
    magnitude = layer.lora_magnitude_vector["a"].weight.double()
    norms = (weight + delta).norm(dim=1)
    truth = (magnitude / norms)[:, None] * (weight + delta)
    torch.testing.assert_close(layer(x), x @ truth.t() + conv.bias)
    layer.merge()
    torch.testing.assert_close(conv.weight.t(), truth)
    layer.unmerge()
    half = layer.bfloat16()
    half.merge()
    assert (conv.weight.t().double() - truth).abs().max() < 2**-7 * truth.abs().max()


def test_merges_that_raise() -> None:
    """A result that is not finite; a row scaled by 0 that would have to be computed back."""
    layer, _ = several(["dora"])
    name = layer.active_adapters[0]
    magnitude = layer.lora_magnitude_vector[name].weight
    before = layer.weight.clone()
    with torch.no_grad():
        magnitude[3] = float("inf")
    with pytest.raises(AdapterStateError, match="adapter dora0 seems to be broken.*not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged
    with torch.no_grad():
        magnitude[3] = 0
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.merge(keep_base=False)
    merged = layer.weight.clone()
    with pytest.raises(AdapterStateError, match="0 for at least one row"):
        layer.unmerge()
    assert layer.merged and torch.equal(layer.weight, merged)
    model = adapted(target_modules=["q", "v"], use_dora=True)
    with torch.no_grad():
        model.base_model.model.v.lora_magnitude_vector["default"].weight[3] = 0
    model.merge_adapter(keep_base=False)
    with pytest.raises(AdapterStateError, match="0 for at least one row"):
        model.unmerge_adapter()
    assert model.base_model.model.q.merged and model.base_model.model.v.merged


def test_delete_and_freeze() -> None:
    """A deleted adapter leaves nothing; set_adapter decides which magnitudes train."""
    layer, _ = several(["dora", "dora"])
    layer.set_adapter("dora1")
    assert not layer.lora_magnitude_vector["dora0"].weight.requires_grad
    assert layer.lora_magnitude_vector["dora1"].weight.requires_grad
    layer.delete_adapter("dora1")
    assert list(layer.lora_magnitude_vector) == ["dora0"]
    assert not any("dora1" in name for name in layer.state_dict())
