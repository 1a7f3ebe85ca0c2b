"""What drop-in users do to models, next to PEFT itself: dtypes, changed modules, merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlora
from fastlora import FastLoraLinear, LoraConfig, get_peft_model
from fastlora.layers import FastLoraWrapper
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterStateError, UnsupportedLayerError
from tests.support.peft_twins import peft, q_of, twins
from tests.support.tiny import TwoLayers, randomize, tiny_llama, unchanged

pytest.importorskip("transformers", reason="uses a Llama")

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def test_autocast_of_a_whole_model() -> None:
    """Under bf16 autocast, layers that get bf16 inputs over fp32 weights compute and train."""
    ours, theirs, patched = twins(tiny_llama, target_modules="all-linear")
    # transformers' own loss is fp32.
    logits = copy.deepcopy(theirs).double()(input_ids=IDS).logits[:, :-1]
    exact = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    losses = []
    for model in (ours, theirs, patched):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(losses[0], losses[2])
    assert_within_budget(losses[0], losses[1].bfloat16(), exact.detach())
    grads = [p.grad for n, p in ours.named_parameters() if "lora_" in n]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


def test_fp16_keeps_its_range() -> None:
    """A large scaling on a large s overflows fp16 only where the result does."""
    x, lora_a = torch.full((1, 256), 200.0).half(), torch.full((1, 256), 0.05)
    lora_b, weight = torch.full((4, 1), 1e-3), torch.zeros(4, 256).half()
    y = fastlora.functional.lora_linear(x, weight, lora_a, lora_b, 32.0)
    near, exact = (
        (x.to(kind) @ lora_a.to(kind).t()) @ (32 * lora_b.to(kind)).t()
        for kind in (torch.float16, torch.float64)
    )
    assert y.dtype == torch.float16
    assert_within_budget(y, near, exact)


def test_a_factor_under_a_weight_norm_is_called() -> None:
    """Its gain at zero switches the adapter off, and the report says that it is called."""
    models = twins(TwoLayers)
    for model in models:
        factor = q_of(model).lora_A["default"]
        nn.utils.weight_norm(factor)
        factor.weight_g.data.zero_()
    x = torch.randn(3, 16)
    ours, theirs, patched = (model(x) for model in models)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(patched, theirs)
    for model in (models[0], models[2]):
        report = fastlora.fusion_report(model)
        assert [row.fused for row in report.rows] == [False, True]
        assert "adapter 'default'" in report.rows[0].reason


def test_offloaded_after_wrapping() -> None:
    """accelerate's offload hooks on factors are honored."""
    accelerate = pytest.importorskip("accelerate")
    model = get_peft_model(TwoLayers(), LoraConfig(r=4, target_modules=["q", "v"]))
    randomize(model)
    x = torch.randn(3, 16)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(x), expected)


def test_a_linear_with_more_than_a_weight_stays_as_it_is() -> None:
    """Extra state survives, and unloading gives the very module back."""
    model = TwoLayers()
    model.q.register_buffer("statistics", torch.ones(3))
    q, v = model.q, model.v
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"]))
    assert isinstance(adapted.base_model.model.q, FastLoraWrapper)
    assert "base_model.model.q.base_layer.statistics" in adapted.state_dict()
    bare = adapted.unload()
    assert bare.q is q
    assert bare.v is v


@pytest.mark.parametrize("merges", [["default"], ["b"], ["default", "b"]], ids=str)
@pytest.mark.parametrize("disabled", [False, True])
def test_unloading_keeps_what_is_merged(merges: list[str], disabled: bool) -> None:
    """`unload` leaves merged adapters in the weights and takes active copies, as in PEFT (R4)."""
    bare = []
    for library in (fastlora, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(
            TwoLayers(), library.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
        )
        model.add_adapter("b", library.LoraConfig(r=3, target_modules=["q", "v"]))
        with torch.no_grad():
            for name in ("head.modules_to_save.default.bias", "q.lora_B.b.weight"):
                model.base_model.model.get_parameter(name).normal_()
            model.base_model.model.q.lora_B["default"].weight.normal_()
        model.merge_adapter(merges)
        if disabled:  # PEFT takes merged adapters out in the next forward
            model.base_model.disable_adapter_layers()
            model(torch.zeros(1, 16))
        bare.append(model.unload().state_dict())
    torch.testing.assert_close(bare[0], bare[1])


@pytest.mark.parametrize("library", [fastlora, peft], ids=["fastlora", "peft"])
def test_deleting_the_active_adapter_keeps_another_one_merged(library: Any) -> None:
    """The adapter that becomes active was merged and stays in the weights, as in PEFT."""
    config = library.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    model = library.get_peft_model(TwoLayers(), config)
    model.add_adapter("b", config)
    model.merge_adapter(["b"])
    x = torch.randn(3, 16)
    expected = model(x)
    model.delete_adapter("default")
    assert model.base_model.model.q.merged_adapters == ["b"]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.unload()(x), expected)


def test_wrapper_shows_the_weight() -> None:
    """Models that look at ``layer.weight`` (T5's ``wo``) find the base layer's."""
    model = TwoLayers()
    model.q.register_forward_hook(lambda *_: None)
    weight = model.q.weight
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q"]))
    assert adapted.base_model.model.q.weight is weight
    assert adapted.base_model.model.q.bias is model.q.bias


def test_merging_a_name_twice_counts_once() -> None:
    """The same name twice in one call is one merge."""
    layer = FastLoraLinear(8, 8, r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.merge(adapter_names=["default", "default"])
    torch.testing.assert_close(layer(x), expected)


def test_set_adapter_while_disabled_and_merged() -> None:
    """After the block the adapter set in it acts, not the one merged before."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q"]))
    randomize(model)
    x = torch.randn(3, 16)
    model.set_adapter("b")
    expected = model(x)
    model.set_adapter("default")
    model.merge_adapter()
    with model.disable_adapter():
        model.set_adapter("b")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "how", ["in place", "step", "fused step", "assigned", ".data and clear_caches"]
)
def test_unmerge_keeps_what_moves_no_version(how: str) -> None:
    """What is written while merged stays: in place, by a fused step, replaced, or told of."""
    layer = FastLoraLinear(8, 8, bias=False, r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.merge()
    delta = layer.get_delta_weight("default")
    layer.weight.requires_grad_(True)
    if how == "in place":
        with torch.no_grad():
            layer.weight.copy_(torch.ones(8, 8))
    elif "step" in how:
        layer(torch.randn(3, 8)).sum().backward()
        torch.optim.SGD([layer.weight], lr=0.5, fused=how == "fused step").step()
    elif how == "assigned":
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for _ in range(layer.weight._version):
            state["weight"] += 1.0
        layer.load_state_dict(state, assign=True)
    else:
        layer.weight.data += 1.0
        layer.clear_caches()
    written = layer.weight.detach().clone()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, written - delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unmerge_keeps_what_a_base_bias_learned_while_merged(dtype: torch.dtype) -> None:
    """In every dtype: in float64 the bits of the bias were kept as a view of it."""
    layer = FastLoraLinear(8, 8, r=2, dtype=dtype)
    layer.merge()
    with torch.no_grad():
        layer.bias += 1.0
    learned = layer.bias.detach().clone()
    layer.unmerge()
    assert torch.equal(layer.bias, learned)


def test_a_deleted_adapter_is_active_on_no_layer() -> None:
    """Also on layers that it was not on: a new adapter of that name would act there at once."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v"]))
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("other")
    assert all(status.active_adapters == ["default"] for status in model.get_layer_status())
    x = torch.randn(3, 16)
    expected = model(x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    assert torch.equal(model(x), expected)


def test_merging_while_adapters_are_disabled_raises() -> None:
    """The merged adapters would act, which are to be disabled."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    model.base_model.disable_adapter_layers()
    with unchanged(model), pytest.raises(AdapterStateError, match="enable_adapter_layers"):
        model.merge_adapter()


@pytest.mark.parametrize("elsewhere", ["step", "compiled step", "DoRA step", "clear_caches"])
def test_unmerge_is_exact_behind_what_happens_elsewhere(elsewhere: str) -> None:
    """Training and refreshing another model, and a forward with gradients, are no writes."""
    layer = FastLoraLinear(8, 8, r=2, use_dora=True)
    other = FastLoraLinear(8, 8, r=2, use_dora="DoRA" in elsewhere)
    nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():  # could not be divided out again
        layer.lora_magnitude_vector["default"].weight[3] = 0.0
    before = layer.weight.clone()
    layer.bias.requires_grad_(True)
    layer.merge()
    layer(torch.randn(3, 8)).sum().backward()
    other(torch.randn(3, 8)).sum().backward()
    step = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5).step
    if elsewhere == "clear_caches":
        other.clear_caches()
    else:
        (torch.compile(step, backend="eager") if "compiled" in elsewhere else step)()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("how", ["parametrize", "prune"])
def test_merging_a_computed_weight_raises(how: str) -> None:
    """A weight that other parameters give cannot take an update."""
    layer = FastLoraLinear(8, 8, r=2)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", 0.2)
    else:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(UnsupportedLayerError, match="by a parametrization or by pruning"):
        layer.merge()
    assert not layer.merged
