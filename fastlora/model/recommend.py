"""`recommend`: what the field advises to start from, by the size of the base model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastlora.model.config import LoraConfig
from fastlora.model.estimate import logical_numel, own_parameters

_BILLION = 1_000_000_000
# Below so many parameters: range of r, range of alpha, dropout. The last row has no end.
_BY_SIZE: tuple[tuple[float, tuple[int, int], tuple[int, int], float], ...] = (
    (1 * _BILLION, (4, 8), (16, 32), 0.05),
    (7 * _BILLION, (8, 16), (32, 64), 0.05),
    (13 * _BILLION, (16, 32), (64, 64), 0.1),
    (float("inf"), (32, 32), (64, 64), 0.1),
)
# How QLoRA stores a base model (Dettmers et al., 2023, arXiv 2305.14314, sections 3 and 4): fields
# of transformers' BitsAndBytesConfig.
QLORA: Mapping[str, Any] = MappingProxyType(
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
)
_IN_4_BITS = ", base model in 4 bits (NF4, nested scales, products in bf16), paged AdamW"
# Of the memory, what a base model may take: activations, adapters and their optimizer need some.
_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Recommendation:
    """A start for the hyperparameters, and the ranges to search in.

    Attributes:
        num_params: Parameters of the base model that it is for.
        r: Rank to start with: the upper end of ``r_range``.
        lora_alpha: Alpha to start with: the lower end of ``lora_alpha_range``.
        lora_dropout: Dropout probability.
        target_modules: What to adapt: every linear layer but the output head.
        learning_rate: Of AdamW, after the warm-up.
        max_grad_norm: To clip each adapter's gradient to.
        r_range, lora_alpha_range, learning_rate_range: Lower and upper end.
        load_in: ``"4bit"`` where the base model in 16 bits leaves a step too little memory; None
            where it does not, or where nothing was said about memory.
    """

    num_params: int
    r: int
    lora_alpha: int
    lora_dropout: float
    r_range: tuple[int, int]
    lora_alpha_range: tuple[int, int]
    target_modules: str = "all-linear"
    learning_rate: float = 2e-4
    learning_rate_range: tuple[float, float] = (1e-4, 5e-4)
    max_grad_norm: float = 1.0
    load_in: str | None = None

    @property
    def optimizer(self) -> str:
        """The optimizer's class; with ``load_in`` a paged one, whose state may leave the GPU."""
        return "bitsandbytes.optim.PagedAdamW32bit" if self.load_in else "torch.optim.AdamW"

    def quantization_config(self) -> Any:
        """Returns what `from_pretrained` of transformers takes as that, or None.

        NF4 with nested scales and products in bf16, as QLoRA has it.
        """
        if self.load_in is None:
            return None
        library: Any = importlib.import_module("transformers")
        return library.BitsAndBytesConfig(**QLORA)

    def config(self, **changes: Any) -> LoraConfig:
        """Returns a config with these values.

        Args:
            **changes: Fields of `fastlora.LoraConfig` to set beside or instead.
        """
        fields: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }
        return LoraConfig(**(fields | changes))

    def __str__(self) -> str:
        """One line."""
        low, high = self.learning_rate_range
        return (
            f"{_size(self.num_params)} parameters: r {self.r} ({_range(self.r_range)}), "
            f"lora_alpha {self.lora_alpha} ({_range(self.lora_alpha_range)}), "
            f"lora_dropout {self.lora_dropout:g}, target_modules {self.target_modules!r}, "
            f"learning rate {self.learning_rate:g} ({low:g} to {high:g}), "
            f"gradient clipping at {self.max_grad_norm:g}" + (_IN_4_BITS if self.load_in else "")
        )


def recommend(
    model_or_num_params: nn.Module | int, *, memory_bytes: int | None = None
) -> Recommendation:
    """Returns where to start for a base model of this size.

    Under 1 billion parameters: r 4 to 8, alpha 16 to 32, dropout 0.05; from 1 to under 7: 8 to 16,
    32 to 64, 0.05; from 7 to under 13: 16 to 32, 64, 0.1; from 13: 32, 64, 0.1. The learning rate
    is 1e-4 to 5e-4 with gradient clipping throughout. Of the ranges, the largest r and the smallest
    alpha are the start, so that alpha is 2 r.

    With ``memory_bytes`` it says too whether to train as QLoRA does (Dettmers et al., 2023, arXiv
    2305.14314): where the parameters in 16 bits take more than 60 % of that memory.

    Args:
        model_or_num_params: A model (its adapters don't count), or a number of parameters.
        memory_bytes: Of the device that is to train it.

    Raises:
        TypeError: It is neither.
        ValueError: The number, the model's number of parameters, or ``memory_bytes`` is below 1.
    """
    if isinstance(model_or_num_params, nn.Module):
        count = sum(map(logical_numel, own_parameters(model_or_num_params)))
    elif isinstance(model_or_num_params, int) and not isinstance(model_or_num_params, bool):
        count = model_or_num_params
    else:
        raise TypeError(
            f"model_or_num_params is {model_or_num_params!r}, expected a model or a whole number "
            "of parameters"
        )
    if count < 1:
        raise ValueError(f"the model has {count} parameters, expected at least 1")
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory_bytes is {memory_bytes}, expected at least 1")
    r, alpha, dropout = next(row[1:] for row in _BY_SIZE if count < row[0])
    tight = memory_bytes is not None and 2 * count > _OF_MEMORY * memory_bytes
    return Recommendation(
        count, r[1], alpha[0], dropout, r, alpha, load_in="4bit" if tight else None
    )


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _size(count: int) -> str:
    for unit, name in ((_BILLION, "B"), (1_000_000, "M")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:,}"
