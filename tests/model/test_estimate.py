"""`fastlora.estimate`: counts against the adapters that are really made, and known sizes of OPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.estimate import format_bytes
from fastlora.model.step_memory import measure_peak_of_created_tensors
from fastlora.train import train_adapters
from fastlora.train.quantization import quantize_meta_model
from fastlora.validation import ConfigError, TargetNotFoundError
from tests.support.peak_bytes import peak_bytes
from tests.support.tiny import TwoLayers, adapted, tiny_llama

MIB = 1 << 20
# Parameters, hidden size, layers, heads, width of the feed-forward, of the embeddings.
OPT = {
    "125m": (125_239_296, 768, 12, 12, 3072, 768),
    "350m": (331_196_416, 1024, 24, 16, 4096, 512),
    "1.3b": (1_315_758_080, 2048, 24, 32, 8192, 2048),
}


def opt(size: str) -> Any:
    """An OPT of the real size, without memory."""
    transformers = pytest.importorskip("transformers", reason="makes OPT")
    _, hidden, layers, heads, width, embedding = OPT[size]
    config = transformers.OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=width,
        word_embed_proj_dim=embedding,
        do_layer_norm_before=size != "350m",
    )
    with torch.device("meta"):
        return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("size", "r", "parameters", "mib", "percent"),
    [
        ("125m", 16, 1_179_648, 4.5, 0.94),
        ("350m", 16, 3_145_728, 12, 0.95),
        ("1.3b", 16, 6_291_456, 24, 0.48),
        ("125m", 32, 2_359_296, 9, 1.88),
        ("350m", 32, 6_291_456, 24, 1.90),
        ("1.3b", 32, 12_582_912, 48, 0.96),
    ],
)
def test_opt(size: str, r: int, parameters: int, mib: float, percent: float) -> None:
    """What the published recipes for OPT give: r 16 and 32 on q, k, v and out."""
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    found = fastlora.estimate(opt(size), fastlora.LoraConfig(r=r, target_modules=targets))
    assert found.adapter_parameters == parameters
    assert found.base_parameters == OPT[size][0]
    assert found.weight_bytes == found.gradient_bytes == mib * MIB
    assert found.optimizer_bytes == 2 * mib * MIB
    assert found.training_bytes == 4 * mib * MIB
    assert found.base_bytes == 4 * OPT[size][0]
    assert round(100 * found.share, 2) == percent
    for words in (f"{parameters:,} parameters", f"{percent:.2f} %", f"weights {mib:.1f} MiB"):
        assert words in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_counts_what_is_made(dtype: torch.dtype) -> None:
    """Bytes too; the base is left as it was. (What features count: test_features.py.)"""
    pytest.importorskip("transformers")
    base = tiny_llama().to(dtype)
    before = list(base.state_dict())
    config = fastlora.LoraConfig(
        r=2, target_modules=["o_proj"], lora_bias=True, modules_to_save=["norm"], bias="all"
    )
    found = fastlora.estimate(base, config)
    assert list(base.state_dict()) == before and all(p.requires_grad for p in base.parameters())
    total = sum(p.numel() for p in base.parameters())
    model = fastlora.get_peft_model(base, config)
    assert found.adapter_parameters == model.get_nb_trainable_parameters()[0]
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found.base_parameters == total
    # The same before the second adapter, of the model and of what it wraps.
    for each in (model, model.get_base_model()):
        assert fastlora.estimate(each, config) == found
    # What the first one has a copy of trains no bias of the second one's either.
    other = fastlora.LoraConfig(r=2, target_modules=["q"], bias="all")
    model = adapted(target_modules=["q"], modules_to_save=["head"])
    counted = fastlora.estimate(model, other).adapter_parameters
    model.add_adapter("b", other)
    model.set_adapter("b")
    assert counted == model.get_nb_trainable_parameters()[0]


def test_peft_config_and_optimizers() -> None:
    """PEFT's own config object counts alike; the optimizer's state follows its kind."""
    peft = pytest.importorskip("peft")
    model = TwoLayers()
    config = peft.LoraConfig(r=2, target_modules=["q", "v"])
    found = fastlora.estimate(model, config, optimizer_states=1)
    assert found.adapter_parameters == 2 * (16 + 24) * 2 and found.modules == 2
    assert found.optimizer_bytes == found.weight_bytes
    assert fastlora.estimate(model, config, optimizer_states=0).optimizer_bytes == 0
    half = fastlora.estimate(model.bfloat16(), config, autocast_adapter_dtype=False)
    assert half.weight_bytes == found.weight_bytes // 2


def test_a_bias_of_two_names_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("tied", model[0])
    config = fastlora.LoraConfig(r=2, target_modules=["0"], bias="lora_only")
    found = fastlora.estimate(model, config).adapter_parameters
    assert found == fastlora.get_peft_model(model, config).get_nb_trainable_parameters()[0]


def test_frozen_factors_are_not_counted() -> None:
    """MiCA never trains lora_B."""
    config = fastlora.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights="mica")
    found = fastlora.estimate(TwoLayers(), config)
    model = fastlora.get_peft_model(TwoLayers(), config)
    assert found.adapter_parameters == model.get_nb_trainable_parameters()[0]
    assert found.weight_bytes == 4 * found.adapter_parameters


def test_errors() -> None:
    """Errors are those of get_peft_model."""
    model = TwoLayers()
    with pytest.raises(TargetNotFoundError, match="close names|matches no module"):
        fastlora.estimate(model, fastlora.LoraConfig(target_modules=["query"]))
    with pytest.raises(ConfigError, match="expected a LoraConfig"):
        fastlora.estimate(model, {"r": 8})
    with pytest.raises(ValueError, match="optimizer_states must be at least 0, got -1"):
        fastlora.estimate(model, fastlora.LoraConfig(target_modules=["q"]), optimizer_states=-1)
    assert isinstance(model.q, nn.Linear)


def test_human_bytes() -> None:
    """Powers of 1024."""
    assert [format_bytes(n) for n in (0, 1023, 1024, 9 * MIB, 3 << 40)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB"),
        *("9.0 MiB", "3.0 TiB"),
    ]


@pytest.mark.parametrize(
    ("bits", "scales"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 4 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 1 / 64 + 4 / 64 / 256),
        ({"load_in_8bit": True}, 0),
    ],
    ids=["nf4", "nested", "int8"],
)
def test_quantized_by_bitsandbytes(bits: dict[str, Any], scales: float, tmp_path: Path) -> None:
    """What a model's tensors really hold, before it is quantized as after."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**bits)
    with torch.device("meta"):
        empty = tiny_llama(hidden_size=128, intermediate_size=256)
    plain = sum(p.numel() for p in empty.parameters())
    quantize_meta_model(empty, config)
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    real = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    targets = fastlora.LoraConfig(r=4, target_modules="all-linear")
    found, made = fastlora.estimate(empty, targets), fastlora.estimate(real, targets)
    assert found.base_parameters == made.base_parameters == plain
    assert found.base_bytes == made.base_bytes and found.scale_bytes == made.scale_bytes
    kinds = ("Params4bit", "Int8Params")
    weights = [m for m in real.modules() if type(getattr(m, "weight", None)).__name__ in kinds]
    assert len(weights) == 14
    numel = sum(m.in_features * m.out_features for m in weights)
    bytes_each = 0.5 if "load_in_4bit" in bits else 1
    rest = sum(p.nbytes for p in real.parameters() if type(p).__name__ not in kinds)
    assert found.base_bytes - found.scale_bytes == numel * bytes_each + rest
    rows = 4 * sum(m.out_features for m in weights)
    tables = 14 * (64 + (1024 + 4) * ("bnb_4bit_use_double_quant" in bits))
    expected = numel * scales + tables if scales else rows
    assert found.scale_bytes == pytest.approx(expected, rel=0.02)
    assert found.workspace_bytes == 256 * 128 * (4 if scales else 2)
    assert "one dequantized weight" in str(found)


def test_quantized_by_torchao() -> None:
    """Codes and scales of what the weight is made of."""
    library = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    library.quantize_(model, library.Int8WeightOnlyConfig(version=2))
    found = fastlora.estimate(model, fastlora.LoraConfig(r=2, target_modules=["0"]))
    assert found.base_bytes - found.scale_bytes == 64 * 32 + 2 * 32
    assert found.scale_bytes == model[0].weight.scale.nbytes + model[0].weight.zero_point.nbytes
    assert found.workspace_bytes == 64 * 32 * 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_what_a_step_holds(checkpointing: bool) -> None:
    """Counted without memory, it is what PyTorch's allocator sees of the same step."""
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            base = tiny_llama(num_hidden_layers=4)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        config = fastlora.LoraConfig(r=4, target_modules="all-linear")
        model = fastlora.get_peft_model(base, config).train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        ids = torch.zeros(4, 256, dtype=torch.long, device=device)

        def step(model: Any = model, ids: torch.Tensor = ids) -> None:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

        if device == "cpu":
            step()
        found.append((measure_peak_of_created_tensors if device == "meta" else peak_bytes)(step))
    assert found[0] == pytest.approx(found[1], rel=0.15)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_what_a_step_of_experts_holds(kind: str) -> None:
    """A mixed batch of adapters on experts, counted without memory and by PyTorch's allocator."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    transformers = pytest.importorskip("transformers")
    config = moe_models.moe_model(kind).config
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            base = transformers.AutoModelForCausalLM.from_config(config)
        model = fastlora.get_peft_model(base, fastlora.LoraConfig(target_parameters=stacks), "a")
        model.add_adapter("b", fastlora.LoraConfig(r=4, target_parameters=stacks[1:]))
        train_adapters(model.train(), ["a", "b"])
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        ids = torch.arange(4 * 64, device=device).view(4, 64) % 32

        def step(model: Any = model, ids: torch.Tensor = ids) -> None:
            with fastlora.adapters(model, ["a", "b", None, "a"]):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

        if device == "cpu":
            step()
        found.append((measure_peak_of_created_tensors if device == "meta" else peak_bytes)(step))
    assert found[0] == pytest.approx(found[1], rel=0.15)
