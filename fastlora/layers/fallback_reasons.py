"""Fallback reasons: texts that explain why a layer does not use a faster implementation.

The reasons appear in the fusion report and in the error messages for ``impl="triton"``,
batch-invariant mode, and CUDA graph capture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from fastlora.layers.adapter_factors import fallback_reason_adapter_called
from fastlora.ops.execution_mode import KERNEL_DTYPES
from fastlora.ops.factors import Slots
from fastlora.routing.routing import Routing
from fastlora.validation import ImplementationError

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters

# Reason why a base layer that is called unchanged is not supported in the batch-invariant mode.
BASE_GEMM_VARIES = "its base layer's own GEMM may depend on the number of rows"
# Reason why the address tables of a pool or a block have no row for a layer.
ADAPTED_AFTER_BLOCK = "the layer was adapted after the block began"
DORA_WITH_DROPOUT = (
    "DoRA with dropout in training needs a second base product; PyTorch computes both"
)


class FusionStatus(NamedTuple):
    """Whether a layer is fused.

    If the layer is not fused, the status also contains the fallback reason.

    Attributes:
        fused: Whether the layer computes the base GEMM and the LoRA update in one call.
        fallback_reason: Reason why the layer is not fused, or an empty string if it is.
    """

    fused: bool
    fallback_reason: str


def fusion_status(
    layer: BaseLinearWithAdapters, names: list[str], base_reason: str, fsdp_gathered: bool
) -> FusionStatus:
    """Return a layer's fusion status for the given adapters.

    The status states whether the layer is fused and, if not, the reason. A fused layer computes the
    base GEMM and the active adapters in one call.

    Args:
        layer: The layer.
        names: The active adapters.
        base_reason: Reason why the base layer is called, or an empty string if it is not called.
        fsdp_gathered: Whether FSDP2 replaces shards with plain parameters during the forward pass.
    """
    reason = (
        base_reason
        or fallback_reason_adapter_called(layer, names, fsdp_gathered)
        or reason_dora_prevents_fusion(layer, names)
    )
    drops = [n for n in names if isinstance(layer.lora_dropout[n], nn.Dropout)]
    if not reason and drops and len(names) > 1:
        reason = (
            "several active adapters with dropout: the first is fused, the others are added "
            "separately"
        )
    return FusionStatus(not reason, reason)


def uses_dora(layer: BaseLinearWithAdapters, names: list[str]) -> bool:
    """Return whether any of the named adapters uses DoRA on a layer."""
    holder = layer._modules.get("lora_magnitude_vector")
    if holder is None or not holder._modules:  # Dynamo in torch 2.11 does not trace `bool(dict)`.
        return False
    return any(name in holder._modules for name in names)


def reason_dora_prevents_fusion(layer: BaseLinearWithAdapters, names: list[str]) -> str:
    """Return the reason why DoRA prevents a layer from being fused.

    Returns an empty string if none of the named adapters uses DoRA on the layer, or if the layer
    can be fused even though an adapter uses DoRA.
    """
    if not uses_dora(layer, names):
        return ""
    if len(names) > 1:
        return "several active adapters, some with DoRA: they are applied one after another"
    dropout = layer.lora_dropout[names[0]]
    if dropout.training and not isinstance(dropout, nn.Identity):
        return DORA_WITH_DROPOUT
    return ""


def raise_if_triton_required(layer: BaseLinearWithAdapters, names: list[str]) -> None:
    """Raise `ImplementationError` if Triton is required for a layer that cannot use it.

    Triton is required if the layer has ``impl="triton"``. The caller has found that the adapters'
    modules must be called, so Triton kernels cannot compute the update.
    """
    if layer.impl == "triton":
        raise ImplementationError(
            f"impl='triton' cannot be used: {fallback_reason_adapter_called(layer, names)}"
        )


def graph_capture_error_message(inference_only: bool, autocast_dtype: torch.dtype | None) -> str:
    """Return an error message that states why a CUDA graph cannot be captured.

    The message names the problem in a layer that the graph would contain, and a remedy. The graph
    would use the adapters of a pool.
    """
    if inference_only:
        reason = "the layer runs without kernels"
    elif autocast_dtype is not None:
        reason = f"autocast is on; convert the model to {autocast_dtype} instead"
    else:
        reason = (
            "gradients are recorded, or the base layer's output has a different dtype than its "
            "input"
        )
    return (
        f"cannot capture a CUDA graph over a pool: {reason}; capture it under torch.no_grad() or "
        "torch.inference_mode()"
    )


def batch_invariance_unsupported_reason(
    inference_only: bool, autocast_dtype: torch.dtype | None
) -> str:
    """Return the reason why batch-invariant mode is not supported for a mixed batch.

    Call this function only if kernels are available, but a layer cannot run the batch in this mode.
    """
    if autocast_dtype is not None:
        return f"autocast is on; convert the model to {autocast_dtype} instead"
    if not inference_only:
        return (
            "with gradients, the kernels of mixed batches choose their tiles by batch; call "
            "eval() and use torch.no_grad(), or train one adapter at a time"
        )
    return (
        "an adapter has a factor that has hooks, is not a plain nn.Linear, or is on another device"
    )


def fallback_reason_for_factor_dtypes(routing: Routing, slots: Slots) -> str:
    """Return the fallback reason if the kernels do not support the dtypes of a batch's factors.

    In a fallback, the kernels are not used. The result is an empty string if the kernels support
    the dtypes.
    """
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
        return f"factors have different dtypes: {found}"
    return ""
