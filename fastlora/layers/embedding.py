"""`FastLoraEmbedding`: an `nn.Embedding` with adapters.

``y = weight[ids] + scale * scaling * lora_embedding_A.T[ids] @ lora_embedding_B.T``. Here scale is
the base layer's ``embed_scale`` if it has one (as Gemma's and Bart's embeddings do), and 1
otherwise. The adapted weight is ``weight + scaling * (lora_embedding_B @ lora_embedding_A).T``.
Transposed, it is the weight of a linear layer on one-hot rows: K is the vocabulary size, and N is
the size of an embedding vector.

Shapes and file names follow PEFT 0.21.2, ``tuners/lora/layer.py``, `Embedding`. Dropout is not
applied to ids. lora_embedding_A has a dense gradient regardless of ``sparse``, because it is stored
by rank. ``max_norm`` limits only the vectors of the base layer; the forward pass never writes to
the factors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.layers.adapter_init import AdapterInitializer
from fastlora.layers.base_layers import dense_weight
from fastlora.layers.layer_kinds import (
    LayerAdapterSettings,
    LayerKind,
    TensorShapes,
    register_layer_kind,
)
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.parts import Factor
from fastlora.layers.unfused import BaseAdditiveLoraLayer
from fastlora.ops.execution_mode import ExecutionMode
from fastlora.validation import UnsupportedLayerError


class FastLoraEmbedding(BaseAdditiveLoraLayer):
    """LoRA layer for an `nn.Embedding`.

    The embedding, which may be an instance of a subclass, is called unchanged.

    Args:
        base_layer: The embedding.

    Attributes:
        lora_embedding_A: Maps an adapter name to ``[R, num_embeddings]``.
        lora_embedding_B: Maps an adapter name to ``[embedding_dim, R]``.
    """

    adapter_parts = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    fallback_reason = (
        "the adapter runs as a lookup and a rank-R product in PyTorch; dropout does not apply to "
        "ids"
    )

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer, base_layer.num_embeddings, base_layer.embedding_dim)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def _resolve_init(self, init: bool | str) -> bool | str:
        # As in PEFT, most initializations of linears give an embedding A zero and B normal.
        return init if init in (False, "mica") else True

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, Factor]:
        lora_a, lora_b = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        if start.init.name is not False:
            lora_a.zero_()
            lora_b.normal_()
        if start.init.name == "mica":
            lora_a, lora_b = start.initial_values(lora_a, lora_b)
        return {"lora_embedding_A": nn.Parameter(lora_a), "lora_embedding_B": nn.Parameter(lora_b)}

    def _lora_a_weight(self, name: str) -> torch.Tensor | None:
        factors: Any = self._modules.get("lora_embedding_A")
        return factors[name] if factors is not None and name in factors else None

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name], None

    def _count_samples_and_batch_dims(self, x: torch.Tensor) -> tuple[int, int]:
        return x.numel(), x.dim()

    def _add_update(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
        conditions: ExecutionMode,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        base = self.base_layer
        lora_a, lora_b, _ = self._factors(name)
        # [..., R]
        s = F.embedding(
            x,
            lora_a.t(),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        s = s * self._scaling_on_device_of(name, s)
        embed_scale = getattr(base, "embed_scale", None)
        if embed_scale is not None:
            s = s * (embed_scale.to(s) if isinstance(embed_scale, torch.Tensor) else embed_scale)
        y = y + s @ lora_b.t()
        g = self._dora_scale(name, conditions)
        return y if g is None else y * g

    def _weight_for_init(self, purpose: str) -> torch.Tensor:
        return dense_weight(self.base_layer, purpose).detach().t()

    def _local_weight(self) -> torch.Tensor:
        return dense_weight(self.base_layer).t()

    def _reshape_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t()

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        weight = self.weight
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
        if not plain:
            raise UnsupportedLayerError(
                f"cannot merge into {type(self.base_layer).__name__}: its weight is not a plain "
                "floating-point matrix; dequantize the base model first"
            )
        return DenseMergeTarget(weight, torch.t), None


def _shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
    base: Any = module
    k, n = base.num_embeddings, base.embedding_dim
    shapes: TensorShapes = {
        "lora_embedding_A": (settings.r, k),
        "lora_embedding_B": (n, settings.r),
    }
    if settings.use_dora:
        shapes["lora_magnitude_vector"] = (n,)
    return shapes


def _check(module: nn.Module, settings: LayerAdapterSettings) -> None:
    if settings.lora_bias:
        raise UnsupportedLayerError(
            "lora_bias=True is not supported for embeddings, as in PEFT; set lora_bias=False, or "
            "exclude the module with exclude_modules"
        )
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise UnsupportedLayerError(
            f"its embed_scale has shape {tuple(scale.shape)}, expected a tensor with one element"
        )
    if settings.use_dora:
        dense_weight(module)


register_layer_kind(
    LayerKind(
        "embeddings",
        lambda m: isinstance(m, nn.Embedding),
        FastLoraEmbedding,
        _shapes,
        _check,
        uses_dropout=False,
    )
)
