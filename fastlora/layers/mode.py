"""What a layer keeps of its weights ends when it enters or leaves training mode."""

from __future__ import annotations

from typing import Any

from fastlora.layers.norms import forget_norms
from fastlora.weight_marks import marks


def forget_kept(layer: Any) -> None:
    """Drops what a layer keeps of its weights, and its model of the adapters in mixed batches.

    Args:
        layer: A LoRA layer of fastlora's, or a patched one of PEFT's.
    """
    forget_norms(layer)
    marks.end_trained()  # blocks that are open keep some too
    if layer.routed_by is not None:
        layer.routed_by.packs.clear()


class ForgetsWithMode:
    """A layer that keeps nothing from one mode to another; comes before `nn.Module`."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        if mode != self.training:
            forget_kept(self)
        return super().train(mode)  # type: ignore[misc]  # nn.Module has it
