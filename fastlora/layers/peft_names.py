"""What PEFT's LoRA layers answer to tools that look inside of a model, under PEFT's names."""

from __future__ import annotations

from typing import ClassVar


class LayerNames:
    """Names and flags of a layer's adapters; comes before PEFT's abstract class in no `__mro__`.

    Attributes:
        other_param_names: Names of what belongs to adapters and is no tensor.
    """

    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout")
    adapter_parts: ClassVar[tuple[str, ...]]
    r: dict[str, int]
    _active_adapters: list[str]
    _disabled: bool

    @property
    def active_adapters(self) -> list[str]:
        """Names set active, whether or not this layer has them."""
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """The same, under PEFT's other name."""
        return list(self._active_adapters)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of what holds each adapter's factors."""
        return tuple(part for part in self.adapter_parts if part != "lora_magnitude_vector")

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.r)

    def _set_trainable(self, names: list[str]) -> None:
        """Has these adapters train, and no others."""

    def enable_adapters(self, enabled: bool) -> None:
        """Has the active adapters act and train, or makes the layer its base layer."""
        self._disabled = not enabled
        self._set_trainable(self._active_adapters if enabled else [])
