"""Why a layer does not run in the best way: one sentence for each case.

The fusion report, the refusals of ``impl="triton"`` and of the batch-invariant mode, and captures
of CUDA graphs all take theirs from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers.factors import why_not_fused
from fastlora.ops.conditions import KERNEL_DTYPES
from fastlora.ops.factors import Slots
from fastlora.routing.routing import Routing
from fastlora.validation import ImplementationError

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer

# Why a base layer that is called as it is has no place in the batch-invariant mode.
NOT_OUR_GEMM = "its base layer's own GEMM may go by the number of rows"
# Why a pool's or a block's tables have no row of a layer.
TOO_LATE = "it was adapted after the block began"
DORA_DROPS = "DoRA with dropout in training: a second base product, both PyTorch's"


def fusion(
    layer: AdaptedLayer, names: list[str], why_not_base: str, gathered: bool
) -> tuple[bool, str]:
    """Returns whether the base GEMM and the adapters that act are one call, and why not.

    ``why_not_base`` is why the base layer is called as it is; empty where it is not. ``gathered``
    says that FSDP2 puts plain parameters in place of shards for the forward.
    """
    why = why_not_base or why_not_fused(layer, names, gathered) or why_dora_not_fused(layer, names)
    drops = [n for n in names if isinstance(layer.lora_dropout[n], nn.Dropout)]
    if not why and drops and len(names) > 1:
        why = "several active adapters with dropout: the first is fused, others are added to it"
    return not why, why


def uses_dora(layer: AdaptedLayer, names: list[str]) -> bool:
    """Whether one of these adapters of the layer uses DoRA."""
    holder = layer._modules.get("lora_magnitude_vector")
    magnitudes: Any = None if holder is None else holder._modules
    return bool(magnitudes) and any(name in magnitudes for name in names)


def why_dora_not_fused(layer: AdaptedLayer, names: list[str]) -> str:
    """Returns why active adapters are not one call because of DoRA, or an empty string."""
    if not uses_dora(layer, names):
        return ""
    if len(names) > 1:
        return "several active adapters, some with DoRA: they act one after the other"
    dropout = layer.lora_dropout[names[0]]
    if dropout.training and not isinstance(dropout, nn.Identity):
        return DORA_DROPS
    return ""


def refuse_triton(layer: AdaptedLayer, names: list[str]) -> None:
    """Raises `ImplementationError` where kernels are to run and modules must be called instead."""
    if layer.impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run: {why_not_fused(layer, names)}")


def why_not_captured(bare: bool, dtype: torch.dtype | None) -> str:
    """Returns why only kernels could look adapters up, and do not run."""
    if bare:
        why = "the layer runs without kernels"
    elif dtype is not None:
        why = f"autocast is on; give the model the dtype {dtype}"
    else:
        why = "gradients are recorded, or the base layer's output has another dtype than its input"
    return (
        f"a CUDA graph over a pool cannot be captured here: {why}; capture it within "
        "torch.no_grad() or torch.inference_mode()"
    )


def why_not_tables(bare: bool, dtype: torch.dtype | None) -> str:
    """Returns why a mixed batch runs in PyTorch's GEMMs although there are kernels."""
    if dtype is not None:
        return f"autocast is on; give the model the dtype {dtype}"
    if not bare:
        return (
            "the kernels of mixed batches with gradients choose their tiles by the batch; call "
            "eval() and use torch.no_grad(), or train one adapter at a time"
        )
    return "an adapter has a factor that is hooked, not a plain linear, or on another device"


def why_not_lists(routing: Routing, slots: Slots) -> str:
    """Returns why kernels cannot take some factors, or an empty string."""
    dtypes: dict[torch.dtype, str] = {}
    for name, factors in zip(routing.names, slots, strict=True):
        for tensor in () if factors is None else (*factors[:2], factors.lora_bias):
            if tensor is not None:
                dtypes.setdefault(tensor.dtype, name)
    for dtype, name in dtypes.items():
        if dtype not in KERNEL_DTYPES:
            return f"adapter {name!r} has a factor of {dtype}, expected fp16, bf16 or fp32"
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} (adapter {name!r})" for dtype, name in dtypes.items())
        return f"factors have more than one dtype, {found}"
    return ""
