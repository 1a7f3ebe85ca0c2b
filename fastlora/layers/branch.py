"""A layer's adapter as bare tensors.

A layer here is anything with ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling`` keyed by
adapter name: ours, and PEFT's own layers after `fastlora.patch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.scalings import Scalings


class Branch(NamedTuple):
    """What one call of `fastlora.functional` takes from a layer's adapters.

    Attributes:
        lora_a: ``[R, K]``; several adapters are their rank rows side by side.
        lora_b: ``[N, R]``.
        scaling: No dimensions for one adapter, else ``[R]``.
        lora_bias: ``[N]``, scaled, or None.
        dropout_p: Probability that acts now.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    lora_bias: torch.Tensor | None
    dropout_p: float


def factors_of(
    layer: Any, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float] | None:
    """Returns lora_a, lora_b, the bias of lora_B and the dropout that acts of one adapter.

    None where its modules must be called.
    """
    # Looked up as nn.Module keeps them, in few calls: each takes microseconds in a large model.
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, dropout_p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:  # PEFT's, where there is no dropout
        return None
    if type(down) is not nn.Linear or type(up) is not nn.Linear or is_hooked(down, up, dropout):
        return None
    lora_a, lora_b = down._parameters.get("weight"), up._parameters.get("weight")
    if type(lora_a) is not nn.Parameter or type(lora_b) is not nn.Parameter:
        return None
    return lora_a, lora_b, up._parameters["bias"], dropout_p


def branch_of(layer: Any, name: str, x: torch.Tensor) -> Branch | None:
    """Returns one adapter's branch, or None where its modules must be called."""
    factors = factors_of(layer, name)
    if factors is None:
        return None
    lora_a, lora_b, lora_bias, dropout_p = factors
    scalings: Any = layer.scaling
    if lora_bias is None and isinstance(scalings, Scalings):
        beside = scalings.tensors[name]
        if beside.dtype == x.dtype == torch.float32 and beside.is_cpu and x.is_cpu:
            return Branch(lora_a, lora_b, beside, None, dropout_p)
    scaling = scaling_of(layer, name)
    if lora_bias is not None:
        lora_bias = lora_bias * scaling
    return Branch(lora_a, lora_b, scaling_tensor(layer, name, scaling, x), lora_bias, dropout_p)


def scaling_of(layer: Any, name: str) -> Any:
    """Returns an adapter's scaling: a number, or in a graph that is compiled a tensor, its input.

    A number would be part of the graph. A tensor also where the user put one.
    """
    scalings = layer.scaling
    if torch.compiler.is_compiling() and isinstance(scalings, Scalings):
        return scalings.tensors[name]
    return scalings[name]


def scaling_tensor(layer: Any, name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns a scaling as a tensor without dimensions, kept on the layer until it changes."""
    device, dtype = x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):  # in a compiled graph, or for PEFT's compiled hot swap
        return value.to(device=device, dtype=dtype).reshape(())
    if torch.compiler.is_compiling():
        # What an eager forward has cached meanwhile must not be a reason to compile again.
        return torch.full((), value, dtype=dtype, device=device)
    cache = layer.__dict__.setdefault("_scaling_tensors", {})
    cached = cache.get(name)
    if cached is not None and cached[:3] == (value, device, dtype):
        return cached[3]
    with torch.inference_mode(False):  # it will be saved for a backward one day
        tensor = torch.full((), value, dtype=dtype, device=device)
    # In a CUDA graph's capture the fill is only recorded: the tensor belongs to that graph alone.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(tensor) is torch.Tensor and not capturing:
        cache[name] = (value, device, dtype, tensor)
    return tensor


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its class's forward."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """Returns the weight of a linear that nothing has hooked into, else None."""
    if type(module) is not nn.Linear or is_hooked(module):
        return None
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter else None
