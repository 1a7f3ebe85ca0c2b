"""Models of every kind of layer that adapters go on, beside a linear."""

from __future__ import annotations

import functools
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


class Pictures(nn.Module):
    """A convolution of so many dimensions, and a linear on the mean of its channels."""

    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        options = {"kernel_size": 3, "padding": 1, **options}
        self.kind = conv(4, 8, **options)
        self.lin = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 4, ...]`` to ``[B, 5]``."""
        return self.lin(self.kind(x).tanh().flatten(2).mean(2))


def pictures(dims: int) -> Callable[[int], torch.Tensor]:
    """Makes inputs ``[samples, 4, 6, ...]``."""

    def make(samples: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(samples, 4, *[6] * dims, generator=generator)

    return make


class Attentive(nn.Module):
    """Self-attention, and a linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.kind = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.lin = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T, 8]`` to ``[B, T, 5]``."""
        y, _ = self.kind(x, x, x, need_weights=False)
        return self.lin(y.tanh())


def once(model: Any) -> Any:
    """Has a model of PEFT's add the update of out_proj once; it merges it twice in a forward."""
    out_proj = model.base_model.model.kind.base_layer.out_proj
    out_proj.merge = out_proj.unmerge = lambda *args, **kwargs: None
    return model


class Turned(nn.Module):
    """A Conv1D of transformers, a linear with its weight the other way round, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.kind = Conv1D(6, 8)
        nn.init.normal_(self.kind.bias)
        self.lin = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T, 8]`` to ``[B, T, 5]``."""
        return self.lin(self.kind(x).tanh())


def sentences(samples: int) -> torch.Tensor:
    """Vectors ``[samples, 5, 8]``."""
    return torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(4))


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
        linear: Whether it is a kind of linear layer.
        config: Further fields.
        mend: Makes a model of PEFT's compute what it should.
    """

    make: Callable[[], nn.Module]
    x: Callable[[int], torch.Tensor]
    dora: bool = True
    lora_bias: bool = False
    drops: bool = False
    mixes: bool = True
    merges: bool = True
    linear: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    mend: Callable[[Any], Any] = lambda model: model


def words(samples: int) -> torch.Tensor:
    """Ids ``[samples, 5]``, the padding among them."""
    return torch.arange(samples * 5).view(samples, 5) % 11


_CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "conv1d": (1, {"stride": 2, "bias": False}),
    "conv2d": (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "conv2d of a point": (2, {"kernel_size": 1, "padding": 0}),
    "conv2d, padded to the same size": (2, {"padding": "same"}),
    "conv3d": (3, {}),
    "conv2d in groups": (2, {"groups": 2}),
}


def _convolution(dims: int, options: dict[str, Any]) -> KindCase:
    return KindCase(
        functools.partial(Pictures, dims, **options),
        pictures(dims),
        lora_bias=options.get("bias", True),
        drops=True,
        merges=options.get("groups", 1) == 1,
    )


KINDS = {
    "embedding": KindCase(Words, words),
    "Conv1D of transformers": KindCase(Turned, sentences, lora_bias=True, linear=True),
    "attention": KindCase(Attentive, sentences, dora=False, mixes=False, mend=once),
    **{name: _convolution(*case) for name, case in _CONVOLUTIONS.items()},
}
