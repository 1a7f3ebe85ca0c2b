"""`layer_replication` against PEFT: values, gradients, files, merging; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.support.tiny import randomize, tiny, tiny_llama, trainable, unchanged

pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])
RANGES = [[0, 2], [0, 1], [1, 2]]


def made() -> Any:
    """A model of two layers."""
    return tiny("LlamaForCausalLM", num_hidden_layers=2)


def config(**fields: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "layer_replication": RANGES}
    return LoraConfig(**{**settings, **fields})


def adapted() -> Any:
    """One of four layers, with an adapter."""
    torch.manual_seed(1)
    model = get_peft_model(made(), config())
    randomize(model)
    return model.eval()


def test_copies_share_what_is_frozen() -> None:
    """Weights are those of two layers, merged ones each its own; generation caches all layers."""
    model = adapted()
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    for i, j in ((0, 2), (1, 3)):
        ours, others = (dict(layers[k].named_parameters()) for k in (i, j))
        shared = {name for name in ours if ours[name] is others[name]}
        assert {n for n in ours if "lora" not in n} == shared
        assert layers[i].self_attn.config is model.config
    before = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    assert before == sum(p.numel() for p in made().parameters())
    assert len(trainable(model)) == 16
    settings = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False}
    cached, whole = (model.generate(**settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    copied = copy.deepcopy(model)
    assert copied.get_base_model().model.layers[0].self_attn.q_proj.weight is (
        copied.get_base_model().model.layers[2].self_attn.q_proj.weight
    )
    with pytest.warns(UserWarning, match=r"likewise for \d+ more\). This takes 0.0 MiB more"):
        merged = model.merge_and_unload()
    weights = [layer.self_attn.q_proj.weight for layer in merged.model.layers]
    assert len({id(weight) for weight in weights}) == 4
    norms = [layer.input_layernorm.weight for layer in merged.model.layers]
    assert len({id(weight) for weight in norms}) == 2
    again = get_peft_model(merged, config(layer_replication=None))
    assert len(trainable(again)) == 16


def test_several_adapters(tmp_path: Path) -> None:
    """All have the same layers, alone and in one batch; the others are refused."""
    model = adapted()
    model.add_adapter("b", config())
    randomize(model, seed=3)
    with torch.no_grad():
        alone = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = model(input_ids=IDS).logits
        mixed = model(input_ids=IDS, adapter_names=["b", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["b"][0])
    torch.testing.assert_close(mixed[1], alone["default"][1])
    for ranges in (None, [[0, 2]]):
        with pytest.raises(ConfigError, match=r"already replicated with \[\[0, 2\], \[0, 1\]"):
            model.add_adapter("c", config(layer_replication=ranges))
    model.save_pretrained(tmp_path)
    fresh = LoraModel.from_pretrained(made(), tmp_path)
    fresh.load_adapter(tmp_path / "b", "b")
    fresh.set_adapter("b")
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=IDS).logits, alone["b"])
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="applied to layers without adapters"):
        plain.add_adapter("b", config())


def test_failures_leave_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad ranges and targets, a file that does not fit, a failure half way."""
    model = made()
    adapted().save_pretrained(tmp_path)
    add, calls = fastlora.layers.LoraLayer.add_adapter, []

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError("no room")
        add(self, *args, **kwargs)

    for ranges, words in (
        ([[0, 3]], r"range \[0, 3\], .* end <= 2 .the number of layers"),
        ([[1, 1]], "must be a list of layer ranges"),
        ([2], "must be a list of layer ranges"),
        ("all", "must be a list of layer ranges"),
    ):
        with unchanged(model), pytest.raises(ConfigError, match=words):
            get_peft_model(model, config(layer_replication=ranges))
    with unchanged(model), pytest.raises(TargetNotFoundError):
        get_peft_model(model, config(target_modules=["nothing"]))
    with unchanged(model):
        assert fastlora.estimate(model, config()).modules == 8
    with unchanged(model), pytest.raises(CheckpointError):
        LoraModel.from_pretrained(model, tmp_path, config=config(r=3))
    monkeypatch.setattr(fastlora.layers.LoraLayer, "add_adapter", fails)
    with unchanged(model), pytest.raises(MemoryError):
        get_peft_model(model, config())
    with pytest.raises(
        UnsupportedLayerError, match="find the list of layers in a T5ForConditionalGeneration"
    ):
        settings = config(target_modules=["q"], layer_replication=[[0, 1]])
        get_peft_model(tiny("T5ForConditionalGeneration"), settings)
