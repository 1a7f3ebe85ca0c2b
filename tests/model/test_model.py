"""`LoraModel` on small models: adapters, files, and refusals that change nothing."""

from __future__ import annotations

import copy
import cProfile
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlora
from fastlora import LoraConfig, LoraModel, fusion_report, get_peft_model
from fastlora.layers import FastLoraLinear, LoraLayer, TrainableTokensWrapper
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    FastLoraError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.support.tiny import (
    TwoLayers,
    adapted,
    in_a_wrapper,
    randomize,
    tiny,
    tiny_llama,
    two_layers,
    unchanged,
)

CONFIG = {"r": 4, "target_modules": ["q", "v"]}


def test_save_and_load_several(tmp_path: Path) -> None:
    """PEFT's folder layout; every adapter comes back, onto a bare model or one with adapters."""
    model = adapted(bias="all", modules_to_save=["head"])
    # Named like a module and like an attribute: PEFT drops tensors of "default" here.
    for name in ("q", "lora_A"):
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q"]))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.normal_()
        model.base_model.model.norm.bias.normal_()
    x = torch.randn(3, 16)
    outputs = {}
    for name in ("default", "q", "lora_A"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {"README.md"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "q",
        "lora_A",
    }
    base = copy.deepcopy(model).unload()
    base.head = copy.deepcopy(model.base_model.model.head.original_module)
    fresh = LoraModel.from_pretrained(base, tmp_path)
    assert not fresh.training
    assert not any(p.requires_grad for p in fresh.parameters())
    fresh.load_adapter(tmp_path / "q", "q", is_trainable=True)
    fresh.load_adapter(tmp_path / "lora_A", "other")
    for name, saved in (("default", "default"), ("q", "q"), ("other", "lora_A")):
        fresh.set_adapter(name, inference_mode=name == "q")
        assert torch.equal(fresh(x), outputs[saved])
        # Loaded for inference, an adapter trains once it is set to.
        assert any(p.requires_grad for p in fresh.parameters()) == (name != "q")


def test_load_over_an_adapter_keeps_its_parameters(tmp_path: Path) -> None:
    """Loading a file over an adapter of the same name writes into the same tensors."""
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    randomize(model, seed=99)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    other = adapted(lora_alpha=32)
    with pytest.raises(CheckpointError, match="rank and scaling for q are"):
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kind", [LoraLayer, TrainableTokensWrapper])
def test_a_merged_adapter_is_not_replaced(kind: type, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    randomize(model)
    for module in model.modules():
        if isinstance(module, kind):
            module.merge()  # type: ignore[attr-defined]
    words = "cannot replace adapter 'default' because it is currently merged"
    with unchanged(model), pytest.raises(AdapterStateError, match=f"load_adapter {words}"):
        model.load_adapter(tmp_path, "default")
    with unchanged(model), pytest.raises(AdapterStateError, match=f"hotswap_adapter {words}"):
        fastlora.hotswap_adapter(model, tmp_path, "default")
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_base_weights_of_a_file_beside_a_merged_adapter(
    dora: bool, keep_base: bool, tmp_path: Path
) -> None:
    """They replace the weight from before the merge."""
    base, x = tiny_llama(tie_word_embeddings=False), torch.arange(6)[None]
    targets = ["q_proj", "lm_head"]
    model = adapted(base=copy.deepcopy(base), target_modules=targets, use_dora=dora)
    model.save_pretrained(tmp_path)
    expected = model(x).logits
    model.merge_adapter(keep_base=keep_base)
    model.load_adapter(tmp_path, "second")
    torch.testing.assert_close(model(x).logits, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x).logits, base(x).logits)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).logits, expected)
    model.set_adapter("second")
    torch.testing.assert_close(model(x).logits, expected)


def test_base_biases_of_a_file_beside_a_merged_adapter(tmp_path: Path) -> None:
    other = adapted(bias="lora_only")
    with torch.no_grad():
        other.base_model.model.q.bias.add_(1.0)
    other.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    expected = other(x)
    model = adapted(lora_bias=True)
    model.merge_adapter()
    model.load_adapter(tmp_path, "second")
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(model(x), expected)


def test_own_files_load_over_an_adapter_that_was_scaled(tmp_path: Path) -> None:
    """An adapter's own files load over it after `set_scale`, and the scale stays; as in PEFT."""
    pytest.importorskip("peft")
    found, x = [], torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    for library in (fastlora, importlib.import_module("peft")):
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
        model = library.get_peft_model(TwoLayers(), config).eval()
        model.save_pretrained(tmp_path)
        for layer in (model.base_model.model.q, model.base_model.model.v):
            layer.set_scale("default", 3.0)
            torch.nn.init.zeros_(layer.lora_B["default"].weight)
        model.load_adapter(tmp_path, "default")
        found.append(model(x))
        model.save_pretrained(tmp_path)  # what it saves then loads as well
        model.load_adapter(tmp_path, "default")
        assert torch.equal(model(x), found[-1])
    torch.testing.assert_close(*found)


WRAPPED = [
    {"target_modules": ["0.q", "v"], "alpha_pattern": {"0.q": 40}, "rank_pattern": {"0.v": 3}},
    {"target_modules": r"0\.[qv]", "exclude_modules": ["0.v"], "lora_alpha": 4},
    {"target_modules": "all-linear", "modules_to_save": ["head"]},
]


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
@pytest.mark.parametrize("config", WRAPPED, ids=["patterns", "expression", "all-linear"])
def test_files_and_wrapped_modules(how: str, config: dict[str, Any], tmp_path: Path) -> None:
    """The names of wrappers are in no file, so files load into models with and without them."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    for saved, loaded in (("none", how), (how, "none"), (how, how)):
        model = adapted(base=in_a_wrapper(saved), **config)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = LoraModel.from_pretrained(in_a_wrapper(loaded), tmp_path)
        assert torch.equal(again(x), model(x))
        again.load_adapter(tmp_path, "default")
        again.load_adapter(tmp_path, "other")
        again.set_adapter("other")
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_layers_that_are_wrapped_after_they_were_adapted(how: str, tmp_path: Path) -> None:
    x = torch.randn(3, 16)
    model, new = (adapted(seed=n, base=two_layers(), rank_pattern={"q": 2}) for n in (1, 2))
    base = model.get_base_model()
    base.q = in_a_wrapper(how, base.q)[0]
    for each, name in ((model, "own"), (new, "new")):
        each.save_pretrained(tmp_path / name)
        again = LoraModel.from_pretrained(two_layers(), tmp_path / name)
        assert torch.equal(again(x), each(x))
    with model.disable_adapter():
        assert torch.equal(model(x), two_layers()(x))
    model.load_adapter(tmp_path / "new", "default")
    assert torch.equal(model(x), new(x))
    model.load_adapter(tmp_path / "own", "other")
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(two_layers(), tmp_path / "other")
    assert torch.equal(model(x), again(x))


def test_a_sum_of_adapters_on_a_wrapped_module_is_saved(tmp_path: Path) -> None:
    """Neither the targets nor the patterns of a computed config name the wrapper."""
    model = adapted(base=in_a_wrapper("compiled"), target_modules=["q"], exclude_modules=["v"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    x = torch.randn(3, 16)
    expected = model(x)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = LoraModel.from_pretrained(in_a_wrapper("none"), tmp_path / "sum")
    torch.testing.assert_close(again(x), expected)


def test_a_resized_embedding_is_loaded(tmp_path: Path) -> None:
    """An embedding that PEFT saved along goes into the base model, and its shape must fit."""
    pytest.importorskip("transformers")
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, key = load_file(file), "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, key: torch.ones(97, 64)}, file)
    loaded = LoraModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, torch.ones(97, 64))
    save_file({**tensors, key: torch.ones(98, 64)}, file)
    with pytest.raises(
        CheckpointError, match=r"shape \(98, 64\), but this model expects \(97, 64\)"
    ):
        LoraModel.from_pretrained(tiny_llama(), tmp_path)


def test_conv1d_of_transformers() -> None:
    """GPT-2's transposed linear is the default target, and the report says why it is not fused."""
    pytest.importorskip("transformers")
    report = fusion_report(get_peft_model(tiny("GPT2LMHeadModel"), LoraConfig(r=4)))
    assert [row.name.rpartition(".")[2] for row in report.rows] == ["c_attn"]
    assert report.fused == 0 and "Conv1D" in report.rows[0].reason


def test_counts_are_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    """The printed line has PEFT's words and the true counts."""
    adapted().print_trainable_parameters()
    trainable = 4 * (16 + 24) * 2
    total = sum(p.numel() for p in TwoLayers().parameters()) + trainable
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}\n"
    )


RAISING: dict[str, tuple[dict[str, Any], type[FastLoraError], str]] = {
    "no target": ({"target_modules": ["qq"]}, TargetNotFoundError, r"'qq'.*close names: q"),
    "not linear": ({"target_modules": ["norm"]}, UnsupportedLayerError, "'norm' is a LayerNorm"),
    "no head": (
        {"modules_to_save": ["lm"]},
        TargetNotFoundError,
        r"entries \['lm'\] match no module",
    ),
    "rank": ({"rank_pattern": {"q": 0}}, ConfigError, "rank_pattern"),
}


@pytest.mark.parametrize("case", RAISING)
def test_a_config_that_raises_leaves_the_model(case: str) -> None:
    """On a bare model and on one that has an adapter."""
    change, error, message = RAISING[case]
    bare, model = TwoLayers(), adapted()
    for target, call in (
        (bare, lambda c: get_peft_model(bare, c)),
        (model, lambda c: model.add_adapter("b", c)),
    ):
        with unchanged(target), pytest.raises(error, match=message):
            call(LoraConfig(**{**CONFIG, **change}))


def test_a_failure_in_the_middle_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory at the second layer: the first one is a plain linear again."""

    def fail(self: FastLoraLinear, name: str, **values: Any) -> None:
        if self.in_features == 24:
            raise torch.OutOfMemoryError("no memory for v")
        original(self, name, **values)

    original: Callable[..., None] = FastLoraLinear.add_adapter
    bare, model = TwoLayers(), adapted()
    monkeypatch.setattr(FastLoraLinear, "add_adapter", fail)
    with unchanged(bare), pytest.raises(torch.OutOfMemoryError):
        get_peft_model(bare, LoraConfig(**CONFIG))
    with unchanged(model), pytest.raises(torch.OutOfMemoryError):
        model.add_adapter("b", LoraConfig(**CONFIG))


def test_unknown_adapters() -> None:
    """Every call that takes a name refuses an unknown one and lists what there is."""
    model = adapted()
    calls = [
        lambda: model.set_adapter("defalt"),
        lambda: model.set_adapter(["default", "defalt"]),
        lambda: model.delete_adapter("defalt"),
        lambda: model.merge_adapter(["defalt"]),
        lambda: model.merge_and_unload(adapter_names=["defalt"]),
        lambda: model.save_pretrained("unused", selected_adapters=["defalt"]),
    ]
    words = r"defalt.*\['default'\].*close names"
    for call in calls:
        with unchanged(model), pytest.raises(AdapterNotFoundError, match=words):
            call()
    for name in ("", "a.b"):
        with pytest.raises(ConfigError, match="without dots"):
            model.add_adapter(name, LoraConfig(**CONFIG))
    with pytest.raises(AdapterStateError, match="'default' already exists"):
        model.add_adapter("default", LoraConfig(**CONFIG))
    with pytest.raises(AdapterStateError, match="already has LoRA layers"):
        get_peft_model(model.get_base_model(), LoraConfig(**CONFIG))
    with pytest.raises(AdapterNotFoundError, match="no adapter named 'defalt'"):
        model(torch.randn(2, 16), adapter_names=["default", "defalt"])


def damage(tmp_path: Path, how: str) -> None:
    """Makes the saved adapter wrong in one way."""
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.v.lora_A.weight"
    if how == "shape":
        tensors[key] = torch.zeros(4, 23)
    elif how == "missing":
        for leaf in ("lora_A", "lora_B"):
            del tensors[f"base_model.model.v.{leaf}.weight"]
    elif how == "extra":
        for leaf, shape in (("lora_A", (4, 16)), ("lora_B", (5, 4))):
            tensors[f"base_model.model.head.{leaf}.weight"] = torch.zeros(shape)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
        return
    elif how == "gone":
        file.unlink()
        return
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"lora_A.weight' has shape \(4, 23\), but this model expects \(4, 24\)"),
        ("missing", r"missing 2 tensor\(s\) that this model needs; the first"),
        ("extra", "this model has no parameter for it"),
        ("truncated", "adapter_model.safetensors"),
        ("gone", "adapter_model.safetensors"),
    ],
)
def test_a_failed_load_changes_nothing(how: str, message: str, tmp_path: Path) -> None:
    """A file that does not fit: neither a bare model nor one with adapters is touched."""
    model = adapted()
    model.save_pretrained(tmp_path)
    damage(tmp_path, how)
    bare = TwoLayers()
    for call in (
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: LoraModel.from_pretrained(bare, tmp_path),
    ):
        with unchanged(model, bare), pytest.raises(CheckpointError, match=message):
            call()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("pruned", [False, True])
def test_unload_checks_all_layers_first(name: str, pruned: bool) -> None:
    """What is computed from other parameters is not an `nn.Linear`'s own; nothing has changed."""
    model = adapted()
    layer = model.base_model.model.v
    if pruned:
        prune.random_unstructured(layer, name, 0.5)
    else:
        parametrize.register_parametrization(layer, name, nn.Identity())
    error = rf"cannot .*: its {name} is computed .*; first call torch"
    for call in (model.unload, model.merge_and_unload, lambda: layer.base_layer):
        with unchanged(model), pytest.raises(UnsupportedLayerError, match=error):
            call()
    if pruned:
        prune.remove(layer, name)
    else:
        parametrize.remove_parametrizations(layer, name)
    expected = model(torch.ones(1, 16))
    base = model.merge_and_unload()
    assert type(base.v) is nn.Linear
    torch.testing.assert_close(base(torch.ones(1, 16)), expected)


def test_merge_and_unload_is_all_or_nothing() -> None:
    """A safe merge that fails at the second layer leaves the first unmerged."""
    model = adapted()
    with torch.no_grad():
        model.base_model.model.v.lora_A["default"].weight[0, 0] = float("nan")
    with unchanged(model), pytest.raises(AdapterStateError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model.base_model.model.q, FastLoraLinear)
    assert not model.base_model.model.q.merged


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}], ids=str)
def test_adding_an_adapter_costs_the_same_whatever_is_there(fields: dict[str, Any]) -> None:
    """The 64th adapter takes the calls that the third took: nothing walks over the others."""
    model = get_peft_model(TwoLayers(), LoraConfig(target_modules=["q", "v"], **fields), "a0")
    calls = []
    for i in range(1, 64):
        config, profile = LoraConfig(target_modules=["q", "v"], **fields), cProfile.Profile()
        profile.runcall(model.add_adapter, f"a{i}", config)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[-1] == calls[1]  # the second fills caches
