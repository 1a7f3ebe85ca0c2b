"""`FastLoraLinear` is an `nn.Linear` in every other respect, and its adapters behave."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastlora
from fastlora import FastLoraLinear
from fastlora.layers import FastLoraWrapper
from fastlora.validation import ConfigError, UnsupportedLayerError
from tests.support.tiny import Gated, randomize, with_adapters


def trained(layer: FastLoraLinear | FastLoraWrapper) -> FastLoraLinear | FastLoraWrapper:
    """Gives every adapter a B that is not zero."""
    for factor in layer.lora_B.values():
        nn.init.normal_(factor.weight)
    return layer


def test_it_is_a_linear() -> None:
    """Names, shapes, isinstance, and what trains."""
    layer = FastLoraLinear(16, 24, r=3, lora_bias=True)
    plain = nn.Linear(16, 24)
    assert isinstance(layer, nn.Linear)
    assert {n for n in layer.state_dict() if "lora" not in n} == set(plain.state_dict())
    plain.load_state_dict({n: v for n, v in layer.state_dict().items() if "lora" not in n})
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), plain(x))  # B starts at zero
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_B.default.bias",
    }


def test_from_linear_shares_the_weight() -> None:
    """The weight is the same tensor, and a refused call leaves the linear as it was."""
    linear = nn.Linear(16, 24)
    with pytest.raises(ConfigError, match="r must be a positive integer, got 0"):
        FastLoraLinear.from_linear(linear, r=0)
    assert linear.weight.requires_grad
    layer = FastLoraLinear.from_linear(linear, r=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.to_linear().weight is linear.weight


def test_from_linear_raises_for_what_must_be_called() -> None:
    """A subclass or a hooked linear is not computed from its weight alone."""
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    for module, why in ((hooked, "forward hooks"), (FastLoraLinear(4, 4), "FastLoraLinear")):
        with pytest.raises(UnsupportedLayerError, match=why):
            FastLoraLinear.from_linear(module)


def test_merged_layer_moves_and_disables() -> None:
    """A merged layer's kept weight follows .to(), and disabling shows the base layer."""
    layer = trained(FastLoraLinear(32, 48, r=4))
    x = torch.randn(3, 32)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    layer.merge()
    merged = layer(x)
    with layer.disable_adapter():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), merged)
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    torch.testing.assert_close(layer.float().eval().to_linear()(x), base)


def test_unmerging_frees_what_a_merge_saved() -> None:
    layer: Any = trained(FastLoraLinear(32, 48, r=4))
    layer.merge()
    kept = [weakref.ref(tensor) for tensor in layer._unmerged]
    layer.unmerge()
    gc.collect()
    assert [tensor() for tensor in kept] == [None, None]


def test_another_adapter_ends_a_merge() -> None:
    """At once, or behind a block in which adapters are disabled."""
    layer = trained(FastLoraLinear(32, 48, r=4))
    layer.add_adapter("other", r=2)
    weight = layer.weight.clone()
    layer.merge()
    with pytest.warns(UserWarning, match="unmerges the adapters that are currently merged"):
        layer.set_adapter("other")
    assert torch.equal(layer.weight, weight) and layer.active_adapters == ["other"]
    layer.merge()
    with layer.disable_adapter():
        layer.set_adapter("default")
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_wrapper_does_not_write_into_an_output_that_others_hold() -> None:
    """A base that hands out its input, or whose output a hook keeps, is not overwritten."""

    class Same(nn.Module):
        in_features = out_features = 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    linear, kept = nn.Linear(8, 8), []
    linear.register_forward_hook(lambda _, __, y: kept.append(y))
    for base in (Same(), linear):
        layer = FastLoraWrapper(base)
        layer.add_adapter("default", r=3)
        layer.set_adapter("default")
        trained(layer)
        x = torch.randn(5, 8)
        before = x.clone()
        with torch.no_grad():
            y = layer(x)
        assert torch.equal(x, before)
        assert not kept or not torch.equal(kept[0], y)


@pytest.mark.parametrize("ids", [None, ["a", "b", None, "a"]], ids=["one", "mixed"])
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}]
    + [{"lora_dropout": 0.5, "use_dora": True}, {"frozen": True}],
    ids=str,
)
def test_selective_checkpoints_that_keep_products(
    options: dict[str, Any], dtype: torch.dtype, tokens: int, ids: list[str | None] | None
) -> None:
    """A layer does not write into a product that `torch.utils.checkpoint` has saved."""
    torch.manual_seed(0)
    options = dict(options)
    frozen = options.pop("frozen", False)
    config = fastlora.LoraConfig(r=4, target_modules=["gate", "up", "down"], **options)
    model = with_adapters(Gated(), {"a": config, "b": config}).to(dtype).train()
    randomize(model)
    model.set_adapter(["a", "b"], inference_mode=frozen)
    x = torch.randn(4, tokens, 16, dtype=dtype, requires_grad=True)
    kept = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm")]
    found = []
    for context in (None, functools.partial(create_selective_checkpoint_contexts, kept)):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        block: Any = contextlib.nullcontext()
        with block if ids is None else fastlora.adapters(model, ids, seeds={"a": 3, "b": 5}):
            if context is None:
                y = model(x)
            else:
                y = checkpoint(model, x, use_reentrant=False, context_fn=context)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("called", [False, True], ids=["plain", "called"])
def test_the_gradient_of_a_bias_of_b_is_summed_in_the_bias_dtype(called: bool) -> None:
    """64 rows of 600 times a scaling of 4 are no fp16 number."""
    base = nn.Linear(16, 8, dtype=torch.float16)
    options: Any = {"r": 2, "lora_alpha": 8, "lora_bias": True}
    if called:
        layer: Any = FastLoraWrapper(base)
        layer.add_adapter("default", **options)
        layer.set_adapter("default")
    else:
        layer = FastLoraLinear.from_linear(base, **options)
    layer.lora_A.float()
    layer.lora_B.float()
    y = layer(torch.randn(64, 16, dtype=torch.float16))
    y.backward(torch.full_like(y, 600.0))
    bias = layer.lora_B["default"].bias
    assert torch.equal(bias.grad, torch.full_like(bias, 64 * 600.0 * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (2, 4, 16)], ids=["rows", "sequences"])
def test_outputs_can_be_written_to(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = FastLoraLinear(16, 8, bias=False, r=2, dtype=dtype)  # nn.Linear's own with one cannot
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        expected, features = layer(x).clone(), layer(x)
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    features *= scale  # autograd refuses this for a view that was made without gradients
    features.sum().backward()
    torch.testing.assert_close(scale.grad, expected.sum())
    torch.relu_(layer(x)).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


def test_autocast_leaves_fp64_alone() -> None:
    """As a linear of PyTorch's."""
    layer = trained(FastLoraLinear(16, 8, r=2).double())
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(16, 8).double()(x).dtype == torch.float64
        found = layer(x)
    assert torch.equal(found, layer(x))
