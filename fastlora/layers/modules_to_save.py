"""`ModulesToSaveWrapper`: a module trained whole, one copy for each adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastlora.routing.ids import NO_ADAPTER
from fastlora.routing.in_force import routing_of
from fastlora.routing.routing import Group, Routing
from fastlora.validation import AdapterNotFoundError, UnsupportedLayerError

# The slot of an adapter that the batch does not name.
ABSENT = -2


def check_copyable(module: nn.Module) -> None:
    """Raises `UnsupportedLayerError` for a container without a forward."""
    if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
        raise UnsupportedLayerError(
            f"modules_to_save needs modules that can be called, got {type(module).__name__}"
        )


class ModulesToSaveWrapper(nn.Module):
    """Runs the active adapter's copy of a module, or the original where no adapter is active.

    Structure and names are PEFT's, so that parameters are found under the same names.

    Args:
        original_module: The module to copy.

    Raises:
        UnsupportedLayerError: The module is a container without a forward.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        check_copyable(original_module)
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.training = original_module.training
        self._active_adapters: list[str] = []
        self._disabled = False
        # The model's group of layers, and this one's number, once it is in a model.
        self.routed_by: Group | None = None
        self.routed_as = 0
        original_module.requires_grad_(False)

    def add_adapter(self, adapter_name: str) -> None:
        """Copies the original module for an adapter."""
        module = copy.deepcopy(self.original_module)
        self.modules_to_save[adapter_name] = module.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drops an adapter's copy."""
        if adapter_name not in self.modules_to_save:
            raise AdapterNotFoundError(f"no copy for adapter {adapter_name!r}")
        del self.modules_to_save[adapter_name]
        self._active_adapters = [n for n in self._active_adapters if n != adapter_name]

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        self._active_adapters = list(names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in names and not inference_mode)

    def current(self) -> nn.Module:
        """Returns the module that the next forward runs."""
        names = [name for name in self._active_adapters if name in self.modules_to_save]
        if self._disabled or not names:
            return self.original_module
        return self.modules_to_save[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the current module; in a mixed batch, each sample's own copy."""
        routing = routing_of(self)
        if routing is None or self._disabled:
            return self.current()(*args, **kwargs)
        return self._mixed(routing, *args, **kwargs)

    def _mixed(self, routing: Routing, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the copy of each adapter on its own rows along x's first dimension.

        With ids per token, rows are those of ``x [..., K]`` flattened.
        """
        if x.shape[0] % routing.ids.numel():
            flat = self._mixed(routing, x.reshape(-1, x.shape[-1]), *args, **kwargs)
            return flat.view(*x.shape[:-1], *flat.shape[1:])
        slots = {name: slot for slot, name in enumerate(routing.names)}
        copied = [slot if n in self.modules_to_save else NO_ADAPTER for n, slot in slots.items()]
        ids = routing.ids.to(x.device).repeat_interleave(x.shape[0] // routing.ids.numel())
        own = torch.tensor([*copied, NO_ADAPTER], device=x.device)[ids]
        # Every process that shares the batch calls the same modules in the same order, some on no
        # rows: FSDP2 may have wrapped each of them, and each call then waits for the others.
        together = routing.absent_gradients and torch.is_grad_enabled()
        result: torch.Tensor | None = None
        modules = [(NO_ADAPTER, self.original_module)]
        modules += [(slots.get(name, ABSENT), m) for name, m in self.modules_to_save.items()]
        for slot, module in modules:
            index = (own == slot).nonzero().flatten()
            if not index.numel() and not together:
                continue
            part = module(x.index_select(0, index), *args, **kwargs)
            if result is None:
                result = part.new_zeros(x.shape[0], *part.shape[1:])
            result = result.index_copy(0, index, part)
        return self.original_module(x, *args, **kwargs) if result is None else result

    def __getattr__(self, name: str) -> Any:
        """Finds what the wrapper lacks on the module that it stands for (``.weight``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "original_module" not in self._modules:
                raise
            return getattr(self.current(), name)
