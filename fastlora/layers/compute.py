"""From a layer's adapters to one call of `fastlora.functional`.

A layer here is anything with ``lora_A``, ``lora_B``, ``lora_dropout`` and ``scaling`` keyed by
adapter name: ours, and PEFT's own layers after `fastlora.patch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastlora import functional
from fastlora.batch_invariant import refuse_in_mode
from fastlora.sharding import is_sharded

# Why a base layer that is called as it is has no place in the batch-invariant mode.
NOT_OUR_GEMM = "its base layer's own GEMM may go by the number of rows"


def why_not_fused(layer: Any, names: list[str], gathered: bool = False) -> str:
    """Returns why adapters cannot run as bare tensors, or an empty string.

    Their modules must then be called: hooks, parametrizations, shards and replacements of users and
    libraries live there. ``gathered`` says that FSDP2 puts plain parameters in place of shards for
    the forward.
    """
    for name in names:
        factors = plain_weight(layer.lora_A[name]), plain_weight(layer.lora_B[name])
        if any(factor is None for factor in factors):
            modules = layer.lora_A[name], layer.lora_B[name]
            if all(type(m) is nn.Linear and is_sharded(m.weight) for m in modules):
                if gathered and not any(map(is_hooked, modules)):
                    continue
                return f"adapter {name!r} has sharded factors (DTensors) that nothing gathers"
            return f"adapter {name!r} has a factor that is hooked, or not a plain linear"
        dropout = layer.lora_dropout[name]
        if type(dropout) not in (nn.Dropout, nn.Identity) or is_hooked(dropout):
            return f"adapter {name!r} has its own dropout module, or hooks on it"
    return ""


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """Returns the weight of a linear that nothing has hooked into, else None."""
    if type(module) is not nn.Linear or is_hooked(module):
        return None
    weight = module._parameters.get("weight")
    return weight if type(weight) is nn.Parameter else None


def _called(layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Adds adapters by calling their modules one by one, as PEFT does."""
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        inner = x.to(down.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x
        update = up(down(layer.lora_dropout[name](inner))) * layer.scaling[name]
        y = (y + update).to(y.dtype)
    return y


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


def branch_of(layer: Any, name: str, x: torch.Tensor) -> Branch | None:
    """Returns one adapter's branch, or None where its modules must be called."""
    # Looked up as nn.Module keeps them: attribute access costs a microsecond a time.
    modules = layer._modules
    up = modules["lora_B"]._modules[name]
    lora_a, lora_b = plain_weight(modules["lora_A"]._modules[name]), plain_weight(up)
    dropout, dropout_p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:  # PEFT's, where there is no dropout
        return None
    if lora_a is None or lora_b is None or is_hooked(dropout):
        return None
    scaling = layer.scaling[name]
    lora_bias = up._parameters["bias"]
    if lora_bias is not None:
        lora_bias = lora_bias * scaling
    return Branch(lora_a, lora_b, _scaling_tensor(layer, name, scaling, x), lora_bias, dropout_p)


def _scaling_tensor(layer: Any, name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns a scaling as a tensor without dimensions, kept on the layer until it changes."""
    device, dtype = x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):  # PEFT's compiled hot swap
        return value.to(device=device, dtype=dtype).reshape(())
    cache = layer.__dict__.setdefault("_scaling_tensors", {})
    cached = cache.get(name)
    if cached is not None and cached[:3] == (value, device, dtype):
        return cached[3]
    with torch.inference_mode(False):  # it will be saved for a backward one day
        tensor = torch.full((), value, dtype=dtype, device=device)
    # In a CUDA graph's capture the fill is only recorded: the tensor belongs to that graph alone.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not capturing:
        cache[name] = (value, device, dtype, tensor)
    return tensor


def _branches(layer: Any, x: torch.Tensor, names: list[str]) -> list[Branch] | None:
    """Returns the active adapters as few branches: one, unless dropout masks x for each alone.

    None where the modules of one of them must be called.
    """
    branches = []
    for name in names:
        branch = branch_of(layer, name, x)
        if branch is None:
            return None
        branches.append(branch)
    if len(branches) == 1 or any(branch.dropout_p for branch in branches):
        return branches
    biases = [branch.lora_bias for branch in branches if branch.lora_bias is not None]
    return [
        Branch(
            torch.cat([branch.lora_a for branch in branches]),
            torch.cat([branch.lora_b for branch in branches], dim=1),
            torch.cat([b.scaling.expand(b.lora_a.shape[0]) for b in branches]),
            sum(biases[1:], biases[0]) if biases else None,
            0.0,
        )
    ]


def lora_forward(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    names: list[str],
    impl: str,
) -> torch.Tensor:
    """Runs a plain linear base layer and its active adapters fused.

    Args:
        layer: Holds the adapters.
        x: ``[..., K]``.
        weight: Base weight ``[N, K]``.
        bias: Base bias ``[N]`` or None.
        names: Active adapters that the layer has, at least one.
        impl: As in `fastlora.functional.lora_linear`.
    """
    branches = _branches(layer, x, names)
    if branches is None:
        refuse_in_mode(layer, why_not_fused(layer, names))
        return _called(layer, F.linear(x, weight, bias), x, names)
    first, *others = branches
    lora_a, lora_b, scaling, lora_bias, dropout_p = first
    if lora_bias is not None:
        bias = lora_bias if bias is None else bias + lora_bias
    y = functional.linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, impl)
    return _add(y, x, others, impl, inplace=True) if others else y


def lora_added_forward(
    layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str], impl: str, inplace: bool
) -> torch.Tensor:
    """Adds the active adapters to the output ``y [..., N]`` of a base layer called as it is."""
    refuse_in_mode(layer, NOT_OUR_GEMM)
    branches = _branches(layer, x, names)
    if branches is None:
        return _called(layer, y, x, names)
    return _add(y, x, branches, impl, inplace)


def _add(
    y: torch.Tensor, x: torch.Tensor, branches: list[Branch], impl: str, inplace: bool
) -> torch.Tensor:
    for lora_a, lora_b, scaling, lora_bias, dropout_p in branches:
        y = functional.add(y, x, lora_a, lora_b, scaling, dropout_p, impl, inplace)
        if lora_bias is not None:
            y = y + lora_bias.to(y.dtype)
        inplace = True
    return y
