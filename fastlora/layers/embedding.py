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

from fastlora.layers.added import AddedLora
from fastlora.layers.bases import dense_weight
from fastlora.layers.kinds import Kind, Settings, Shapes, register_kind
from fastlora.layers.parts import Factor
from fastlora.layers.starting import Starter
from fastlora.layers.stored import Plain, Stored
from fastlora.ops.conditions import Conditions
from fastlora.validation import UnsupportedLayerError


class FastLoraEmbedding(AddedLora):
    """LoRA layer over an `nn.Embedding` (or a subclass instance), which is called unchanged.

    Args:
        base_layer: The embedding.

    Attributes:
        lora_embedding_A: Maps an adapter name to ``[R, num_embeddings]``.
        lora_embedding_B: Maps an adapter name to ``[embedding_dim, R]``.
    """

    adapter_parts = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    not_fused = (
        "the adapter runs as a lookup and a rank-R product in PyTorch; dropout does not apply to "
        "ids"
    )

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer, base_layer.num_embeddings, base_layer.embedding_dim)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def _init_here(self, init: bool | str) -> bool | str:
        # As in PEFT, most initializations of linears give an embedding A zero and B normal.
        return init if init in (False, "mica") else True

    def _new_factors(self, r: int, lora_bias: bool, start: Starter) -> dict[str, Factor]:
        lora_a, lora_b = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        if start.init.name is not False:
            lora_a.zero_()
            lora_b.normal_()
        if start.init.name == "mica":
            lora_a, lora_b = start.values(lora_a, lora_b)
        return {"lora_embedding_A": nn.Parameter(lora_a), "lora_embedding_B": nn.Parameter(lora_b)}

    def _first_factor(self, name: str) -> torch.Tensor | None:
        factors: Any = self._modules.get("lora_embedding_A")
        return factors[name] if factors is not None and name in factors else None

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name], None

    def _samples(self, x: torch.Tensor) -> tuple[int, int]:
        return x.numel(), x.dim()

    def _plus(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
        conditions: Conditions,
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
        s = s * self._scaling_beside(name, s)
        embed_scale = getattr(base, "embed_scale", None)
        if embed_scale is not None:
            s = s * (embed_scale.to(s) if isinstance(embed_scale, torch.Tensor) else embed_scale)
        y = y + s @ lora_b.t()
        g = self._dora_scale(name, conditions)
        return y if g is None else y * g

    def _weight_to_start_from(self, why: str) -> torch.Tensor:
        return dense_weight(self.base_layer, why).detach().t()

    def _own_weight(self) -> torch.Tensor:
        return dense_weight(self.base_layer).t()

    def _weight_like(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.t()

    def _mergeable(self) -> tuple[Stored, torch.Tensor | None]:
        weight = self.weight
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
        if not plain:
            raise UnsupportedLayerError(
                f"cannot merge into {type(self.base_layer).__name__}: its weight is not a plain "
                "floating-point matrix; dequantize the base model first"
            )
        return Plain(weight, torch.t), None


def _shapes(module: nn.Module, asked: Settings) -> Shapes:
    base: Any = module
    k, n = base.num_embeddings, base.embedding_dim
    shapes: Shapes = {"lora_embedding_A": (asked.r, k), "lora_embedding_B": (n, asked.r)}
    if asked.use_dora:
        shapes["lora_magnitude_vector"] = (n,)
    return shapes


def _check(module: nn.Module, asked: Settings) -> None:
    if asked.lora_bias:
        raise UnsupportedLayerError(
            "lora_bias=True is not supported for embeddings, as in PEFT; set lora_bias=False, or "
            "exclude the module with exclude_modules"
        )
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise UnsupportedLayerError(
            f"its embed_scale has shape {tuple(scale.shape)}, expected one number"
        )
    if asked.use_dora:
        dense_weight(module)


register_kind(
    Kind(
        "embeddings",
        lambda m: isinstance(m, nn.Embedding),
        FastLoraEmbedding,
        _shapes,
        _check,
        drops=False,
    )
)
