"""What bitsandbytes does to 4-bit weights in evaluation on a CPU with AVX512 bf16, and training.

A forward there whose x needs no gradient repacks the codes for its product, and rounds the blocks'
largest values to bf16. From then on the module gives x no gradient, and nothing raises. There is no
way back: the values of before are gone (bitsandbytes 0.50).
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"


def keep_layout(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking a model in which adapters train.

    All of its 4-bit layers, since gradients go through those without adapters too.
    """
    repacked = False
    for module in model.modules():
        if _REPACKS in module.__dict__:
            setattr(module, _REPACKS, False)
            repacked = repacked or is_repacked(module)
    if repacked:
        _warn()


def warn_of_repacked(layer: nn.Module, base: nn.Module, x: torch.Tensor) -> None:
    """Warns where a forward that is to have gradients gets none through its base layer."""
    wanted = torch.is_grad_enabled() and x.is_cpu and is_repacked(base)
    if wanted and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        _warn()


def is_repacked(base: nn.Module) -> bool:
    """Returns whether a module's codes were repacked."""
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _warn() -> None:
    warnings.warn(
        "bitsandbytes has repacked 4-bit weights in an evaluation on the CPU: through such a layer "
        "its input gets no gradient, so adapters below it do not train, and its scales are rounded "
        "to bf16. To train, load the base model anew and add adapters (or load them with "
        "is_trainable=True, or patch the model) before it is evaluated",
        stacklevel=3,
    )
