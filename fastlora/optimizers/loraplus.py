"""LoRA+: a higher learning rate for lora_B than for lora_A (https://arxiv.org/abs/2402.12354).

The parameter groups and the defaults are those of PEFT 0.21.2, ``optimizers/loraplus.py``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastlora.validation import ConfigError

# The bitsandbytes optimizers with 8-bit state. They should use 32-bit state for embeddings.
_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """Create a LoRA+ optimizer for a model's adapters.

    It trains lora_B at a higher learning rate than lora_A.

    Args:
        model: A model with adapters. The optimizer updates its trainable parameters.
        optimizer_cls: Optimizer class, such as `torch.optim.AdamW`.
        lr: Learning rate of lora_A and of other matrices.
        loraplus_lr_ratio: Ratio of the learning rate of lora_B and of vectors to ``lr``. The paper
            uses 16 for hard tasks and less for easy tasks, with half of LoRA's usual ``lr``.
        **kwargs: ``loraplus_weight_decay`` (weight decay of all parameters except biases and those
            of `nn.LayerNorm`, 0.0 by default), ``loraplus_lr_embedding`` (learning rate of adapters
            on embeddings, 1e-6 by default), and arguments of ``optimizer_cls``.

    Returns:
        An optimizer. Its four parameter groups contain lora_A and other matrices; adapters on
        embeddings; lora_B and vectors; and biases and the parameters of `nn.LayerNorm` modules.

    Raises:
        ConfigError: A learning rate or the ratio is not a positive number, or no parameter is
            trainable.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = loraplus_groups(
        named,
        lr=lr,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_weight_decay=kwargs.pop("loraplus_weight_decay", 0.0),
        loraplus_lr_embedding=kwargs.pop("loraplus_lr_embedding", 1e-6),
        without_decay=_layernorm_parameter_names(model),
    )
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    if getattr(optimizer_cls, "__name__", "") in _EIGHT_BIT:
        library = importlib.import_module("bitsandbytes.optim")
        manager = library.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def loraplus_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    without_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return a list of LoRA+ parameter groups.

    They can be passed to any optimizer. The groups are those of `create_loraplus_optimizer`.

    Args:
        named_parameters: Tuples (name, parameter) for all parameters to train.
        lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding: As in
            `create_loraplus_optimizer`.
        without_decay: Names of vectors and lora_B weights without weight decay. Those whose names
            contain ``bias`` have no weight decay either. As in PEFT, all other matrices have it.

    Raises:
        ConfigError: As in `create_loraplus_optimizer`.
    """
    rates = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio}
    rates["loraplus_lr_embedding"] = loraplus_lr_embedding
    for name, value in rates.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} must be a positive number, got {value!r}")
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": lr},
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": loraplus_lr_embedding},
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": lr * loraplus_lr_ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    for name, parameter in named_parameters:
        if ".lora_embedding_" in name:
            index = 1
        elif ".lora_B." not in name and parameter.ndim != 1:
            index = 0
        else:
            index = 3 if "bias" in name or name in without_decay else 2
        groups[index]["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ConfigError("no parameter is trainable; call set_adapter() or train_adapters() first")
    return groups


def _layernorm_parameter_names(model: nn.Module) -> set[str]:
    """Return the parameter names of all `nn.LayerNorm` modules in a model."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key in module._parameters
    }
