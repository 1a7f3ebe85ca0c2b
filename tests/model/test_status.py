"""`get_layer_status` and `get_model_status`: field by field those of PEFT."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model import status
from fastlora.validation import AdapterNotFoundError
from tests.support.peft_twins import assert_same_status, peft
from tests.support.tiny import TwoLayers, quantized_two_layers, tiny_llama, with_adapters


def pair() -> Any:
    """Two adapters on different layers, one with a copy of a module, in both libraries."""
    made = []
    for library in (fastlora, peft):
        torch.manual_seed(0)
        configs = {
            "default": library.LoraConfig(r=4, target_modules=["q"], modules_to_save=["norm"]),
            "other": library.LoraConfig(r=2, target_modules=["q", "v"], use_dora=True),
        }
        made.append(with_adapters(TwoLayers(), configs, library))
    return made


def test_fields_are_those_of_peft() -> None:
    """As made; another one active; merged; disabled; trainable by hand."""
    ours, theirs = pair()
    assert_same_status(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
    assert_same_status(ours, theirs)
    for model in (ours, theirs):
        model.merge_adapter(["other"])
    assert_same_status(ours, theirs)
    for model in (ours, theirs):
        model.unmerge_adapter()
        model.base_model.disable_adapter_layers()
    assert ours.get_model_status().enabled is theirs.get_model_status().enabled is False
    for model in (ours, theirs):
        model.base_model.enable_adapter_layers()
    assert_same_status(ours, theirs)
    for model in (ours, theirs):
        model.base_model.model.q.lora_A["other"].requires_grad_(False)
    assert_same_status(ours, theirs)
    assert ours.get_model_status().requires_grad["other"] == "irregular"


def test_layers_that_differ_are_irregular() -> None:
    """One layer merged by hand, another disabled, one with another adapter active."""
    ours, theirs = pair()
    for model in (ours, theirs):
        model.base_model.model.q.merge(adapter_names=["other"])
    assert_same_status(ours, theirs)
    found = ours.get_model_status()
    assert found.merged_adapters == "irregular"
    ours.base_model.model.q.unmerge()
    ours.base_model.model.q._disabled = True
    ours.base_model.model.v._active_adapters = ["other"]
    found = ours.get_model_status()
    assert (found.enabled, found.active_adapters) == ("irregular", "irregular")


def test_a_copy_is_set_active_by_itself() -> None:
    """As PEFT's wrappers allow; a name without a copy is refused."""
    made = []
    for library in (fastlora, peft):
        config = library.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"])
        model = with_adapters(TwoLayers(), {"default": config, "other": config}, library)
        model.base_model.model.norm.set_adapter("other")
        made.append(model)
    assert_same_status(*made)
    assert made[0].get_model_status().active_adapters == "irregular"
    with pytest.raises(AdapterNotFoundError, match="'absent'"):
        made[0].base_model.model.norm.set_adapter("absent")
    assert made[0].base_model.model.norm.acting() == "other"


def test_a_copy_names_the_active_adapters_that_have_one() -> None:
    """As PEFT's wrappers do, which also name what adapters own there."""
    answers = []
    for library in (fastlora, peft):
        bare = library.LoraConfig(r=2, target_modules=["q"])
        with_copy = library.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"])
        model = with_adapters(TwoLayers(), {"default": bare, "other": with_copy}, library)
        norm, found = model.base_model.model.norm, []
        for names in (["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(names)
            found.append((norm.active_adapters, norm.modules_to_save["other"].bias.requires_grad))
        found.append((*norm.adapter_layer_names, *norm.other_param_names))
        answers.append(found)
    assert answers[0] == answers[1]


def test_weights_that_are_targeted_as_parameters() -> None:
    """fastlora adapts a linear layer as a whole; PEFT's status names the layer of a parameter."""
    made = []
    for library in (fastlora, peft):
        config = library.LoraConfig(r=2, target_modules=["v"], target_parameters=["q.weight"])
        made.append(library.get_peft_model(TwoLayers(), config))
    assert_same_status(*made)
    kinds = [layer.module_type for layer in made[0].get_layer_status()]
    assert kinds == ["lora.ParamWrapper", "lora.Linear"]


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
def test_quantized_bases(kind: str) -> None:
    """Their names in PEFT; beside a plain layer the model's is irregular."""
    model = fastlora.get_peft_model(
        quantized_two_layers(kind), fastlora.LoraConfig(r=2, target_modules=["q", "v"])
    )
    q, v = model.get_layer_status()
    expected = {
        "bitsandbytes": ("lora.Linear4bit", "bnb 4bit"),
        "torchao": ("lora.TorchaoLoraLinear", "torchao"),
    }
    assert (q.module_type, q.quantization_backend) == expected[kind]
    assert (v.module_type, v.quantization_backend) == ("lora.Linear", None)
    found = model.get_model_status()
    assert found.quantization_backend == "irregular"
    plain = fastlora.get_peft_model(
        TwoLayers(), fastlora.LoraConfig(r=2, target_modules=["q", "v"])
    ).get_nb_trainable_parameters()
    # Two values of a 4-bit weight are in one byte.
    assert (found.trainable_params, found.total_params) == plain
    assert model.get_nb_trainable_parameters() == plain


def test_models_that_are_not_wrapped() -> None:
    """A transformers model with layers in it, any other module, and one without."""
    base = tiny_llama()
    fastlora.get_peft_model(base, fastlora.LoraConfig(target_modules=["q_proj"]))
    found = fastlora.get_model_status(base)
    assert (found.base_model_type, found.adapter_model_type) == ("LlamaForCausalLM", "None")
    assert (found.peft_types, found.num_adapter_layers) == ({}, 2)
    inside = nn.ModuleDict({"llama": base})
    assert fastlora.get_model_status(inside).base_model_type == "other"
    assert fastlora.get_layer_status(inside)[0].name.startswith("llama.model.layers.0")
    with pytest.raises(ValueError, match="No adapter layers found"):
        fastlora.get_layer_status(nn.Linear(2, 2))


def test_records_have_the_fields_of_peft() -> None:
    """In PEFT's order."""
    for name in ("TunerLayerStatus", "TunerModelStatus"):
        mine, its = getattr(status, name), getattr(peft.peft_model, name)
        assert [f.name for f in dataclasses.fields(mine)] == [
            f.name for f in dataclasses.fields(its)
        ]
