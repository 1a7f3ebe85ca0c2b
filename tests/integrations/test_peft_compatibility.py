"""PEFT compatibility: what our config, model and layers are to it, and what it makes of them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, get_peft_model
from fastlora.validation import AdapterStateError
from tests.support.tiny import TwoLayers

peft = pytest.importorskip("peft", reason="is about PEFT's classes")

IMPORTED_LATER = """
import sys
import fastlora
config = fastlora.LoraConfig(r=2, target_modules=["q"])
from tests.support.tiny import TwoLayers
model = fastlora.get_peft_model(TwoLayers(), config)
absent = [name for name in ("peft", "transformers", "huggingface_hub") if name in sys.modules]
assert not absent, absent
import peft
from peft.tuners.tuners_utils import BaseTunerLayer
assert isinstance(config, peft.LoraConfig) and isinstance(model, peft.PeftModel)
assert isinstance(model.base_model.model.q, BaseTunerLayer)
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_ImportHookFinder"
            and finder.name == "peft"]
assert type(peft.__loader__).__name__ == "SourceFileLoader", peft.__loader__
"""


def test_classes_where_peft_is_imported_later() -> None:
    """A config and a model made before `import peft` are PEFT's after it."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_LATER],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_config_is_pefts() -> None:
    """A config is a `peft.LoraConfig`, with its methods, and still copies, pickles and compares."""
    config = LoraConfig(r=4, target_modules=["q"], task_type="CAUSAL_LM")
    assert isinstance(config, peft.LoraConfig) and isinstance(config, peft.PeftConfig)
    assert config.peft_type.value == "LORA" and config.peft_type == peft.PeftType.LORA
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert config != LoraConfig(r=8, target_modules=["q"], task_type="CAUSAL_LM")
    ours, theirs = config.to_dict(), peft.LoraConfig(**config.to_dict()).to_dict()
    assert {k: v for k, v in theirs.items() if v != ours[k]} == {"target_modules": {"q"}}


def test_the_name_in_old_pickles_of_models() -> None:
    """Models that were pickled when their class was transformers' own still load."""
    old = b"cfastlora.integrations.transformers\nTransformersLoraModel\n."
    assert pickle.loads(old) is fastlora.LoraModel


def test_config_files(tmp_path: Path) -> None:
    """PEFT reads our file, with its version in it, and `from_json_file` gives its fields."""
    LoraConfig(r=4, target_modules=["q"]).save_pretrained(tmp_path)
    fields = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert fields == json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_version"] == peft.LoraConfig.from_pretrained(tmp_path).peft_version
    assert fields["peft_version"] == "0.21.2"
    assert LoraConfig.from_peft_type(r=4, target_modules=["q"]).r == 4


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_config_of_ours_given_to_peft(change: dict[str, Any]) -> None:
    """PEFT makes a model of its own from our config, with patched layers, that computes as its."""
    config = {"r": 4, "target_modules": ["q", "v"], "init_lora_weights": False, **change}
    x, found = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), []
    for cls in (LoraConfig, peft.LoraConfig):
        torch.manual_seed(0)
        base = TwoLayers()
        torch.manual_seed(1)
        model = peft.get_peft_model(base, cls(**config))
        y = model(x)
        y.square().sum().backward()
        found.append((model, [y, *(p.grad for p in model.parameters() if p.grad is not None)]))
    (ours, values), (_, expected) = found
    assert type(ours) is peft.PeftModel
    assert len(values) == len(expected) >= 5
    for value, want in zip(values, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-6)
    report = fastlora.fusion_report(ours)
    assert report.fused == len(report.rows) == 2
    ours.add_adapter("second", LoraConfig(r=2, target_modules=["q"]))
    assert ours.base_model.model.q.r == {"default": 4, "second": 2}


def test_config_of_ours_injected_by_peft() -> None:
    """`inject_adapter_in_model` takes our config too; its layers are patched."""
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), TwoLayers())
    assert isinstance(model.q, peft.tuners.lora.Linear)
    assert fastlora.fusion_report(model).fused == 1


@pytest.mark.parametrize("target", ["q", "v"])
@pytest.mark.parametrize("config_class", [LoraConfig, peft.LoraConfig])
def test_peft_adds_no_adapters_to_layers_of_ours(config_class: Any, target: str) -> None:
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    config, state = model.peft_config["default"], model.state_dict()
    for given in (model, model.get_base_model()):
        with (
            pytest.warns(UserWarning, match="second time"),
            pytest.raises(AdapterStateError, match="already has LoRA layers of fastlora"),
        ):
            peft.get_peft_model(given, config_class(r=4, target_modules=[target]))
    assert model.peft_config == {"default": config} and model.peft_config["default"] is config
    assert model.state_dict().keys() == state.keys()


def test_model_and_layers_are_pefts() -> None:
    """A model is a `peft.PeftModel` whatever its base, and its layers are LoRA layers to PEFT."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    assert isinstance(model, peft.PeftModel) and type(model) is fastlora.LoraModel
    assert isinstance(model.base_model.model.q, peft.tuners.lora.LoraLayer)
    assert not isinstance(model.base_model.model.v, peft.tuners.lora.LoraLayer)
    assert model.active_peft_config is model.peft_config["default"]
    assert model.active_peft_config.peft_type.value == "LORA"
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    with pytest.raises(fastlora.validation.UnsupportedLayerError, match="patch"):
        fastlora.patch(model)
