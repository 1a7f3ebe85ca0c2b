"""Tiny models of many architectures, with every initialization on all the kinds of layers in them.

Each: wrapped, trained by a step, saved, loaded by PEFT, merged. The initializations come from the
registry: one that is added there is tried here.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastlora
from fastlora.init import InitMethod, all_init_methods
from tests.support.tiny import tiny

peft = pytest.importorskip("peft", reason="loads into PEFT")
pytest.importorskip("transformers")


class Architecture(NamedTuple):
    """A tiny model, its input, and what is adapted.

    Attributes:
        kind: Its class.
        linears: Target modules that are linear layers.
        embeddings: Those that are embeddings.
        convolutions: Those that are convolutions.
        batch: Shapes of inputs by name: of ids ``[B, T]``, of other numbers with more dimensions.
        changes: Fields of its config.
    """

    kind: str
    linears: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    batch: dict[str, tuple[int, ...]] = {"input_ids": (4, 5)}
    changes: dict[str, Any] = {}


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ARCHITECTURES = {
    "OPT": Architecture(
        "OPTForCausalLM",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("embed_tokens",),
    ),
    "Llama": Architecture("LlamaForCausalLM", _GATED, ("embed_tokens",)),
    "GPT-2": Architecture("GPT2LMHeadModel", ("c_attn", "c_proj", "c_fc"), ("wte", "wpe")),
    "BERT": Architecture(
        "BertForSequenceClassification",
        ("query", "key", "value", "dense"),
        ("word_embeddings",),
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        ("q", "k", "v", "o", "wi", "wo"),
        ("relative_attention_bias",),
        batch={"input_ids": (4, 5), "decoder_input_ids": (4, 5)},
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        ("q_proj", "v_proj", "fc1"),
        ("decoder.embed_tokens",),
        ("conv1", "conv2"),
        {"input_features": (4, 8, 12), "decoder_input_ids": (4, 3)},
        {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 8, **_IDS},
    ),
    "Qwen3": Architecture("Qwen3ForCausalLM", _GATED, ("embed_tokens",)),
    "ViT": Architecture(
        "ViTForImageClassification",
        ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        (),
        ("projection",),
        {"pixel_values": (4, 3, 8, 8)},
        {"image_size": 8, "patch_size": 4},
    ),
    "ResNet": Architecture(
        "ResNetForImageClassification",
        ("classifier.1",),
        (),
        ("convolution",),
        {"pixel_values": (4, 3, 16, 16)},
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 6}
        | {"layer_type": "basic"},
    ),
}
# PEFT has these on convolutions.
FOR_CONVOLUTIONS: tuple[bool | str, ...] = (True, False, "gaussian")


@functools.cache
def _base(name: str) -> nn.Module:
    kind, changes = ARCHITECTURES[name].kind, ARCHITECTURES[name].changes
    tied = {"tie_word_embeddings": False} if "Image" not in kind else {}
    made: nn.Module = tiny(kind, **tied, **changes)
    return made


def _batch(name: str) -> dict[str, torch.Tensor]:
    generator, batch = torch.Generator().manual_seed(1), {}
    for key, shape in ARCHITECTURES[name].batch.items():
        if len(shape) == 2:
            batch[key] = torch.randint(3, 31, shape, generator=generator)
        else:
            batch[key] = torch.randn(shape, generator=generator)
    return batch


def _output(name: str, model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(**_batch(name)).logits
    return found


def _config(name: str, init: InitMethod) -> fastlora.LoraConfig:
    architecture, extra = ARCHITECTURES[name], {}
    if init.settings is not None:
        made = init.settings.cls()
        extra = {init.settings.field: vars(made) if init.settings.as_dict else made}
    targets = [*architecture.linears, *architecture.embeddings]
    if init.name in FOR_CONVOLUTIONS:
        targets += architecture.convolutions
    return fastlora.LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, init_lora_weights=init.name, **extra
    )


def _corda(name: str, model: nn.Module, config: fastlora.LoraConfig) -> None:
    fastlora.preprocess_corda(model, config, dataloader=[_batch(name)])


def _lora_ga(name: str, model: nn.Module, config: fastlora.LoraConfig) -> None:
    def step() -> None:
        _output(name, model).square().mean().backward()

    fastlora.preprocess_loraga(model, config, train_step=step)


def _eva(name: str, model: Any) -> None:
    fastlora.initialize_lora_eva_weights(model, [_batch(name)])


# What looks at data before an adapter is added, and afterwards, by the name of the calibration.
BEFORE: dict[str, Callable[[str, nn.Module, fastlora.LoraConfig], None]] = {
    "preprocess_corda": _corda,
    "preprocess_loraga": _lora_ga,
}
AFTER: dict[str, Callable[[str, Any], None]] = {"initialize_lora_eva_weights": _eva}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("init", all_init_methods(), ids=lambda init: str(init.name))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrapped_trained_saved_loaded_and_merged(
    name: str, init: InitMethod, tmp_path: Path
) -> None:
    base, config = copy.deepcopy(_base(name)), _config(name, init)
    before = _output(name, base).detach()
    if init.calibration and init.calibration not in AFTER:
        BEFORE[init.calibration](name, base, config)
    torch.manual_seed(2)
    model = fastlora.get_peft_model(base, config)
    if init.calibration in AFTER:
        AFTER[init.calibration](name, model)
    if init.name is not False and init.name != "loftq":
        torch.testing.assert_close(_output(name, model).detach(), before, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "untrained")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    _output(name, model).square().mean().backward()
    assert trained and any(p.grad is not None and p.grad.any() for p in trained)
    optimizer.step()
    expected = _output(name, model).detach()
    assert not torch.equal(expected, before)
    extra: dict[str, Any] = {}
    if init.converts:
        extra["path_initial_model_for_weight_conversion"] = str(tmp_path / "untrained")
    model.save_pretrained(tmp_path / "trained", **extra)
    if init.converts or not init.changes_base:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(_base(name)), tmp_path / "trained")
    else:  # PEFT needs a GPU to repeat it
        loaded = fastlora.LoraModel.from_pretrained(
            copy.deepcopy(_base(name)), tmp_path / "trained"
        )
    for layer in loaded.modules():  # Whisper reads the strides, which PEFT's layers lack
        if type(layer).__name__ == "Conv1d" and not hasattr(layer, "stride"):
            layer.stride = layer.base_layer.stride
    torch.testing.assert_close(_output(name, loaded.eval()), expected, rtol=1e-3, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(_output(name, merged), expected, rtol=1e-3, atol=1e-4)
