"""What the pages here adapt: random models of two layers, and a task that they can learn."""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

WORDS = 32


def tiny_llama(**settings: object) -> LlamaForCausalLM:
    """Returns the same random model at every call; with a real one, `from_pretrained`."""
    torch.manual_seed(0)
    config = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        **settings,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def tiny_moe(**settings: object) -> Qwen3MoeForCausalLM:
    """Returns the same random mixture of experts at every call: 8 experts, 2 for each token."""
    torch.manual_seed(0)
    config = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
        **settings,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).eval()


def counting(step: int, samples: int = 8, length: int = 10) -> torch.Tensor:
    """Returns samples ``[samples, length]`` in which each token is ``step`` above the last."""
    starts = torch.randint(0, WORDS, (samples, 1), generator=torch.Generator().manual_seed(step))
    return (starts + step * torch.arange(length)) % WORDS


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int = 30, lr: float = 2e-2) -> float:
    """Trains what trains of a model on one batch, and returns its last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


@torch.no_grad()
def loss_on(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> float:
    """Returns a model's loss on a batch."""
    return model(input_ids=ids, labels=ids, **options).loss.item()


def parse_arguments(doc: str | None) -> None:
    """Parse the command line of a script without options; ``--help`` prints its docstring."""
    show = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=doc, formatter_class=show).parse_args()
