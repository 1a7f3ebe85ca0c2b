"""Experts that a config names: refused or warned about by name, for each form of a config."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.model.stacked_experts import EXPERT_NAMES
from fastlora.validation import CheckpointError, ConfigError, UnsupportedLayerError
from tests.support.peft_twins import peft
from tests.support.tiny import unchanged

transformers = pytest.importorskip("transformers", minversion="5.0")

OF_KIND: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1},
        **{"n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    },
    "llama4_text": {
        **{"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8},
        **{"intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
}
V4 = ["o_proj", "gate_proj", "up_proj", "down_proj"]
MIXTRAL = ["q_proj", "v_proj", "w1", "w2", "w3"]
REGEX = r".*\.(o_proj|down_proj)"
# PEFT converts these names to parameters of experts, and no linear has them.
UNSUPPORTED: list[tuple[str, list[str]]] = [
    ("qwen3_moe", V4),
    ("olmoe", V4),
    ("qwen3_moe", ["o_proj", "gate_proj"]),
    ("qwen3_moe", ["o_proj", "mlp.experts.down_proj"]),
    ("qwen3_moe", ["o_proj", "experts.3.down_proj"]),
    ("mixtral", ["o_proj", "block_sparse_moe.experts.0.w2"]),
    ("mixtral", MIXTRAL),
    ("mixtral", ["w1", "w2", "w3"]),
]
# Experts that are left out beside linears that are adapted.
LEFT_OUT: list[tuple[str, str | list[str], list[str]]] = [
    *((kind, "all-linear", ["gate_up_proj", "down_proj"]) for kind in OF_KIND),
    *((kind, V4, ["gate_up_proj", "down_proj"]) for kind in ("deepseek_v3", "llama4_text")),
    *((kind, REGEX, ["down_proj"]) for kind in OF_KIND),
    ("qwen3_moe", r".*(o_proj|experts\.\d+\.up_proj)", ["gate_up_proj"]),
    ("gpt_oss", V4, ["gate_up_proj", "down_proj"]),
    ("mixtral", V4, ["gate_up_proj", "down_proj"]),
]
# Nothing that means experts.
SILENT: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"target_modules": ["o_proj"]}) for kind in OF_KIND),
    ("deepseek_v3", {"target_modules": ["o_proj", "shared_experts.gate_proj"]}),
    ("deepseek_v3", {"target_modules": ["down_proj"], "layers_to_transform": [0]}),
    ("mixtral", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
]


def of_kind(kind: str) -> Any:
    """A random model of two layers with four experts."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
            **{"num_experts_per_tok": 2, "max_position_embeddings": 32},
            **OF_KIND[kind],
        },
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


kept = functools.cache(of_kind)


def adapted(kind: str, **fields: Any) -> tuple[list[str], list[str]]:
    """Returns the modules that a config adapts, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(kept(kind), LoraConfig(r=2, **fields))
        model.unload()
    warned = [str(w.message) for w in caught if w.category is UserWarning]
    return model.base_model.targeted_module_names, warned


@pytest.mark.parametrize(("kind", "targets"), UNSUPPORTED, ids=str)
def test_names_of_experts_raise(kind: str, targets: list[str]) -> None:
    """A name that means experts to PEFT, and is no linear's, is refused by name (R3)."""
    model = kept(kind)
    asked = sorted(name for name in targets if name[0] not in "oqv")
    words = f"entries {asked} name experts of a '{kind}' model".replace("[", r"\[")
    message = rf"{words} \('model.layers.\*.mlp.experts.*target_parameters.*fastlora.patch\(model\)"
    with unchanged(model), pytest.raises(UnsupportedLayerError, match=message):
        get_peft_model(model, LoraConfig(target_modules=targets))


@pytest.mark.parametrize(("kind", "targets", "experts"), LEFT_OUT, ids=str)
def test_experts_that_are_left_out_are_named(
    kind: str, targets: str | list[str], experts: list[str]
) -> None:
    """One warning names every stacked weight of experts that a config means (R3)."""
    found, said = adapted(kind, target_modules=targets)
    assert len(said) == 1 and "leaves out" in said[0] and "fastlora.patch(model)" in said[0]
    named = {part.rpartition(".")[2] for part in said[0].split("'") if ".experts." in part}
    assert named == set(experts)
    router = {"llama4_text": "", "gpt_oss": "mlp.router.weight"}.get(kind, "mlp.gate.weight")
    if targets == "all-linear":
        assert router in said[0]
    shared = kind in ("deepseek_v3", "llama4_text") and targets == V4
    assert found and any("shared_expert" in name for name in found) >= shared


@pytest.mark.parametrize(("kind", "fields"), SILENT, ids=str)
def test_other_configs_warn_of_nothing(kind: str, fields: dict[str, Any]) -> None:
    """Experts that a config does not mean, or excludes, are not mentioned."""
    assert adapted(kind, **fields)[1] == []


def test_a_config_that_names_nothing_but_experts() -> None:
    """It is refused by the experts' names, and not for matching nothing."""
    for kind, targets in (("gpt_oss", ["gate_proj"]), ("olmoe", r".*\.experts\.down_proj")):
        with pytest.raises(UnsupportedLayerError, match=r"matches only experts \('model.*experts"):
            get_peft_model(kept(kind), LoraConfig(target_modules=targets))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_a_router_is_unsupported(kind: str) -> None:
    """A router that is no linear is refused by its name and its class (R3)."""
    name = "router" if kind == "gpt_oss" else "gate"
    with pytest.raises(UnsupportedLayerError, match=rf"mlp\.{name}' is a \w+Router"):
        get_peft_model(kept(kind), LoraConfig(target_modules=["o_proj", name]))


@pytest.mark.parametrize(("kind", "targets"), [("qwen3_moe", V4), ("mixtral", MIXTRAL)])
def test_folders_with_experts(kind: str, targets: list[str], tmp_path: Path) -> None:
    """Folders that PEFT saved with adapted experts are refused, with transformers 5 or 4 (R3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(of_kind(kind), peft.LoraConfig(r=2, target_modules=targets))
        twin.save_pretrained(tmp_path)
    model = kept(kind)
    with unchanged(model), pytest.raises((CheckpointError, ConfigError), match="target_parameters"):
        LoraModel.from_pretrained(model, tmp_path)
    # With transformers 4 experts were linears: a list of names, and factors of each expert.
    file, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"target_modules": targets, "target_parameters": None}
    path.write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}}))
    tensors = {key: t for key, t in load_file(file).items() if ".experts." not in key}
    for letter, shape in (("A", (2, 16)), ("B", (16, 2))):
        key = f"base_model.model.model.layers.0.mlp.experts.0.{targets[-1]}.lora_{letter}.weight"
        tensors[key] = torch.zeros(shape)
    save_file(tensors, file)
    with unchanged(model), pytest.raises(UnsupportedLayerError, match="name experts of a"):
        LoraModel.from_pretrained(model, tmp_path)


def test_a_folder_without_experts(tmp_path: Path) -> None:
    """PEFT leaves Llama 4's routed experts out: its folder loads, with equal logits."""
    ids = torch.arange(12).view(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=V4, init_lora_weights=False)
        twin = peft.get_peft_model(of_kind("llama4_text"), config).eval()
        twin.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"leaves out experts \('.*experts.gate_up_proj'"):
        model = LoraModel.from_pretrained(of_kind("llama4_text"), tmp_path)
    torch.testing.assert_close(model(input_ids=ids).logits, twin(input_ids=ids).logits)


def test_the_names_are_pefts() -> None:
    """The table has PEFT's model types, and for each one the names of experts."""
    theirs = pytest.importorskip("peft.utils.transformers_weight_conversion")
    patterns, names = theirs._MODEL_TO_CONVERSION_PATTERN, theirs._MOE_TARGET_MODULE_MAPPING
    assert {
        kind: names[pattern].keys() - {"gate"}
        for kind, pattern in patterns.items()
        if pattern in names
    } == EXPERT_NAMES


def test_experts_of_a_model_without_a_config() -> None:
    """Experts are known by their stacked weights alone, whatever they are called."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"lin": nn.Linear(16, 16), "up": nn.Linear(16, 16)})
    model["experts"] = Experts()
    with pytest.warns(
        UserWarning, match=r"\['lin', 'up'\] leaves out experts \('experts.up'\). Stacked"
    ):
        get_peft_model(model, LoraConfig(target_modules=["lin", "up"]))
