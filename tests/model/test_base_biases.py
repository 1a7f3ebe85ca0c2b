"""Which base biases train (``bias="all"``, ``"lora_only"``), and which ones a file holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from tests.support.tiny import TwoLayers

MODES = ("lora_only", "all")


def base() -> TwoLayers:
    """Two linears, a norm and a head; the same values each time."""
    torch.manual_seed(0)
    return TwoLayers()


def trains(model: Any) -> tuple[set[str], set[str]]:
    """Returns the base parameters that train, by their names in the base model, and the factors."""
    names = {
        n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad
    }
    factors = {name for name in names if "lora_" in name}
    return {name.replace(".base_layer", "") for name in names - factors}, factors


def train(model: Any) -> torch.Tensor:
    """Takes ten steps over everything that trains, and returns the outputs afterwards."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 16), torch.randn(8, 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model(x).detach()


def outputs(model: Any) -> torch.Tensor:
    """Returns the outputs that `train` returns, without a step."""
    torch.manual_seed(1)
    return model(torch.randn(8, 16)).detach()


@pytest.mark.parametrize("bias", MODES)
def test_an_idle_adapter_trains_no_bias(tmp_path: Path, bias: str) -> None:
    """A base bias trains only while an adapter that asked for it is active (R1)."""
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q"]))
    twin = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["v"], bias=bias))
    twin.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v"], bias=bias))
    assert trains(model) == trains(twin)
    trained = train(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert torch.equal(outputs(LoraModel.from_pretrained(base(), tmp_path)), trained)


@pytest.mark.parametrize("bias", MODES)
def test_a_file_holds_the_biases_that_were_trained(tmp_path: Path, bias: str) -> None:
    """A file holds what the adapter trained, as if the model had that adapter alone (R1)."""
    config = {"r": 2, "target_modules": ["v"], "bias": bias, "modules_to_save": ["head"]}
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("b", LoraConfig(**config))
    model.set_adapter("b")
    trained = train(model)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    alone = peft.get_peft_model(base(), peft.LoraConfig(**config))
    alone.save_pretrained(tmp_path / "alone")
    held = set(load_file(tmp_path / "b" / "adapter_model.safetensors"))
    theirs = set(load_file(tmp_path / "alone" / "adapter_model.safetensors"))
    # PEFT writes the copied head's biases a second and a third time.
    assert held == {key for key in theirs if "head." not in key or key.count(".") == 3}
    assert torch.equal(outputs(LoraModel.from_pretrained(base(), tmp_path / "b")), trained)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "b")
    torch.testing.assert_close(outputs(loaded), trained)
    # A model that adapts another layer has these biases under other names.
    beside = get_peft_model(base(), LoraConfig(r=2, target_modules=["q"]))
    beside.load_adapter(tmp_path / "b", "b")
    beside.set_adapter("b")
    assert torch.equal(outputs(beside), trained)


@pytest.mark.parametrize("bias", MODES)
def test_a_converted_adapter_keeps_its_biases(tmp_path: Path, bias: str) -> None:
    """The file of a conversion holds the biases; of a new adapter beside it, a warning says not."""
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["v"], bias=bias))
    trained = train(model)
    fastlora.save_as_lora(tmp_path, model, 1.0)
    torch.testing.assert_close(outputs(LoraModel.from_pretrained(base(), tmp_path)), trained)
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(base(), tmp_path)), trained)
    assert trains(model) == trains(
        get_peft_model(base(), LoraConfig(r=2, target_modules=["v"], bias=bias))
    )
    with pytest.warns(UserWarning, match="does not include the base biases that adapter 'default'"):
        fastlora.reduce_rank(model, 1.0)
    with pytest.warns(UserWarning, match="does not include the base biases"):
        fastlora.reduce_intruder_dimension(model, logging_sink=None)
    with pytest.warns(UserWarning, match="does not include the base biases"):
        model.add_weighted_adapter(["default", "reduced"], [0.5, 0.5], "sum")


@pytest.mark.parametrize("bias", MODES)
def test_biases_in_files_of_peft(tmp_path: Path, bias: str) -> None:
    """A file that PEFT saved beside another adapter has biases under that adapter's names too."""
    twin = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q"], bias=bias))
    twin.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v"]))
    trained = train(twin)
    twin.save_pretrained(tmp_path, selected_adapters=["default"])
    assert "base_model.model.v.base_layer.bias" in load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(outputs(LoraModel.from_pretrained(base(), tmp_path)), trained)


def steps(seed: int) -> Iterator[tuple[str, Any]]:
    """Yields operations on adapters "default", "b" and "c"; freezing is followed by setting."""
    draw = random.Random(seed)
    names = ["default", "b", "c"]
    for _ in range(8):
        kind = draw.choice(["set", "set two", "freeze", "frozen set", "layers", "block", "add"])
        if kind == "set two":
            yield "set", draw.sample(names, 2)
        elif kind == "freeze":
            yield "freeze", draw.choice(names)
            yield "set", draw.choice(names)
        elif kind == "frozen set":
            yield "frozen set", draw.choice(names)
            yield "set", draw.choice(names)
        else:
            yield kind, draw.choice(names)
    yield "set", "c"
    yield "delete", "default"
    yield "set", "b"
    yield "delete", "c"


def apply(library: Any, model: Any, kind: str, name: Any) -> Iterator[None]:
    """Takes a step of `steps`; yields wherever the parameters that train are to be compared."""
    tuner = model.base_model
    if kind in ("set", "frozen set"):
        tuner.set_adapter(name, inference_mode=kind == "frozen set")
    elif kind == "freeze":
        tuner.set_requires_grad(name, False)
    elif kind == "delete":
        model.delete_adapter(name)
    elif kind == "layers":
        tuner.disable_adapter_layers()
        yield
        tuner.enable_adapter_layers()
    elif kind == "block":
        with model.disable_adapter():
            yield
    elif "more" not in model.peft_config:
        model.add_adapter("more", library.LoraConfig(r=2, target_modules=["v", "head"]))
    yield


@pytest.mark.parametrize("bias", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_biases_train_as_the_factors_do(bias: str, seed: int) -> None:
    """Factors train as in PEFT, and the biases that PEFT gives an adapter train with them (R1)."""
    first = trains(peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q"], bias=bias)))[0]
    assert first == (
        {"q.bias"} if bias == "lora_only" else {"q.bias", "v.bias", "norm.bias", "head.bias"}
    )
    models = []
    for library in (fastlora, peft):
        model = library.get_peft_model(base(), library.LoraConfig(r=2, target_modules=["v"]))
        model.add_adapter("b", library.LoraConfig(r=2, target_modules=["q"], bias=bias))
        model.add_adapter("c", library.LoraConfig(r=2, target_modules=["q", "v"]))
        models.append(model)
    model, twin = models
    for kind, name in steps(seed):
        runs = (apply(fastlora, model, kind, name), apply(peft, twin, kind, name))
        for _ in zip(*runs, strict=True):
            biases, factors = trains(model)
            assert factors == trains(twin)[1], (kind, name)
            asked = "b" in model.active_adapters and any(".b." in factor for factor in factors)
            assert biases == (first if asked else set()), (kind, name)


def test_what_a_user_unfreezes_stays_trainable() -> None:
    """A new adapter, and activation, freeze no weight of the base; as in PEFT (R1)."""
    found = []
    for library in (fastlora, peft):
        model = library.get_peft_model(base(), library.LoraConfig(r=2, target_modules=["q"]))
        for name in ("v.weight", "norm.weight"):
            model.get_base_model().get_parameter(name).requires_grad_(True)
        model.add_adapter("b", library.LoraConfig(r=2, target_modules=["v"]))
        model.set_adapter("b")
        found.append(trains(model))
    assert found[0] == found[1]
    assert found[0][0] == {"v.weight", "norm.weight"}


def test_deleting_an_adapter_freezes_its_biases() -> None:
    """A deleted adapter leaves no bias behind that trains, disabled or not (R1)."""
    for disabled in (False, True):
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q"]))
        model.add_adapter("b", LoraConfig(r=2, target_modules=["v"], bias="all"))
        model.base_model.set_adapter(["default", "b"])
        if disabled:
            model.base_model.disable_adapter_layers()
        model.delete_adapter("b")
        model.base_model.enable_adapter_layers()
        biases, factors = trains(model)
        assert not biases and len(factors) == 2
