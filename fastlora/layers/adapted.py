"""What every module with adapters by name keeps of them: which are active, act, train, are merged.

Names and flags are PEFT's, for tools that look inside of a model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from fastlora.validation import UnsupportedLayerError


class Adapted:
    """Adapters on one module; comes before PEFT's abstract class in no `__mro__`.

    Attributes:
        other_param_names: PEFT's name for what belongs to adapters and is no tensor.
        adapter_layer_names: PEFT's name for the children that hold adapters' tensors.
        merged_adapters: Names of the adapters that are in the base weight now, in order.
        merge_error: What quantising a merged weight again lost of what the merge was to change, as
            a share of its Frobenius norm; None where nothing is merged into a quantised weight.
    """

    other_param_names: ClassVar[tuple[str, ...]] = ()
    _unmerged: object = None  # what a merge has kept of the base weight

    def _init_adapted(self) -> None:
        self._active_adapters: list[str] = []
        self._disabled = False
        self.merged_adapters: Any = []
        self.merge_error: float | None = None

    def _all_available_adapter_names(self) -> list[str]:
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yields what an adapter can train on this module; nothing where it is not on it."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def _check_known(self, adapter_name: str) -> None:
        """Raises `AdapterNotFoundError` unless the module has the adapter."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    # -------------------------------------------------------------------------------- which act

    @property
    def active_adapters(self) -> list[str]:
        """Names set active, whether or not this layer has them."""
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """The same, under PEFT's other name."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the forward ignores every adapter."""
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters act, and them alone trainable.

        Args:
            adapter_names: One name, or several, in the order in which they act.
            inference_mode: Leave all of them frozen.

        Raises:
            AdapterNotFoundError: The module has no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_known(name)
        self._activate(names, inference_mode)

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        """`set_adapter` for a whole model, where a module may lack some of the names."""
        if self.merged and not keep_merged:
            warnings.warn("set_adapter() unmerges the adapters merged so far", stacklevel=3)
            self.unmerge()
        self._active_adapters = list(dict.fromkeys(names))
        self._set_trainable([] if inference_mode else self._active_adapters)

    def _set_trainable(self, names: list[str]) -> None:
        """Has these adapters train, and no others."""
        for adapter in self._all_available_adapter_names():
            for parameter in self.adapter_parameters(adapter):
                parameter.requires_grad_(adapter in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Has the active adapters act and train, or makes the module its base layer."""
        self._disabled = not enabled
        self._set_trainable(self._active_adapters if enabled else [])

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the module is its base layer; a merge is undone and done again."""
        merged, kept = list(self.merged_adapters), self._unmerged is not None
        active, was_disabled = self._active_adapters, self._disabled
        if merged:
            self.unmerge()
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = was_disabled
            # Where other adapters were set active meanwhile, these are to act.
            if merged and self._active_adapters == active:
                self.merge(adapter_names=merged, keep_base=kept)

    # ------------------------------------------------------------- merging, where there is any

    @property
    def merged(self) -> bool:
        """Whether any adapter is in the base weight now."""
        return bool(self.merged_adapters)

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Returns the names that `merge` would merge, or raises as it would; changes nothing."""
        return []

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep_base: bool = True,
    ) -> None:
        """Adds adapters to the base weight, so that the forward is that of the base layer.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; None for the active ones. Those merged already are left out.
            keep_base: Keep a copy of the weight until `unmerge`, which then restores it bit for
                bit. False saves that memory, and `unmerge` subtracts instead, as PEFT does.

        Raises:
            AdapterNotFoundError: The layer has no such adapter.
            AdapterStateError: ``safe_merge`` found a value that is not finite, or lora_bias has no
                base bias to go into. Nothing has changed then.
            UnsupportedLayerError: The base weight cannot take an update.
        """
        names = self.check_merge(safe_merge, adapter_names)
        if names:
            self._merge(names, keep_base)

    def _merge(self, names: list[str], keep_base: bool) -> None:
        """`merge` of adapters that have been checked."""

    def unmerge(self) -> None:
        """Takes them out again."""
