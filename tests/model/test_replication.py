"""`layer_replication` against PEFT: values, gradients, files, merging; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.support.peft_twins import assert_files_cross, assert_same_training, peft
from tests.support.tiny import randomise, tiny_llama, trainable

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])
RANGES = [[0, 2], [0, 1], [1, 2]]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Model class: its config, target modules, and the part to give PEFT where it finds no layers.
MODELS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "LlamaForCausalLM": ({**SMALL, "num_key_value_heads": 1}, ["q_proj", "up_proj"], ""),
    "MistralForCausalLM": ({**SMALL, "num_key_value_heads": 1}, ["q_proj"], ""),
    "Qwen2ForCausalLM": ({**SMALL, "num_key_value_heads": 1}, ["q_proj"], ""),
    "BertForMaskedLM": (SMALL, ["query", "dense"], ""),
    "FalconForCausalLM": (SMALL, ["query_key_value"], "transformer"),
    "GPTNeoXForCausalLM": (SMALL, ["query_key_value"], "gpt_neox"),
    "GPT2LMHeadModel": (
        {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ["c_attn"],
        "transformer",
    ),
}


def made(kind: str) -> Any:
    """A random model of that class in evaluation mode; the same one at every call."""
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(**MODELS[kind][0])).eval()


def logits(model: Any) -> torch.Tensor:
    """A model's output."""
    return model(input_ids=IDS).logits


def config(library: Any, kind: str = "LlamaForCausalLM", **fields: Any) -> Any:
    settings = {"r": 2, "target_modules": list(MODELS[kind][1]), "layer_replication": RANGES}
    return library.LoraConfig(**{**settings, **fields})


def adapted(library: Any, kind: str) -> Any:
    torch.manual_seed(1)
    model = made(kind)
    part = MODELS[kind][2]
    if library is peft and part:  # PEFT finds these only from the inside
        from peft.tuners.tuners_utils import replicate_layers

        replicate_layers(getattr(model, part), RANGES)
        settings = config(library, kind, layer_replication=None)
    else:
        settings = config(library, kind)
    model = library.get_peft_model(model, settings)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_as_peft(kind: str, tmp_path: Path) -> None:
    """Values, gradients, names, the model's config; files both ways; merging."""
    if kind == "Qwen2ForCausalLM":  # PEFT leaves its config's layer_types too short
        models = [adapted(fastlora, kind)]
    else:
        models = [adapted(library, kind) for library in (fastlora, peft)]
    ours, theirs = models[0], models[-1]
    assert ours.config.num_hidden_layers == 4
    expected = assert_same_training(ours, theirs, logits)
    if not MODELS[kind][2] and len(models) == 2:
        assert_files_cross(models, lambda: made(kind), logits, expected, tmp_path)
    else:
        ours.save_pretrained(tmp_path)
        here = LoraModel.from_pretrained(made(kind), tmp_path)
        torch.testing.assert_close(logits(here).detach(), expected)
    with torch.no_grad(), ours.disable_adapter():
        plain = ours(input_ids=IDS).logits
    with pytest.raises(AdapterStateError, match="shares its weight with"):
        ours.merge_adapter()
    with pytest.warns(UserWarning, match=r"others theirs: 0.0 MiB more"):
        merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(plain, expected)


def test_copies_share_what_is_frozen() -> None:
    """Weights are those of two layers, merged ones each its own; generation caches all layers."""
    model = adapted(fastlora, "LlamaForCausalLM")
    layers = model.get_base_model().model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    for i, j in ((0, 2), (1, 3)):
        ours, others = (dict(layers[k].named_parameters()) for k in (i, j))
        shared = {name for name in ours if ours[name] is others[name]}
        assert {n for n in ours if "lora" not in n} == shared
        assert layers[i].self_attn.config is model.config
    before = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    assert before == sum(p.numel() for p in made("LlamaForCausalLM").parameters())
    assert len(trainable(model)) == 16
    settings = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False}
    cached, whole = (model.generate(**settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    copied = copy.deepcopy(model)
    assert copied.get_base_model().model.layers[0].self_attn.q_proj.weight is (
        copied.get_base_model().model.layers[2].self_attn.q_proj.weight
    )
    merged = model.merge_and_unload()
    weights = [layer.self_attn.q_proj.weight for layer in merged.model.layers]
    assert len({id(weight) for weight in weights}) == 4
    norms = [layer.input_layernorm.weight for layer in merged.model.layers]
    assert len({id(weight) for weight in norms}) == 2
    again = get_peft_model(merged, config(fastlora, layer_replication=None))
    assert len(trainable(again)) == 16


def test_several_adapters(tmp_path: Path) -> None:
    """All have the same layers, alone and in one batch; the others are refused."""
    model = adapted(fastlora, "LlamaForCausalLM")
    model.add_adapter("b", config(fastlora))
    randomise(model, seed=3)
    with torch.no_grad():
        alone = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = model(input_ids=IDS).logits
        mixed = model(input_ids=IDS, adapter_names=["b", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["b"][0])
    torch.testing.assert_close(mixed[1], alone["default"][1])
    for ranges in (None, [[0, 2]]):
        with pytest.raises(ConfigError, match=r"replicate its layers by \[\[0, 2\], \[0, 1\]"):
            model.add_adapter("c", config(fastlora, layer_replication=ranges))
    model.save_pretrained(tmp_path)
    fresh = LoraModel.from_pretrained(made("LlamaForCausalLM"), tmp_path)
    fresh.load_adapter(tmp_path / "b", "b")
    fresh.set_adapter("b")
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=IDS).logits, alone["b"])
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="needs layers without adapters"):
        plain.add_adapter("b", config(fastlora))


def state(model: nn.Module) -> Any:
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        model.config.to_dict(),
    )


def test_failures_leave_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad ranges and targets, a file that does not fit, a failure half way."""
    model = made("LlamaForCausalLM")
    before = state(model)
    for ranges, words in (
        ([[0, 3]], r"range \[0, 3\], .* the model's 2 layers"),
        ([[1, 1]], "must be a list of ranges"),
        ([2], "must be a list of ranges"),
        ("all", "must be a list of ranges"),
    ):
        with pytest.raises(ConfigError, match=words):
            get_peft_model(model, config(fastlora, layer_replication=ranges))
    with pytest.raises(TargetNotFoundError):
        get_peft_model(model, config(fastlora, target_modules=["nothing"]))
    assert state(model) == before
    assert fastlora.estimate(model, config(fastlora)).modules == 8
    assert state(model) == before
    adapted(fastlora, "LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        LoraModel.from_pretrained(model, tmp_path, config=config(fastlora, r=3))
    assert state(model) == before
    add = fastlora.layers.LoraLayer.add_adapter
    calls = []

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError("no room")
        add(self, *args, **kwargs)

    monkeypatch.setattr(fastlora.layers.LoraLayer, "add_adapter", fails)
    with pytest.raises(MemoryError):
        get_peft_model(model, config(fastlora))
    assert state(model) == before
    with pytest.raises(UnsupportedLayerError, match="a T5ForConditionalGeneration has no list"):
        small = transformers.T5Config(
            vocab_size=11, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2
        )
        get_peft_model(
            transformers.T5ForConditionalGeneration(small),
            config(fastlora, target_modules=["q"], layer_replication=[[0, 1]]),
        )
