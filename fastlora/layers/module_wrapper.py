"""The base class of wrappers for modules that adapters train without LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from fastlora.layers.module_with_adapters import ModuleWithAdapters
from fastlora.ops.execution_mode import execution_mode_of
from fastlora.routing.ids import ids_divide_rows
from fastlora.routing.routing import RoutedLayerGroup, Routing
from fastlora.validation import AdapterNotFoundError, UnsupportedLayerError


class ModuleWrapper(ModuleWithAdapters, nn.Module):
    """Base class for wrappers that take the place of a module in the model.

    A wrapper adds adapters to the module. It keeps the original module and the copies of the module
    or of its rows that the adapters train without LoRA. Attributes that the wrapper lacks are
    looked up on the module that is currently in use. A subclass defines what an adapter trains: a
    copy of the whole module (``modules_to_save``) or of some of its rows
    (``trainable_token_indices``). Names of parameters and of file keys follow PEFT.

    Attributes:
        field: The config field that requests the wrapper.
        owned: Names of the child modules that contain the adapters' weights.
        owns: Term for what an adapter trains, in messages.
        held: Name of the child that is the original module.
        routing_group, routing_index: The routing group of the model, and this module's number in
            it.
        may_see_partial_rows: As in `fastlora.layers.linear_with_adapters.BaseLinearWithAdapters`.
    """

    field: ClassVar[str]
    owned: ClassVar[tuple[str, ...]] = ()
    owns: ClassVar[str]
    held: ClassVar[str]

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.training = original.training
        self._init_adapter_state()
        self.routing_group: RoutedLayerGroup | None = None
        self.routing_index, self.may_see_partial_rows = 0, False

    # ---------------------------------------------------------- methods that subclasses override

    def get_base_layer(self) -> nn.Module:
        """Return the base layer.

        The base layer is the original module that this object wraps.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} has no base layer")

    @property
    def _trained_modules_or_rows_by_adapter(self) -> nn.ModuleDict | nn.ParameterDict:
        """The trained modules or rows, keyed by adapter name.

        They are copies of the wrapped module or of some of its rows.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return the names of an adapter's tensors in the adapter file.

        The result is a dict that maps each name in the adapter file to the name of the same tensor
        in the state dict. All names are relative to this module.
        """
        raise UnsupportedLayerError(f"{type(self).__name__} has no adapters")

    # ------------------------------------------------------------------------ mixed batches

    def _check_rows_and_pause_tracking(
        self, routing: Routing, x: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Check that x has all rows, and return a context manager that pauses row tracking.

        The rows must be in the order of the batch.
        """
        compiling = execution_mode_of(x, "eager").compiling
        routing.check_gets_all_rows(self, x, compiling)
        if not compiling:
            routing.check_sample_dimension(self, x)
        return nullcontext() if compiling else routing.pause_row_order_tracking()

    # ----------------------------------------------------------------------------- adapters

    def release(self) -> nn.Module:
        """Release the wrapped module from this wrapper, and return it.

        The returned module replaces this wrapper when the wrapper and its adapters are removed. By
        default, it is the base layer, which is the original module. A subclass may return an
        adapter's copy of the module instead.
        """
        return self.get_base_layer()

    def current(self) -> nn.Module:
        """Return the module that is currently in use.

        It provides the attributes that the wrapper lacks.
        """
        return self.get_base_layer()

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters in this module.

        Each of them has its own copy of the wrapped module or of some of its rows.
        """
        return list(self._trained_modules_or_rows_by_adapter)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield an adapter's parameters.

        The parameters belong to the adapter's own copy of the wrapped module or of its rows.
        Nothing is yielded if this wrapper lacks the adapter.
        """
        if adapter_name in self._trained_modules_or_rows_by_adapter:
            trained = self._trained_modules_or_rows_by_adapter[adapter_name]
            yield from (trained,) if isinstance(trained, nn.Parameter) else trained.parameters()

    def _remove_trained_copy(self, adapter_name: str) -> None:
        """Remove an adapter's trained copy of the wrapped module.

        The copy may contain only some of the module's rows.
        """
        del self._trained_modules_or_rows_by_adapter[adapter_name]

    def __getattr__(self, name: str) -> Any:
        """Look up missing attributes, such as ``weight``, on the current module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.held not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current(), name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this module.

        The adapter's copy of the module or of its rows is deleted, and the adapter is no longer
        active.

        Raises:
            AdapterNotFoundError: The adapter has no copy of the module or of its rows.
            AdapterStateError: A `fastlora.adapters` block is open for the model.
        """
        if self.routing_group is not None:
            self.routing_group.check_no_open_blocks("delete_adapter")
        self._check_has_adapter(adapter_name)
        self._remove_adapter(adapter_name)

    def _remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the wrapper, with the adapter's copy of the wrapped module.

        The copy may contain only some of the module's rows. Unlike `delete_adapter`, this method
        checks nothing. For example, this method is called after the addition of an adapter has
        failed.
        """
        self._remove_trained_copy(adapter_name)
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def _parameters_and_values_before_merge(self) -> list[tuple[object, object]]:
        """Return the base parameters that the merge of adapters has changed.

        The result is a list of tuples ``(parameter, value)``, where ``value`` is the parameter's
        value before the merge, or None if it was not kept.
        """
        return [(self.get_base_layer().weight, None)] if self.merged else []

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names)

    def _check_has_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.adapter_names:
            raise AdapterNotFoundError(
                f"adapter {adapter_name!r} has no {self.field} entry for this module"
            )

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters.

        Only adapters that have their own copy of this module or of its rows are included.
        """
        return [name for name in self._active_adapters if name in self.adapter_names]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold the adapters' weights.

        Each of these attributes, such as ``modules_to_save``, maps an adapter name to the module or
        the rows that the adapter trains. The property's name is PEFT's.
        """
        return self.owned

    def acting(self) -> str | None:
        """Return the name of the acting adapter, whose copy of the module or of its rows is in use.

        A forward pass applies the acting adapter, which is the first active adapter that has its
        own copy of this module or of some of the module's rows. Returns None if there is no such
        adapter, or if the adapters are disabled.
        """
        if self._disabled:
            return None
        known = self.adapter_names
        return next((name for name in self._active_adapters if name in known), None)


def adapter_index_of_rows(
    sample_or_token_slots: torch.Tensor,
    names: tuple[str, ...],
    known: list[str],
    num_rows: int,
    device: torch.device,
) -> torch.Tensor:
    """Return the index of each row's adapter.

    The result is int64 ``[num_rows]``. An index is a position in ``known``, or -1 for a row without
    an adapter. ``sample_or_token_slots [B]`` contains the slot of each sample or token, and
    ``names`` lists the adapter of each slot.

    Raises:
        ValueError: The number of rows is not a multiple of B.
    """
    count = sample_or_token_slots.numel()
    if not ids_divide_rows(num_rows, count):
        raise ValueError(
            f"a module got {num_rows} rows in a batch with {count} adapter ids; expected one id "
            "per sample or per token"
        )
    place = {name: index for index, name in enumerate(known)}
    table = torch.tensor([*(place.get(name, -1) for name in names), -1], device=device)
    return table[sample_or_token_slots.to(device)].repeat_interleave(num_rows // max(count, 1))
