"""Adapters at a smaller rank, what that loses, and adapters without intruders; against PEFT."""

from __future__ import annotations

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
)
from tests.support.peft_twins import assert_near, peft
from tests.support.tiny import adapted, two_layers, unchanged

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def layers_of(model: Any) -> dict[str, Any]:
    """The two adapted layers."""
    return {name: getattr(model.base_model.model, name) for name in ("q", "v")}


@pytest.mark.parametrize("rank", [2, 6, 9, 0.9, 1.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_lost_is_said(rank: int | float, rslora: bool) -> None:
    """As much as singular values that are cut off, and no update of the rank loses less."""
    model = adapted(r=6, use_rslora=rslora, lora_bias=True, rank_pattern={"v": 3})
    found = fastlora.reduce_rank(model, rank)
    for name, layer in layers_of(model).items():
        old, new = (layer.get_delta_weight(n).double() for n in ("default", "reduced"))
        s = torch.linalg.svdvals(old)
        cut = found.ranks[name]
        assert layer.lora_A["reduced"].weight.shape[0] == cut
        assert found.errors[name] == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-5)
        assert found.errors[name] == pytest.approx(float(s[cut:].norm() / s.norm()), abs=1e-5)
        if isinstance(rank, float):
            assert found.errors[name] <= math.sqrt(1 - rank) + 1e-4
            assert cut == 1 or s[: cut - 1].norm() ** 2 < rank * s.norm() ** 2 * (1 + 1e-6)
        bias = layer.scaling["default"] * layer.lora_B["default"].bias
        torch.testing.assert_close(layer.lora_B["reduced"].bias, bias)
        assert layer.scaling["reduced"] == 1.0
    assert f"at most {found.largest_error:.2%}" in str(found)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["head"]}])
def test_a_rank_that_is_enough_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """Outputs stay; saved, the new adapter loads in PEFT and here."""
    model = adapted(r=6, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.mul_(1.5)
    expected = model(X).detach()
    fastlora.reduce_rank(model, 6)
    model.set_adapter("reduced")
    torch.testing.assert_close(model(X).detach(), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["reduced"])
    for library in (peft, fastlora):
        again = library.PeftModel.from_pretrained(two_layers(), tmp_path / "reduced").eval()
        assert_near(again(X).detach(), expected, library.__name__)


@pytest.mark.parametrize("rank", [2, 0.8])
def test_conversion_is_that_of_peft(rank: int | float, tmp_path: Path) -> None:
    """The same names, ranks and updates; what is saved loads in both libraries."""
    ours, theirs = (adapted(library, r=6, lora_alpha=3) for library in (fastlora, peft))
    with pytest.warns(UserWarning, match=r"already a LoRA adapter: .*at most [\d.]+% \((q|v)\)"):
        config, tensors = fastlora.convert_to_lora(ours, rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, expected = peft.convert_to_lora(theirs, rank)
    assert tensors.keys() == expected.keys()
    for name in ("q", "v"):
        key = f"base_model.model.{name}.lora_"
        mine, its = (t[f"{key}B.weight"] @ t[f"{key}A.weight"] for t in (tensors, expected))
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert config.rank_for(name) == tensors[f"{key}A.weight"].shape[0]
        assert config.scaling_for(name) == 1.0
    assert list(ours.peft_config) == ["default"]
    fastlora.save_as_lora(tmp_path, ours, rank)
    again = (lib.PeftModel.from_pretrained(two_layers(), tmp_path) for lib in (peft, fastlora))
    assert_near(*(model.eval()(X).detach() for model in again), "what is saved")


def test_conversion_while_a_block_is_open(tmp_path: Path) -> None:
    """In any thread; the model and the block stay as they are."""
    model = adapted(modules_to_save=["head"])
    _, expected = fastlora.convert_to_lora(model, 2)
    ids = ["default", None, "default", None, None]
    with unchanged(model), torch.no_grad(), fastlora.adapters(model, ids):
        before = model(X)
        _, tensors = fastlora.convert_to_lora(model, 2)
        ThreadPoolExecutor(1).submit(fastlora.save_as_lora, tmp_path, model, 2).result(60)
        assert torch.equal(model(X), before)
    for found in (tensors, load_file(tmp_path / "adapter_model.safetensors")):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_methods_of_peft_are_converted_by_peft(tmp_path: Path) -> None:
    """A LoHa adapter becomes a LoRA adapter that loads here."""
    config = peft.LoHaConfig(r=2, target_modules=["q", "v"], init_weights=False)
    model = peft.get_peft_model(two_layers(), config).eval()
    expected = model(X).detach()
    fastlora.save_as_lora(tmp_path, model, 8)
    again = fastlora.PeftModel.from_pretrained(two_layers(), tmp_path)
    torch.testing.assert_close(again(X).detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("epsilon", [999.0, 0.6, 0.0])
def test_intruders_are_those_of_peft(epsilon: float) -> None:
    """The same lines, and the same update on every layer: all, some or none are intruders."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    models, lines = [], []
    for library, reduce in (
        (fastlora, fastlora.reduce_intruder_dimension),
        (peft, reduce_intruder_dimension),
    ):
        model = adapted(library, r=6, lora_alpha=3, use_rslora=True)
        said: list[str] = []
        reduce(model, top_k=5, threshold_epsilon=epsilon, logging_sink=said.append)
        assert model.active_adapters == ["intruder_reduced"]
        models.append(model)
        lines.append([line.rpartition("model.")[2] for line in said])
    assert lines[0] == lines[1]
    for ours, theirs in zip(*(layers_of(model).values() for model in models), strict=True):
        mine, its = (layer.get_delta_weight("intruder_reduced") for layer in (ours, theirs))
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
        changed = not torch.allclose(mine, ours.get_delta_weight("default"), atol=1e-5)
        assert changed == (epsilon > 1) or epsilon == 0.6


def test_intruders_on_other_kinds_and_dtypes() -> None:
    """Embeddings and Conv1D, whose sides PEFT 0.21.2 mixes up; bf16 factors stay bf16."""
    base = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16)).to(torch.bfloat16)
    torch.manual_seed(1)
    config = fastlora.LoraConfig(r=3, target_modules=["0", "1"])
    model = fastlora.get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    fastlora.reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    layer = model.base_model.model[0]
    lora_a, lora_b, _ = layer._factors("intruder_reduced")
    assert (lora_a.dtype, lora_b.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (lora_a.shape, lora_b.shape) == ((3, 40), (16, 3))
    weight = layer._local_weight().float()
    old, new = (
        layer._reshape_to_weight(layer.get_delta_weight(n)).float()
        for n in ("default", "intruder_reduced")
    )
    adapted_weight = weight + old
    u, s, vh = torch.linalg.svd(adapted_weight, full_matrices=False)
    wanted = old - 0.25 * (u[:, :10] * s[:10]) @ vh[:10]
    best = torch.linalg.svdvals(wanted)[3:].norm()
    assert (new - wanted).norm() < best * 1.02 + 0.02 * wanted.norm()


def test_errors_change_nothing() -> None:
    """One error each, and the adapters as they were."""
    model = adapted(r=6)
    state = copy.deepcopy(model.state_dict())
    for rank, words in (
        (0, "positive"),
        (1.5, "between 0 and 1"),
        (-1, "positive"),
        (17, "larger"),
    ):
        for function in (fastlora.reduce_rank, fastlora.convert_to_lora):
            with unchanged(model), pytest.raises(ConfigError, match=words):
                function(model, rank)
    with pytest.raises(AdapterNotFoundError, match="no adapter named 'absent'"):
        fastlora.reduce_rank(model, 2, "absent")
    for call in (
        lambda: fastlora.reduce_rank(model, 2, new_adapter_name="default"),
        lambda: fastlora.reduce_intruder_dimension(model, new_adapter_name="default"),
    ):
        with unchanged(model), pytest.raises(AdapterStateError, match="already exists"):
            call()
    with pytest.raises(AdapterStateError, match="uses DoRA"):
        fastlora.reduce_intruder_dimension(adapted(use_dora=True), logging_sink=None)
    attention = adapted(base=nn.Sequential(nn.MultiheadAttention(16, 2)), target_modules=["0"])
    with unchanged(attention), pytest.raises(UnsupportedLayerError, match="'0', a MultiheadAtt"):
        fastlora.reduce_intruder_dimension(attention, logging_sink=None)
    for function in (fastlora.convert_to_lora, fastlora.reduce_rank):
        with torch.no_grad():
            model.base_model.model.v.lora_A["default"].weight[0, 0] = math.inf
        with (
            unchanged(model),
            pytest.raises(AdapterStateError, match="'default' on 'v' contains NaN"),
        ):
            function(model, 2)
        model.load_state_dict(state)
    with pytest.raises(UnsupportedLayerError, match="Could not detect any layer"):
        fastlora.convert_to_lora(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="The provided model is not using LoRA"):
        fastlora.reduce_intruder_dimension(nn.Linear(2, 2))  # type: ignore[arg-type]  # is none
