"""Tiny mixtures of experts, with adapters on their stacks of weights: fastlora's and PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastlora.model.adapter_state import file_keys_to_state_keys

transformers = pytest.importorskip("transformers", minversion="5.0")

# Fields of each model's config besides those that all models have.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1},
        **{"n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    },
    "llama4_text": {
        **{"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8},
        **{"intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "nemotron_h": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
        **{"moe_shared_expert_intermediate_size": 8, "n_shared_experts": 1},
        **{"layers_block_type": ["attention", "moe"]},
    },
}


def moe_model(
    kind: str, dtype: torch.dtype = torch.float32, implementation: str = "", **fields: Any
) -> Any:
    """A random model of two layers with four experts; the same one at every call.

    ``fields`` go to the model's config.
    """
    torch.manual_seed(0)
    common = {
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"num_experts_per_tok": 2, "max_position_embeddings": 32, "pad_token_id": 0},
    }
    config = transformers.AutoConfig.for_model(kind, **{**common, **MODELS[kind], **fields})
    if implementation:
        config._experts_implementation = implementation
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # Some models start with stacks of zeros.
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def stacks_of(model: nn.Module) -> list[str]:
    """The names of a model's stacks of weights, without layers: ``experts.gate_up_proj``."""
    found = [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name]
    return sorted({".".join(name.split(".")[-2:]) for name in found})


class ExpertBlock(nn.Module):
    """The experts of a model's last layer, which is called with the choices of a router."""

    def __init__(self, kind: str, dtype: torch.dtype, implementation: str = "") -> None:
        super().__init__()
        model = moe_model(kind, dtype, implementation)
        found = [m for name, m in model.named_modules() if name.endswith("experts")]
        self.experts: Any = next(m for m in reversed(found) if "down_proj" in m._parameters)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., H]`` to ``[..., H]``."""
        y: torch.Tensor = self.experts(x.reshape(-1, x.shape[-1]), index, weights)
        return y.view(x.shape)


def routed_tokens(
    tokens: int, dtype: torch.dtype, seed: int = 2, idle: int | None = 2
) -> tuple[torch.Tensor, ...]:
    """Inputs of an `ExpertBlock`: two of four experts for each token, none for the idle expert."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator).to(torch.bfloat16).to(dtype)
    scores = torch.rand(tokens, 4, generator=generator)
    if idle is not None:
        scores[:, idle] = -1.0
    weights, index = scores.topk(2)
    return x.requires_grad_(), index, weights.to(torch.bfloat16).to(dtype).requires_grad_()


def file_gradients(model: Any, adapter: str = "default") -> dict[str, torch.Tensor | None]:
    """The gradients of an adapter's factors, by their keys in files; of fastlora's or PEFT's."""
    return {key: factor.grad for key, factor in file_parameters(model, adapter).items()}


def file_parameters(model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The factors of an adapter, by their keys in files; of fastlora's model or PEFT's."""
    parameters = dict(model.named_parameters())
    if hasattr(model, "base_model") and type(model).__module__.startswith("fastlora"):
        keys = file_keys_to_state_keys(model, adapter)
        return {disk: parameters[key] for disk, key in keys.items()}
    return {n.replace(f".{adapter}", ""): p for n, p in parameters.items() if f".{adapter}." in n}


def copy_random_factors(models: list[Any], adapter: str = "default", seed: int = 9) -> None:
    """Gives every lora_B of an adapter the same random values in all models."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for key, factor in sorted(file_parameters(model, adapter).items()):
            if "lora_B" in key:
                values = torch.randn(factor.shape, generator=generator) * 0.3
                factor.data = values.to(torch.bfloat16).to(factor.dtype)
