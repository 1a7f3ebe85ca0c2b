"""`add_weighted_adapter`: values against PEFT's, and against what the sum should be."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.algebra import combine, low_rank
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    FastLoraError,
)
from tests.support.peft_twins import peft
from tests.support.tiny import TwoLayers, with_adapters

ALL = [*combine.COMBINATIONS]
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def filled(library: Any, *configs: dict[str, Any], **options: Any) -> Any:
    """A model with random adapters a, b, ...; the same values in both libraries."""
    torch.manual_seed(0)
    base = TwoLayers()
    made = {
        name: library.LoraConfig(**{"target_modules": ["q", "v"], **config})
        for name, config in zip("abcd", configs, strict=False)
    }
    model = with_adapters(base, made, library, **options)
    with torch.no_grad():
        factors = {name: p for name, p in sorted(model.named_parameters()) if "lora_" in name}
        for index, parameter in enumerate(factors.values()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def layers_of(model: Any) -> list[Any]:
    """The two adapted layers."""
    return [model.base_model.model.q, model.base_model.model.v]


def fixed_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has what is drawn at random depend on its shape alone."""

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(chances.shape))
        return (torch.rand(chances.shape, generator=generator) < chances).to(chances)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("kind", ALL)
def test_updates_are_those_of_peft(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters of different alphas, one weight negative: every layer's update, and outputs."""
    if method == "frequency" and "ties" not in kind:
        pytest.skip("no sign is elected")
    fixed_masks(monkeypatch)
    found = []
    for library in (fastlora, peft):
        model = filled(library, {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2})
        model.add_weighted_adapter(
            ["a", "b"],
            [0.7, -1.5],
            "sum",
            combination_type=kind,
            density=0.5,
            majority_sign_method=method,
        )
        model.set_adapter("sum")
        updates = [layer.get_delta_weight("sum").detach() for layer in layers_of(model)]
        found.append([*updates, model(X).detach()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.5, 0.75, -2.0]], ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_a_name_may_come_more_than_once(
    kind: str, weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list with repeats gives PEFT's sum, rank and output, one that cancels out too (R8)."""
    fixed_masks(monkeypatch)
    names, found = ["a", "b", "a"] if len(weights) == 3 else ["a", "a"], []
    for library in (fastlora, peft):
        model = filled(library, {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2})
        model.add_weighted_adapter(names, weights, "sum", kind, density=0.5)
        model.set_adapter("sum")
        config = model.peft_config["sum"]
        updates = [layer.get_delta_weight("sum").detach() for layer in layers_of(model)]
        found.append([(config.r, config.lora_alpha), *updates, model(X).detach()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_sums(kind: str, rslora: bool) -> None:
    """Of three adapters of different ranks, by rsLoRA too, which PEFT 0.21.2 scales twice."""
    configs: list[dict[str, Any]] = [
        {"r": r, "lora_alpha": 8, "use_rslora": rslora, "lora_dropout": 0.25, "lora_bias": True}
        for r in (2, 3, 5)
    ]
    configs[1]["rank_pattern"] = {"v": 1}
    model = filled(fastlora, *configs)
    weights = [1.0, -0.5, 2.0]
    rank = None if kind == "cat" else 10
    model.add_weighted_adapter(["a", "b", "c"], weights, "sum", kind, svd_rank=rank)
    config = model.peft_config["sum"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (10, 10, False)
    assert config.rank_for("v") == (8 if kind == "cat" else 10)
    for layer in layers_of(model):
        expected = sum(w * layer.get_delta_weight(n) for n, w in zip("abc", weights, strict=True))
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
        assert layer.scaling["sum"] == 1.0
        bias = sum(
            w * layer.scaling[n] * layer.lora_B[n].bias for n, w in zip("abc", weights, strict=True)
        )
        torch.testing.assert_close(layer.lora_B["sum"].bias, bias)
    # PEFT's sum of rsLoRA adapters is sqrt(r) times too large, so its output is no truth here.
    if rslora:
        theirs = filled(peft, {"r": 4, "use_rslora": True})
        theirs.add_weighted_adapter(["a"], [1.0], "sum")
        own, made = (layers_of(theirs)[0].get_delta_weight(n) for n in ("a", "sum"))
        torch.testing.assert_close(made, math.sqrt(4) * own, rtol=1e-4, atol=1e-5)
        ours = filled(fastlora, {"r": 4, "use_rslora": True})
        ours.add_weighted_adapter(["a"], [1.0], "sum")
        own, made = (layers_of(ours)[0].get_delta_weight(n) for n in ("a", "sum"))
        torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-5)


def test_svd_cuts_off_where_nothing_is_better() -> None:
    """The best approximation of its rank; clamped as PEFT does; more rank than there is."""
    model = filled(fastlora, {"r": 4}, {"r": 4})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", svd_rank=3)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "wide", svd_rank=40)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "clamped", svd_clamp=0.9)
    for layer in layers_of(model):
        exact = layer.get_delta_weight("a") + layer.get_delta_weight("b")
        s = torch.linalg.svdvals(exact)
        lost = (layer.get_delta_weight("sum") - exact).norm()
        assert lost == pytest.approx(float(s[3:].norm()), rel=1e-4)
        torch.testing.assert_close(layer.get_delta_weight("wide"), exact, rtol=1e-4, atol=1e-5)
        values = torch.cat(
            [p.weight.flatten() for p in (layer.lora_A["wide"], layer.lora_B["wide"])]
        )
        assert values.isfinite().all()
        factors = layer.lora_A["clamped"].weight, layer.lora_B["clamped"].weight
        assert max(float(f.max()) for f in factors) <= float(exact.abs().max()) * 100
        top = torch.cat([f.flatten() for f in factors]).sort()[0]
        assert (top == top[-1]).sum() > 1  # several stand at the bound


def test_clamp_is_the_quantile_of_peft() -> None:
    """Values between two of those that are there."""
    lora_a, lora_b = torch.randn(3, 8), torch.randn(5, 3)
    bound = float(torch.quantile(torch.cat([lora_b.flatten(), lora_a.flatten()]), 0.83))
    a, b = low_rank.clamp_factors_to_quantile(lora_a, lora_b, 0.83)
    torch.testing.assert_close(a, lora_a.clamp(-bound, bound))
    torch.testing.assert_close(b, lora_b.clamp(-bound, bound))


def test_different_targets_and_files(tmp_path: Path) -> None:
    """Layers that only one adapter has; saved here, the sum is the same in PEFT, and back."""
    configs: list[dict[str, Any]] = [
        {"r": 2, "target_modules": ["q"], "use_rslora": True},
        {"r": 3, "target_modules": ["v", "head"], "modules_to_save": ["norm"]},
    ]
    model = filled(fastlora, *configs)
    with torch.no_grad():
        model.base_model.model.norm.modules_to_save["b"].weight.fill_(1.5)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", "cat")
    assert model.peft_config["sum"].target_modules == {"q", "v", "head"}
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    layer = model.base_model.model.head
    torch.testing.assert_close(layer.get_delta_weight("sum"), 2.0 * layer.get_delta_weight("b"))
    assert model.base_model.model.norm.current().weight[0] == 1.5  # of the one that owns a copy
    y = model.eval()(X)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    for library in (peft, fastlora):
        torch.manual_seed(0)
        again = library.PeftModel.from_pretrained(TwoLayers(), tmp_path / "sum")
        torch.testing.assert_close(again.eval()(X), y)


def test_configs_that_choose_layers_in_different_ways() -> None:
    """The sum has the layers that the adapters have, and no others."""
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"lin": nn.Linear(16, 16)}) for _ in range(4)]
    base = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})
    first = fastlora.LoraConfig(r=2, target_modules=["lin"], layers_to_transform=[1])
    second = fastlora.LoraConfig(r=2, target_modules=".*layers.2.lin|.*layers.3.lin")
    third = fastlora.LoraConfig(r=2, target_modules=["layers.0.lin"])
    model = with_adapters(base, {"a": first, "b": second, "c": third})
    model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum", "cat")
    has = [
        name for name, m in model.base_model.model.named_modules() if "sum" in getattr(m, "r", ())
    ]
    assert has == ["model.layers.0.lin", "model.layers.1.lin"]
    with pytest.raises(ConfigError, match="must have the same type"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "other", "cat")


def test_it_trains_and_keeps_the_dtype() -> None:
    """A sum of fp32 factors beside a bf16 base is fp32; one of bf16 factors is bf16."""
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        torch.manual_seed(0)
        base = TwoLayers().to(torch.bfloat16)
        configs = {n: fastlora.LoraConfig(r=2, target_modules=["q"]) for n in "ab"}
        model = with_adapters(base, {"a": configs["a"]}, autocast_adapter_dtype=autocast)
        model.add_adapter("b", configs["b"], autocast_adapter_dtype=autocast)
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
        model.set_adapter("sum")
        factor = model.base_model.model.q.lora_B["sum"].weight
        assert factor.dtype == dtype
        model(X.to(torch.bfloat16)).float().sum().backward()
        assert factor.grad is not None


WRONG: list[tuple[dict[str, Any], type[FastLoraError], str]] = [
    ({"adapters": ["a", "z"]}, AdapterNotFoundError, "no adapter named 'z'"),
    ({"adapters": []}, ConfigError, "adapters is empty"),
    ({"weights": [1.0]}, ConfigError, "one weight for each of the 2 adapters"),
    ({"weights": [1.0, math.inf]}, ConfigError, "finite"),
    ({"adapter_name": "a"}, AdapterStateError, "already exists"),
    ({"adapter_name": "a.b"}, ConfigError, "a.b"),
    ({"combination_type": "tie"}, ConfigError, "close names: ties"),
    ({"combination_type": "linear"}, ConfigError, "same r value"),
    ({"combination_type": "ties_svd"}, ConfigError, "needs a density"),
    ({"combination_type": "dare_ties_svd", "density": 0}, ConfigError, "needs a density"),
    ({"combination_type": "ties_svd", "density": -0.5}, ConfigError, "needs a density"),
    ({"combination_type": "ties_svd", "density": 1.5}, ConfigError, "needs a density"),
    ({"svd_rank": 0}, ConfigError, "r must be a positive integer"),
    ({"svd_clamp": 2.0}, ConfigError, "svd_clamp"),
    ({"majority_sign_method": "most"}, ConfigError, "majority_sign_method"),
    ({"adapters": ["a", "c"]}, AdapterStateError, "'c' uses DoRA"),
    ({"adapters": ["a", "d"]}, AdapterStateError, "contains NaN or infinite values"),
]


@pytest.mark.parametrize("wrong, error, words", WRONG, ids=lambda case: str(case)[:40])
def test_errors_change_nothing(
    wrong: dict[str, Any], error: type[FastLoraError], words: str
) -> None:
    """One error, and a model as it was."""
    model = filled(fastlora, {"r": 4}, {"r": 3}, {"r": 4, "use_dora": True}, {"r": 4})
    with torch.no_grad():
        layers_of(model)[1].lora_B["d"].weight[0, 0] = math.nan
    before = list(model.state_dict())
    arguments = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum", **wrong}
    with pytest.raises(error, match=words):
        model.add_weighted_adapter(**arguments)
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["a", "b", "c", "d"]
    assert model.active_adapters == ["a"]


def test_two_copies_of_one_module_raise() -> None:
    """There is no saying whose the sum would have."""
    model = filled(fastlora, *({"r": 2, "modules_to_save": ["head"]} for _ in range(2)))
    for names in (["a", "b"], ["a", "a"]):
        with pytest.raises(AdapterStateError, match="each have a copy of 'head'"):
            model.add_weighted_adapter(names, [1.0, 1.0], "sum", "cat")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties_svd"])
def test_embeddings(kind: str) -> None:
    """Their updates are those of PEFT."""
    found = []
    ids = torch.arange(12).view(3, 4)
    for library in (fastlora, peft):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))
        configs = {
            name: library.LoraConfig(r=3, lora_alpha=alpha, target_modules=["0", "1"])
            for name, alpha in (("first", 2), ("second", 5))
        }
        model = with_adapters(base, configs, library)
        factors = {name: p for name, p in sorted(model.named_parameters()) if "lora_" in name}
        with torch.no_grad():
            for index, parameter in enumerate(factors.values()):
                generator = torch.Generator().manual_seed(index)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        model.add_weighted_adapter(["first", "second"], [0.5, -2.0], "sum", kind, density=0.5)
        model.set_adapter("sum")
        found.append([model.base_model.model[0].get_delta_weight("sum"), model(ids)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)


def test_a_share_of_an_update_has_the_smallest_rank_that_keeps_it() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])
    made = low_rank.Svd(torch.eye(3), values, torch.eye(3))  # squares: 9, 4, 1
    for share, rank in ((0.5, 1), (9 / 14, 1), (0.65, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        assert made.num_singular_values_to_keep(share) == rank, share
    assert [made.num_singular_values_to_keep(rank) for rank in (1, 2, 5)] == [1, 2, 3]
    assert made.relative_truncation_error(3) == 0 and made.relative_truncation_error(0) == 1
    assert made.relative_truncation_error(1) == pytest.approx((5 / 14) ** 0.5)
    nothing = made._replace(s=torch.zeros(3))
    assert (
        nothing.num_singular_values_to_keep(0.5) == 1 and nothing.relative_truncation_error(1) == 0
    )


@pytest.mark.parametrize("within_block", [False, True])
def test_a_failed_sum_is_not_left_in_the_model(
    within_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor of another rank, which may broadcast, is an error, and the adapter is removed."""
    model = filled(fastlora, {"r": 1}, {"r": 1})
    names = list(model.state_dict())
    wrong = "_set_layer_ranks_and_alphas"
    monkeypatch.setattr(fastlora.LoraConfig, wrong, lambda c, *_: c.rank_pattern.update(q=3))
    blocks = contextlib.ExitStack()
    with blocks, torch.no_grad():
        if within_block:
            blocks.enter_context(fastlora.adapters(model, ["a"] * len(X)))
        with pytest.raises(AdapterStateError, match=r"shape \(3, 16\), but .* shape \(1, 16\)"):
            model.add_weighted_adapter(["a"], [1.0], "sum")
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("patterns", [("(?i)Q", "v"), ("(?P<name>q)", "(?P<name>v)")], ids=str)
def test_patterns_that_cannot_be_joined(patterns: tuple[str, str], tmp_path: Path) -> None:
    """The config of the sum then lists the layers, and that of one adapter keeps its pattern."""
    model = filled(fastlora, *({"target_modules": pattern} for pattern in patterns))
    model.set_adapter(["a", "b"])
    expected = model(X)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    fastlora.reduce_rank(model, 2, "a")
    assert model.peft_config["sum"].target_modules == {"q", "v"}
    assert model.peft_config["reduced"].target_modules == patterns[0]
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = fastlora.LoraModel.from_pretrained(TwoLayers(), tmp_path / "sum")
    torch.testing.assert_close(again(X), expected)
