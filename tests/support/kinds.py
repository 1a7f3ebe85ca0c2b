"""Models of every kind of layer that adapters go on, beside a linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Words(nn.Module):
    """An embedding that scales what it looks up, as Gemma's, and a linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.kind = ScaledEmbedding(11, 8, padding_idx=0, **options)
        self.lin = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T]`` to ``[B, T, 5]``."""
        return self.lin(self.kind(ids).tanh())


class ScaledEmbedding(nn.Embedding):
    """`nn.Embedding` times a number."""

    embed_scale = 3.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As Gemma's."""
        return super().forward(input) * self.embed_scale


@dataclass(frozen=True)
class KindCase:
    """One kind of layer in a model.

    Attributes:
        make: The model; its layers ``kind`` and ``lin`` are the targets.
        x: Inputs of so many samples, always the same.
        inner: Name of the adapted layer.
        dora: Whether PEFT has DoRA there.
        lora_bias: Whether PEFT has lora_bias there.
        drops: Whether dropout acts.
        mixes: Whether rows of several adapters share a batch.
        merges: Whether PEFT merges it.
        config: Further fields.
    """

    make: Callable[[], nn.Module]
    x: Callable[[int], torch.Tensor]
    dora: bool = True
    lora_bias: bool = False
    drops: bool = False
    mixes: bool = True
    merges: bool = True
    config: dict[str, Any] = field(default_factory=dict)


def words(samples: int) -> torch.Tensor:
    """Ids ``[samples, 5]``, the padding among them."""
    return torch.arange(samples * 5).view(samples, 5) % 11


KINDS = {
    "embedding": KindCase(Words, words),
}
