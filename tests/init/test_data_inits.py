"""Initializations that look at data, beside PEFT's: CorDA, LoRA-GA and EVA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import CordaConfig, EvaConfig, LoraGAConfig
from fastlora.validation import AdapterStateError, ConfigError, InitializationError
from tests.support.inits import (
    FIELDS,
    METHODS,
    SAMPLES,
    assert_same_start,
    layers_of,
    lora,
    peft,
    run,
    started,
    train,
    train_a_bit,
    two_layers,
)
from tests.support.tiny import tiny_llama, unchanged

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
CORDA, FILES = {"init_lora_weights": "corda"}, ("cache_file", "covariance_file")


def test_corda_cache_files_and_calibrations_are_either_librarys(tmp_path: Path) -> None:
    base = two_layers()
    reference = started(fastlora, copy.deepcopy(base), **CORDA)
    for writer in (fastlora, peft):
        files = {name: str(tmp_path / writer.__name__ / name) for name in FILES}
        started(writer, copy.deepcopy(base), settings=files, **CORDA)
        for reader in (fastlora, peft):
            for file in FILES:
                calibrate = METHODS["corda"][reader][0]
                kept = {file: files[file]}
                found = started(reader, copy.deepcopy(base), calibrate, settings=kept, **CORDA)
                assert_same_start(found, reference, tolerance=1e-5)
    # Calibrated by PEFT with its config, and started by us.
    calibrate, own, _ = METHODS["corda"][peft]
    config = peft.LoraConfig(**FIELDS, **CORDA, corda_config=own())
    model = copy.deepcopy(base)
    calibrate(model, config, run_model=run(model))
    assert_same_start(fastlora.get_peft_model(model, config), reference, tolerance=1e-5)


def test_corda_takes_loaders_batches_and_copies() -> None:
    """Batches of several sequences count each; the model to run may be a copy of the model."""
    base = two_layers()
    reference = started(fastlora, copy.deepcopy(base), **CORDA)

    def loaded(model: nn.Module, config: Any) -> None:
        batches = (torch.cat(SAMPLES[i : i + 2]) for i in (0, 2))
        fastlora.preprocess_corda(
            model, config, hooked_model=copy.deepcopy(model).train(), dataloader=batches
        )

    found = started(fastlora, copy.deepcopy(base), loaded, **CORDA)
    assert_same_start(found, reference, tolerance=1e-5)
    kept = CordaConfig(prune_temporary_fields=False, use_float16_for_covariance=True)
    model = copy.deepcopy(base).train()
    config = fastlora.LoraConfig(**FIELDS, init_lora_weights="corda", corda_config=kept)
    fastlora.preprocess_corda(model, config, dataloader=SAMPLES)
    assert model.training and model.q.sample_count == 4
    scaled = [sample[0] / sample.max() for sample in SAMPLES]
    expected = sum(x.T @ x for x in scaled) / 4
    torch.testing.assert_close(model.q.covariance_matrix, expected, atol=1e-5, rtol=1e-5)


def test_corda_files(tmp_path: Path) -> None:
    """A trained adapter loads where the model is calibrated again."""
    base = two_layers()
    cache = {"cache_file": str(tmp_path / "cache.pt")}
    model = started(fastlora, copy.deepcopy(base), settings=cache, **CORDA)
    train_a_bit(model)
    model.save_pretrained(tmp_path)
    for library in (fastlora, peft):
        again = copy.deepcopy(base)
        METHODS["corda"][library][0](again, library.LoraConfig.from_pretrained(tmp_path))
        loaded = library.PeftModel.from_pretrained(again, tmp_path)
        torch.testing.assert_close(loaded(X), model(X), atol=2e-5, rtol=2e-5)
    bare = copy.deepcopy(base)
    with pytest.raises(
        InitializationError, match=r"'q': .*needs calibration data .* fastlora.preprocess_corda"
    ):
        fastlora.PeftModel.from_pretrained(bare, tmp_path)
    assert type(bare.q) is nn.Linear


def test_corda_errors(tmp_path: Path) -> None:
    config = fastlora.LoraConfig(**FIELDS, init_lora_weights="corda", corda_config=CordaConfig())
    with pytest.raises(ConfigError, match="run_model and dataloader are both None"):
        fastlora.preprocess_corda(two_layers(), config)
    with pytest.raises(InitializationError, match="the dataloader is empty"):
        fastlora.preprocess_corda(two_layers(), config, dataloader=[])
    with pytest.raises(InitializationError, match="layer 'q': the calibration data did not reach"):
        fastlora.preprocess_corda(two_layers(), config, run_model=lambda: None)
    with pytest.raises(InitializationError, match=r"layer 'q': .* infinite values"):
        fastlora.preprocess_corda(two_layers(), config, dataloader=[X * torch.nan])
    with pytest.raises(InitializationError, match="layer 'q': .* only zero inputs"):
        fastlora.preprocess_corda(two_layers(), config, dataloader=[X * 0])
    high = fastlora.LoraConfig(**{**FIELDS, "r": 17}, init_lora_weights="corda")
    with pytest.raises(InitializationError, match=r"layer 'q': r=17 .* at most 16"):
        fastlora.preprocess_corda(two_layers(), high, dataloader=SAMPLES)
    model = two_layers()
    fastlora.preprocess_corda(model, config, dataloader=SAMPLES)
    before = copy.deepcopy(model)
    other = fastlora.LoraConfig(**{**FIELDS, "rank_pattern": {"v": 2}}, init_lora_weights="corda")
    with pytest.raises(
        InitializationError, match="'v': .*run preprocess_corda on this model with the adapter's c"
    ):
        fastlora.get_peft_model(model, other)
    assert type(model.q) is nn.Linear and model.q.weight.equal(before.q.weight)
    assert model.q.eigens is not None  # what the first layer had used is there again
    fastlora.get_peft_model(model, config)
    with pytest.raises(ConfigError, match="corda_method must be one of 'ipm', 'kpm', got 'cpm'"):
        CordaConfig(corda_method="cpm")


def test_lora_ga_files(tmp_path: Path) -> None:
    """A warning says that the base weights are others."""
    started(fastlora, two_layers(), init_lora_weights="lora_ga").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="changed the base weights for training, and loading"):
        fastlora.PeftModel.from_pretrained(two_layers(), tmp_path)


def test_lora_ga_gradients_caches_and_loaders(tmp_path: Path) -> None:
    base = two_layers().eval()
    base.q.weight.requires_grad_(False)
    base.v.weight.grad = kept = torch.ones_like(base.v.weight)
    config = fastlora.LoraConfig(
        **FIELDS, init_lora_weights="lora_ga", lora_ga_config={"direction": "A2rBr"}
    )
    fastlora.preprocess_loraga(base, config, train(base), tmp_path / "folder" / "gradients.pt")
    assert base.v.weight.grad is kept and not base.q.weight.requires_grad and not base.training
    assert base.q.weight.grad is None and base.head.weight.requires_grad
    other, (calibrate, own, _) = two_layers(), METHODS["lora_ga"][peft]
    theirs = own(direction="A2rBr")
    calibrate(
        other,
        peft.LoraConfig(**FIELDS, init_lora_weights="lora_ga", lora_ga_config=theirs),
        train(other),
        cache_file=str(tmp_path / "theirs" / "gradients.pt"),
    )
    for name in ("q", "v"):
        gradients = (getattr(m, name)._peft_loraga_grad for m in (base, other))
        torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    for folder in ("folder", "theirs"):
        cached = two_layers()
        fastlora.preprocess_loraga(cached, config, cache_file=tmp_path / folder / "gradients.pt")
        torch.testing.assert_close(cached.q._peft_loraga_grad, other.q._peft_loraga_grad)
    model = tiny_llama()
    ids = torch.arange(24).view(2, 12)
    config = fastlora.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    fastlora.preprocess_loraga(model, config, dataloader=[{"input_ids": ids, "labels": ids}] * 2)
    expected = model(ids).logits
    torch.testing.assert_close(
        fastlora.get_peft_model(model, config)(ids).logits, expected, atol=1e-5, rtol=1e-5
    )


def test_lora_ga_on_conv1d_scales_by_its_outputs() -> None:
    """PEFT takes the first dimension of the weight, which Conv1D stores the other way round."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(24, 16))
    nn.init.normal_(base[0].weight)
    fields = {"target_modules": ["0"], "fan_in_fan_out": True, "init_lora_weights": "lora_ga"}
    ours, theirs = (started(lib, copy.deepcopy(base), **fields) for lib in (fastlora, peft))
    mine, other = (layers_of(m)["0"].lora_B["default"].weight for m in (ours, theirs))
    torch.testing.assert_close(mine.norm() / other.norm(), torch.tensor((24 / 16) ** 0.25))
    torch.testing.assert_close(ours(X), base(X), atol=1e-5, rtol=1e-5)
    # The gradient, as large as the weight, goes once the adapter has started.
    assert not any("_peft_loraga_grad" in module.__dict__ for module in ours.modules())


def test_lora_ga_beside_other_kinds_of_layers() -> None:
    """What has no gradient because it is no linear starts as with True, as in PEFT; one is said."""
    torch.manual_seed(0)
    model = two_layers()
    model.conv, model.embed = nn.Conv1d(3, 4, 2), nn.Embedding(7, 5)
    config = fastlora.LoraConfig(
        r=4,
        target_modules=["q", "conv", "embed"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    fastlora.preprocess_loraga(model, config, train(model))
    assert not hasattr(model.conv, "_peft_loraga_grad")
    with pytest.warns(
        UserWarning, match="only for linear layers; the adapter on a Conv1d is initialized as"
    ):
        adapted = fastlora.get_peft_model(model, config)
    assert not adapted.base_model.model.conv.lora_B["default"].weight.any()
    assert adapted.base_model.model.q.lora_B["default"].weight.any()


def test_lora_ga_without_labels() -> None:
    config = fastlora.LoraConfig(
        target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    batch = {"input_ids": torch.arange(6)[None]}
    with pytest.raises(InitializationError, match="no scalar loss for these batches; add labels"):
        fastlora.preprocess_loraga(tiny_llama(), config, dataloader=[batch])


def test_lora_ga_errors() -> None:
    settings = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = fastlora.LoraConfig(**FIELDS, **settings)
    model = two_layers()
    with pytest.raises(InitializationError, match="'q': .*fastlora.preprocess_loraga"):
        fastlora.get_peft_model(model, config)
    with pytest.raises(ConfigError, match="If you want to use LoRA-GA"):
        fastlora.preprocess_loraga(model, fastlora.LoraConfig(**FIELDS), train(model))
    with pytest.raises(ConfigError, match="train_step and dataloader are both None"):
        fastlora.preprocess_loraga(model, config)
    with pytest.raises(InitializationError, match="layer 'q': its weight received no gradient"):
        fastlora.preprocess_loraga(model, config, lambda: None)

    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fastlora.preprocess_loraga(model, config, fails)
    assert all(parameter.requires_grad for parameter in model.parameters())
    fastlora.preprocess_loraga(model, config, train(model))
    bare = fastlora.LoraConfig(**FIELDS, init_lora_weights="lora_ga")
    with pytest.raises(InitializationError, match="lora_ga_config must be provided"):
        fastlora.get_peft_model(model, bare)
    high = fastlora.LoraConfig(**{**FIELDS, "rank_pattern": {"v": 9}}, **settings)
    before = model.q.weight.detach().clone()
    with pytest.raises(InitializationError, match=r"'v': .* at most 8 \(half .*, got r=9"):
        fastlora.get_peft_model(model, high)
    assert model.q.weight.equal(before) and model.q._peft_loraga_grad is not None


def llama_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens with padding and labels."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 97, (4, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 20:] = 0
        labels = torch.where(torch.arange(24) < 4, -100, ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


EVA = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}


def eva(library: Any, settings: Any = None, **fields: Any) -> Any:
    """A tiny Llama with an EVA adapter that has its directions."""
    config = library.LoraConfig(
        **{**EVA, **fields},
        init_lora_weights="eva",
        eva_config=library.EvaConfig(**(settings or {})),
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(tiny_llama(), config)
        library.initialize_lora_eva_weights(model, llama_batches(), show_progress_bar=False)
    return model


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"rho": 2.0}, {}),
        ({"rho": 1.0, "whiten": True}, {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
        ({"rho": 2.0, "adjust_scaling_factors": False, "use_label_mask": False}, {"lora_alpha": 6}),
        ({"rho": 1.5}, {"rank_pattern": {"q_proj": 2, "v_proj": 4}, "use_rslora": True}),
    ],
    ids=["redistributed", "whitened", "unadjusted", "patterns"],
)
def test_eva(settings: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    """The same ranks, directions, scalings and config; files cross both ways."""
    ours, theirs = (eva(library, settings, **fields) for library in (fastlora, peft))
    assert_same_start(ours, theirs, tolerance=1e-4)
    mine, other = (model.peft_config["default"] for model in (ours, theirs))
    assert mine.rank_pattern == other.rank_pattern and mine.alpha_pattern == other.alpha_pattern
    assert mine.rank_pattern or settings["rho"] == 1.0
    ids = llama_batches(1)[0]["input_ids"]
    torch.testing.assert_close(ours(ids).logits, tiny_llama()(ids).logits, atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        train_a_bit(model)
    expected = [model(ids).logits for model in (ours, theirs)]
    torch.testing.assert_close(*expected, atol=1e-3, rtol=1e-3)
    for model, wanted in zip((ours, theirs), expected, strict=True):
        where = tmp_path / type(model).__module__.partition(".")[0]
        model.save_pretrained(where)
        for library in (fastlora, peft):
            loaded = library.PeftModel.from_pretrained(tiny_llama(), where)
            torch.testing.assert_close(loaded(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_eva_state_of_either_library() -> None:
    ours = eva(fastlora)
    states = []
    for library in (fastlora, peft):
        config = library.LoraConfig(
            **EVA, init_lora_weights="eva", eva_config=library.EvaConfig(rho=2.0)
        )
        states.append(
            library.get_eva_state_dict(
                tiny_llama(), llama_batches(), config, show_progress_bar=False
            )
        )
    mine, theirs = states
    assert list(mine) == list(theirs)
    assert sum(len(each) for each in mine.values()) == 4 * len(mine)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name].float(), atol=1e-4, rtol=1e-3)
    again = fastlora.get_peft_model(tiny_llama(), ours.peft_config["default"])
    named = {f"base_model.model.{name}": value for name, value in theirs.items()}
    fastlora.initialize_lora_eva_weights(again, eva_state_dict=named)
    assert_same_start(again, ours, tolerance=1e-4)


def test_eva_whitens_layers_with_the_same_inputs_once() -> None:
    """PEFT divides in place what such layers share, once for each of them."""
    plain, ours = eva(fastlora, {"rho": 1.0}), eva(fastlora, {"rho": 1.0, "whiten": True})
    theirs = eva(peft, {"rho": 1.0, "whiten": True})

    def divided(model: Any, name: str) -> torch.Tensor:
        rows = (layers_of(m)[name].lora_A["default"].weight for m in (plain, model))
        before, after = (each.detach().norm(dim=1) for each in rows)
        return before / after

    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        torch.testing.assert_close(
            divided(theirs, layer), divided(ours, layer).square(), atol=1e-3, rtol=1e-3
        )
    alone = "model.layers.0.self_attn.o_proj"
    torch.testing.assert_close(divided(theirs, alone), divided(ours, alone), atol=1e-3, rtol=1e-3)


class Endless:
    """A loader that can start again, and says how often it did."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.starts = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        yield from self.batches


def test_eva_takes_any_loader_and_gives_layers_no_rank_at_all() -> None:
    """Batches of plain tensors; a layer whose inputs barely vary goes without an adapter."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"wide": nn.Linear(16, 8), "flat": nn.Linear(8, 8), "up": nn.Linear(8, 8)})
    base["wide"].weight.data[1:] *= 1e-9
    base["wide"].bias.data.zero_()

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.flat = base["wide"], base["flat"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.flat(self.wide(x))

    model = Chain()
    config = fastlora.LoraConfig(
        r=4, target_modules=["wide", "flat"], init_lora_weights="eva", eva_config=EvaConfig(rho=2)
    )
    expected = model(X)
    adapted = fastlora.get_peft_model(model, config)
    loader = Endless([torch.randn(64, 16, generator=torch.Generator().manual_seed(1))])
    fastlora.initialize_lora_eva_weights(adapted, loader, show_progress_bar=False)
    ranks = {name: layer.r["default"] for name, layer in layers_of(adapted).items()}
    assert sum(ranks.values()) == 8 and ranks["wide"] > ranks.get("flat", 0)
    assert loader.starts > 2  # once to see who gets the same, then until the directions settle
    torch.testing.assert_close(adapted(X), expected, atol=1e-6, rtol=1e-6)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(ranks)
    assert not any(module._forward_pre_hooks for module in adapted.modules())
    state = {"base_model.model.wide": torch.eye(16)[:3], "base_model.model.flat": torch.zeros(0, 8)}
    model = fastlora.get_peft_model(Chain(), config)
    fastlora.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert type(model.base_model.model.flat) is nn.Linear
    assert model.peft_config["default"].target_modules == {"wide"}
    assert model.peft_config["default"].rank_pattern == {"wide": 3}
    assert model.peft_config["default"].alpha_pattern == {"wide": 6.0}
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)


def test_eva_keeps_no_graph_of_a_call_that_makes_one() -> None:
    seen = []

    def rows(inputs: Any, _: Any, __: str) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return inputs[0]

    def call(model: nn.Module, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            return model(x)

    config = fastlora.LoraConfig(**FIELDS, init_lora_weights="eva")
    model = fastlora.get_peft_model(two_layers(), config)
    fastlora.get_eva_state_dict(
        model, [torch.cat([X, X + 1])], None, call, None, rows, show_progress_bar=False
    )
    assert seen and not any(seen)


def test_eva_with_a_generator_that_is_used_up() -> None:
    config = fastlora.LoraConfig(**FIELDS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = fastlora.get_peft_model(two_layers(), config)
    batches = (torch.randn(9, 16) for _ in range(2))
    with unchanged(model), pytest.raises(InitializationError, match="iterator .* no more batches"):
        fastlora.initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def test_eva_errors() -> None:
    config = fastlora.LoraConfig(**FIELDS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = fastlora.get_peft_model(two_layers(), config)
    few = [torch.randn(7, 16)]
    with (
        unchanged(model),
        pytest.raises(InitializationError, match=r"'.*q': EVA needs a batch of at least 8 rows"),
    ):
        fastlora.initialize_lora_eva_weights(model, few, show_progress_bar=False)
    with unchanged(model), pytest.raises(InitializationError, match="the dataloader is empty"):
        fastlora.initialize_lora_eva_weights(model, [])
    with unchanged(model), pytest.raises(ConfigError, match="dataloader is required"):
        fastlora.initialize_lora_eva_weights(model)
    wrong = {"base_model.model.v": torch.randn(2, 23)}
    with (
        unchanged(model),
        pytest.raises(InitializationError, match=r"layer 'v': .* \(2, 23\), expected \[rank, 24\]"),
    ):
        fastlora.initialize_lora_eva_weights(model, eva_state_dict=wrong)
    with pytest.warns(UserWarning, match=r"init_lora_weights=True because .*\['q'\]"):
        fastlora.initialize_lora_eva_weights(
            model, eva_state_dict={"base_model.model.v": torch.eye(24)[:4]}
        )
    assert layers_of(model)["v"].lora_A["default"].weight.equal(torch.eye(24)[:4])
    state = {"base_model.model.q": torch.eye(16)[:1], "base_model.model.v": torch.eye(24)[:1]}
    with (
        fastlora.adapters(model, ["default"]),
        unchanged(model),
        pytest.raises(AdapterStateError, match=r"initialize_lora_eva_weights\(\) cannot be called"),
    ):
        fastlora.initialize_lora_eva_weights(model, eva_state_dict=state)
    plain = fastlora.get_peft_model(two_layers(), fastlora.LoraConfig(**FIELDS))
    with pytest.raises(ConfigError, match="only be used with `init_lora_weights='eva'`"):
        fastlora.initialize_lora_eva_weights(plain, SAMPLES)
    with pytest.raises(ConfigError, match="must be a PeftModel"):
        fastlora.initialize_lora_eva_weights(two_layers(), SAMPLES)
    with pytest.raises(ConfigError, match="peft_config is required"):
        fastlora.get_eva_state_dict(two_layers(), SAMPLES)
    model.add_adapter("other", fastlora.LoraConfig(**FIELDS))
    model.set_adapter(["default", "other"])
    with pytest.raises(AdapterStateError, match="single active adapter"):
        fastlora.initialize_lora_eva_weights(model, SAMPLES)
    for values, words in (
        ({"rho": 0.5}, "`rho` must be >= 1.0"),
        ({"rho": "a"}, "rho must be a number, got 'a'"),
        ({"tau": 2.0}, "between 0.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            EvaConfig(**values)


def test_settings_in_files_and_objects(tmp_path: Path) -> None:
    """As PEFT writes them, and PEFT's own objects and dicts are taken."""
    for init, name, theirs in (
        ("eva", "eva_config", peft.EvaConfig(rho=3.0)),
        ("corda", "corda_config", lora.config.CordaConfig(corda_method="kpm", cache_file="x.pt")),
        ("lora_ga", "lora_ga_config", lora.config.LoraGAConfig(scale="unit")),
        ("loftq", "loftq_config", peft.LoftQConfig(loftq_bits=8)),
    ):
        other = peft.LoraConfig(init_lora_weights=init, **{name: theirs})
        mine = fastlora.LoraConfig(init_lora_weights=init, **{name: theirs})
        as_dict = fastlora.LoraConfig(init_lora_weights=init, **{name: other.to_dict()[name]})
        assert mine == as_dict
        assert fastlora.LoraConfig.from_peft(other).to_dict()[name] == mine.to_dict()[name]
        assert mine.to_dict()[name] == other.to_dict()[name]
        mine.save_pretrained(tmp_path)
        assert peft.LoraConfig.from_pretrained(tmp_path).to_dict()[name] == other.to_dict()[name]
        assert fastlora.LoraConfig.from_pretrained(tmp_path) == mine
    with pytest.raises(ConfigError, match="`EvaConfig` must be a `EvaConfig`, a dict, or None"):
        fastlora.LoraConfig(init_lora_weights="eva", eva_config=3)
    with pytest.warns(UserWarning, match="`init_lora_weights` is 'eva' but `eva_config` is not"):
        assert fastlora.LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    for name, value in (("eva_config", EvaConfig()), ("corda_config", CordaConfig())):
        with pytest.warns(UserWarning, match=f"`{name}` specified but will be ignored when"):
            fastlora.LoraConfig(**{name: value})
    with pytest.warns(UserWarning, match="`loftq_config` specified but will be ignored"):
        assert fastlora.LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}
    with pytest.raises(ConfigError, match="`loftq_config` must be specified"):
        fastlora.LoraConfig(init_lora_weights="loftq")
