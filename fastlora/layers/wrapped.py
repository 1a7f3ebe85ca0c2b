"""`FastLoraWrapper`: adapters on a base layer that is called unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.layers.base import LoraLayer
from fastlora.layers.bases import linear_features, makes_fresh_outputs, stored_weight
from fastlora.layers.call import LayerCall
from fastlora.layers.coded_base import as_called, call_base, coded_base, sibling_base, why_called
from fastlora.layers.forward import begin, forward
from fastlora.layers.quantised import Quantised, quantised
from fastlora.layers.stored import Stored
from fastlora.layers.why import NOT_OUR_GEMM, fusion
from fastlora.ops.factors import Base
from fastlora.validation import UnsupportedLayerError


class FastLoraWrapper(LoraLayer):
    """LoRA adapters on a linear-like base layer that is called unchanged.

    Computes ``y = base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T``.

    The class is for base layers that are not a plain `nn.Linear`: quantized layers, tensor-parallel
    layers, layers that hooks offload, and Hugging Face's Conv1D. Without gradients, the update is
    added to the base layer's output in place where that is safe. If kernels can read the quantized
    base weight, they compute the base product too.

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
        """Return the output ``[..., N]`` for ``x [..., K]``.

        The base layer receives all other arguments.
        """
        call = begin(self, x)
        acts = not isinstance(call, LayerCall) or call.names
        if acts and not (args or kwargs):
            base = coded_base(call)
            if base is not None:
                return as_called(call, base, forward(call, base))
        call.conditions.refuse(self, NOT_OUR_GEMM)
        y = call_base(call, self.base_layer, *args, **kwargs)
        if not acts:
            return y
        inplace = not y.requires_grad and self._may_write_into(y, x)
        return forward(call, Base(y=y, inplace=inplace))

    def _own_quantised(self) -> Quantised | None:
        return quantised(self.base_layer)

    def _plain_base(self) -> Base | None:
        return sibling_base(self)

    def _may_write_into(self, y: torch.Tensor, x: torch.Tensor) -> bool:
        """Return whether y may be overwritten, because no other code refers to it."""
        hooked = self.base_layer._forward_hooks or "forward" in self.base_layer.__dict__
        return makes_fresh_outputs(self.base_layer) and not (hooked or y is x or y._is_view())

    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def fusion(self, gathered: bool = False) -> tuple[bool, str]:
        """Return whether the base GEMM and LoRA term run fused, and the fallback reason if not."""
        return fusion(self, self._acting(), why_called(self), gathered)

    def _mergeable(self) -> tuple[Stored, torch.Tensor | None]:
        shape = self.out_features, self.in_features
        return stored_weight(self.base_layer, shape), getattr(self.base_layer, "bias", None)

    def _weight_like(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t() if type(self.base_layer).__name__ == "Conv1D" else delta
