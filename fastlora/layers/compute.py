"""From a layer's adapters to one call of `fastlora.functional`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora import functional
from fastlora.layers.branch import Branch, branch_of, is_hooked, plain_weight, scaling_of
from fastlora.layers.shared_shrink import shared_shrink
from fastlora.ops.invariant import refuse_in_mode
from fastlora.sharding import is_sharded
from fastlora.validation import ImplementationError

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


def refuse_triton(layer: Any, names: list[str]) -> None:
    """Raises `ImplementationError` where kernels are to run and modules must be called instead."""
    if getattr(layer, "impl", "auto") == "triton":
        raise ImplementationError(f"impl='triton' cannot run: {why_not_fused(layer, names)}")


def _called(layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Adds adapters by calling their modules one by one, as PEFT does."""
    refuse_triton(layer, names)
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        inner = x.to(down.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x
        update = up(down(layer.lora_dropout[name](inner))) * scaling_of(layer, name)
        y = (y + update).to(y.dtype)
    return y


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
    alone, first, others = len(names) == 1, None, []
    if alone:
        first = branch_of(layer, names[0], x)
    elif (branches := _branches(layer, x, names)) is not None:
        first, *others = branches
    if first is None:
        refuse_in_mode(layer, why_not_fused(layer, names))
        return _called(layer, F.linear(x, weight, bias), x, names)
    shrunk = shared_shrink(layer, x, first, impl) if alone else None
    lora_a, lora_b, scaling, lora_bias, dropout_p = first
    if lora_bias is not None:
        bias = lora_bias if bias is None else bias + lora_bias
    y = functional.linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, impl, shrunk=shrunk)
    return _add(y, x, others, impl, inplace=True) if others else y


def lora_added_forward(
    layer: Any, y: torch.Tensor, x: torch.Tensor, names: list[str], impl: str, inplace: bool
) -> torch.Tensor:
    """Adds the active adapters to the output ``y [..., N]`` of a base layer called as it is."""
    refuse_in_mode(layer, NOT_OUR_GEMM)
    branches = _branches(layer, x, names)
    if branches is None:
        return _called(layer, y, x, names)
    shrunk = shared_shrink(layer, x, branches[0], impl) if len(names) == 1 else None
    return _add(y, x, branches, impl, inplace, shrunk)


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    branches: list[Branch],
    impl: str,
    inplace: bool,
    shrunk: functional.Shrunk | None = None,
) -> torch.Tensor:
    for lora_a, lora_b, scaling, lora_bias, dropout_p in branches:
        y = functional.add(y, x, lora_a, lora_b, scaling, dropout_p, impl, inplace, shrunk)
        if lora_bias is not None:
            y = y + lora_bias.to(y.dtype)
        inplace = True
    return y
