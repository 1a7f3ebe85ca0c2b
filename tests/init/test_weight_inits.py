"""Initializations beside PEFT's: how adapters start, their files, what cannot start."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FastLoraLinear
from fastlora.init import all_init_methods, find_init_method
from fastlora.layers.base_layers import dense_weight
from fastlora.validation import (
    AdapterStateError,
    ConfigError,
    FastLoraError,
    InitializationError,
    UnsupportedLayerError,
)
from tests.support.inits import (
    FIELDS,
    assert_same_start,
    assert_same_step,
    base_weight,
    layers_of,
    peft,
    started,
    train_a_bit,
    two_layers,
)
from tests.support.peft_twins import assert_files_cross
from tests.support.tiny import quantized_two_layers, tiny_llama, unchanged

INITS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica")
# An init, its settings, other fields, and what may differ.
STARTS: list[tuple[bool | str, dict[str, Any], dict[str, Any], float]] = [
    *((init, {}, {}, 2e-6) for init in INITS),
    *((init, {}, {"use_rslora": True, "bias": "all"}, 2e-6) for init in INITS[3:]),
    *((init, {}, {"use_dora": True}, 2e-6) for init in ("orthogonal", "pissa", "olora")),
    ("corda", {}, {}, 2e-5),
    ("corda", {"corda_method": "kpm"}, {"rank_pattern": {"v": 3}, "use_rslora": True}, 2e-4),
    *(("lora_ga", {"direction": d}, {}, 1e-5) for d in ("ArBr", "A2rBr", "ArB2r", "random")),
    *(("lora_ga", {"scale": s}, {}, 1e-5) for s in ("weight_svd", "gd_scale", "unit")),
]
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("init", "settings", "fields", "tolerance"), STARTS, ids=str)
def test_as_in_peft(
    init: bool | str, settings: dict[str, Any], fields: dict[str, Any], tolerance: float
) -> None:
    """Factors, base weight, output and gradients; nothing of a calibration stays."""
    base = two_layers()
    fields = {"init_lora_weights": init, "settings": settings, **fields}
    ours, theirs = (started(lib, copy.deepcopy(base), **fields) for lib in (fastlora, peft))
    assert_same_start(ours, theirs, tolerance)
    assert_same_step(ours, theirs, X, tolerance=1e-4 if init == "corda" else 1e-5)
    if init is not False:
        torch.testing.assert_close(ours(X), base(X), atol=1e-5, rtol=1e-5)
    found = find_init_method(init)
    assert found.changes_base != base_weight(layers_of(ours)["q"]).equal(base.q.weight)
    assert not any(hasattr(m, found.data or "-") or m._forward_pre_hooks for m in ours.modules())


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "orthogonal"])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16(init: str, autocast: bool) -> None:
    """The same dtypes as in PEFT, and a base weight within its rounding."""
    models = []
    for library in (fastlora, peft):
        torch.manual_seed(2)
        config = library.LoraConfig(**FIELDS, init_lora_weights=init)
        base = two_layers(torch.bfloat16)
        models.append(library.get_peft_model(base, config, autocast_adapter_dtype=autocast))
    assert_same_start(*models, tolerance=2**-9)


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(24, 16), nn.Linear(24, 8))
    nn.init.normal_(base[0].weight)
    for init in ("pissa", "olora", "mica"):
        fields = {"target_modules": ["0"], "init_lora_weights": init, "fan_in_fan_out": True}
        if init == "olora":  # PEFT decomposes the weight as it is stored, and fails
            ours = started(fastlora, copy.deepcopy(base), **fields)
            torch.testing.assert_close(ours(X), base(X), atol=1e-5, rtol=1e-5)
            continue
        ours, theirs = (started(lib, copy.deepcopy(base), **fields) for lib in (fastlora, peft))
        assert_same_start(ours, theirs)
        assert_same_step(ours, theirs, X)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_cross_both_ways(init: str, tmp_path: Path) -> None:
    """Whoever loads changes the base weight again, and gets the trained adapter's output."""
    base = two_layers()
    ours, theirs = (
        started(library, copy.deepcopy(base), init_lora_weights=init)
        for library in (fastlora, peft)
    )
    for model in (ours, theirs):
        train_a_bit(model)
    expected = theirs(X).detach()
    fresh = functools.partial(copy.deepcopy, base)
    assert_files_cross((ours, theirs), fresh, lambda model: model(X), expected, tmp_path)


@pytest.mark.parametrize(
    ("init", "fields"),
    [
        *((init, {}) for init in ("pissa", "olora", "pissa_niter_2", "corda", "lora_ga")),
        ("olora", {"use_rslora": True}),
        ("pissa_niter_2", {"rank_pattern": {"q": 3}, "alpha_pattern": {"v": 5}}),
        ("pissa", {"modules_to_save": ["head"]}),
    ],
    ids=str,
)
def test_conversion_to_plain_lora(init: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = two_layers()
    models = {}
    for library in (fastlora, peft):
        model = started(library, copy.deepcopy(base), init_lora_weights=init, **fields)
        if find_init_method(
            init
        ).data:  # as PEFT's examples save it, who have no data when it is read
            model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / library.__name__ / "untrained")
        model.peft_config["default"].init_lora_weights = init
        train_a_bit(model)
        before = model.peft_config["default"].to_dict()
        model.save_pretrained(
            tmp_path / library.__name__ / "plain",
            path_initial_model_for_weight_conversion=tmp_path / library.__name__ / "untrained",
        )
        assert model.peft_config["default"].to_dict() == before
        models[library.__name__] = model
    configs = [
        json.loads((tmp_path / name / "plain" / "adapter_config.json").read_text())
        for name in models
    ]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert configs[0][key] == configs[1][key], key
    for writer, model in models.items():
        if writer == "peft" and "modules_to_save" in fields:
            continue  # PEFT leaves the copies of modules out of such a file
        for reader in (fastlora, peft):
            loaded = reader.PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path / writer / "plain"
            )
            torch.testing.assert_close(loaded(X), model.eval()(X), atol=2e-5, rtol=2e-5)
            assert base_weight(layers_of(loaded)["q"]).equal(base.q.weight)
        merged = fastlora.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / writer / "plain"
        ).merge_and_unload()
        torch.testing.assert_close(merged(X), model(X), atol=2e-5, rtol=2e-5)


def test_conversion_errors(tmp_path: Path) -> None:
    base = two_layers()
    pissa = started(fastlora, copy.deepcopy(base), init_lora_weights="pissa")
    other = started(fastlora, copy.deepcopy(base), init_lora_weights="pissa", r=3)
    other.save_pretrained(tmp_path / "other")
    target = tmp_path / "out"

    def check_raises(model: Any, words: str, initial: str = "other") -> None:
        with pytest.raises(FastLoraError, match=words):
            model.save_pretrained(
                target, path_initial_model_for_weight_conversion=tmp_path / initial
            )
        assert not target.exists()

    check_raises(pissa, r"has shape \(3, 16\) for 'base_model.model.q.lora_A.weight'; expected")
    check_raises(pissa, "no such folder", "missing")
    orthogonal = started(fastlora, copy.deepcopy(base), init_lora_weights="orthogonal")
    check_raises(orthogonal, "supports only .*PiSSA.* got init_lora_weights='orthogonal'")
    words = "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not"
    for pattern in ("rank_pattern", "alpha_pattern"):
        fields = {"use_rslora": True, pattern: {"q": 3}}
        with pytest.warns(
            UserWarning, match="rank_pattern/alpha_pattern and post-training conversion"
        ):
            fastlora.LoraConfig(init_lora_weights="pissa", **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = started(fastlora, copy.deepcopy(base), init_lora_weights="pissa", **fields)
        check_raises(model, words)


def test_mica_trains_a_alone(tmp_path: Path) -> None:
    model = started(fastlora, two_layers(), init_lora_weights="mica")
    layer = layers_of(model)["q"]

    def training() -> list[str]:
        return [n.split(".", 2)[2] for n, p in model.named_parameters() if p.requires_grad]

    assert training() == ["q.lora_A.default.weight", "v.lora_A.default.weight"]
    model.add_adapter("plain", fastlora.LoraConfig(**FIELDS))
    model.set_adapter("plain")
    assert [n for n in training() if n.startswith("q")] == [
        "q.lora_A.plain.weight",
        "q.lora_B.plain.weight",
    ]
    model.set_adapter("default")
    assert training() == ["q.lora_A.default.weight", "v.lora_A.default.weight"]
    train_a_bit(model)
    expected = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.delete_adapter("default")
    assert "default" not in layer.frozen_peft_weight_names
    for library in (fastlora, peft):
        model = library.PeftModel.from_pretrained(two_layers(), tmp_path, is_trainable=True)
        torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)
        assert training() == ["q.lora_A.default.weight", "v.lora_A.default.weight"]


def not_finite(model: Any) -> None:
    model.v.weight.data[3, 5] = torch.inf


def of_rank_two(model: Any) -> None:
    model.v.weight.data = model.v.weight.data[:, :2] @ model.v.weight.data[:2]


@pytest.mark.parametrize(
    ("init", "damage", "fields", "words"),
    [
        ("pissa", not_finite, {}, r"target module 'v': .* infinite values \(1 of 384\)"),
        ("pissa_niter_2", not_finite, {}, "target module 'v': .* infinite values"),
        ("olora", not_finite, {}, "target module 'v': .* infinite values"),
        ("mica", not_finite, {}, "target module 'v': .* infinite values"),
        ("pissa", of_rank_two, {}, "target module 'v': .* needs r=4 .* only 2 are nonzero"),
        (
            "pissa",
            None,
            {"rank_pattern": {"v": 17}},
            "target module 'v': .* requires r to be at most 16 .*, got r=17",
        ),
        (
            "olora",
            None,
            {"rank_pattern": {"v": 17}},
            "target module 'v': .* requires r to be at most 16 .*, got r=17",
        ),
        ("mica", None, {"rank_pattern": {"v": 17}}, "MiCA requires `r` <= min"),
        ("pissa", None, {"alpha_pattern": {"v": -1}}, "target module 'v': .* positive scaling"),
        ("orthogonal", None, {"rank_pattern": {"v": 3}}, "'v': Orthogonal .* to be even, got 3"),
    ],
)
def test_what_cannot_start_leaves_the_model_as_it_was(
    init: str, damage: Any, fields: dict[str, Any], words: str
) -> None:
    """In the second of two layers, so that the first one has been changed already."""
    model = two_layers()
    if damage is not None:
        damage(model)
    check_raises = functools.partial(pytest.raises, InitializationError, match=words)
    with unchanged(model), check_raises():
        started(fastlora, model, init_lora_weights=init, **fields)
    # And where an adapter is there already.
    adapted = fastlora.get_peft_model(model, fastlora.LoraConfig(**FIELDS))
    with unchanged(adapted), check_raises(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = fastlora.LoraConfig(**{**FIELDS, **fields}, init_lora_weights=init)
        adapted.add_adapter("more", config)


def test_rank_deficient_weights_where_the_formula_works() -> None:
    for init in ("olora", "mica"):
        model = two_layers()
        of_rank_two(model)
        expected = model(X)
        started_model = started(fastlora, model, init_lora_weights=init)
        torch.testing.assert_close(started_model(X), expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_are_not_changed_behind_the_other_ones_back() -> None:
    """PEFT changes the embedding along, and with it what the model computes."""
    tokens = torch.arange(8)[None]
    model = tiny_llama()
    expected = model(tokens).logits
    fields = {"target_modules": ["lm_head"], "r": 4, "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    assert (theirs(tokens).logits - expected).abs().max() > 0.01
    shares = "'lm_head', which is shared with 'model.embed_tokens'"
    with unchanged(model), pytest.raises(AdapterStateError, match=shares):
        fastlora.get_peft_model(model, fastlora.LoraConfig(**fields))
    untied = fastlora.get_peft_model(
        tiny_llama(tie_word_embeddings=False), fastlora.LoraConfig(**fields)
    )
    assert untied(tokens).logits.isfinite().all()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_weight_of_a_module_with_two_names_is_not_changed(init: str) -> None:
    model = two_layers()
    model.other = model.q
    with unchanged(model), pytest.raises(AdapterStateError, match="'q', which is shared with 'ot"):
        started(fastlora, model, init_lora_weights=init)


def test_quantized_bases() -> None:
    """OLoRA quantizes anew, as in PEFT; others ask for the model before quantization."""
    ours = quantized_two_layers("bitsandbytes")
    before = dense_weight(ours.q).clone()
    adapted = started(fastlora, ours, init_lora_weights="olora", target_modules=["q"])
    theirs = started(
        peft, quantized_two_layers("bitsandbytes"), init_lora_weights="olora", target_modules=["q"]
    )
    mine, other = layers_of(adapted)["q"], layers_of(theirs)["q"]
    for factor in ("lora_A", "lora_B"):
        a, b = (getattr(layer, factor)["default"].weight for layer in (mine, other))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    weights = [dense_weight(layer.get_base_layer()) for layer in (mine, other)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)
    assert (weights[0] - before).abs().max() > 0.01
    torch.testing.assert_close(adapted(X), theirs(X), atol=1e-5, rtol=1e-5)
    for kind in ("bitsandbytes", "torchao"):
        model = quantized_two_layers(kind)
        with pytest.raises(UnsupportedLayerError, match="target module 'q': .*'pissa' changes"):
            started(fastlora, model, init_lora_weights="pissa", target_modules=["q"])
        assert not hasattr(model.q, "lora_A")


def test_weights_that_are_not_there() -> None:
    """On the meta device nothing is read; a weight that is computed cannot be changed."""
    with torch.device("meta"):
        model = two_layers()
    adapted = started(fastlora, model, init_lora_weights="pissa")
    assert layers_of(adapted)["q"].weight.is_meta
    model = two_layers()
    nn.utils.parametrizations.weight_norm(model.q)
    with pytest.raises(
        UnsupportedLayerError, match="'q': .*ParametrizedLinear has no weight of its own"
    ):
        started(fastlora, model, init_lora_weights="pissa")
    expected = model(X)
    torch.testing.assert_close(started(fastlora, model, init_lora_weights="mica")(X), expected)


def test_a_layer_alone() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    before = linear.weight.detach().clone()
    layer = FastLoraLinear.from_linear(linear, r=3, init_lora_weights="pissa")
    x = torch.randn(4, 12)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, before, linear.bias), atol=1e-5, rtol=1e-5
    )
    assert not layer.weight.equal(before)
    with pytest.raises(InitializationError, match=r"r to be at most 10 \(.*\), got r=11"):
        layer.add_adapter("b", r=11, init_lora_weights="olora")
    assert list(layer.lora_A) == ["default"]
    assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight is layer.weight
    assert "base_layer" not in dict(layer.named_modules())
    layer.merge()
    torch.testing.assert_close(layer.weight, before, atol=1e-6, rtol=1e-6)
    with pytest.raises(AdapterStateError, match=r"adapters \['default'\] are merged"):
        layer.add_adapter("b", r=2, init_lora_weights="olora")
    new = FastLoraLinear(12, 10, r=4, init_lora_weights="orthogonal")
    assert (new.lora_B["default"].weight @ new.lora_A["default"].weight).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="must be one of .* got 'magic'"):
        FastLoraLinear(12, 10, init_lora_weights="magic")


def test_adapters_that_changed_the_base_beside_others(tmp_path: Path) -> None:
    base = two_layers()
    for init in ("pissa", "olora", "pissa_niter_2", True):
        started(fastlora, copy.deepcopy(base), init_lora_weights=init).save_pretrained(
            tmp_path / str(init)
        )
    words = "PiSSA changes the base weights of the model and should thus not be used with other"
    for first, second in (("pissa", "True"), ("True", "pissa")):
        model = fastlora.LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / first)
        with pytest.warns(UserWarning, match=words):
            model.load_adapter(tmp_path / second, "other")
    model = fastlora.LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "pissa")
    with pytest.raises(
        AdapterStateError, match=r"changing .*OLoRA.*, but adapter 'default' .*PiSS"
    ):
        model.load_adapter(tmp_path / "olora", "other")
    with pytest.warns(UserWarning, match="'pissa_niter_2' is random"):
        fastlora.LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "pissa_niter_2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path / "pissa", "default")  # over itself: nothing changes again
    torch.testing.assert_close(model(X), base(X), atol=1e-5, rtol=1e-5)


def test_what_cannot_go_without_its_own_base_weights(tmp_path: Path) -> None:
    """Taking a plain adapter's place, sums, smaller ranks, pools: they want it as plain LoRA."""
    base = two_layers()
    model = started(fastlora, copy.deepcopy(base), init_lora_weights="pissa")
    model.save_pretrained(tmp_path)
    plain = fastlora.get_peft_model(copy.deepcopy(base), fastlora.LoraConfig(**FIELDS))
    before = copy.deepcopy(plain.state_dict())
    tensors = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    pissa = model.peft_config["default"]

    def check_raises(words: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        with pytest.raises(FastLoraError, match=f"'pissa' changed .*{words}.* does not reproduce"):
            call(*args, **options)

    check_raises("that replaces 'default'", plain.load_adapter, tmp_path, "default")
    check_raises("that replaces", fastlora.hotswap_adapter, plain, tmp_path, "default")
    check_raises(
        "place", fastlora.hotswap_adapter_from_state_dict, plain, tensors, "default", config=pissa
    )
    assert all(value.equal(before[key]) for key, value in plain.state_dict().items())
    fastlora.hotswap_adapter(model, tmp_path, "default")  # over itself
    check_raises("computed from this one", fastlora.reduce_rank, model, 2)
    check_raises(
        "computed from this one", model.add_weighted_adapter, ["default"], [0.5], "sum", "linear"
    )
    assert list(model.peft_config) == ["default"]
    with fastlora.AdapterPool(two_layers(), max_adapters=2, target_modules=["q", "v"]) as pool:
        check_raises("an adapter pool", pool.register, "a", tmp_path)


@pytest.mark.parametrize(
    ("init", "other"),
    [
        ("pissa", {"init_lora_weights": True}),
        ("pissa", {"init_lora_weights": "olora"}),
        ("pissa_niter_4", {"init_lora_weights": "pissa_niter_8"}),
        ("olora", {"r": 2, "lora_alpha": 3}),
        ("olora", {"lora_alpha": 4}),
        ("olora", {"target_modules": ["q"]}),
        ("corda", {"corda_method": "kpm"}),
        ("lora_ga", {"init_lora_weights": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", ["load_adapter", "hotswap_adapter"])
def test_only_the_same_change_of_the_base_replaces_an_adapter(
    init: str, other: dict[str, Any], operation: str, tmp_path: Path
) -> None:
    base = two_layers()
    model = started(fastlora, copy.deepcopy(base), init_lora_weights=init)
    train_a_bit(model)
    expected = model(X)
    model.save_pretrained(tmp_path / "own")
    settings = {"settings": other} if "corda_method" in other else other
    new = started(fastlora, copy.deepcopy(base), **{"init_lora_weights": init, **settings})
    new.save_pretrained(tmp_path / "new")

    def replace(folder: str) -> None:
        if operation == "load_adapter":
            model.load_adapter(tmp_path / folder, "default")
        else:
            fastlora.hotswap_adapter(model, tmp_path / folder, "default")

    with unchanged(model), pytest.raises(FastLoraError, match="'default'"):
        replace("new")
    torch.nn.init.zeros_(layers_of(model)["q"].lora_B["default"].weight)
    replace("own")
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("deleted", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_file_replaces_an_adapter_if_two_changed_the_base(deleted: bool, tmp_path: Path) -> None:
    """Each file belongs to other base weights, which the configs do not show."""
    model = started(fastlora, two_layers(), init_lora_weights="pissa")
    model.save_pretrained(tmp_path)
    if deleted:
        model.delete_adapter("default")
    name = "default" if deleted else "other"
    model.add_adapter(name, copy.deepcopy(fastlora.LoraConfig.from_pretrained(tmp_path)))
    words = "so did that of a deleted adapter" if deleted else "so did that of adapter 'default'"
    for replace in (model.load_adapter, functools.partial(fastlora.hotswap_adapter, model)):
        with unchanged(model), pytest.raises(FastLoraError, match=words):
            replace(tmp_path, name)


def test_a_rank_that_the_base_was_changed_for_is_not_padded() -> None:
    model = started(fastlora, two_layers(), init_lora_weights="pissa")
    with unchanged(model), pytest.raises(ConfigError, match="'pissa' changed the base weights"):
        fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=4)


def test_the_base_stays_changed_behind_a_deleted_adapter(tmp_path: Path) -> None:
    base = two_layers()
    for init in ("pissa", True):
        adapter = started(fastlora, copy.deepcopy(base), init_lora_weights=init)
        adapter.save_pretrained(tmp_path / str(init))
    model = fastlora.LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "pissa")
    with pytest.warns(UserWarning, match=r"keep the change .* 'default' made to them \(PiSSA\)"):
        model.delete_adapter("default")
    words = r"but a deleted adapter has already changed them \(PiSSA\); load the base model again"
    with unchanged(model), pytest.raises(AdapterStateError, match=words):
        model.load_adapter(tmp_path / "pissa", "default")
    with pytest.warns(UserWarning, match="a deleted adapter has changed the base weights"):
        model.load_adapter(tmp_path / "True", "default")
    model.load_adapter(tmp_path / "True", "default")  # is no PiSSA adapter


def test_every_name_is_known_to_the_config() -> None:
    for init in all_init_methods():
        if init.settings is None:
            assert fastlora.LoraConfig(init_lora_weights=init.name).init is init
    assert fastlora.LoraConfig(init_lora_weights="PiSSA_niter_3").init.name == "pissa"
    with pytest.raises(ConfigError, match="or 'pissa_niter_<n>', got 'pissa_niter_'"):
        fastlora.LoraConfig(init_lora_weights="pissa_niter_")


class Other(nn.Module):
    """An embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T]`` to ``[B, 6, T - 2]``."""
        return self.conv(self.embed(ids).transpose(1, 2))


def test_other_kinds_of_layers(tmp_path: Path) -> None:
    """Embeddings have MiCA, and start as ever otherwise; convolutions have the random ones."""
    torch.manual_seed(0)
    base, ids = Other(), torch.arange(20).view(2, 10)
    fields: dict[str, Any] = {"target_modules": ["embed"], "init_lora_weights": "mica"}
    ours, theirs = (started(lib, copy.deepcopy(base), **fields) for lib in (fastlora, peft))
    mine, other = (model.base_model.model.embed for model in (ours, theirs))
    b, b_ = (layer.lora_embedding_B["default"].detach() for layer in (mine, other))
    torch.testing.assert_close(b @ b.T, b_ @ b_.T, atol=1e-6, rtol=1e-6)
    assert not mine.lora_embedding_A["default"].any()
    for layer in (mine, other):
        assert layer.lora_embedding_A["default"].requires_grad
        assert not layer.lora_embedding_B["default"].requires_grad
        with torch.no_grad():
            layer.lora_embedding_A["default"].add_(0.3)
    ours.save_pretrained(tmp_path)
    for library in (fastlora, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        torch.testing.assert_close(loaded(ids), ours(ids), atol=1e-6, rtol=1e-6)
        assert not loaded.base_model.model.embed.lora_embedding_B["default"].requires_grad
    for init in ("pissa", "olora", "orthogonal"):
        fields = {"target_modules": ["embed"], "init_lora_weights": init}
        model = started(fastlora, copy.deepcopy(base), **fields)
        assert not model.base_model.model.embed.lora_embedding_A["default"].any()
        assert base_weight(model.base_model.model.embed).equal(base.embed.weight)
        fields["target_modules"] = ["conv"]
        with pytest.raises(
            UnsupportedLayerError, match=f"'conv'.*'{init}' is supported only for linear"
        ):
            started(fastlora, copy.deepcopy(base), **fields)
        with pytest.raises(ValueError, match="Unknown initialization"):
            started(peft, copy.deepcopy(base), **fields)
