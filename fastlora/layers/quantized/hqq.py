"""Weights quantized by HQQ, which can be dequantized; kernels cannot read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from fastlora.layers.quantized.base_weight import BaseQuantizedWeight, register_quantized_weight
from fastlora.validation import UnsupportedLayerError


@register_quantized_weight
class HqqWeight(BaseQuantizedWeight):
    """Quantized base weight of an HQQ layer.

    The class gives read-only access to the weight and can dequantize it. Adapters cannot be merged
    into the weight, because fastlora does not requantize HQQ weights. The layer is an `HQQLinear`.
    The weight is stored as codes with a zero point and a scale for each group.
    """

    peft_layer = ("peft.tuners.lora.hqq", "HqqLoraLinear")

    @staticmethod
    def stored_weight_of(module: object) -> Any:
        return getattr(module, "W_q")  # noqa: B009 - a module of any kind

    @classmethod
    def matches(cls, module: object) -> bool:
        return hasattr(module, "W_q") and callable(getattr(module, "dequantize", None))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is dequantized to, which is HQQ's compute dtype."""
        found: torch.dtype = self.base.compute_dtype
        return found

    def tensor_dependencies(self) -> Sequence[torch.Tensor]:
        meta: dict[str, object] = getattr(self.base, "meta", None) or {}
        return [self.weight, *(part for part in meta.values() if isinstance(part, torch.Tensor))]

    def dense(self) -> torch.Tensor:
        made: torch.Tensor = self.base.dequantize()
        return made

    def check_writable(self) -> NoReturn:
        """Always raise `UnsupportedLayerError`.

        Merging would require HQQ's solver.
        """
        raise UnsupportedLayerError(
            f"cannot merge into {type(self.base).__name__}: fastlora does not requantize a merged "
            "weight with HQQ's solver; dequantize the base model first"
        )
