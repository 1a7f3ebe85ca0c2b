"""Target matching against PEFT's own, config by config."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from fastlora import LoraModel, get_peft_model
from fastlora.model.config import LoraConfig
from fastlora.model.default_targets import DEFAULT_TARGETS
from fastlora.model.inject import lora_layers
from fastlora.model.target_names import distinguishing_suffixes
from fastlora.model.targets import (
    check_all_target_modules_match,
    find_modules_to_save,
    find_target_modules,
    resolve_target_modules,
)
from fastlora.validation import ConfigError, TargetNotFoundError, UnsupportedLayerError
from tests.support.tiny import tiny, tiny_llama, unchanged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)
        self.q_proj_norm = nn.LayerNorm(4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        self.head = nn.Linear(4, 4)


class Tower(nn.Module):
    """Names that tell suffixes from parts of words, and layer indices from expert indices."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(n))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.q_proj = nn.Linear(4, 4)
        self.my_head = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.shared = self.q_proj


def llama_for(cls: str) -> Callable[[], nn.Module]:
    """A Llama for another task."""
    return lambda: getattr(transformers, cls)(tiny_llama().config)


def tiny_gpt2() -> nn.Module:
    return tiny("GPT2LMHeadModel", n_layer=2)


def peft_names(model: nn.Module, **fields: object) -> tuple[list[str], list[str], object]:
    """Targets, saved modules and the resolved target_modules, as PEFT finds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
    base = wrapped.base_model.model
    saved = [
        name
        for name, module in base.named_modules(remove_duplicate=False)
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper)
    ]
    resolved = wrapped.peft_config["default"].target_modules
    return list(wrapped.base_model.targeted_module_names), saved, resolved


CONFIGS: list[dict[str, object]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "up"]},
    {"target_modules": ["attn.q_proj"]},
    {"target_modules": ["layers.1.attn.q_proj", "q_proj_nothing"]},
    {"target_modules": ["head"]},
    {"target_modules": ["embed", "head"]},
    {"target_modules": r"layers\.\d+\.attn\.(q|v)_proj"},
    {"target_modules": r".*\.head"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": "all-linear", "exclude_modules": ["up", "my_head"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"layers\.0.*"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.2.attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"layers\.1\.attn\.q"},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "experts"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["no", "blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["layers.0.attn.v_proj", "q_proj"], "layers_to_transform": [2]},
    {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    {"target_modules": ["q_proj", "head", "up"], "modules_to_save": ["layers.0"]},
    {"target_modules": "all-linear", "modules_to_save": ["my_head", "embed"]},
    {"target_modules": ["up"], "modules_to_save": ["shared"]},
    {"target_modules": [f"layers.{i}.attn.{p}_proj" for i in range(12) for p in "qv"]},
    {"target_modules": [f"{b}.{i}.attn.v_proj" for b in ("layers", "blocks") for i in range(12)]},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: json.dumps(fields)[:60])
def test_names_are_pefts(fields: dict[str, object]) -> None:
    model = Tower(12 if len(fields["target_modules"]) == 24 else 3)
    targets, saved, resolved = peft_names(model, **fields)
    config = LoraConfig(**fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_target_modules(model, config) == targets
    assert find_modules_to_save(model, config) == saved
    ours = resolve_target_modules(model, config)
    assert ours == resolved
    # What belongs into a saved config means the same modules again.
    if targets:
        again = LoraConfig(**{**fields, "target_modules": ours})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert find_target_modules(model, again) == targets


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"task_type": "CAUSAL_LM"}),
        (tiny_llama, {"target_modules": "all-linear"}),
        (tiny_llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        (tiny_llama, {"target_modules": ["gate_proj"], "layers_to_transform": 1}),
        (tiny_llama, {"modules_to_save": ["lm_head", "norm"]}),
        (lambda: tiny_llama().model, {"target_modules": "all-linear"}),
        (
            llama_for("LlamaForSequenceClassification"),
            {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        ),
        (
            llama_for("LlamaForSequenceClassification"),
            {"task_type": "SEQ_CLS", "modules_to_save": ["norm"]},
        ),
        (
            llama_for("LlamaForTokenClassification"),
            {"task_type": "TOKEN_CLS"},
        ),
        (
            llama_for("LlamaForQuestionAnswering"),
            {"task_type": "QUESTION_ANS"},
        ),
        (tiny_gpt2, {}),
        (tiny_gpt2, {"target_modules": "all-linear"}),
    ],
)
def test_names_are_pefts_on_transformers_models(make: object, fields: dict[str, object]) -> None:
    model = make()
    targets, saved, resolved = peft_names(model, **fields)
    config = LoraConfig(**fields)
    assert find_target_modules(model, config) == targets
    assert find_modules_to_save(model, config) == saved
    assert resolve_target_modules(model, config) == resolved


@pytest.mark.parametrize("pattern", [None, "layers", "experts"])
def test_layer_index_is_the_first_number(pattern: str | None) -> None:
    model = nn.ModuleDict({"model": Tower()})  # a list needs a name before it to be found unnamed
    fields = {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": pattern}
    targets, _, _ = peft_names(model, **fields)
    assert find_target_modules(model, LoraConfig(**fields)) == targets
    if pattern is None:
        assert "model.layers.0.experts.1.up" not in targets


def test_full_names_stay_exempt_from_the_layer_filter() -> None:
    """PEFT's rule, which its own shortening of 20 names and more breaks."""
    for count in (12, 24):
        model = nn.ModuleDict({"layers": nn.ModuleList(Attention() for _ in range(count))})
        names = [f"layers.{i}.q_proj" for i in range(count)]
        fields = {"target_modules": names, "layers_to_transform": [1], "layers_pattern": "layers"}
        assert find_target_modules(model, LoraConfig(**fields)) == names
        targets, _, _ = peft_names(model, **fields)
        assert (targets == names) == (count == 12)


def test_all_linear_of_a_second_adapter() -> None:
    """Layers that are called as they are count too, whatever wraps them by now."""
    kind = type("Projection", (nn.Linear,), {})
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(nn.Sequential(kind(4, 4), nn.Linear(4, 4)), config)
    model.add_adapter("second", config)
    assert [list(layer.lora_A) for layer in lora_layers(model).values()] == [
        ["default", "second"]
    ] * 2
    own = nn.Embedding(4, 4)  # with factors of its own, as other libraries have them
    own.lora_A = nn.Parameter(torch.zeros(2, 4))
    assert find_target_modules(nn.Sequential(own, nn.Linear(4, 4)), config) == ["1"]


def test_second_adapter_matches_layers_and_not_their_insides() -> None:
    model = peft.get_peft_model(Tower(), peft.LoraConfig(target_modules="all-linear"))
    base = model.base_model.model
    assert find_target_modules(
        base, LoraConfig(target_modules="all-linear")
    ) == find_target_modules(Tower(), LoraConfig(target_modules="all-linear"))
    assert resolve_target_modules(base, LoraConfig(target_modules="all-linear")) == (
        resolve_target_modules(Tower(), LoraConfig(target_modules="all-linear"))
    )
    named = LoraConfig(target_modules=["q_proj"])
    assert find_target_modules(base, named) == find_target_modules(Tower(), named)
    with pytest.raises(TargetNotFoundError):
        find_target_modules(base, LoraConfig(target_modules=["default", "base_layer"]))


def test_default_table_is_pefts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    ours = {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGETS.items()}
    assert {k: ours.get(k) for k in theirs} == theirs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_porj"]}, ["q_porj", "close names", "q_proj"]),
        ({"target_modules": r"layer\..*q_proj"}, [r"layer\\..*q_proj", "no module"]),
        ({"target_modules": []}, ["[]", "no module"]),
        ({"target_modules": ["up"], "exclude_modules": r".*"}, ["exclude_modules", "experts.0.up"]),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, ["modules_to_save", "head"]),
        ({"target_modules": ["up"], "layers_to_transform": 9}, ["up", "layers_to_transform=9"]),
    ],
)
def test_nothing_found(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(peft.tuners.tuners_utils.NoMatchingPeftModuleError):
        peft.LoraModel(Tower(), peft.LoraConfig(**fields), "default")
    with pytest.raises(TargetNotFoundError) as caught:
        find_target_modules(Tower(), LoraConfig(**fields))
    for word in words:
        assert word in str(caught.value)


def test_no_default_for_the_architecture_or_one_that_layers_cannot_filter() -> None:
    model = Tower()
    with pytest.raises(ConfigError, match="target_modules is None.*expected a list"):
        find_target_modules(model, LoraConfig())
    model.config = {"model_type": "gemma4"}
    with pytest.raises(ConfigError, match="layers_to_transform"):
        find_target_modules(model, LoraConfig(layers_to_transform=1))


def test_parts_that_match_nothing_are_warned_about() -> None:
    config = LoraConfig(
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["nowhere"],
        rank_pattern={"v_proj": 4, "q_proj": 2},
        alpha_pattern={r"layers\.7\..*": 3},
    )
    with pytest.warns(UserWarning) as caught:
        find_target_modules(Tower(), config)
    (warning,) = [str(w.message) for w in caught]
    for word in ("k_proj", "nowhere", "rank_pattern keys ['v_proj']", r"layers\\.7"):
        assert word in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_target_modules(Tower(), LoraConfig(target_modules=["q_proj"], exclude_modules=["up"]))


def test_modules_to_save_that_do_not_exist() -> None:
    with pytest.raises(TargetNotFoundError, match="haed.*close names: .*head"):
        find_modules_to_save(Tower(), LoraConfig(target_modules=["up"], modules_to_save=["haed"]))
    config = LoraConfig(target_modules=["up"], modules_to_save=["head", "nowhere"])
    with pytest.warns(UserWarning, match="nowhere") as caught:
        assert find_modules_to_save(Tower(), config)[-2:] == ["my_head", "head"]
    assert caught[0].filename == __file__


def test_mamba_modules_that_are_never_called() -> None:
    mixers = {name: nn.ModuleDict({"out_proj": nn.Linear(2, 2)}) for name in ("first", "last")}
    model = nn.ModuleDict(mixers)
    config = LoraConfig(target_modules=["out_proj"])
    assert find_target_modules(model, config) == ["first.out_proj", "last.out_proj"]
    model.config = transformers.MambaConfig()
    with pytest.raises(UnsupportedLayerError, match="^first.out_proj is never called"):
        find_target_modules(model, config)


def test_model_and_config_stay_as_they_were() -> None:
    model = Tower()
    config = LoraConfig(target_modules="all-linear", modules_to_save=["head"])
    with unchanged(model):
        find_target_modules(model, config)
        find_modules_to_save(model, config)
    assert config == LoraConfig(target_modules="all-linear", modules_to_save=["head"])


def test_minimal_suffixes() -> None:
    names = [f"enc.{i}.q" for i in range(30)] + ["dec.0.v", "dec.1.v"]
    others = ["dec.2.v", "enc", "dec"]
    assert distinguishing_suffixes(names, others) == {"q", "0.v", "1.v"}


class Experts(nn.Module):
    """Two weights of four experts each, stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 8))


def test_all_linear_says_that_it_leaves_out_stacked_experts() -> None:
    """A warning names the weights and what adapts them; other 3-dimensional ones are none."""
    model = nn.ModuleDict({"lin": nn.Linear(16, 16), "conv": nn.Conv1d(4, 4, 3)})
    config = LoraConfig(target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_target_modules(model, config) == ["lin"]
    model["experts"] = Experts()
    with pytest.warns(
        UserWarning,
        match=r"leaves out experts \('experts.up', 'experts.down'\). .*target_parameters",
    ):
        assert find_target_modules(model, config) == ["lin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = LoraConfig(target_modules="all-linear", exclude_modules=["experts"])
        assert find_target_modules(model, without) == ["lin"]


@pytest.mark.parametrize(("kind", "field"), [("XLNetModel", "d_inner"), ("FunnelModel", "")])
def test_heads_of_attention_are_not_experts(kind: str, field: str) -> None:
    """Parameters of three dimensions without experts are not reported."""
    model = tiny(kind, **({field: 24} if field else {}))
    assert any(parameter.dim() == 3 for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_target_modules(model, LoraConfig(target_modules="all-linear"))


def test_all_linear_says_which_layers_it_leaves_out() -> None:
    """Those of which other adapters own copies; a copied module of another kind is none."""
    config = LoraConfig(target_modules="all-linear")
    for saved, said in (
        ("my_head", "leaves out 'my_head': it is a module that adapters ['default'] own copies of"),
        ("head", "leaves out 'layers.0.head' and 6 more: it is a module"),
        ("embed", None),
    ):
        first = LoraConfig(target_modules=["q_proj"], modules_to_save=[saved])
        base = get_peft_model(Tower(), first).base_model.model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            find_target_modules(base, config)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == (said is not None)
        assert said is None or said in messages[0]


def test_all_linear_leaves_out_a_copied_layer_with_the_name_of_another(tmp_path: Path) -> None:
    """A layer at the top does not select the copied one of the same name; the file says so too."""
    layers = {"attn": Attention(), "q_proj": nn.Linear(16, 16), "out": nn.Linear(16, 16)}
    config = LoraConfig(r=2, target_modules="all-linear")
    first = LoraConfig(r=2, target_modules=["out"], modules_to_save=["attn"])
    base = copy.deepcopy(nn.ModuleDict(layers))
    model = get_peft_model(nn.ModuleDict(layers), first)
    with pytest.warns(UserWarning, match="leaves out 'attn.q_proj' and"):
        model.add_adapter("all", config)
    adapted = [n for n, m in model.base_model.model.named_modules() if "all" in getattr(m, "r", ())]
    assert adapted == ["q_proj", "out"]
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    again = LoraModel.from_pretrained(base, tmp_path / "all")
    found = [n for n, m in again.base_model.model.named_modules() if getattr(m, "r", ())]
    assert found == adapted


def test_all_linear_says_why_it_leaves_out_the_layer_that_it_names() -> None:
    layers = {"attn": Attention(), "out": nn.Linear(4, 4), "head": nn.Linear(4, 4)}
    first = LoraConfig(target_modules=["out"], modules_to_save=["attn", "head"])
    base = get_peft_model(nn.ModuleDict(layers), first).base_model.model
    expected = "leaves out 'attn.q_proj' and 2 more: it is inside 'attn', a module"
    with pytest.warns(UserWarning, match=expected):
        find_target_modules(base, LoraConfig(target_modules="all-linear"))


def test_what_other_adapters_own_copies_of_is_no_target() -> None:
    first = LoraConfig(target_modules=["up"], modules_to_save=["my_head", "attn"])
    base = get_peft_model(Tower(), first).base_model.model
    for name, where in (
        ("my_head", "is"),
        ("layers.0.attn.q_proj", "is inside 'layers.0.attn',"),
        ("blocks.0.attn.q_proj", "is inside 'blocks.0.attn',"),
    ):
        with pytest.raises(UnsupportedLayerError, match=f"{name}' {where} a module that adapters"):
            find_target_modules(base, LoraConfig(target_modules=[name]))
    below = LoraConfig(target_modules=["up"], modules_to_save=["attn.q_proj"])
    with pytest.raises(
        UnsupportedLayerError, match="attn.q_proj', which is inside 'layers.0.attn'"
    ):
        find_modules_to_save(base, below)
    again = LoraConfig(target_modules=["up"], modules_to_save=["my_head"])
    assert find_modules_to_save(base, again) == ["my_head"]


def test_each_name_has_to_match_where_that_is_asked() -> None:
    check_all_target_modules_match(Tower(), LoraConfig(target_modules=["q_proj", "up"]))
    with pytest.raises(TargetNotFoundError, match=r"\['k_proj'\] match no module"):
        check_all_target_modules_match(Tower(), LoraConfig(target_modules=["q_proj", "k_proj"]))


@pytest.mark.parametrize("count, more", [(10, ""), (11, " and 1 more"), (30, " and 20 more")])
def test_messages_name_ten_entries(count: int, more: str) -> None:
    """A config may hold any number of them."""
    names = [f"missing{index:02}" for index in range(count)]
    config = LoraConfig(target_modules=names)
    with pytest.raises(TargetNotFoundError) as raised:
        find_target_modules(tiny_llama(), config)
    assert f"target_modules={names[:10]}{more} matches no module" in str(raised.value)


def test_a_message_names_ten_modules() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    with pytest.raises(TargetNotFoundError, match="modules named 0, 1, 10, 11, 2, 3, 4, 5, 6, 7$"):
        find_target_modules(model, LoraConfig(target_modules=["missing"]))


def test_the_architecture_is_in_any_kind_of_config() -> None:
    @dataclasses.dataclass
    class Config:
        model_type: str = "llama"

    model = Tower()
    for config in (Config(), {"model_type": "llama"}, transformers.LlamaConfig()):
        model.config = config
        assert resolve_target_modules(model, LoraConfig()) == set(DEFAULT_TARGETS["llama"])
    for config in (Config, None, {"model_type": 3}, "llama"):
        model.config = config
        with pytest.raises(ConfigError, match="has no default targets"):
            resolve_target_modules(model, LoraConfig())


@pytest.mark.parametrize("count", [19, 20])
def test_names_are_shortened_from_twenty_on(count: int) -> None:
    """As PEFT stores them."""
    names = {f"layers.{index}.attn.q_proj" for index in range(count)}
    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(count))})
    found = resolve_target_modules(model, LoraConfig(target_modules=sorted(names)))
    assert found == (names if count < 20 else {"q_proj"})
