"""The base class of modules with named adapters: which are active, trainable, and merged.

Names and flags follow PEFT, for tools that inspect a model's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from fastlora.user_warnings import warn
from fastlora.validation import UnsupportedLayerError


class ModuleWithAdapters:
    """Base class for modules with adapters.

    Subclasses include LoRA layers and wrappers of whole modules. In a subclass's ``__mro__``, this
    class never comes before PEFT's abstract class.

    Attributes:
        other_param_names: PEFT's name for the attributes of adapters that are not tensors.
        adapter_layer_names: PEFT's name for the child modules that contain adapters' tensors.
        merged_adapters: Names of the adapters that are merged into the base weight, in order.
        merge_error: Error of quantizing a merged weight again, relative to the change that the
            merge should make (both as Frobenius norms). None if no adapter is merged into a
            quantized weight.
    """

    other_param_names: ClassVar[tuple[str, ...]] = ()
    _unmerged: object = None  # The state of the base weight that a merge has saved.

    def _init_adapter_state(self) -> None:
        self._active_adapters: list[str] = []
        self._disabled = False
        self.merged_adapters: Any = []
        self.merge_error: float | None = None

    def _all_available_adapter_names(self) -> list[str]:
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield an adapter's parameters in this module.

        Parameters that are never trained are left out. Nothing is yielded if the module lacks the
        adapter.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def _check_has_adapter(self, adapter_name: str) -> None:
        """Raise `AdapterNotFoundError` unless the module has the adapter."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    # ---------------------------------------------------------------------------- active adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the module's active adapters.

        An adapter that the module lacks can also be active.
        """
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters.

        This property is an alias of `active_adapters`. PEFT uses both names.
        """
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are disabled.

        The forward pass then ignores every adapter.
        """
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        Their parameters become trainable, and all other adapters are frozen.

        Args:
            adapter_names: One name, or several in the order in which they are applied.
            inference_mode: Whether to leave all adapters frozen.

        Raises:
            AdapterNotFoundError: The module does not have one of the adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_has_adapter(name)
        self._activate(names, inference_mode)

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        """Activate the named adapters.

        Only their parameters become trainable, or none if ``inference_mode`` is set. If adapters
        are merged, they are unmerged first, unless ``keep_merged`` is set. Unlike `set_adapter`,
        this method accepts the names of adapters that the module lacks.
        """
        if self.merged and not keep_merged:
            warn("set_adapter() unmerges the adapters that are currently merged")
            self.unmerge()
        self._active_adapters = list(dict.fromkeys(names))
        self._train_only([] if inference_mode else self._active_adapters)

    def _train_only(self, names: list[str]) -> None:
        """Make only the named adapters trainable.

        All other adapters are frozen.
        """
        for adapter in self._all_available_adapter_names():
            for parameter in self.adapter_parameters(adapter):
                parameter.requires_grad_(adapter in names)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters.

        Enabling makes the active adapters trainable, and disabling freezes all adapters.
        """
        self._disabled = not enabled
        self._train_only(self._active_adapters if enabled else [])

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager that disables all adapters.

        Merged adapters are unmerged in the block and merged again afterwards.
        """
        merged, had_saved_base = list(self.merged_adapters), self._unmerged is not None
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
                self.merge(adapter_names=merged, keep_base=had_saved_base)

    # ----------------------------------------------------------------------------------- merging

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """Check that adapters can be merged, and return the names of those to merge.

        The list contains the adapters that `merge` would merge. This method raises the same errors
        as `merge`, but does not change the module.
        """
        return []

    def _check_release(self) -> None:
        """Check that the adapters can be removed, so that the base module can be released.

        Raises an error that states the reason if `release`, a method of subclasses, cannot return
        the module without adapters.
        """

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep_base: bool = True,
    ) -> None:
        """Merge adapters into the base weight.

        The forward pass then runs only the base layer.

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
                lora_bias and the base layer has no bias. In this case, nothing has changed.
            UnsupportedLayerError: The base weight does not support merging.
        """
        names = self.check_merge(safe_merge, adapter_names)
        if names:
            self._merge_without_checks(names, keep_base)

    def _merge_without_checks(self, names: list[str], keep_base: bool) -> None:
        """Merge the named adapters into the base weight without running `check_merge` first.

        The adapters must already have passed `check_merge`. ``keep_base`` is as in `merge`.
        """

    def unmerge(self) -> None:
        """Unmerge all merged adapters from the base weight."""
