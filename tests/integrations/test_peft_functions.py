"""Functions of PEFT's that take models of ours, imported from where PEFT has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.status import TunerLayerStatus, TunerModelStatus
from tests.support.peft_twins import peft
from tests.support.tiny import TwoLayers, adapted

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def test_hot_swap(tmp_path: Path) -> None:
    """Of a compiled model too; and of a model of PEFT's, which goes where it went."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = adapted(peft, r=2, seed=2)
    expected = other(X).detach()
    other.save_pretrained(tmp_path)
    for library in (fastlora, peft):
        model = adapted(library)
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert model.base_model.model.q.lora_A["default"].weight.shape[0] == 6
        compiled: Any = torch.compile(model, backend="eager")
        hotswap_adapter(
            compiled if library is fastlora else model, tmp_path, adapter_name="default"
        )
        torch.testing.assert_close(model(X).detach(), expected, rtol=1e-4, atol=1e-5)


def test_status_and_conversion(tmp_path: Path) -> None:
    """Records of ours, and a folder that both load."""
    model = adapted()
    assert all(isinstance(layer, TunerLayerStatus) for layer in peft.get_layer_status(model))
    assert isinstance(peft.get_model_status(model), TunerModelStatus)
    assert peft.get_layer_status(model.get_base_model())[0].name == "q"
    assert not isinstance(peft.get_model_status(adapted(peft)), TunerModelStatus)
    config, tensors = peft.convert_to_lora(model, rank=2)
    assert isinstance(config, fastlora.LoraConfig)
    assert tensors["base_model.model.q.lora_A.weight"].shape == (2, 16)
    peft.save_as_lora(tmp_path, model, rank=4)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(TwoLayers(), tmp_path).eval()
    torch.testing.assert_close(again(X).detach(), model(X).detach(), rtol=1e-4, atol=1e-5)


def test_a_base_model_with_layers_of_ours_raises(tmp_path: Path) -> None:
    """It is no model of PEFT's either, although its layers are PEFT's by registration."""
    base = adapted().get_base_model()
    for call in (
        lambda: fastlora.convert_to_lora(base, 2),
        lambda: peft.convert_to_lora(base, 2),
        lambda: fastlora.save_as_lora(tmp_path, base, 2),
        lambda: fastlora.hotswap_adapter(base, tmp_path, "default"),
    ):
        with pytest.raises(ValueError, match="Could not detect any layer|No adapter layers found"):
            call()


def test_intruders_and_loraplus() -> None:
    """Adapters on an embedding of ours have the rate for embeddings."""
    from peft.optimizers import create_loraplus_optimizer
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))
    model = fastlora.get_peft_model(base, fastlora.LoraConfig(target_modules=["0", "1"]))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-7
    )
    embedding = model.base_model.model[0]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {
        id(embedding.lora_embedding_A["default"]),
        id(embedding.lora_embedding_B["default"]),
    }
    reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    assert model.active_adapters == ["intruder_reduced"]
