"""`fastlora.recommend`: the advice by size, and that a config can be made of it."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch

import fastlora
from tests.support.tiny import TwoLayers, tiny_llama

B = 1_000_000_000


@pytest.mark.parametrize(
    ("count", "r", "alpha", "dropout"),
    [
        (1, (4, 8), (16, 32), 0.05),
        (135_000_000, (4, 8), (16, 32), 0.05),
        (B - 1, (4, 8), (16, 32), 0.05),
        (B, (8, 16), (32, 64), 0.05),
        (7 * B - 1, (8, 16), (32, 64), 0.05),
        (7 * B, (16, 32), (64, 64), 0.1),
        (13 * B - 1, (16, 32), (64, 64), 0.1),
        (13 * B, (32, 32), (64, 64), 0.1),
        (405 * B, (32, 32), (64, 64), 0.1),
    ],
)
def test_by_size(count: int, r: tuple[int, int], alpha: tuple[int, int], dropout: float) -> None:
    """The start lies in the ranges, and alpha is 2 r."""
    found = fastlora.recommend(count)
    assert (found.r_range, found.lora_alpha_range, found.lora_dropout) == (r, alpha, dropout)
    assert r[0] <= found.r <= r[1] and alpha[0] <= found.lora_alpha <= alpha[1]
    assert found.lora_alpha == 2 * found.r
    assert found.learning_rate_range == (1e-4, 5e-4) and 1e-4 <= found.learning_rate <= 5e-4
    assert found.max_grad_norm == 1.0 and found.num_params == count
    config = found.config(task_type="CAUSAL_LM", r=3)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, dropout)
    assert config.target_modules == "all-linear"
    assert found.config(r=3, lora_alpha=5).lora_alpha == 5
    assert found.config(use_rslora=True).lora_alpha == found.lora_alpha


def test_by_model() -> None:
    """A model counts without its adapters, and a tied weight once."""
    pytest.importorskip("transformers")
    base = tiny_llama()
    count = sum(p.numel() for p in base.parameters())
    assert fastlora.recommend(base).num_params == count
    model = fastlora.get_peft_model(base, fastlora.recommend(base).config())
    assert fastlora.recommend(model) == fastlora.recommend(count)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fastlora.recommend(model).r = 3  # type: ignore[misc]  # that is the point


def test_str() -> None:
    """One line with everything."""
    assert str(fastlora.recommend(6_738_000_000)) == (
        "6.74B parameters: r 16 (8 to 16), lora_alpha 32 (32 to 64), lora_dropout 0.05, "
        "target_modules 'all-linear', learning rate 0.0002 (0.0001 to 0.0005), "
        "gradient clipping at 1"
    )
    assert str(fastlora.recommend(70 * B)).startswith("70B parameters: r 32 (32), lora_alpha 64 (")
    count = sum(p.numel() for p in TwoLayers().parameters())
    assert str(fastlora.recommend(TwoLayers())).startswith(f"{count:,} parameters: r 8 ")


@pytest.mark.parametrize("wrong", [0, -5, "7b", 7e9, True, None], ids=repr)
def test_errors(wrong: Any) -> None:
    """Neither a model nor a number of parameters."""
    with pytest.raises((TypeError, ValueError), match="must be"):
        fastlora.recommend(wrong)


def test_by_memory() -> None:
    """QLoRA where 16 bits leave too little: Llama-3.1-8B takes 16 GB of a card's 24, or of 80."""
    count = 8_030_000_000
    for memory, load_in in ((24 * B, "4bit"), (80 * B, None), (None, None)):
        found = fastlora.recommend(count, memory_bytes=memory)
        assert found.load_in == load_in
        assert ("in 4 bits (NF4, double quantization, bf16 compute)" in str(found)) == bool(load_in)
        assert ("Paged" in found.optimizer) == bool(load_in)
        if load_in is None:
            assert found.quantization_config() is None
    with pytest.raises(ValueError, match="memory_bytes must be at least 1, got 0"):
        fastlora.recommend(count, memory_bytes=0)
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = fastlora.recommend(count, memory_bytes=24 * B).quantization_config()
    assert config.load_in_4bit and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "rank", "excluded"),
    [
        ("qwen3_moe", 4, {"gate"}),
        ("mixtral", 4, {"gate"}),
        ("deepseek_v3", 4, {"gate"}),
        ("gpt_oss", 4, {"router"}),
        ("llama4_text", 8, {"router"}),
        ("nemotron_h", 4, {"gate"}),
        ("hunyuan_v1_moe", 4, {"gate", "gate.wg"}),
    ],
)
def test_experts(kind: str, rank: int, excluded: set[str]) -> None:
    """Experts have rank r / experts per token, whatever the model type; routers stay frozen."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    base = moe_models.moe_model(kind)
    stacks = moe_models.stacks_of(base)
    advice = fastlora.recommend(base)
    assert (advice.r, advice.expert_r, list(advice.target_parameters)) == (8, rank, sorted(stacks))
    assert f"target_parameters {sorted(stacks)} with r {rank}, " in str(advice)
    assert (advice.lora_dropout, advice.config().exclude_modules) == (0.0, excluded)
    for changes, expected in (({}, rank), ({"r": 6}, rank * 6 // 8)):
        config = advice.config(**changes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            estimated = fastlora.estimate(base, config)
            model = fastlora.get_peft_model(moe_models.moe_model(kind), config)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trained.values()) == estimated.adapter_parameters
        assert not any(".gate." in n or ".router." in n for n in trained)
        ranks = {n: m.r["default"] for n, m in model.named_modules() if getattr(m, "r", None)}
        experts = {n for n in ranks if "parameters_with_adapters" in n}
        assert {n.rpartition(".")[2] for n in experts} == {n.partition(".")[2] for n in stacks}
        assert all(r == (expected if n in experts else config.r) for n, r in ranks.items())
        assert fastlora.recommend(model) == advice


def test_patterns_and_exclusions_are_added() -> None:
    """Ranks of other modules leave those of experts, and routers stay excluded."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    advice = fastlora.recommend(moe_models.moe_model("qwen3_moe"))
    config = advice.config(rank_pattern={"q_proj": 3}, exclude_modules=["o_proj"])
    name = "model.layers.0.mlp.experts.down_proj"
    assert (config.rank_for("model.layers.0.self_attn.q_proj"), config.rank_for(name)) == (3, 4)
    assert config.exclude_modules == {"gate", "o_proj"}
    assert advice.config(rank_pattern={"down_proj": 3}).rank_for(name) == 3
    for excluded in (["o_proj"], r".*\.o_proj"):
        config = advice.config(exclude_modules=excluded)
        model = fastlora.get_peft_model(moe_models.moe_model("qwen3_moe"), config)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and not any(".o_proj." in n or ".gate." in n for n in trained)


def test_quantized_experts_are_left_out() -> None:
    """FP8 stacks do not support adapters, so the config adapts the other layers."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    base = moe_models.moe_model("qwen3_moe")
    for parameter in base.parameters():
        if parameter.dim() == 3:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    advice = fastlora.recommend(base)
    assert advice.target_parameters == ()
    assert advice.exclude_modules == ("experts.down_proj", "experts.gate_up_proj", "gate")
    model = fastlora.get_peft_model(base, advice.config())
    assert model.base_model.targeted_parameter_names == []


def test_other_targets_than_those_of_experts() -> None:
    """Targets that are given decide about experts, which then have the rank that is given."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    advice = fastlora.recommend(moe_models.moe_model("qwen3_moe"))
    config = advice.config(target_modules=["q_proj"])
    assert (config.target_parameters, config.rank_pattern, config.exclude_modules) == (
        None,
        {},
        None,
    )
    config = advice.config(target_parameters=["experts.down_proj"])
    assert (config.target_parameters, config.rank_pattern) == (["experts.down_proj"], {})
    assert fastlora.recommend(moe_models.moe_model("qwen3_moe").config.hidden_size).expert_r == 8
