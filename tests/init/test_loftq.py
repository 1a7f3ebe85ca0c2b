"""LoftQ: a base weight of a few bits, and factors for what that loses; beside PEFT's."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora import LoftQConfig
from fastlora.init.loftq import fake_quantize as rounded
from fastlora.layers.base_layers import dense_weight
from fastlora.validation import (
    CheckpointError,
    ConfigError,
    InitializationError,
    UnsupportedLayerError,
)
from tests.support.inits import (
    FIELDS,
    assert_same_step,
    base_weight,
    layers_of,
    peft,
    started,
    train_a_bit,
    two_layers,
)
from tests.support.tiny import TwoLayers, quantized_two_layers

bnb = pytest.importorskip("bitsandbytes")
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def wide() -> nn.Module:
    """The same model at every call, its rows whole blocks: what bitsandbytes needs on a CPU."""
    torch.manual_seed(3)
    model = TwoLayers()
    model.q, model.v = nn.Linear(64, 128), nn.Linear(128, 64)
    model.norm, model.head = nn.LayerNorm(128), nn.Linear(64, 5)
    return model


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's own functions, which name a GPU, with the CPU in its place."""
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    for name in ("loftq_init", "_loftq_init_new"):
        source = inspect.getsource(getattr(loftq_utils, name)).replace('"cuda"', '"cpu"')
        space = vars(loftq_utils) | {"clear_device_cache": lambda: None}
        exec(source, space)  # noqa: S102 - PEFT's
        monkeypatch.setattr(loftq_utils, name, space[name])
    monkeypatch.setattr(layer, "loftq_init", loftq_utils.loftq_init)
    return loftq_utils


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_as_in_peft(on_a_cpu: Any, bits: int, iterations: int) -> None:
    """Rounded weights, products of factors, outputs and gradients."""
    base = wide()
    models = []
    for library in (fastlora, peft):
        config = library.LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
        models.append(
            started(library, copy.deepcopy(base), init_lora_weights="loftq", loftq_config=config)
        )
    ours, theirs = models
    for name, layer in layers_of(ours).items():
        other = layers_of(theirs)[name]
        torch.testing.assert_close(base_weight(layer), base_weight(other), atol=1e-5, rtol=1e-5)
        products = [
            each.lora_B["default"].weight @ each.lora_A["default"].weight for each in (layer, other)
        ]
        torch.testing.assert_close(*products, atol=1e-5, rtol=1e-5)
    assert_same_step(ours, theirs, torch.randn(5, 64), tolerance=2e-5)
    assert (
        ours.peft_config["default"].to_dict()["loftq_config"]
        == (theirs.peft_config["default"].to_dict()["loftq_config"])
    )


def test_normal_floats_are_bitsandbytes() -> None:
    for shape in ((48, 64), (7, 9), (130, 33)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        # Whole blocks: of others bitsandbytes compiles a function on a CPU, in half a minute.
        blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        codes, state = bnb.functional.quantize_4bit(blocks, blocksize=64, quant_type="nf4")
        expected = bnb.functional.dequantize_4bit(codes, state).flatten()[: weight.numel()]
        torch.testing.assert_close(rounded(weight, 4).flatten(), expected, atol=1e-6, rtol=1e-6)
    zeros = torch.zeros(3, 64)
    assert rounded(zeros, 4).equal(zeros) and rounded(zeros, 8).equal(zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_falls(bits: int) -> None:
    """With the factors less is lost than without; more bits lose less."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    weight = linear.weight.detach().clone()
    for iterations in (1, 5) if bits > 2 else (1,):
        layer = fastlora.FastLoraLinear.from_linear(
            copy.deepcopy(linear),
            r=8,
            init_lora_weights="loftq",
            init_config=LoftQConfig(loftq_bits=bits, loftq_iter=iterations),
        )
        assert layer.weight.unique().numel() <= 64 * 48 * 2**bits
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        error = float((layer.weight + update - weight).norm())
        assert error < 0.95 * float((rounded(weight, bits) - weight).norm())
        assert error < {2: 0.5, 4: 0.12, 8: 0.01}[bits] * float(weight.norm())


def test_files(tmp_path: Path) -> None:
    """Loading rounds the base weight again; there is no plain LoRA for the weight as it was."""
    base = two_layers()
    fields = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}
    model = started(fastlora, copy.deepcopy(base), **fields)
    train_a_bit(model)
    model.save_pretrained(tmp_path / "trained")
    loaded = fastlora.LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained")
    torch.testing.assert_close(loaded(X), model(X), atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="supports only initializations that subtract"):
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "trained"
        )


def test_files_of_peft_load(on_a_cpu: Any, tmp_path: Path) -> None:
    base = wide()
    fields = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=8)}
    theirs = started(peft, copy.deepcopy(base), **fields)
    train_a_bit(theirs)
    theirs.save_pretrained(tmp_path)
    for library in (fastlora, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        x = torch.randn(5, 64)
        torch.testing.assert_close(loaded(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_replacing_weights_of_a_quantized_model(on_a_cpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(two_layers_of_quantized(), path)
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q", "v"]}
    ours = fastlora.get_peft_model(
        quantized_two_layers("bitsandbytes"), fastlora.LoraConfig(**config)
    )
    theirs = peft.get_peft_model(quantized_two_layers("bitsandbytes"), peft.LoraConfig(**config))
    mine, other = layers_of(ours), layers_of(theirs)
    untouched = mine["v"].lora_A["default"].weight.clone()
    fastlora.replace_lora_weights_loftq(ours, path)
    on_a_cpu.replace_lora_weights_loftq(theirs, str(path))
    products = [
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for layer in (mine["q"], other["q"])
    ]
    torch.testing.assert_close(*products, atol=1e-5, rtol=1e-5)
    weight = two_layers_of_quantized()["q.weight"]
    base = dense_weight(mine["q"].get_base_layer())
    assert (base + products[0] - weight).norm() < 0.9 * (base - weight).norm()
    assert mine["v"].lora_A["default"].weight.equal(untouched)  # it is not quantized
    # Taken back where the callback says so; folders with files in parts are read too.
    kept = mine["q"].lora_A["default"].weight.clone()
    seen = []

    def no(model: nn.Module, name: str) -> bool:
        seen.append(name)
        assert not mine["q"].lora_A["default"].weight.equal(kept)
        return False

    with torch.no_grad():
        kept = mine["q"].lora_A["default"].weight.mul_(1.5).clone()
    fastlora.replace_lora_weights_loftq(ours, tmp_path, callback=no)
    assert seen == ["q"] and mine["q"].lora_A["default"].weight.equal(kept)
    parts = tmp_path / "parts"
    parts.mkdir()
    path.rename(parts / "one.safetensors")
    (parts / "model.safetensors.index.json").write_text(
        '{"weight_map": {"q.weight": "one.safetensors", "other": "damaged.safetensors"}}'
    )
    (parts / "damaged.safetensors").write_bytes(b"which no layer needs")
    fastlora.replace_lora_weights_loftq(ours, parts)
    product = mine["q"].lora_B["default"].weight @ mine["q"].lora_A["default"].weight
    torch.testing.assert_close(product, products[0], atol=1e-6, rtol=1e-6)


def two_layers_of_quantized() -> dict[str, torch.Tensor]:
    """The weights that `tiny.quantized_two_layers` quantizes."""
    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in TwoLayers().state_dict().items()}


def test_replacing_errors(tmp_path: Path) -> None:
    config = fastlora.LoraConfig(r=4, target_modules=["q"])
    model = fastlora.get_peft_model(quantized_two_layers("bitsandbytes"), config)
    before = copy.deepcopy(layers_of(model)["q"].state_dict())
    with pytest.raises(CheckpointError, match="Could not find the weights file"):
        fastlora.replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(ConfigError, match="must pass the model_path"):
        fastlora.replace_lora_weights_loftq(model)
    save_file({"v.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no q.weight"):
        fastlora.replace_lora_weights_loftq(model, tmp_path)
    save_file({"q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(2, 2\), but this model expects \(24, 16\)"):
        fastlora.replace_lora_weights_loftq(model, tmp_path)
    save_file({"q.weight": torch.full((24, 16), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(InitializationError, match="layer 'q': .* infinite values"):
        fastlora.replace_lora_weights_loftq(model, tmp_path)
    after = layers_of(model)["q"].state_dict()
    assert all(after[key].equal(value) for key, value in before.items() if "lora" in key)
    plain = fastlora.get_peft_model(two_layers(), fastlora.LoraConfig(**FIELDS))
    with pytest.raises(UnsupportedLayerError, match="No bnb LoRA module found"):
        fastlora.replace_lora_weights_loftq(plain, tmp_path)
    with pytest.raises(UnsupportedLayerError, match="'loftq' changes the base weight"):
        started(
            fastlora,
            quantized_two_layers("bitsandbytes"),
            target_modules=["q"],
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": 4},
        )
    for values in ({"loftq_bits": 3}, {"loftq_iter": 0}, {"loftq_iter": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            LoftQConfig(**values)
