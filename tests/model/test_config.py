"""`LoraConfig` against PEFT's: fields, defaults, files both ways, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from pathlib import Path

import pytest
import torch.nn as nn

import fastlora
from fastlora import get_peft_model
from fastlora.model.config import CONFIG_NAME, LoraConfig, LoraRuntimeConfig
from fastlora.validation import CheckpointError, ConfigError, FastLoraError
from tests.support.tiny import TwoLayers

peft = pytest.importorskip("peft")

# Values that both libraries take, field by field.
SET = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/model",
    "revision": "main",
    "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"},
    "inference_mode": True,
    "r": 3,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.up_proj"],
    "exclude_modules": ["x"],
    "lora_alpha": 17,
    "lora_dropout": 0.25,
    "fan_in_fan_out": True,
    "bias": "all",
    "use_rslora": True,
    "use_dora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1, 2],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 32},
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "ensure_weight_tying": True,
    "layer_replication": [[0, 2], [1, 2]],
}


def test_fields_and_defaults_are_pefts() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    assert [f.name for f in dataclasses.fields(ours)] == [
        f.name for f in dataclasses.fields(theirs)
    ]
    assert ours.to_dict() == theirs.to_dict()
    assert dataclasses.asdict(ours.runtime_config) == dataclasses.asdict(theirs.runtime_config)


def test_what_trainer_asks_of_a_config() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for name in ("is_prompt_learning", "is_adaption_prompt"):
        assert getattr(ours, name) is getattr(theirs, name) is False


def test_positional_order_is_pefts() -> None:
    assert LoraConfig("CAUSAL_LM", None, None, "1", "m", None, True, 5).r == 5


@pytest.mark.parametrize("task_type", [*peft.TaskType, None])
def test_enum_and_string_are_one(task_type: object) -> None:
    value = None if task_type is None else task_type.value
    assert LoraConfig(task_type=task_type) == LoraConfig(task_type=value)
    assert type(LoraConfig(task_type=task_type).task_type) in (str, type(None))


def test_file_loads_in_peft(tmp_path: Path) -> None:
    LoraConfig(**SET).save_pretrained(tmp_path)
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert theirs.to_dict() == peft.LoraConfig(**SET).to_dict()


def test_file_of_peft_loads(tmp_path: Path) -> None:
    peft.LoraConfig(**SET).save_pretrained(tmp_path)
    for for_loading in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = LoraConfig.from_pretrained(tmp_path, for_loading=for_loading)
        assert ours == LoraConfig(**SET)
    assert LoraConfig.from_peft(peft.LoraConfig(**SET)) == ours


def test_text_is_pefts(tmp_path: Path) -> None:
    fields = {**SET, "target_modules": ["q_proj"]}  # PEFT writes sets in any order
    peft.LoraConfig(**fields).save_pretrained(tmp_path / "theirs")
    LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    assert os.listdir(tmp_path / "ours") == [CONFIG_NAME]
    assert (tmp_path / "ours" / CONFIG_NAME).read_text() == (
        tmp_path / "theirs" / CONFIG_NAME
    ).read_text()


def test_sets_are_written_sorted() -> None:
    names = [f"m{i}" for i in range(50)]
    assert LoraConfig(target_modules=names[::-1]).to_dict()["target_modules"] == sorted(names)


def test_pattern_order_survives_a_file(tmp_path: Path) -> None:
    patterns = {"q_proj": 4, "attn.q_proj": 2}  # the first match wins, so the order is meaning
    config = LoraConfig(rank_pattern=patterns, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).rank_for("attn.q_proj") == 4
    assert list(peft.LoraConfig.from_pretrained(tmp_path).rank_pattern) == list(patterns)
    # PEFT's own writer loses it, and with it the rank.
    peft.LoraConfig(rank_pattern=patterns).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).rank_for("attn.q_proj") == 2


def test_runtime_config_is_never_saved(tmp_path: Path) -> None:
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in config.to_dict()
    theirs = peft.LoraConfig(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert LoraConfig.from_peft(theirs).runtime_config.ephemeral_gpu_offload
    with pytest.warns(UserWarning, match="runtime_config"):
        assert LoraConfig.from_dict({"runtime_config": {"ephemeral_gpu_offload": True}}) == (
            LoraConfig()
        )


def test_unknown_keys_are_dropped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"\['newer', 'newest'\]") as caught:
        config = LoraConfig.from_dict({"r": 3, "newest": 1, "newer": None})
    assert len(caught) == 1 and config == LoraConfig(r=3)


def test_the_callers_objects_stay_the_callers() -> None:
    names, saved, ranks = {"q"}, ["head"], {"q": 2}
    config = LoraConfig(target_modules=names, modules_to_save=saved, rank_pattern=ranks)
    config.target_modules.add("v")
    config.modules_to_save.append("x")
    config.rank_pattern["v"] = 3
    assert (names, saved, ranks) == ({"q"}, ["head"], {"q": 2})
    assert copy.deepcopy(config) == config


def test_none_patterns_are_empty() -> None:
    config = LoraConfig.from_dict({"rank_pattern": None, "alpha_pattern": None})
    assert config.rank_for("q") == 8 and config.alpha_for("q") == 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)}) for _ in range(2)
        )


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({}, {}),
        ({"q": 2}, {"xq": 5}),
        ({"^q": 2}, {r"layers\.1.*": 5}),
        ({"layers.0.q": 2, "q": 3}, {"q|xq": 5}),
        ({"q": 3, "layers.0.q": 2}, {"0.q": 0.5, ".*": 7}),
        ({"ayers.0.q": 3, "": 4}, {"nothing": 3}),
    ],
)
def test_rank_and_scaling_are_pefts(
    use_rslora: bool, ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    fields = {
        "target_modules": ["q", "xq"],
        "r": 5,
        "lora_alpha": 11,
        "use_rslora": use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraModel(Model(), peft.LoraConfig(**fields), "default")
    ours = LoraConfig(**fields)
    for name in theirs.targeted_module_names:
        layer = theirs.model.get_submodule(name)
        assert ours.rank_for(name) == layer.r["default"], name
        assert ours.alpha_for(name) == layer.lora_alpha["default"], name
        assert math.isclose(ours.scaling_for(name), layer.scaling["default"], rel_tol=1e-15)


BAD = [
    ({"r": 0}, "r must be a positive integer, got 0"),
    ({"r": -1}, "-1"),
    ({"r": 2.0}, "2.0"),
    ({"r": True}, "True"),
    ({"lora_dropout": 1.0}, "lora_dropout must be a number in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, "-0.1"),
    ({"lora_dropout": float("nan")}, "nan"),
    ({"lora_dropout": "0.1"}, "'0.1'"),
    ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
    ({"bias": "lora"}, "bias must be one of 'none', 'all', 'lora_only', got 'lora'; close names"),
    ({"task_type": "CAUSAL"}, "task_type must be one of"),
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
    ({"use_rslora": "yes"}, "use_rslora must be True or False, got 'yes'"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out"),
    ({"lora_bias": None}, "lora_bias"),
    ({"target_modules": 3}, "target_modules must be a list of module names or a string, got 3"),
    ({"target_modules": ["q", 3]}, "the entries of target_modules must be module names, got 3"),
    ({"target_modules": [""]}, "the entries of target_modules must be module names, got ''"),
    ({"target_modules": "(q"}, "target_modules must contain valid regular expressions, got '(q'"),
    ({"exclude_modules": "*"}, "exclude_modules"),
    ({"exclude_modules": {1}}, "exclude_modules"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names or None"),
    ({"modules_to_save": [""]}, "modules_to_save"),
    ({"modules_to_save": ["["]}, "modules_to_save"),
    ({"init_lora_weights": "gausian"}, "init_lora_weights must be one of"),
    ({"init_lora_weights": None}, "init_lora_weights must be one of"),
    ({"init_lora_weights": 1}, "init_lora_weights"),
    ({"layers_to_transform": "1"}, "layers_to_transform"),
    ({"layers_to_transform": [1, -1]}, "layers_to_transform"),
    ({"layers_to_transform": True}, "layers_to_transform"),
    ({"target_modules": "q.*", "layers_to_transform": 1}, "requires target_modules to be a list"),
    ({"target_modules": "q.*", "layers_pattern": "h"}, "layers_pattern='h' requires target"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "requires layers_to_transform, which"),
    ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern"),
    ({"rank_pattern": ["q"]}, "rank_pattern must be a dict"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be a positive integer, got 0"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern must contain valid regular expressions"),
    ({"rank_pattern": {3: 1}}, "rank_pattern must contain only strings, got 3"),
    ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q'] must be a finite number, got 'x'"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True is only supported if"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias=True is not supported for DoRA"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda v: str(v)[:50])
def test_bad_values(fields: dict[str, object], words: str) -> None:
    for make in (lambda: LoraConfig(**fields), lambda: LoraConfig.from_dict(fields)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert words in str(caught.value)
        assert isinstance(caught.value, (FastLoraError, ValueError))
    with pytest.raises(ConfigError):
        LoraConfig.from_dict(fields, for_loading=True)


UNSET_NOW = {
    "megatron_config": {"hidden_size": 1},
    "megatron_core": "mine",
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
}
# Fields of initializations: see tests/init.
OF_INITS = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}


def test_no_field_is_forgotten() -> None:
    implemented = {*SET, *OF_INITS, "peft_type", "lora_bias", "runtime_config"}
    assert implemented | set(UNSET_NOW) == {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("name", UNSET_NOW)
def test_field_without_implementation_raises(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"does not support {name}=.*get_peft_model.*fastlora.patch"
    ):
        LoraConfig(**{name: UNSET_NOW[name]})


def test_all_of_them_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(use_qalora=True, arrow_config={"top_k": 2})
    assert "use_qalora=True, arrow_config={'top_k': 2}" in str(caught.value)


def test_empty_means_unset() -> None:
    assert LoraConfig(
        target_parameters=[], layer_replication=[], loftq_config=None, megatron_config={}
    )


def test_idle_settings_of_a_trained_file_do_not_matter() -> None:
    config = LoraConfig.from_dict({"qalora_group_size": 4}, for_loading=True)
    with pytest.raises(ConfigError, match="use_qalora"):
        LoraConfig.from_dict({"use_qalora": True}, for_loading=True)
    with pytest.raises(ConfigError, match="qalora_group_size=4"):
        config.check_supported("new")


def test_config_of_an_adapter_in_a_model() -> None:
    theirs = peft.LoraConfig(init_lora_weights="pissa", target_modules=["q"])
    assert LoraConfig.from_peft(theirs, initialized=True).init_lora_weights == "pissa"
    with pytest.raises(ConfigError, match="use_qalora"):
        LoraConfig.from_peft(peft.LoraConfig(use_qalora=True), initialized=True)
    assert LoraConfig.from_peft(peft.LoraConfig(use_dora=True)).use_dora
    with pytest.raises(ConfigError, match=r"expected a LoraConfig, got \{'r': 8\}"):
        LoraConfig.from_peft({"r": 8})
    with pytest.raises(ConfigError, match="peft_type is 'LOHA'; expected 'LORA'"):
        LoraConfig.from_peft(peft.LoHaConfig())


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        LoraConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        LoraConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"r": 0}')
    with pytest.raises(ConfigError, match=CONFIG_NAME):
        LoraConfig.from_pretrained(tmp_path)
    with (tmp_path / CONFIG_NAME).open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(CheckpointError, match="expected at most"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [peft.IA3Config(), peft.PromptTuningConfig(num_virtual_tokens=2), peft.XLoraConfig()],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_raise_with_what_to_do(config: object) -> None:
    """One error names the method, and the two lines that do it; the model is as it was."""
    model = TwoLayers()
    kind = config.peft_type.value  # type: ignore[attr-defined]  # PEFT's configs have it
    with pytest.raises(ConfigError, match=f"'{kind}'.*peft.get_peft_model.*fastlora.patch"):
        get_peft_model(model, config)
    assert type(model.q) is nn.Linear


def test_patch_does_what_the_error_says() -> None:
    """The two lines work for a variant: its layers stay PEFT's, and other layers are fused."""
    config = {"r": 2, "target_modules": ["q", "v"], "kasa_config": peft.KasaConfig()}
    with pytest.raises(ConfigError, match="kasa_config="):
        LoraConfig(**config)
    model = peft.get_peft_model(TwoLayers(), peft.LoraConfig(**config))
    assert {row.fused for row in fastlora.patch(model).rows} == {False}
