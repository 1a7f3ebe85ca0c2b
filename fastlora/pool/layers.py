"""Replaces a model's target modules with the LoRA layers of an adapter pool, and restores them."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fastlora.layers import LoraLayer
from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters
from fastlora.layers.layer_kinds import LINEAR
from fastlora.model import inject
from fastlora.model.base_modules import modules_with_original_names
from fastlora.model.config import LoraConfig
from fastlora.model.plan import TargetModule, plan_target_modules
from fastlora.model.stacked_experts import (
    base_parameters_outside_auxiliary_wrappers,
    former_names_of_parameter,
    former_to_parameter_names,
    is_quantized,
    stacks_with_expert_layer_class,
)
from fastlora.model.target_names import is_all_linear
from fastlora.model.targets import model_type_of
from fastlora.pool.packed_adapter import TargetableBaseWeight
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.active import (
    check_batch_matches_ids,
    discard_unused_results,
    skip_batch_size_check,
)
from fastlora.routing.routing import RoutedLayerGroup, add_to_group
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError


class InstalledPoolLoraLayers:
    """The LoRA layers that an adapter pool installs in a model.

    The LoRA layers replace the target modules of the model. The constructor installs the layers,
    and `restore_model` removes them.

    In each forward pass, the layers use the adapters that are loaded in the pool.

    Args:
        model: The base model. It is unchanged if the constructor raises.
        target_modules: The modules to replace, as in `LoraConfig`.
        target_parameters: The parameters to adapt, as in `AdapterPool`.
        block: Function that takes the adapter name of each sample in a batch and returns a context
            manager that activates these adapters. It implements the ``adapter_names=`` argument of
            the model.

    Attributes:
        group: The routing group that all of the pool's layers belong to.
        targets: Names and dimensions of the weights that adapters may adapt, in the model's order.
            The index of a weight here is the ``table_row`` of its layer.
        layers: The LoRA layers of these weights, in the same order.

    Raises:
        AdapterStateError: The model already has LoRA layers.
        ConfigError: The model itself is the target.
        TargetNotFoundError: ``target_modules`` matches no module, or ``target_parameters`` no
            parameter.
        UnsupportedLayerError: ``target_modules`` matches a module that is not a linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: Any,
        target_parameters: list[str] | None,
        block: Callable[[Sequence[str | None]], AbstractContextManager[None]],
    ) -> None:
        if inject.lora_layers(model):
            raise AdapterStateError(
                "the model already has LoRA layers; unload() the LoraModel or close() the "
                "AdapterPool that added them first"
            )
        if target_parameters is None and is_all_linear(target_modules):
            target_parameters = _expert_and_router_target_parameters(model)
        config = LoraConfig(target_modules=target_modules, target_parameters=target_parameters)
        found = plan_target_modules(model, config).targets
        if "" in found:
            raise ConfigError("the model itself is a target; wrap it in another module first")
        for name, target in found.items():
            if target.kind.name != LINEAR and not target.kind.adapts_parameters:
                raise UnsupportedLayerError(
                    f"target module {name!r} is a {type(target.base).__name__}, but an adapter "
                    "pool supports only linear layers and parameters; exclude this module, or load "
                    "the adapters into a LoraModel and select an adapter for each sample with "
                    "fastlora.adapters"
                )
        self.group = RoutedLayerGroup()
        patch_activation_checkpointing()
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._replaced: dict[str, tuple[nn.Module, LoraLayer]] = {}
        self._block = block
        # Maps the name of each wrapped method to a tuple (wrapper, previous attribute of the model
        # instance or None).
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        try:
            for name, target in found.items():
                self._replace(name, target)
            add_to_group(self.group, model, inject.modules_with_adapters(model))
            self._wrap_forward_and_generate_with_adapter_names()
        except BaseException:
            self.restore_model()
            raise
        by_name: dict[str, LoraLayer] = {}
        for name, (_, layer) in self._replaced.items():
            own = {f"{name}.{leaf}": inner for leaf, inner in layer.inner_layers().items()}
            by_name |= own or {name: layer}
        self.layers: list[Any] = list(by_name.values())
        for row, weight in enumerate(self.layers):
            weight.table_row = row
        self.targets = [
            TargetableBaseWeight(name, own.in_features, own.out_features, own.num_matrices)
            for name, own in by_name.items()
        ]

    def _wrap_forward_and_generate_with_adapter_names(self) -> None:
        """Wrap the model's ``forward`` and ``generate`` so that they can use the pool's adapters.

        The wrappers accept ``adapter_names=``. During a call with ``adapter_names=``, the named
        adapters are active. The wrappers also check the batch size: the number of samples or tokens
        must equal the number of adapter ids. In ``generate``, only the batch that the caller passes
        is checked, because beam search adds rows to the batch later.
        """
        self._wrap_method_with_adapter_names("forward", contextlib.nullcontext)
        if hasattr(self._model, "generate"):
            self._wrap_method_with_adapter_names("generate", skip_batch_size_check, per_sample=True)

    def _wrap_method_with_adapter_names(
        self, method_name: str, around: Callable[[], AbstractContextManager[None]], **rules: bool
    ) -> None:
        """Wrap a model method so that it accepts ``adapter_names=``.

        During a call with ``adapter_names=``, the named adapters are active. The wrapper also
        checks the batch size.

        Args:
            method_name: Name of the method.
            around: Function that returns a context manager in which the method is called.
            **rules: Keyword arguments for `check_batch_matches_ids`.
        """
        method, group, block = getattr(self._model, method_name), self.group, self._block

        @functools.wraps(method)
        def call(
            *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
        ) -> Any:
            opened = contextlib.nullcontext() if adapter_names is None else block(adapter_names)
            with opened:
                check_batch_matches_ids(group, args, kwargs, **rules)
                try:
                    with around():
                        return method(*args, **kwargs)
                finally:
                    discard_unused_results(group)

        own = self._model.__dict__
        self._wrapped[method_name] = call, own.get(method_name)
        own[method_name] = call

    def _replace(self, name: str, target: TargetModule) -> None:
        module, layer = self._model.get_submodule(name), target.kind.wrap(target.base)
        if isinstance(layer, FastLoraAdaptedParameters):
            layer.get_or_add_parameter_layers([each.name for each in target.settings.parameters])
        self._model.set_submodule(name, layer)
        self._replaced[name] = module, layer

    def restore_model(self) -> None:
        """Restore the model to its state before the layers were installed.

        The model gets its original modules and methods back, and parameters that required gradients
        when the layers were installed require gradients again.
        """
        for name, (_, layer) in self._replaced.items():
            if self._model.get_submodule(name) is layer:
                self._model.set_submodule(name, layer.release())
        self._replaced = {}
        own = self._model.__dict__
        for method, (call, before) in self._wrapped.items():
            if own.get(method) is not call:
                continue  # other code wrapped it again and calls the wrapper
            if before is None:
                del own[method]
            else:
                own[method] = before
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def base_weights_device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Return the device and the dtype of the base weights of the pool's layers.

        The base weights of all layers must share one device. The dtype is that of the first base
        weight.

        Raises:
            UnsupportedLayerError: The base weights are on different devices.
        """
        found = [layer._reference_for_new_factors() for layer in self.layers]
        modules = (module for module, _ in self._replaced.values())
        devices = {p.device for module in modules for p in itertools.islice(module.parameters(), 1)}
        if len(devices) > 1:
            raise UnsupportedLayerError(
                f"the target modules are on {', '.join(sorted(map(str, devices)))}; an adapter "
                "pool needs all of them to be on one device"
            )
        dtypes = [tensor.dtype for tensor in found if tensor is not None]
        device = next(iter(devices), torch.device("cpu"))
        return device, dtypes[0] if dtypes else torch.get_default_dtype()


def _expert_and_router_target_parameters(model: nn.Module) -> list[str] | None:
    """Return the names of a model's expert and router parameters.

    A pool adapts these parameters by default if its target modules are "all-linear". The result is
    None if the model has no such parameters. The expert parameters are stacks. The router
    parameters are those with former names; see `former_names_of_parameter`. Stacks of other modules
    are left out, and so are quantized parameters.
    """
    parameters = base_parameters_outside_auxiliary_wrappers(modules_with_original_names(model))
    former = former_to_parameter_names(model_type_of(model))
    stacks = {each.name for each in stacks_with_expert_layer_class(parameters)}
    return [
        each.name
        for each in parameters
        if each.name in stacks
        or (former_names_of_parameter(former, each) and not is_quantized(each))
    ] or None
