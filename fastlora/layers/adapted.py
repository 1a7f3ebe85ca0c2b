"""The state of a module with named adapters: which are active, trainable, and merged.

Names and flags follow PEFT, for tools that inspect a model's modules.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from fastlora.validation import UnsupportedLayerError


class Adapted:
    """Adapters on one module.

    No class has it before PEFT's abstract class in its ``__mro__``.

    Attributes:
        other_param_names: PEFT's name for the attributes of adapters that are not tensors.
        adapter_layer_names: PEFT's name for the children that hold adapters' tensors.
        merged_adapters: Names of the adapters that are merged into the base weight, in order.
        merge_error: Error of quantizing a merged weight again, relative to the change that the
            merge should make (both as Frobenius norms). None if no adapter is merged into a
            quantized weight.
    """

    other_param_names: ClassVar[tuple[str, ...]] = ()
    _unmerged: object = None  # The state of the base weight that a merge has saved.

    def _init_adapted(self) -> None:
        self._active_adapters: list[str] = []
        self._disabled = False
        self.merged_adapters: Any = []
        self.merge_error: float | None = None

    def _all_available_adapter_names(self) -> list[str]:
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the adapter's trainable parameters on this module; none if it lacks the adapter."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def _check_known(self, adapter_name: str) -> None:
        """Raise `AdapterNotFoundError` unless the module has the adapter."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    # ---------------------------------------------------------------------------- active adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, whether or not this layer has them."""
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """Alias of `active_adapters`, under PEFT's other name."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the forward pass ignores every adapter."""
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, and make only their parameters trainable.

        Args:
            adapter_names: One name, or several in the order in which they are applied.
            inference_mode: Whether to leave all adapters frozen.

        Raises:
            AdapterNotFoundError: The module does not have one of the adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_known(name)
        self._activate(names, inference_mode)

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        """Activate adapters as `set_adapter` does; the module may lack some of the names."""
        if self.merged and not keep_merged:
            warnings.warn(
                ("set_adapter() unmerges the adapters that are currently merged"), stacklevel=3
            )
            self.unmerge()
        self._active_adapters = list(dict.fromkeys(names))
        self._set_trainable([] if inference_mode else self._active_adapters)

    def _set_trainable(self, names: list[str]) -> None:
        """Make the parameters of these adapters trainable, and freeze all other adapters."""
        for adapter in self._all_available_adapter_names():
            for parameter in self.adapter_parameters(adapter):
                parameter.requires_grad_(adapter in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable the active adapters and make them trainable, or disable all adapters."""
        self._disabled = not enabled
        self._set_trainable(self._active_adapters if enabled else [])

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the module as its base layer within the block; a merge is undone and then redone."""
        merged, kept = list(self.merged_adapters), self._unmerged is not None
        active, was_disabled = self._active_adapters, self._disabled
        if merged:
            self.unmerge()
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = was_disabled
            # If other adapters were activated within the block, these apply, and nothing is merged
            # again.
            if merged and self._active_adapters == active:
                self.merge(adapter_names=merged, keep_base=kept)

    # ----------------------------------------------------------------------------------- merging

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Return the names that `merge` would merge, or raise as it would, without any change."""
        return []

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep_base: bool = True,
    ) -> None:
        """Merge adapters into the base weight, so that the forward pass runs the base layer only.

        Args:
            safe_merge: Whether to raise if the result is not finite.
            adapter_names: The adapters to merge, or None for the active ones. Adapters that are
                already merged are skipped.
            keep_base: Whether to keep a copy of the weight until `unmerge`, which then restores it
                bit for bit. False saves that memory, and `unmerge` subtracts the update instead, as
                PEFT does.

        Raises:
            AdapterNotFoundError: The layer does not have one of the adapters.
            AdapterStateError: ``safe_merge`` found a value that is not finite, or an adapter has a
                lora_bias and the base layer has no bias. Nothing has changed then.
            UnsupportedLayerError: The base weight does not support merging.
        """
        names = self.check_merge(safe_merge, adapter_names)
        if names:
            self._merge(names, keep_base)

    def _merge(self, names: list[str], keep_base: bool) -> None:
        """Merge adapters that `check_merge` has checked."""

    def unmerge(self) -> None:
        """Undo `merge` for every merged adapter."""
