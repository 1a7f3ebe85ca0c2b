"""What stands in place of a module that adapters train otherwise than by LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from fastlora.routing.routing import Group
from fastlora.validation import AdapterNotFoundError, UnsupportedLayerError


class ModuleWrapper(nn.Module):
    """A module of which each adapter has its own version, whole or in part.

    A subclass says what an adapter has of it. Names of parameters and of file keys are PEFT's.

    Attributes:
        field: The config field that asks for it.
        owned: Names of the children that adapters own.
        other_param_names: PEFT's name for what adapters own beside these: nothing.
        owns: What an adapter has, for messages.
        merged_adapters: Adapters that are in the original's weight now.
        merge_error: Always None; see `LoraLayer`.
        routed_by, routed_as: The model's group of layers, and this one's number in it.
    """

    field: ClassVar[str]
    owned: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    owns: ClassVar[str]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.training = original.training
        self._active_adapters: list[str] = []
        self._disabled = False
        self.merged_adapters: list[str] = []
        self.merge_error: float | None = None
        self.routed_by: Group | None = None
        self.routed_as = 0

    # ------------------------------------------------------------------ what subclasses provide

    def get_base_layer(self) -> nn.Module:
        """Returns the module that was there before."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters that have a version."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yields what an adapter trains here; nothing for one that has no version."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Returns the ends of an adapter's file keys, and of their names in ``state_dict()``."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def _drop(self, adapter_name: str) -> None:
        """Removes an adapter's version."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def release(self) -> nn.Module:
        """Returns the module to put here once the adapters are to go."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    # ----------------------------------------------------------------------------- adapters

    def delete_adapter(self, adapter_name: str) -> None:
        """Drops an adapter's version; raises `AdapterNotFoundError` where it has none."""
        if adapter_name not in self.adapter_names:
            raise AdapterNotFoundError(f"{self.field} has nothing of adapter {adapter_name!r} here")
        self._drop(adapter_name)
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        if self.merged:
            self.unmerge()
        self._active_adapters = list(names)
        for name in self.adapter_names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(name in names and not inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        """Names set active that have a version here."""
        return [name for name in self._active_adapters if name in self.adapter_names]

    @property
    def active_adapter(self) -> list[str]:
        """The same, under PEFT's other name."""
        return self.active_adapters

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the children that adapters own; PEFT's name for `owned`."""
        return self.owned

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter's version the one that runs and, unless ``inference_mode``, trains."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if name not in self.adapter_names:
                raise AdapterNotFoundError(f"{self.field} has nothing of adapter {name!r} here")
        self._activate(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Has the active adapter's version run and train, or the original."""
        self._disabled = not enabled
        for name in self.adapter_names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(enabled and name in self._active_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the module is the original, whatever is active."""
        return self._disabled

    def acting(self) -> str | None:
        """Returns the adapter whose version the next forward runs; None for the original."""
        if self._disabled:
            return None
        known = self.adapter_names
        return next((name for name in self._active_adapters if name in known), None)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the module is the original; a merge is undone and done again."""
        merged, active, was_disabled = (
            [*self.merged_adapters],
            self._active_adapters,
            self._disabled,
        )
        if merged:
            self.unmerge()
        self._disabled = True
        try:
            yield
        finally:
            self._disabled = was_disabled
            if merged and self._active_adapters is active:
                self.merge(adapter_names=merged)

    # ------------------------------------------------------------- merging, where there is any

    @property
    def merged(self) -> bool:
        """Whether any adapter is in the original's weight now."""
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
        """Writes adapters into the original's weight; for arguments see `LoraLayer.merge`."""

    def unmerge(self) -> None:
        """Takes them out again."""


def own_slots(
    ids: torch.Tensor, names: tuple[str, ...], known: list[str], x_rows: int, device: torch.device
) -> torch.Tensor:
    """Returns the place in ``known`` of each row's adapter, int64 ``[x_rows]``; -1 for none.

    Args:
        ids: Slots of the batch's samples or tokens, ``[B]``.
        names: Adapter of each slot.
        known: Names to number.
        x_rows: Rows, a multiple of B.
        device: Where they are to lie.

    Raises:
        ValueError: There is no whole number of rows for each id.
    """
    count = ids.numel()
    if not count or x_rows % count:
        raise ValueError(
            f"a module has {x_rows} rows and the batch {count} adapter ids; expected as many ids "
            "as samples, or as tokens"
        )
    place = {name: index for index, name in enumerate(known)}
    table = torch.tensor([*(place.get(name, -1) for name in names), -1], device=device)
    return table[ids.to(device)].repeat_interleave(x_rows // count)
