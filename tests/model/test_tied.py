"""Tied embeddings: `ensure_weight_tying` with copies, against PEFT; what merging does to them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraModel, get_peft_model
from fastlora.model.adapter_folder import load_adapter_folder
from fastlora.model.tied import tied_with_embedding
from fastlora.validation import ConfigError, UnsupportedLayerError
from tests.support.peft_twins import (
    assert_files_cross,
    assert_same_gradients,
    assert_same_training,
    gradients_of,
    peft,
)
from tests.support.tiny import tiny_llama

pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])


def logits(model: Any) -> torch.Tensor:
    """A model's output."""
    return model(input_ids=IDS).logits


def config(library: Any, **fields: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    return library.LoraConfig(**settings)


def tied_copies(library: Any, saved: list[str]) -> Any:
    torch.manual_seed(1)
    settings = config(library, modules_to_save=saved, ensure_weight_tying=True)
    model = library.get_peft_model(tiny_llama(), settings)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    return model


@pytest.mark.parametrize(
    "saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=",".join
)
def test_copies_as_in_peft(saved: list[str], tmp_path: Path) -> None:
    """One weight, whichever of the tied modules is named; in files, training and merging."""
    ours, theirs = (tied_copies(library, list(saved)) for library in (fastlora, peft))
    assert ours.peft_config["default"].modules_to_save == (
        theirs.peft_config["default"].modules_to_save
    )
    base = ours.get_base_model()
    copies = [m.modules_to_save["default"] for m in (base.model.embed_tokens, base.lm_head)]
    assert copies[0].weight is copies[1].weight
    assert (copies[1].in_features, copies[1].out_features) == (64, 97)
    expected = assert_same_training(ours, theirs, logits)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(tiny_llama()))
    assert_files_cross((ours, theirs), tiny_llama, logits, expected, tmp_path)
    loaded = LoraModel.from_pretrained(tiny_llama(), tmp_path / "saved1").get_base_model()
    assert loaded.lm_head.modules_to_save["default"].weight is (
        loaded.model.embed_tokens.modules_to_save["default"].weight
    )
    with torch.no_grad():
        mixed = ours(input_ids=IDS, adapter_names=["default", None]).logits
        plain = tiny_llama()(input_ids=IDS).logits
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(mixed[1], plain[1])
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=3e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def tied_lora(library: Any, targets: Any) -> Any:
    torch.manual_seed(1)
    settings = config(library, target_modules=targets, ensure_weight_tying=True, lora_alpha=5)
    model = library.get_peft_model(tiny_llama(), settings)
    embedding = model.get_base_model().model.embed_tokens
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factors in (embedding.lora_embedding_A, embedding.lora_embedding_B):
            shape = factors["default"].shape
            factors["default"].copy_(torch.randn(shape, generator=generator) / 4)
        for name, parameter in model.named_parameters():
            if "q_proj.lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "targets",
    [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], r".*(q_proj|lm_head)$"],
    ids=["embedding", "head", "regex"],
)
def test_lora_as_in_peft(targets: Any, tmp_path: Path) -> None:
    """One A and one B, with the sum of the gradients that PEFT's two views of them get."""
    ours, theirs = (tied_lora(library, copy.copy(targets)) for library in (fastlora, peft))
    chosen = [model.peft_config["default"].target_modules for model in (ours, theirs)]
    assert chosen[0] == chosen[1]
    head = ours.get_base_model().lm_head
    embedding = ours.get_base_model().model.embed_tokens
    for mine, own in ((head.lora_A, "lora_embedding_B"), (head.lora_B, "lora_embedding_A")):
        assert mine["default"].weight.data_ptr() == getattr(embedding, own)["default"].data_ptr()
    for model in (ours, theirs):
        logits(model).square().mean().backward()
    expected = logits(theirs).detach()
    torch.testing.assert_close(logits(ours).detach(), expected, rtol=1e-4, atol=3e-5)
    gradients = gradients_of(theirs)
    for end, own in (("A", "B"), ("B", "A")):
        of_head = gradients.pop(f"base_model.model.lm_head.lora_{end}.default.weight")
        key = f"base_model.model.model.embed_tokens.lora_embedding_{own}.default"
        gradients[key] = gradients[key] + of_head.t()
    assert_same_gradients(gradients_of(ours), gradients)
    assert_files_cross((ours, theirs), tiny_llama, logits, expected, tmp_path)
    files = [load_adapter_folder(tmp_path / f"saved{i}").tensors for i in range(2)]
    lora = [{key for key in file if "lora" in key} for file in files]
    assert lora[0] == lora[1]
    with torch.no_grad():
        plain = tiny_llama()(input_ids=IDS).logits
        mixed = ours(input_ids=IDS, adapter_names=["default", None]).logits
        torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(mixed[1], plain[1])
        ours.merge_adapter()
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=3e-5)
        ours.unmerge_adapter()
        with ours.disable_adapter():
            assert torch.equal(ours(input_ids=IDS).logits, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = ours.merge_and_unload()
        # PEFT's merge adds the update to the one weight twice.
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=3e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_tied_lora_beside_other_adapters() -> None:
    """They agree, or are refused; a deleted one leaves both."""
    model = tied_lora(fastlora, ["lm_head"])
    model.add_adapter("b", config(fastlora, target_modules=["lm_head"], ensure_weight_tying=True))
    model.add_adapter("c", config(fastlora))
    model = copy.deepcopy(model)
    model.set_adapter("b")
    assert sum(p.requires_grad for p in model.parameters()) == 2
    model.delete_adapter("default")
    assert list(model.get_base_model().lm_head.r) == ["b"]
    with pytest.raises(UnsupportedLayerError, match="has the input embedding's LoRA for other"):
        model.add_adapter("d", config(fastlora, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="needs use_dora=False"):
        model.add_adapter(
            "d",
            config(fastlora, target_modules=["lm_head"], ensure_weight_tying=True, use_dora=True),
        )
    other = get_peft_model(tiny_llama(), config(fastlora, target_modules=["lm_head"]), "a")
    with pytest.raises(UnsupportedLayerError, match="without LoRA of its own"):
        other.add_adapter(
            "b", config(fastlora, target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    assert list(other.peft_config) == ["a"]


def test_two_adapters_and_copies_of_the_model() -> None:
    model = tied_copies(fastlora, ["lm_head"])
    model.add_adapter("b", config(fastlora, modules_to_save=["lm_head"], ensure_weight_tying=True))
    model = copy.deepcopy(model)
    base = model.get_base_model()
    owned = [base.model.embed_tokens.modules_to_save, base.lm_head.modules_to_save]
    for name in ("default", "b"):
        assert owned[0][name].weight is owned[1][name].weight
    assert owned[0]["b"].weight is not owned[0]["default"].weight
    model.delete_adapter("default")
    assert list(owned[1]) == ["b"]


def test_what_is_not_tied_is_said() -> None:
    """Each of PEFT's three warnings; the caller's config stays as it was."""
    for fields, tied, words in (
        ({"modules_to_save": ["lm_head"]}, True, "`ensure_weight_tying` is not set to True"),
        ({"target_modules": "lm_head"}, True, "`ensure_weight_tying` is not set to True"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, False, "no tied modules w"),
        ({"ensure_weight_tying": True}, True, "no tied modules are added"),
    ):
        given = config(fastlora, **fields)
        before = given.to_dict()
        with pytest.warns(UserWarning, match=words):
            get_peft_model(tiny_llama(tie_word_embeddings=tied), given)
        assert given.to_dict() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(tiny_llama(tie_word_embeddings=False), config(fastlora))
        get_peft_model(tiny_llama(), config(fastlora))


def test_a_copy_of_one_alone_unties_when_unloaded() -> None:
    """The config says so, or a reload would tie them again."""
    with pytest.warns(UserWarning, match="not set to True"):
        model = get_peft_model(tiny_llama(), config(fastlora, modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings


def test_copy_and_target_at_once() -> None:
    settings = config(
        fastlora,
        target_modules=["lm_head"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    base = tiny_llama()
    with pytest.raises(UnsupportedLayerError, match=r"gives 'lm_head' the input embedding's copy"):
        get_peft_model(base, settings)
    assert not any("modules_to_save" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("kind", ["T5", "Bart", "GPT2"])
def test_what_models_tie(kind: str) -> None:
    """By identity, among what transformers says."""
    import transformers

    small = {
        "T5": {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2},
        "Bart": {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1},
        "GPT2": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    }[kind]
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2} if kind == "Bart" else {}
    settings = getattr(transformers, f"{kind}Config")(vocab_size=11, **small, **heads)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForConditionalGeneration"
    model = getattr(transformers, name)(settings)
    from peft.utils.other import _get_module_names_tied_with_embedding

    assert tied_with_embedding(model) == _get_module_names_tied_with_embedding(model)


def tiny_t5() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    settings = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(settings).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q", "lm_head"]},
        {"target_modules": ["q"], "trainable_token_indices": [1, 5, 9]},
    ],
    ids=["copies", "lora", "rows"],
)
def test_an_encoder_and_decoder(fields: dict[str, Any], tmp_path: Path) -> None:
    """Three embeddings and a head with one weight: values as in PEFT and merged, and files.

    PEFT's tied copy of an embedding is a linear, which fails in its first forward, and its loader
    ties nothing here; heads and rows it has right.
    """
    inputs = {"input_ids": IDS, "labels": IDS}
    models = []
    for library in (fastlora, peft):
        settings = library.LoraConfig(r=2, ensure_weight_tying=True, **copy.deepcopy(fields))
        model = library.get_peft_model(tiny_t5(), settings)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            of_head = ("lm_head.lora_A", "lm_head.lora_B")  # views, in PEFT
            for name, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad and not any(part in name for part in of_head):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        models.append(model.eval())
    ours, theirs = models
    expected = ours(**inputs).logits
    if "modules_to_save" not in fields:
        torch.testing.assert_close(expected, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for who in ("ours", "theirs"):
        here = LoraModel.from_pretrained(tiny_t5(), tmp_path / who)
        torch.testing.assert_close(here(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    if "trainable_token_indices" in fields:
        there = peft.PeftModel.from_pretrained(tiny_t5(), tmp_path / "ours")
        torch.testing.assert_close(there(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
