"""Parameters that a config selects: compared with PEFT's, for each form of a config."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.model.stacked_experts import FORMER_NAMES
from fastlora.model.targets import check_all_target_modules_match, select_targets
from fastlora.validation import ConfigError, TargetNotFoundError, UnsupportedLayerError
from tests.support.moe_models import MODELS, file_parameters, moe_model
from tests.support.peft_twins import peft
from tests.support.tiny import unchanged

Sizes = dict[str, tuple[int, float]]

PROJECTIONS = ["o_proj", "gate_proj", "up_proj", "down_proj"]
MIXTRAL = ["o_proj", "w1", "w2", "w3"]
REGEX = r".*\.(o_proj|down_proj)"
ALL_PROJECTIONS = r".*\.(o_proj|gate_proj|up_proj|down_proj|w1|w2|w3)"
# Configs that mean the same in PEFT, except that PEFT drops linear layers with names of experts.
AS_IN_PEFT: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"target_modules": "all-linear"}) for kind in MODELS),
    *((kind, {"target_modules": PROJECTIONS}) for kind in MODELS),
    *((kind, {"target_modules": MIXTRAL}) for kind in MODELS),
    *((kind, {"target_modules": REGEX}) for kind in MODELS),
    *((kind, {"target_modules": ALL_PROJECTIONS}) for kind in MODELS),
    ("qwen3_moe", {"target_modules": ["o_proj", "gate"]}),
    ("deepseek_v3", {"target_modules": ["gate"]}),
    ("qwen3_moe", {"target_modules": r".*\.mlp\.gate"}),
    ("qwen3_moe", {"target_modules": ["o_proj", "mlp.experts.down_proj"]}),
    ("qwen3_moe", {"target_modules": ["experts.3.down_proj"]}),
    ("mixtral", {"target_modules": ["o_proj", "block_sparse_moe.experts.0.w2"]}),
    ("deepseek_v3", {"target_modules": ["shared_experts.down_proj"]}),
    (
        "qwen3_moe",
        {
            "target_modules": PROJECTIONS,
            "rank_pattern": {"gate_up_proj": 5},
            "alpha_pattern": {r"1\.mlp\.experts\.gate_up_proj": 1, "o_proj": 3},
        },
    ),
    *(
        (kind, {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]})
        for kind in MODELS
    ),
    ("gpt_oss", {"target_parameters": ["gate_up_proj", "router.weight"]}),
    ("olmoe", {"target_parameters": ["model.layers.1.mlp.experts.down_proj", "q_proj.weight"]}),
    (
        "qwen3_moe",
        {
            "target_parameters": ["experts.down_proj", "gate_up_proj"],
            "rank_pattern": {"down_proj": 3, r"0\.mlp\.experts\.gate_up_proj": 7},
            "alpha_pattern": {"experts.gate_up_proj": 5},
        },
    ),
]
LAYER = "model.layers.1.mlp."
# Configs that mean less than in PEFT: the names that they select.
EXACT: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "qwen3_moe",
        {"target_modules": r".*layers\.1\..*(gate|up|down)_proj"},
        [f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj"],
    ),
    (
        "qwen3_moe",
        {"target_modules": r".*layers\.1\..*experts\.\d\.down_proj"},
        [f"{LAYER}experts.down_proj"],
    ),
    (
        "deepseek_v3",
        {"target_modules": r".*\.shared_experts\.(gate|down)_proj"},
        [f"{LAYER}shared_experts.gate_proj", f"{LAYER}shared_experts.down_proj"],
    ),
    (
        "deepseek_v3",
        {"target_modules": ["model.layers.0.mlp.gate_proj"]},
        ["model.layers.0.mlp.gate_proj"],
    ),
    (
        "deepseek_v3",
        {"target_modules": ["down_proj"], "layers_to_transform": [0]},
        ["model.layers.0.mlp.down_proj"],
    ),
    (
        "qwen3_moe",
        {"target_modules": ["down_proj", "gate"], "layers_to_transform": [1]},
        [f"{LAYER}gate.weight", f"{LAYER}experts.down_proj"],
    ),
    (
        "qwen3_moe",
        {"target_parameters": ["experts.down_proj"], "layers_to_transform": 1},
        [f"{LAYER}experts.down_proj"],
    ),
    (
        "gpt_oss",
        {"target_parameters": ["gate_up_proj", "down_proj"], "exclude_modules": r".*\.0\..*"},
        [f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj"],
    ),
    (
        "qwen3_moe",
        {
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "exclude_modules": ["gate_proj", "up_proj", "0.mlp.experts.down_proj"],
        },
        [f"{LAYER}experts.down_proj"],
    ),
    (
        "qwen3_moe",
        {
            "target_parameters": ["gate.weight", "experts.down_proj"],
            "exclude_modules": ["gate", "layers.0.mlp.experts"],
        },
        [f"{LAYER}experts.down_proj"],
    ),
]
# Experts that no target selects beside feed-forward projections.
LEFT_OUT: list[tuple[str, str | list[str]]] = [
    *((kind, "all-linear") for kind in ("llama4_text", "gpt_oss", "nemotron_h")),
    *((kind, PROJECTIONS) for kind in ("llama4_text", "gpt_oss", "nemotron_h", "mixtral")),
    *((kind, REGEX) for kind in ("llama4_text", "gpt_oss", "nemotron_h", "mixtral")),
    ("llama4_text", r".*shared_expert\.down_proj"),
    ("qwen3_moe", r".*(o_proj|experts\.0\.down_proj)"),
    ("deepseek_v3", r".*shared_experts\.(gate|down)_proj"),
    ("qwen3_moe", ["o_proj", "w2"]),
]
SILENT: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"target_modules": ["o_proj"]}) for kind in MODELS),
    *((kind, {"target_modules": PROJECTIONS}) for kind in ("qwen3_moe", "deepseek_v3")),
    ("mixtral", {"target_modules": MIXTRAL}),
    ("qwen3_moe", {"target_modules": ["o_proj", "down_proj"]}),
    ("deepseek_v3", {"target_modules": ["down_proj"], "layers_to_transform": [0]}),
    ("deepseek_v3", {"target_modules": r".*layers\.0\..*proj"}),
    ("gpt_oss", {"target_modules": "all-linear", "exclude_modules": ["experts"]}),
    ("mixtral", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("llama4_text", {"target_modules": PROJECTIONS, "target_parameters": ["experts.down_proj"]}),
]
kept = functools.cache(moe_model)


def selected(kind: str, **fields: Any) -> Sizes:
    """Returns the names that a config selects, with their ranks and alphas."""
    config = LoraConfig(r=2, lora_alpha=6, **fields)
    found = select_targets(kept(kind), config)
    found.parameters.store_targets_and_patterns_in(config)
    names = {name: name for name in found.modules}
    for each in found.parameters.parameters:
        # fastlora adapts a linear layer as a whole
        shown = each.module_name if isinstance(each.module, nn.Linear) else each.name
        names[shown] = each.name
    return {n: (config.rank_for(full), config.alpha_for(full)) for n, full in names.items()}


def selected_by_peft(kind: str, **fields: Any) -> Sizes:
    """Returns what real PEFT adapts, with the same names."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=6, **fields)
        twin = peft.get_peft_model(moe_model(kind), config)
    for name, layer in twin.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            leaf = getattr(layer, "parameter_name", "")
            if leaf == "weight" and isinstance(layer.get_base_layer(), nn.Linear):
                leaf = ""
            full = f"{name.replace('.base_layer', '')}{'.' * bool(leaf)}{leaf}"
            found[full] = (layer.r["default"], layer.lora_alpha["default"])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), AS_IN_PEFT, ids=str)
def test_the_adapted_set_contains_that_of_peft(kind: str, fields: dict[str, Any]) -> None:
    """Names, ranks, and alphas; more are only linear layers that mean experts to PEFT (E2)."""
    try:
        theirs = selected_by_peft(kind, **fields)
    except ValueError:
        with pytest.raises(TargetNotFoundError, match="matches no module"):
            selected(kind, **fields)
        return
    ours = selected(kind, **fields)
    more = ours.keys() - theirs.keys()
    assert {name: size for name, size in ours.items() if name not in more} == theirs
    former = FORMER_NAMES.get(kind, {})
    assert all(name.rpartition(".")[2] in former and ".experts." not in name for name in more)
    if kind == "deepseek_v3" and fields["target_modules"] in ("all-linear", PROJECTIONS):
        assert len(more) == 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields", "names"), EXACT, ids=str)
def test_restrictions_are_honored(kind: str, fields: dict[str, Any], names: list[str]) -> None:
    """Regexes, layers_to_transform and exclude_modules select exactly their names (E1, E2)."""
    assert sorted(selected(kind, **fields)) == sorted(names)
    config = LoraConfig(**fields)
    found = select_targets(kept(kind), config).parameters
    found.store_targets_and_patterns_in(config)
    if found.names:  # a subset of the model's: full names
        assert config.target_parameters == sorted(found.names)
    again = select_targets(kept(kind), config)
    assert again.parameters.names == found.names and not again.parameters.fused


def warned(kind: str, **fields: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        select_targets(kept(kind), LoraConfig(**fields))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("kind", "targets"), LEFT_OUT, ids=str)
def test_experts_that_no_target_selects_are_named(kind: str, targets: str | list[str]) -> None:
    """One warning names every parameter and the entries that adapt them (E2)."""
    (said,) = warned(kind, target_modules=targets)
    up = "up_proj" if kind == "nemotron_h" else "gate_up_proj"
    assert "leaves out experts ('model.layers.*" in said
    assert f"target_parameters=['experts.down_proj', 'experts.{up}']" in said
    assert f".experts.{up}'" in said and ".experts.down_proj'" in said


@pytest.mark.parametrize(("kind", "fields"), SILENT, ids=str)
def test_other_configs_warn_of_nothing(kind: str, fields: dict[str, Any]) -> None:
    assert warned(kind, **fields) == []


def test_targets_that_match_nothing_beside_parameters() -> None:
    """PEFT's warning if no module matches at all, and otherwise the entries that match none."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    (said,) = warned("olmoe", target_modules=["nothing"], target_parameters=parameters)
    assert said == "target_modules={'nothing'} were set but no module was matched."
    (said,) = warned("olmoe", target_modules=["q_proj", "nothing"], target_parameters=parameters)
    assert "match no module" in said and "nothing" in said and "q_proj" not in said


def test_the_first_layer_that_is_selected_twice_is_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"})
    config = LoraConfig(target_modules=["b", "c"], target_parameters=["c.weight", "b.weight"])
    with pytest.raises(ConfigError, match=r"of layer 'b' of type Linear.* selects \['weight'\]"):
        get_peft_model(model, config)


def test_all_linear_says_that_it_adapts_routers() -> None:
    (said,) = warned("olmoe", target_modules="all-linear")
    assert "also adapts the routers of experts ('model.layers.*.mlp.gate.weight')" in said


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("qwen3_moe", {"target_modules": ["o_proj", "gate_proj"]}, r"selects \['gate_proj'\]"),
        ("mixtral", {"target_modules": ["w2", "w3"]}, r"selects \['w3'\] but not \['w1'\]"),
        ("olmoe", {"target_modules": r".*\.(gate|down)_proj"}, r"selects \['gate_proj'\]"),
        (
            "deepseek_v3",
            {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
            r"excludes \['up_proj'\] but not \['gate_proj'\]",
        ),
    ],
)
def test_half_of_a_fused_pair_is_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    """The error names both halves and the parameter (E2)."""
    model = kept(kind)
    with (
        unchanged(model),
        pytest.raises(ConfigError, match=rf"{words}.*fused in 'model.layers.*gate_up_proj'"),
    ):
        get_peft_model(model, LoraConfig(**fields))


@pytest.mark.parametrize(
    ("kind", "fields", "error", "words"),
    [
        (
            "qwen3_moe",
            {"target_parameters": ["experts.gate_proj"]},
            TargetNotFoundError,
            r"\['experts.gate_proj'\] match no parameter; close names: experts.gate_up_proj",
        ),
        (
            "qwen3_moe",
            {"target_parameters": ["experts.down_proj", "up"], "target_modules": ["o_proj"]},
            TargetNotFoundError,
            r"entries \['up'\] match no parameter",
        ),
        (
            "gpt_oss",
            {"target_parameters": ["router.bias"]},
            UnsupportedLayerError,
            r"'model.layers.0.mlp.router.bias' has shape \(4,\); expected 2 or 3",
        ),
        (
            "olmoe",
            {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
            ConfigError,
            r"layer 'model.layers.0.self_attn.q_proj' of type Linear, which is not .*\['weight'\]",
        ),
        (
            "olmoe",
            {"target_parameters": ["experts.down_proj"], "fan_in_fan_out": True},
            UnsupportedLayerError,
            r"'model.layers.0.mlp.experts.down_proj' of a OlmoeExperts: expected fan_in_fan_out",
        ),
        (
            "llama4_text",
            {"target_modules": ["w1"]},
            TargetNotFoundError,
            r"matches no module.*adapt them with target_parameters=\['experts.down_proj'",
        ),
        (
            "gpt_oss",
            {"target_modules": ["o_proj", "router"]},
            UnsupportedLayerError,
            r"mlp\.router' is a GptOssTopKRouter",
        ),
    ],
    ids=str,
)
def test_bad_targets(kind: str, fields: dict[str, Any], error: type[Exception], words: str) -> None:
    """Each is refused by name, and the model is unchanged (E1)."""
    model = kept(kind)
    with unchanged(model), pytest.raises(error, match=words):
        get_peft_model(model, LoraConfig(**fields))


@pytest.mark.parametrize("value", ["experts.down_proj", [3], [""], {"a": 1}])
def test_bad_values(value: Any) -> None:
    with pytest.raises(ConfigError, match="target_parameters`? must"):
        LoraConfig(target_parameters=value)


def test_a_quantized_parameter_is_refused() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    stack = torch.zeros(4, 8, 8, dtype=torch.float8_e4m3fn)
    model["experts"].up = nn.Parameter(stack, requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="'experts.up' has dtype torch.float8_e4m3fn"):
        get_peft_model(model, LoraConfig(target_parameters=["up"]))


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    model = nn.Module()
    model.up = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(UnsupportedLayerError, match=r"top-level module .*\(parameter 'up'\)"):
        get_peft_model(model, LoraConfig(target_parameters=["up"]))


def test_the_config_of_the_adapter() -> None:
    """It has PEFT's values, and its copy selects the same parameters for another adapter."""
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": PROJECTIONS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(moe_model("qwen3_moe"), peft.LoraConfig(**fields))
    theirs, given = twin.peft_config["default"], LoraConfig(**fields)
    model = get_peft_model(moe_model("qwen3_moe"), given)
    config = model.peft_config["default"]
    assert given == LoraConfig(**fields)
    assert config.target_modules == set(PROJECTIONS)  # unlike in PEFT
    assert set(config.target_parameters or ()) == theirs.target_parameters
    for name in ("rank_pattern", "alpha_pattern"):
        assert getattr(config, name) == getattr(theirs, name) != {}
    model.add_adapter("second", config)
    assert model.peft_config["second"] == config
    check_all_target_modules_match(kept("qwen3_moe"), given)


def seeded(kind: str) -> Any:
    """Returns a random model, with the seed set for an adapter."""
    model = moe_model(kind)
    torch.manual_seed(1)
    return model


def test_adapters_with_different_parameters() -> None:
    """Each adapter of a model has the parameters of its own config (E1)."""
    both = {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    configs = {
        "a": LoraConfig(r=2, init_lora_weights=False, **both),
        "b": LoraConfig(
            r=3, init_lora_weights=False, target_parameters=["0.mlp.experts.down_proj"]
        ),
    }
    ids, logits = torch.arange(12).view(2, 6), {}
    model = get_peft_model(seeded("olmoe"), configs["a"], "a")
    torch.manual_seed(1)
    model.add_adapter("b", configs["b"])
    model.eval()
    for name, config in configs.items():
        alone = get_peft_model(seeded("olmoe"), config).eval()
        logits[name] = alone(input_ids=ids).logits
    for name in "aba":
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=ids).logits, logits[name], rtol=0, atol=1e-6)
    assert (logits["a"] - logits["b"]).abs().max() > 1e-3
    tuner, stacks = model.base_model, [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    linears = [f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)]
    assert tuner.targeted_module_names == linears
    named = [f"{at}.{leaf}" for at in stacks for leaf in ("gate_up_proj", "down_proj")]
    assert tuner.targeted_parameter_names == named
    model.delete_adapter("a")
    assert tuner.targeted_module_names == []
    assert tuner.targeted_parameter_names == [f"{stacks[0]}.down_proj"]


def test_the_names_are_pefts() -> None:
    """The table has PEFT's model types, and for each one the names and their parameters."""
    theirs = pytest.importorskip("peft.utils.transformers_weight_conversion")
    patterns, names = theirs._MODEL_TO_CONVERSION_PATTERN, theirs._MOE_TARGET_MODULE_MAPPING
    assert {
        kind: names[pattern] for kind, pattern in patterns.items() if pattern in names
    } == FORMER_NAMES


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))


def test_experts_of_a_model_without_a_config() -> None:
    """Experts are known by their stacked weights alone, whatever they are called."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"lin": nn.Linear(16, 16), "up": nn.Linear(16, 16), "gate": _Router()})
    model["experts"] = Experts()
    with pytest.warns(UserWarning, match=r"\['lin', 'up'\] leaves out experts \('experts.up'\)"):
        get_peft_model(model, LoraConfig(target_modules=["lin", "up"])).unload()
    with pytest.raises(UnsupportedLayerError, match="'gate' is a _Router"):
        get_peft_model(model, LoraConfig(target_modules=["lin", "gate"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model, LoraConfig(target_modules=["lin"], target_parameters=["up.weight"]))


def test_a_former_name_doubles_only_its_own_parameters(tmp_path: Path) -> None:
    """A stack in ``target_parameters`` keeps the config's rank beside one with a former name."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=r".*layers\.1\.mlp\.experts\.(gate|up)_proj",
        target_parameters=["layers.0.mlp.experts.gate_up_proj"],
    )
    model = get_peft_model(moe_model("qwen3_moe"), config)
    stacks = "base_model.model.model.layers.{}.mlp.experts.lora_{}.weight"
    for _ in range(2):
        shapes = {key: tuple(p.shape) for key, p in file_parameters(model).items()}
        assert shapes[stacks.format(0, "A")] == (4 * 3, 16)
        assert shapes[stacks.format(1, "A")] == (4 * 6, 16)
        layers = model.get_base_model().model.layers
        inner = [layer.mlp.experts.inner_layers()["gate_up_proj"] for layer in layers]
        assert [layer.scaling["default"] for layer in inner] == [2.0, 2.0]
        model.save_pretrained(tmp_path)
        model = LoraModel.from_pretrained(moe_model("qwen3_moe"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe_model("qwen3_moe"), str(tmp_path))
    assert {k: tuple(p.shape) for k, p in file_parameters(theirs).items()} == shapes


def test_layers_of_parameters_are_pefts() -> None:
    """Code that looks for PEFT's layers of parameters finds fastlora's (E1)."""
    model = get_peft_model(moe_model("olmoe"), LoraConfig(target_parameters=["experts.down_proj"]))
    wrapper = peft.tuners.lora.layer.ParamWrapper
    found = [module for module in model.modules() if isinstance(module, wrapper)]
    assert [layer.parameter_name for layer in found] == ["down_proj"] * 2  # type: ignore[attr-defined]
    linears = get_peft_model(moe_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    assert not any(isinstance(module, wrapper) for module in linears.modules())
