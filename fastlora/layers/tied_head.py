"""`TiedLoraHead`: a head that shares an embedding's weight and its adapters.

The adapted weight of the embedding is ``weight + scaling * (B @ A).T``, ``[V, D]``, and so is that
of the head: ``y = base(x) + scaling * dropout(x) @ B @ A``. The two layers share one A ``[R, V]``
and one B ``[D, R]``, which receive the sum of both gradients. In PEFT 0.21.2, the head has its own
parameters over the same memory, and an optimizer then updates both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers.adapter_init import AdapterInitializer
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.parts import Factor
from fastlora.layers.unfused import BaseAdditiveLoraLayer
from fastlora.ops.execution_mode import ExecutionMode
from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.embedding import FastLoraEmbedding


class _TransposedEmbeddingFactor(nn.Module):
    """A LoRA factor of an embedding, transposed for use in the tied output head.

    The factor is a module without parameters of its own. The module's ``weight`` is a transposed
    view of the embedding's factor.
    """

    def __init__(self, source: FastLoraEmbedding, part: str, adapter_name: str) -> None:
        super().__init__()
        # The tuple keeps the source from becoming a submodule.
        self._at = (source,), part, adapter_name

    @property
    def weight(self) -> torch.Tensor:
        """The LoRA factor of the embedding that the head is tied to, as a transposed view.

        The view is the weight of the head's lora_A or lora_B factor, not the weight of the head.
        """
        (source,), part, adapter_name = self._at
        factor: torch.Tensor = source._modules[part][adapter_name]
        return factor.t()

    @property
    def bias(self) -> None:
        """The bias, which is always None."""
        return None


class TiedLoraHead(BaseAdditiveLoraLayer):
    """LoRA layer for a linear head that is tied to an embedding.

    The head shares its weight and adapters with the embedding.

    Args:
        base_layer: The linear layer.
        tied_to: The embedding's layer.

    Raises:
        UnsupportedLayerError: ``base_layer`` is not an `nn.Linear`.
    """

    fallback_reason = "it shares the factors of the embedding that it is tied to"

    def __init__(self, base_layer: nn.Module, tied_to: FastLoraEmbedding) -> None:
        if not isinstance(base_layer, nn.Linear):
            raise UnsupportedLayerError(
                "ensure_weight_tying needs an nn.Linear tied to the embedding, got "
                f"{type(base_layer).__name__}"
            )
        super().__init__(base_layer, base_layer.in_features, base_layer.out_features)
        self._source = (tied_to,)
        self._adding = ""

    @property
    def tied_to(self) -> FastLoraEmbedding:
        """The embedding layer that this head is tied to.

        The head shares the weight and the LoRA factors of the embedding layer.
        """
        return self._source[0]

    def add_adapter(self, adapter_name: str, **settings: Any) -> None:
        """Add an adapter to the tied head.

        The adapter shares its factors with the embedding's adapter of the same name. ``settings``
        are those of `LoraLayer.add_adapter`.
        """
        self._adding = adapter_name
        super().add_adapter(adapter_name, **settings)

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, Factor]:
        return {
            "lora_A": _TransposedEmbeddingFactor(self.tied_to, "lora_embedding_B", self._adding),
            "lora_B": _TransposedEmbeddingFactor(self.tied_to, "lora_embedding_A", self._adding),
        }

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return the names that the head's tensors for an adapter have in the adapter file.

        The result is an empty dict, because a tied head has no tensors of its own. The shared
        factors are saved with the embedding.
        """
        return {}

    def _count_samples_and_batch_dims(self, x: torch.Tensor) -> tuple[int, int]:
        return x.numel() // x.shape[-1], x.dim() - 1

    def _add_update(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
        conditions: ExecutionMode,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        lora_a, lora_b, _ = self._factors(name)
        if conditions.autocast is None:
            x = x.to(lora_a.dtype)
        # [..., R]
        s = self._apply_dropout(self.lora_dropout[name], x, seed) @ lora_a.t()
        return y + (s * self._scaling_on_device_of(name, s)) @ lora_b.t()

    # ------------------------------------------------------------------------------- merging

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        return DenseMergeTarget(self.weight), None

    def _merge_without_checks(self, names: list[str], keep_base: bool) -> None:
        # The embedding merges its adapters into the shared weight.
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Unmerge the merged adapters.

        No adapter remains merged. The embedding restores the shared weight.
        """
        self.merged_adapters.clear()
