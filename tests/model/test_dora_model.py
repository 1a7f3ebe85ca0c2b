"""DoRA on models against PEFT: files both ways, patched models, quantized base layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import LoraConfig, get_peft_model
from fastlora.layers import FastLoraWrapper
from fastlora.layers.base_layers import dense_weight
from fastlora.validation import CheckpointError
from tests.support.masked_peft import randomize
from tests.support.peft_twins import peft
from tests.support.tiny import quantized_two_layers, tiny_llama

pytest.importorskip("transformers", reason="the models are transformers'")

IDS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(5))
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def logits(model: Any) -> torch.Tensor:
    """A model's output."""
    return model(input_ids=IDS).logits


def test_loading_over_an_adapter(tmp_path: Path) -> None:
    """Factors and magnitudes are those of the file; one without DoRA does not take them."""
    model = get_peft_model(tiny_llama().double(), LoraConfig(**CONFIG, use_dora=True)).eval()
    randomize(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_magnitude_vector.default.weight" in n for n in trained)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        before = logits(model)
        for parameter in trained.values():
            parameter.mul_(3)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), before)
    other = get_peft_model(tiny_llama().double(), LoraConfig(**CONFIG))
    with pytest.raises(CheckpointError, match="use_dora=True, but the loaded adapter"):
        other.load_adapter(tmp_path, "default")


def test_a_16_bit_model_starts_as_its_base() -> None:
    """fp32 magnitudes are not rounded to bf16 first, as PEFT's are: g is 1 to fp32 rounding."""
    base = tiny_llama().bfloat16()
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    model = get_peft_model(base, LoraConfig(**CONFIG, use_dora=True)).eval()
    magnitudes = [p for n, p in model.named_parameters() if "magnitude" in n]
    assert magnitudes and all(p.dtype == torch.float32 for p in magnitudes)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
def test_quantized_base_layers(kind: str, dora: bool) -> None:
    """Over a quantized linear ours is PEFT's layer, and a patched one is too, with gradients."""
    config = {"r": 4, "target_modules": ["q", "v"], "use_dora": dora}
    theirs = peft.get_peft_model(quantized_two_layers(kind), peft.LoraConfig(**config))
    randomize(theirs)
    state = {n: t for n, t in theirs.state_dict().items() if "lora_" in n}
    ours = get_peft_model(quantized_two_layers(kind), LoraConfig(**config))
    patched = peft.get_peft_model(quantized_two_layers(kind), peft.LoraConfig(**config))
    report = fastlora.patch(patched)
    # Blocks of 64 do not divide the 16 features of bitsandbytes' layer.
    for rows in (report.rows, fastlora.fusion_report(ours).rows):
        assert [row.fused for row in rows] == [kind != "bitsandbytes", True]
    assert type(patched.base_model.model.q).__qualname__.startswith("Fast")
    x = torch.randn(3, 16)
    results = []
    for model in (theirs, ours, patched):
        model.load_state_dict(state, strict=False)
        y = model(x)
        named = dict(sorted(model.named_parameters()))
        trained = [p for n, p in named.items() if "lora_" in n and p.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), trained)])
        if kind != "bitsandbytes":  # whose evaluation on a CPU takes no layer as small as this
            results[-1].append(model.eval()(x).detach())
    for other in results[1:]:
        assert len(other) == len(results[0]) >= 5
        for mine, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_4_bit_layer_in_evaluation() -> None:
    """bitsandbytes repacks the weight then, on some CPUs; the norm and a merge see the same one."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4")
    layer = FastLoraWrapper(base.to("cpu"))
    layer.add_adapter("a", r=4, use_dora=True, init_lora_weights=False)
    layer.set_adapter("a")
    x = torch.randn(5, 128)
    expected, weight = layer(x).detach(), dense_weight(base)
    with torch.no_grad():
        for _ in range(2):
            y = layer.eval()(x)
    # In evaluation bitsandbytes computes in bf16 there.
    assert (dense_weight(base) - weight).abs().max() < 2**-7 * weight.abs().max()
    assert (y - expected).abs().max() < 2**-6 * expected.abs().max()
