"""A pool's layers: put in place of a model's target modules, and taken out again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastlora import inject
from fastlora.config import LoraConfig
from fastlora.in_force import check_batch, unchecked
from fastlora.layers import FastLoraLinear, FastLoraWrapper, LoraLayer
from fastlora.layers.linear import why_not_plain
from fastlora.pool.image import Target
from fastlora.routing import Group, number_layers
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError


class PoolLayers:
    """LoRA layers without adapters of their own, in place of a model's target modules.

    Args:
        model: The base model; unchanged where this raises.
        target_modules: As in `LoraConfig`.

    Attributes:
        group: What marks the layers as this pool's.
        targets: The modules, in the model's order; a layer's place here is its ``table_row``.

    Raises:
        AdapterStateError: The model has LoRA layers already.
        ConfigError: The model itself is the target.
        TargetNotFoundError: ``target_modules`` names nothing.
        UnsupportedLayerError: It names a module that is no linear layer.
    """

    def __init__(self, model: nn.Module, target_modules: Any) -> None:
        if any(True for _ in inject.lora_layers(model)):
            raise AdapterStateError(
                "the model has LoRA layers already; unload() or close() what put them there first"
            )
        names = inject.plan_adapter(model, LoraConfig(target_modules=target_modules)).targets
        if "" in names:
            raise ConfigError("the model itself is the target; wrap it in a module first")
        self.group = Group()
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._replaced: dict[str, tuple[nn.Module, LoraLayer]] = {}
        self._hook: RemovableHandle | None = None
        self._generate: Any = None
        try:
            for name, number in zip(names, number_layers(names), strict=True):
                self._replace(name, number)
            self._check_batches()
        except BaseException:
            self.remove()
            raise
        self.targets = [
            Target(name, layer.in_features, layer.out_features)
            for name, (_, layer) in self._replaced.items()
        ]

    def _check_batches(self) -> None:
        """Makes the model compare each batch with its adapter ids, before any work.

        Within `generate` the batch that came in counts: a beam search makes more rows of it.
        """
        group, model = self.group, self._model

        def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            check_batch(group, args, kwargs)

        self._hook = model.register_forward_pre_hook(check, with_kwargs=True)
        generate = getattr(model, "generate", None)
        if generate is None:
            return

        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check_batch(group, args, kwargs)
            with unchecked():
                return generate(*args, **kwargs)

        model.__dict__["generate"] = checked
        self._generate = checked

    def _replace(self, name: str, number: int) -> None:
        module: Any = self._model.get_submodule(name)
        layer: Any = (
            FastLoraWrapper(module)
            if why_not_plain(module)
            else FastLoraLinear.from_linear(module, adapter_name=None)
        )
        layer.routed_by, layer.routed_as = self.group, number
        layer.table_row = len(self._replaced)
        self._model.set_submodule(name, layer)
        self._replaced[name] = module, layer

    def remove(self) -> None:
        """Puts the base layers back; parameters train again where they did."""
        for name, (module, layer) in self._replaced.items():
            back = layer.to_linear() if isinstance(layer, FastLoraLinear) else module
            if self._model.get_submodule(name) is layer:
                self._model.set_submodule(name, back)
        self._replaced = {}
        if self._hook is not None:
            self._hook.remove()
        if self._generate is not None and self._model.__dict__.get("generate") is self._generate:
            del self._model.__dict__["generate"]
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def like(self) -> tuple[torch.device, torch.dtype]:
        """Returns the device of the base weights, and the dtype of the first.

        Raises:
            UnsupportedLayerError: They lie on several devices.
        """
        found = [layer._factor_like() for _, layer in self._replaced.values()]
        devices = {
            next(iter(module.parameters())).device
            for module, _ in self._replaced.values()
            if any(True for _ in module.parameters())
        }
        if len(devices) > 1:
            raise UnsupportedLayerError(
                f"the target modules lie on {', '.join(sorted(map(str, devices)))}; an adapter "
                "pool needs them on one device"
            )
        dtypes = [tensor.dtype for tensor in found if tensor is not None]
        device = next(iter(devices), torch.device("cpu"))
        return device, dtypes[0] if dtypes else torch.get_default_dtype()
