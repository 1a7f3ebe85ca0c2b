"""`FastLoraWrapper`: adapters on a base layer that is called unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.layers.base_layers import (
    keeps_no_reference_to_output,
    linear_features,
    merge_target_of,
)
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.fallback_reasons import BASE_GEMM_VARIES, FusionStatus, fusion_status
from fastlora.layers.linear_forward import create_call, forward
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.merge_target import MergeTarget
from fastlora.layers.quantized import BaseQuantizedWeight, quantized_weight_of
from fastlora.layers.quantized_base import (
    call_base_layer,
    fallback_reason_base_called,
    quantized_base_for_kernels,
    quantized_base_of_layer,
    to_base_output_dtype,
)
from fastlora.ops.execution_mode import dispatch_mode_may_keep_results
from fastlora.ops.factors import Base
from fastlora.validation import UnsupportedLayerError


class FastLoraWrapper(LoraLayer):
    """LoRA layer that wraps a base layer and adds adapters to it.

    The base layer may be any linear-like module. The class is used for base layers that are not a
    plain `nn.Linear`, such as quantized layers, layers that hooks offload, and Hugging Face's
    Conv1D. LoRA layers for other kinds of base layers, such as tensor-parallel layers, are
    subclasses of this class.

    The LoRA layer computes ``y = base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T``,
    usually by calling the base layer and adding the update to its output. Without gradients, the
    update is added to the base layer's output in place where that is safe. If kernels run and can
    read the quantized base weight, the kernels compute the base product too, and the base layer is
    not called.

    Args:
        base_layer: Any linear-like module.

    Raises:
        UnsupportedLayerError: ``base_layer`` is not linear-like.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        features = linear_features(base_layer)
        if features is None:
            raise UnsupportedLayerError(
                f"LoRA needs a layer with in_features and out_features, got "
                f"{type(base_layer).__name__}"
            )
        self.in_features, self.out_features = features
        self.base_layer = base_layer
        self.training = base_layer.training
        self._init_adapters()
        base_layer.requires_grad_(False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the output of the wrapped base layer for x, with the adapters' updates.

        The adapters are the active adapters or, in a mixed batch, each row's adapter. The shape of
        x is ``[..., K]``, and that of the output is ``[..., N]``. The base layer receives all other
        arguments.
        """
        call = create_call(self, x)
        acts = not isinstance(call, UniformCall) or call.names
        if acts and not (args or kwargs):
            base = quantized_base_for_kernels(call)
            if base is not None:
                return to_base_output_dtype(call, base, forward(call, base))
        call.conditions.raise_if_batch_invariant(self, BASE_GEMM_VARIES)
        y = call_base_layer(call, self.base_layer, *args, **kwargs)
        if not acts:
            return y
        if not isinstance(y, torch.Tensor):
            self._check_no_adapter_applies(call, y)
            return y
        inplace = not y.requires_grad and self._is_unreferenced_output(y, x)
        return forward(call, Base(y=y, inplace=inplace))

    def _check_no_adapter_applies(self, call: UniformCall | MixedCall, y: object) -> None:
        """Raise `UnsupportedLayerError` if an adapter applies to the layer.

        An update cannot be added to y, because y is not a tensor.
        """
        if isinstance(call, MixedCall):
            slots = range(len(call.routing.names))
            if all(call.routing.source.factors(self, slot) is None for slot in slots):
                return
        checks = None if self.routing_group is None else self.routing_group.row_checks
        name = "" if checks is None else f" {checks.name_of(self)!r}"
        raise UnsupportedLayerError(
            f"the base layer of{name or ' a LoRA layer'} (type {type(self.base_layer).__name__}) "
            f"must return a tensor, but it returned a {type(y).__name__}; adapt its weight with "
            "target_parameters instead of target_modules"
        )

    def _local_weight_if_quantized(self) -> BaseQuantizedWeight | None:
        return quantized_weight_of(self.base_layer)

    def _fusable_base(self) -> Base | None:
        return quantized_base_of_layer(self)

    def _is_unreferenced_output(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Return whether nothing else references the base layer's output y.

        The result is True only if this is certain. In particular, y must be neither the input x nor
        a view. If y also does not require a gradient, which the caller must check, y may be
        overwritten in place.
        """
        hooked = self.base_layer._forward_hooks or "forward" in self.base_layer.__dict__
        return keeps_no_reference_to_output(self.base_layer) and not (
            hooked or y is x or y._is_view() or dispatch_mode_may_keep_results(y)
        )

    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A fused layer
        computes the base GEMM and the LoRA update in one call.
        """
        return fusion_status(
            self, self._applied_adapters(), fallback_reason_base_called(self), gathered
        )

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        shape = self.out_features, self.in_features
        return merge_target_of(self.base_layer, shape), getattr(self.base_layer, "bias", None)

    def _reshape_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t() if type(self.base_layer).__name__ == "Conv1D" else delta
