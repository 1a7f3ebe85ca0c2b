"""Small models that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiny_llama(**changes: Any) -> Any:
    """A random Llama of two layers (needs transformers); the same one at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


class TwoLayers(nn.Module):
    """Two linears, a norm and a head, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.v = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 16]`` to ``[..., 5]``."""
        return self.head(self.v(self.norm(self.q(x)).relu()))


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Gives every lora_B of a model a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
