"""The base class of wrappers for modules that adapters train without LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from fastlora.layers.adapted import Adapted
from fastlora.ops.conditions import conditions_of
from fastlora.routing.ids import fits
from fastlora.routing.routing import Group, Routing
from fastlora.validation import AdapterNotFoundError, UnsupportedLayerError


class ModuleWrapper(Adapted, nn.Module):
    """Base class of wrappers in which each adapter trains its own version of a module or a part.

    A subclass defines what a version contains. Names of parameters and of file keys follow PEFT.

    Attributes:
        field: The config field that requests the wrapper.
        owned: Names of the children that adapters own.
        owns: Term for an adapter's version in messages.
        held: Name of the child that is the original module.
        routed_by, routed_as: The routing group of the model, and this module's number in it.
        sees_part: As in `fastlora.layers.common.CommonLayer`.
    """

    field: ClassVar[str]
    owned: ClassVar[tuple[str, ...]] = ()
    owns: ClassVar[str]
    held: ClassVar[str]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.training = original.training
        self._init_adapted()
        self.routed_by: Group | None = None
        self.routed_as, self.sees_part = 0, False

    # ---------------------------------------------------------- methods that subclasses override

    def get_base_layer(self) -> nn.Module:
        """Return the original module."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    @property
    def _versions(self) -> nn.ModuleDict | nn.ParameterDict:
        """Maps an adapter name to the adapter's version."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return a dict that maps suffixes of an adapter's file keys to ``state_dict()`` names."""
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    # ------------------------------------------------------------------------ mixed batches

    def _checked(self, routing: Routing, x: torch.Tensor) -> AbstractContextManager[None]:
        """Check that x has all rows of a batch, in order.

        Returns a context manager that pauses the tracking of rows.
        """
        compiling = conditions_of(x, "eager").compiling
        routing.check_rows(self, x, compiling)
        if not compiling:
            routing.check_dimensions(self, x)
        return nullcontext() if compiling else routing.resting()

    # ----------------------------------------------------------------------------- adapters

    def release(self) -> nn.Module:
        """Return the module that replaces this one when the adapters are removed."""
        return self.get_base_layer()

    def current(self) -> nn.Module:
        """Return the module on which attributes that the wrapper lacks are looked up."""
        return self.get_base_layer()

    @property
    def adapter_names(self) -> list[str]:
        """List of the names of the adapters that have a version of the module."""
        return list(self._versions)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter's version; none if it has no version."""
        if adapter_name in self._versions:
            version = self._versions[adapter_name]
            yield from (version,) if isinstance(version, nn.Parameter) else version.parameters()

    def _drop(self, adapter_name: str) -> None:
        """Remove an adapter's version."""
        del self._versions[adapter_name]

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute that the wrapper lacks (``.weight``, ...) on the current module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.held not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current(), name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's version.

        Raises:
            AdapterNotFoundError: The adapter has no version of the module.
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        if self.routed_by is not None:
            self.routed_by.check_closed("delete_adapter")
        self._check_known(adapter_name)
        self._remove_adapter(adapter_name)

    def _remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's version without checks, as after a failed addition."""
        self._drop(adapter_name)
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names)

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.adapter_names:
            raise AdapterNotFoundError(
                f"adapter {adapter_name!r} has no {self.field} entry for this module"
            )

    @property
    def active_adapters(self) -> list[str]:
        """List of the names of the active adapters that have a version of the module."""
        return [name for name in self._active_adapters if name in self.adapter_names]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the children that adapters own; PEFT's name for `owned`."""
        return self.owned

    def acting(self) -> str | None:
        """Return the name of the adapter whose version runs, or None if the original runs."""
        if self._disabled:
            return None
        known = self.adapter_names
        return next((name for name in self._active_adapters if name in known), None)


def own_slots(
    ids: torch.Tensor, names: tuple[str, ...], known: list[str], x_rows: int, device: torch.device
) -> torch.Tensor:
    """Return each row's adapter as an index into ``known``, int64 ``[x_rows]``; -1 for none.

    ``ids [B]`` are the slots of samples or tokens, and ``names`` lists the adapter of each slot.

    Raises:
        ValueError: The number of rows is not a multiple of the number of ids.
    """
    count = ids.numel()
    if not fits(x_rows, count):
        raise ValueError(
            f"a module got {x_rows} rows in a batch with {count} adapter ids; expected one id per "
            "sample or per token"
        )
    place = {name: index for index, name in enumerate(known)}
    table = torch.tensor([*(place.get(name, -1) for name in names), -1], device=device)
    return table[ids.to(device)].repeat_interleave(x_rows // max(count, 1))
