"""`ModulesToSaveWrapper`: a module that is trained in full, with one copy per adapter."""

from __future__ import annotations

import copy
import enum
import functools
import numbers
import types
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastlora.layers.module_wrapper import ModuleWrapper, adapter_index_of_rows
from fastlora.routing.active import active_routing
from fastlora.routing.ids import ids_divide_rows
from fastlora.routing.routing import Routing
from fastlora.validation import UnsupportedLayerError

# Types of arguments that each adapter's copy of a module receives unchanged.
_SAME_FOR_ALL_ROWS = (
    types.NoneType,
    numbers.Number,
    str,
    bytes,
    slice,
    range,
    set,
    frozenset,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    functools.partial,
    nn.Module,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Generator,
)


def raise_if_container(module: nn.Module) -> None:
    """Raise `UnsupportedLayerError` if a module is a container.

    A container has no ``forward`` method.
    """
    if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
        raise UnsupportedLayerError(
            "modules_to_save supports only modules with a forward method, got "
            f"{type(module).__name__}"
        )


class ModulesToSaveWrapper(ModuleWrapper):
    """Wrapper for a module in ``modules_to_save``, with one copy of the module per adapter.

    The wrapper also keeps the original module. The forward pass runs the active adapter's copy, or
    the original module if no adapter is active. In a mixed batch, each row is passed to the copy of
    its own adapter, or to the original module if the row has no adapter.

    Args:
        original_module: The module to copy.

    Raises:
        UnsupportedLayerError: The module is a container without a ``forward`` method.
    """

    field: ClassVar[str] = "modules_to_save"
    owned: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    owns: ClassVar[str] = "copies"
    held: ClassVar[str] = "original_module"

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__(original_module)
        raise_if_container(original_module)
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        original_module.requires_grad_(False)

    def add_adapter(self, adapter_name: str, tied_to: nn.Module | None = None) -> None:
        """Add an adapter with its own copy of the original module.

        Args:
            adapter_name: The adapter that gets the copy.
            tied_to: The module to which the copy is tied. The copy shares the weight of
                ``tied_to``. With None, the copy has its own weight.
        """
        weight: Any = getattr(self.original_module, "weight", None)
        memo = {} if tied_to is None else {id(weight): tied_to.weight}
        module = copy.deepcopy(self.original_module, memo)
        self.modules_to_save[adapter_name] = module.requires_grad_(False)

    @property
    def _trained_modules_or_rows_by_adapter(self) -> nn.ModuleDict:
        """The trained modules or rows, keyed by adapter name.

        In this class, they are copies of the whole module.
        """
        return self.modules_to_save

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return the names that an adapter's tensors have in the adapter file.

        The result is a dict that maps each name in the adapter file to the name of the same tensor
        in the state dict of this wrapper. The names in the adapter file are those in the state dict
        of the adapter's copy of the module.
        """
        if adapter_name not in self.modules_to_save:
            return {}
        owned = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in owned}

    def get_base_layer(self) -> nn.Module:
        """Return the base layer.

        The base layer is the original module that this object wraps.
        """
        return self.original_module

    def release(self) -> nn.Module:
        """Release the wrapped module from this wrapper, and return it.

        The returned module replaces this wrapper when the wrapper and its adapters are removed. It
        is the original module, unless an adapter is active. Then the active adapter's copy of the
        original module is returned, even if adapters are disabled.
        """
        name = next(iter(self.active_adapters), None)
        return self.original_module if name is None else self.modules_to_save[name]

    def current(self) -> nn.Module:
        """Return the module that is currently in use.

        It is the active copy or the original module.
        """
        name = self.acting()
        return self.original_module if name is None else self.modules_to_save[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the current module.

        In a mixed batch, each adapter's copy of the module is called on the rows that use the
        adapter. The original module is called on the rows without an adapter.
        """
        routing = active_routing(self)
        if routing is None or self._disabled:
            return self.current()(*args, **kwargs)
        return self._in_batch(routing, *args, **kwargs)

    def _in_batch(self, routing: Routing, x: object = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            raise UnsupportedLayerError(
                f"{self._description()} must get a tensor as its first positional argument in a "
                "mixed batch. Change how the module is called, or use one adapter per batch"
            )
        with self._check_rows_and_pause_tracking(routing, x):
            return self._run_copies_on_rows(routing, x, *args, **kwargs)

    def _run_copies_on_rows(
        self, routing: Routing, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run each adapter's copy of the module on the rows of x that use the adapter.

        The original module runs on the other rows, and all outputs are combined into one output.
        The rows are along x's first dimension. If ids are per token, the leading dimensions of
        ``x [..., K]`` are flattened to rows. A copy may return any nested structure of tensors with
        the rows along their first dimension. Other tensor arguments with one entry per row, such
        as an attention mask or a router's weights for experts, are split like x.
        """
        lead = x.shape[:1]
        if not ids_divide_rows(x.shape[0], routing.ids.numel()):
            lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        known, count = list(self.modules_to_save), x.shape[0]
        own = adapter_index_of_rows(routing.ids, routing.names, known, count, x.device)
        # All processes that share the batch call the same modules in the same order, some on no
        # rows. FSDP2 may have wrapped each module, and each call then waits for the other
        # processes.
        together = routing.unused_gradients and torch.is_grad_enabled()
        indices, parts = [], []
        for slot, module in enumerate((self.original_module, *self.modules_to_save.values()), -1):
            index = (own == slot).nonzero().flatten()
            if index.numel() or together or not count:
                indices.append(index)
                own_args, own_kwargs = self._select_rows((args, kwargs), index, x, lead)
                output = module(x.index_select(0, index), *own_args, **own_kwargs)
                parts.append(tree_flatten(output))
        leaves = [
            self._combine_outputs(indices, found, lead)
            for found in zip(*(values for values, _ in parts), strict=True)
        ]
        return tree_unflatten(leaves, parts[0][1])

    def _combine_outputs(
        self, indices: list[torch.Tensor], outputs: tuple[object, ...], lead: torch.Size
    ) -> object:
        """Combine the outputs of several modules into one output.

        The modules are the adapters' copies and the original module. Tensors are combined into one
        tensor ``[*lead, ...]``, in the order of the input rows.
        """
        tensors = [value for value in outputs if isinstance(value, torch.Tensor)]
        if len(tensors) < len(outputs):
            return outputs[0]  # None, or a number
        sizes = [index.numel() for index in indices]
        if any(not t.dim() or t.shape[0] != n for t, n in zip(tensors, sizes, strict=True)):
            raise UnsupportedLayerError(
                f"{self._description()} returned a tensor of shape "
                f"{tuple(tensors[0].shape)} for an input of {sizes[0]} rows; in a mixed batch, the "
                "first dimension of the output must have one entry per input row. Change the "
                "module's output, or use one adapter per batch"
            )
        result = tensors[0].new_zeros(sum(sizes), *tensors[0].shape[1:])
        for index, tensor in zip(indices, tensors, strict=True):
            result = result.index_copy(0, index, tensor)
        return result.view(*lead, *result.shape[1:])

    def _select_rows(
        self,
        arguments: tuple[tuple[object, ...], dict[str, object]],
        index: torch.Tensor,
        x: torch.Tensor,
        lead: torch.Size,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Select the rows at ``index`` in each tensor argument that has one entry per row of x.

        Returns the arguments with the selected rows. Other arguments are unchanged, but objects
        such as caches are replaced with None if no rows are selected. If all rows are selected,
        nothing is changed.

        Args:
            arguments: The positional and keyword arguments of the module after x.
            index: The rows of x that the module gets.
            x: The input, with its rows along the first dimension.
            lead: The dimensions of the input that were flattened to rows.

        Raises:
            UnsupportedLayerError: Only some of the rows are selected, and an argument is an object
                such as a cache, or it is unclear whether a tensor has one entry per row.
        """
        count = x.shape[0]
        if index.numel() == count:
            return arguments

        def select(value: object) -> object:
            if isinstance(value, torch.Tensor):
                if len(lead) > 1 and value.shape[: len(lead)] == lead:
                    value = value.flatten(0, len(lead) - 1)
                elif not value.dim() or value.shape[0] != count:
                    return value
                elif index.numel() and not _has_one_entry_per_row(value, x):
                    raise UnsupportedLayerError(
                        f"{self._description()} got an argument of shape {tuple(value.shape)} for "
                        f"an input of shape {tuple(x.shape)}; in a mixed batch, fastlora cannot "
                        "tell whether the first dimension of the argument is the batch dimension. "
                        "Use another batch size, or one adapter per batch"
                    )
                return value.index_select(0, index.to(value.device))
            if _is_same_for_all_rows(value):
                return value
            if not index.numel():
                return None
            raise UnsupportedLayerError(
                f"{self._description()} got a {type(value).__name__}, which a mixed batch cannot "
                "split by sample. Do not pass this argument (for a cache, set use_cache=False), or "
                "use one adapter per batch"
            )

        # PyTorch also treats some caches as trees, and would replace them with new ones.
        return tree_map(select, arguments, is_leaf=lambda v: not isinstance(v, tuple | list | dict))

    def _description(self) -> str:
        """Return a description of the module for error messages."""
        return f"a {type(self.original_module).__name__} in modules_to_save"


def _is_same_for_all_rows(value: object) -> bool:
    """Return whether an argument that is not a tensor cannot contain values of single rows."""
    return isinstance(value, _SAME_FOR_ALL_ROWS) or type(value).__name__.endswith("Config")


def _has_one_entry_per_row(value: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether a tensor with as many rows as x certainly has one entry per row of x.

    If x is not a matrix of features, the first dimension of the tensor may have the number of rows
    only by coincidence. It could be the number of heads in a bias of shape ``[heads, 1, T]`` or
    ``[heads, T, T]``, or the number of tokens in a matrix ``[T, T]``.
    """
    if x.dim() == 1 or (x.dim() == 2 and x.is_floating_point()):
        return True
    if value.dim() == 3:
        positions = x.shape[1]
        if value.shape[-1] == x.shape[-1]:
            return True
        return x.shape[0] != positions > 1 and value.shape[1] == positions != value.shape[2]
    return value.dim() > 3 or x.shape[0] not in x.shape[1:]
