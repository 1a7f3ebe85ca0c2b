"""`recommend`: recommend starting values of hyperparameters for a base model of a given size."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastlora.model.base_modules import base_module_of, modules_with_original_names
from fastlora.model.config import LoraConfig
from fastlora.model.estimate import unique_base_parameters, unpacked_numel
from fastlora.model.stacked_experts import (
    base_parameters_outside_auxiliary_wrappers,
    experts_layer_class,
    stacked_experts_among,
    stacks_with_expert_layer_class,
)
from fastlora.model.tuner import tuner_of
from fastlora.validation import check_rank

_BILLION = 1_000_000_000
# Rows of: exclusive upper bound on the number of parameters, range of r, range of alpha, dropout.
_BY_SIZE: tuple[tuple[float, tuple[int, int], tuple[int, int], float], ...] = (
    (1 * _BILLION, (4, 8), (16, 32), 0.05),
    (7 * _BILLION, (8, 16), (32, 64), 0.05),
    (13 * _BILLION, (16, 32), (64, 64), 0.1),
    (float("inf"), (32, 32), (64, 64), 0.1),
)
# The quantization that QLoRA uses for the base model (Dettmers et al., 2023, arXiv 2305.14314,
# sections 3 and 4), as fields of BitsAndBytesConfig in transformers.
QLORA: Mapping[str, Any] = MappingProxyType(
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
)
_IN_4_BITS = ", base model in 4 bits (NF4, double quantization, bf16 compute), paged AdamW"
# The fraction of the memory that the base model may take. The rest is for activations, adapters,
# and the optimizer state.
_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Recommendation:
    """The recommended LoRA settings for a model.

    The settings for training an adapter on the model include the hyperparameters, and the modules
    and parameters to adapt. The rank, alpha, and learning rate each have a starting value and a
    range to search.

    Attributes:
        num_params: The number of parameters of the base model.
        r: The rank to start with, the upper end of ``r_range``.
        lora_alpha: The value of alpha to start with, the lower end of ``lora_alpha_range``.
        lora_dropout: The dropout probability.
        target_modules: The modules to adapt: every linear layer except the output head.
        learning_rate: The learning rate of AdamW after the warm-up.
        max_grad_norm: The maximum norm to which each adapter's gradient is clipped.
        r_range: The lower and upper ends of the suggested range of ``r``.
        lora_alpha_range: The lower and upper ends of the suggested range of ``lora_alpha``.
        learning_rate_range: The lower and upper ends of the suggested range of learning rates.
        load_in: ``"4bit"`` if the base model in 16 bits would leave too little memory for a
            training step. None if it would not, or if no memory size was given.
        target_parameters: The stacked weights of experts to adapt. Empty if the model has none, or
            if only a number of parameters was given.
        experts_per_token: The number of experts that process a token, or 1 if it is unknown.
        exclude_modules: The routers of experts, the linear layers inside them, and quantized
            stacks of experts.
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
    target_parameters: tuple[str, ...] = ()
    experts_per_token: int = 1
    exclude_modules: tuple[str, ...] = ()

    @property
    def expert_r(self) -> int:
        """The recommended rank of the adapters on experts.

        The rank is ``r // experts_per_token``, with a minimum of 1.
        """
        return _expert_rank(self.r, self.experts_per_token)

    @property
    def optimizer(self) -> str:
        """The recommended optimizer.

        The value is the full name of the optimizer's class. If ``load_in`` is not None, this class
        is a paged optimizer, which can move its state out of GPU memory.
        """
        return "bitsandbytes.optim.PagedAdamW32bit" if self.load_in else "torch.optim.AdamW"

    def quantization_config(self) -> Any:
        """Return the recommended quantization config.

        It is the ``quantization_config`` for the `from_pretrained` method of transformers. The
        config selects NF4 with nested scales and computation in bf16, as in QLoRA. The result is
        None if ``load_in`` is None.
        """
        if self.load_in is None:
            return None
        library: Any = importlib.import_module("transformers")
        return library.BitsAndBytesConfig(**QLORA)

    def config(self, **changes: Any) -> LoraConfig:
        """Create a `fastlora.LoraConfig` with the recommended values.

        If ``changes`` contains ``r``, the rank on experts is ``r / experts_per_token``, and
        ``lora_alpha`` is ``2 * r`` unless it is also in ``changes``. If ``changes`` contains other
        targets, experts are adapted only if these targets select them, with rank r. Otherwise, a
        ``rank_pattern`` or ``exclude_modules`` in ``changes`` is added to the recommended value.
        Its patterns take precedence over the recommended patterns.

        Args:
            **changes: Values of further fields, or values that replace the recommended values.

        Raises:
            ConfigError: If the value of a field is invalid.
        """
        fields: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": 2 * check_rank(changes["r"]) if "r" in changes else self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }
        targets = changes.get("target_modules", self.target_modules)
        if self.exclude_modules and targets == self.target_modules:
            fields["exclude_modules"] = _merge_exclude_modules(self.exclude_modules, changes)
        if self.target_parameters and targets == self.target_modules:
            rank = _expert_rank(changes.get("r", self.r), self.experts_per_token)
            fields["target_parameters"] = list(self.target_parameters)
            if "target_parameters" not in changes:
                recommended = {re.escape(n): rank for n in self.target_parameters}
                given = changes.get("rank_pattern") or {}
                # The first pattern that matches a name determines the rank.
                fields["rank_pattern"] = {**given, **recommended, **given}
        merged = fields.keys() & {"exclude_modules", "rank_pattern"}
        changes = {name: value for name, value in changes.items() if name not in merged}
        return LoraConfig(**(fields | changes))

    def __str__(self) -> str:
        """Return a one-line summary of the recommendation."""
        low, high = self.learning_rate_range
        return (
            f"{_size(self.num_params)} parameters: r {self.r} ({_range(self.r_range)}), "
            f"lora_alpha {self.lora_alpha} ({_range(self.lora_alpha_range)}), "
            f"lora_dropout {self.lora_dropout:g}, target_modules {self.target_modules!r}, "
            + (
                f"target_parameters {list(self.target_parameters)} with r {self.expert_r}, "
                if self.target_parameters
                else ""
            )
            + f"learning rate {self.learning_rate:g} ({low:g} to {high:g}), "
            f"gradient clipping at {self.max_grad_norm:g}" + (_IN_4_BITS if self.load_in else "")
        )


def recommend(
    model_or_num_params: nn.Module | int, *, memory_bytes: int | None = None
) -> Recommendation:
    """Recommend LoRA settings for a base model, given its size and the available memory.

    The settings include the rank, alpha, the dropout probability, and the learning rate. The
    recommended values are starting points for tuning. The rank, alpha, and the dropout probability
    depend on the number of parameters of the base model:

    | parameters            | r        | alpha    | dropout |
    |-----------------------|----------|----------|---------|
    | under 1 billion       | 4 to 8   | 16 to 32 | 0.05    |
    | 1 to under 7 billion  | 8 to 16  | 32 to 64 | 0.05    |
    | 7 to under 13 billion | 16 to 32 | 64       | 0.1     |
    | 13 billion or more    | 32       | 64       | 0.1     |

    For all sizes, the learning rate is 1e-4 to 5e-4, and gradients are clipped. The recommended
    starting values are the largest r and the smallest alpha of the ranges, so that alpha is 2 r.

    With ``memory_bytes``, the result also says whether to quantize the model so that it fits in the
    memory. QLoRA (Dettmers et al., 2023, arXiv 2305.14314) is recommended if the parameters in 16
    bits take more than 60 % of the memory.

    For a model with stacked experts, the recommendation includes the experts, as in "LoRA Without
    Regret" (Schulman et al., 2025). Their rank is r divided by the number of experts that process a
    token. The ratio of adapter parameters to active base parameters is then about the same as in
    other layers. Routers and quantized experts are left out. The recommended dropout is 0, because
    PEFT 0.21.2 does not load adapters of stacked weights with dropout.

    Args:
        model_or_num_params: A model, or a number of parameters. Adapters of fastlora in the model
            are not counted.
        memory_bytes: The memory of the device that is used for training, in bytes.

    Raises:
        TypeError: If ``model_or_num_params`` is neither a model nor an integer.
        ValueError: If the number of parameters or ``memory_bytes`` is less than 1.
    """
    experts: dict[str, Any] = {}
    if isinstance(model_or_num_params, nn.Module):
        experts = _advice_on_experts(model_or_num_params)
        count = sum(map(unpacked_numel, unique_base_parameters(model_or_num_params)))
    elif isinstance(model_or_num_params, int) and not isinstance(model_or_num_params, bool):
        count = model_or_num_params
    else:
        raise TypeError(
            "model_or_num_params must be a model or an int (the number of parameters), got "
            f"{model_or_num_params!r}"
        )
    if count < 1:
        raise ValueError(f"the number of parameters must be at least 1, got {count}")
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory_bytes must be at least 1, got {memory_bytes}")
    r, alpha, dropout = next(row[1:] for row in _BY_SIZE if count < row[0])
    tight = memory_bytes is not None and 2 * count > _OF_MEMORY * memory_bytes
    return Recommendation(
        count,
        r[1],
        alpha[0],
        0.0 if experts.get("target_parameters") else dropout,
        r,
        alpha,
        load_in="4bit" if tight else None,
        **experts,
    )


def _advice_on_experts(model: nn.Module) -> dict[str, Any]:
    """Return the recommended settings for a model's experts.

    The result is a dict of fields of `Recommendation`. The dict is empty if the model has no
    stacked experts for which an expert layer class exists.
    """
    tuner = tuner_of(model)
    model = model if tuner is None else tuner.model
    parameters = base_parameters_outside_auxiliary_wrappers(modules_with_original_names(model))
    stacks = [
        each for each in stacked_experts_among(parameters) if experts_layer_class(each.module)
    ]
    if not stacks:
        return {}
    # Routers, or the modules around the experts, have the number of experts per token.
    routers, experts_per_token = set[str](), 1
    for block in {each.module_name.rpartition(".")[0] for each in stacks}:
        inside = modules_with_original_names(model.get_submodule(block))
        modules = [(name, base_module_of(module)) for name, module, _ in inside]
        for name, module in modules:
            top_k: Any = getattr(module, "top_k", None)
            if not isinstance(top_k, int):
                continue
            experts_per_token = max(experts_per_token, top_k)
            if name:  # Some routers contain their linear layer.
                linears = {own for own, each in modules if isinstance(each, nn.Linear)}
                routers |= {name, *(own for own in linears if own.startswith(f"{name}."))}
    targets = {
        ".".join(each.name.split(".")[-2:]) for each in stacks_with_expert_layer_class(stacks)
    }
    # "all-linear" selects the stacks that have former names.
    quantized = {".".join(each.name.split(".")[-2:]) for each in stacks} - targets
    return {
        "target_parameters": tuple(sorted(targets)),
        "experts_per_token": experts_per_token,
        "exclude_modules": tuple(sorted(routers | quantized)),
    }


def _merge_exclude_modules(
    recommended: Sequence[str], changes: Mapping[str, Any]
) -> list[str] | str | None:
    """Merge the recommended ``exclude_modules`` with the user's ``exclude_modules``.

    Args:
        recommended: The recommended names, which are those of routers, linear layers inside
            routers, and quantized stacks of experts.
        changes: The fields that the user sets, with or without ``exclude_modules``.

    Returns:
        A regular expression if the user's value is a regular expression; otherwise, a list, or None
        if there is nothing to exclude.
    """
    given = changes.get("exclude_modules")
    if isinstance(given, str) and recommended:
        names = "|".join(map(re.escape, recommended))
        return rf"(?:{given})|(?:.*\.)?(?:{names})"
    if isinstance(given, str):
        return given
    return [*recommended, *(name for name in given or () if name not in recommended)] or None


def _expert_rank(r: int, experts_per_token: int) -> int:
    return max(r // experts_per_token, 1)


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _size(count: int) -> str:
    for unit, name in ((_BILLION, "B"), (1_000_000, "M")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:,}"
