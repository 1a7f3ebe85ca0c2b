"""Initialization of a new adapter's factors on one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from fastlora.init import InitInputs, InitMethod, find_init_method
from fastlora.layers.base_layers import (
    linear_features,
    reason_weight_not_replaceable,
    stores_weight_transposed,
)
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError, InitializationError, UnsupportedLayerError


class InitializableLayer(Protocol):
    """Interface for layers on which an adapter can be initialized.

    This `Protocol` declares the attributes of a `LoraLayer` that adapter initialization uses.
    """

    merged_adapters: Any
    is_split: bool

    @property
    def get_base_layer(self) -> Callable[[], Any]: ...

    def _modules_that_may_hold_calibration_results(self) -> list[nn.Module]: ...

    def _weight_for_init(self, why: str) -> torch.Tensor: ...


class AdapterInitializer:
    """Initializer for a new adapter's factors on one layer.

    This class is used for all initialization methods. Some methods also compute a new base weight,
    which the caller has to set.

    Args:
        layer: The layer, which is not changed.
        name: The value of ``init_lora_weights``.
        scaling: The adapter's scaling.
        config: The settings of the initialization method.
        from_file: See `LoraLayer.add_adapter`.

    Attributes:
        base: The layer's base layer.
        asked: The initialization that ``name`` refers to.
        init: The initialization that runs. It differs from ``asked`` if the layer does not support
            ``asked``, if the base weight is on the meta device, or if trained factors will
            overwrite the values.
        weight: The new base weight ``[N, K]`` once `initialize_weights` has run, or None if it is
            unchanged.

    Raises:
        ConfigError: There is no initialization of this name.
        InitializationError: The layer lacks the data that the initialization needs.
    """

    def __init__(
        self,
        layer: InitializableLayer,
        name: bool | str,
        scaling: float,
        config: object | None,
        from_file: bool,
    ) -> None:
        self.layer, self.scaling, self.config = layer, scaling, config
        self.asked = find_init_method(name)
        self.name, self.init = name, self.asked
        self.weight: torch.Tensor | None = None
        self.base = base = layer.get_base_layer()
        base_weight = base._parameters.get("weight")
        is_meta = base_weight is not None and base_weight.is_meta  # There are no values to read.
        if is_meta or (from_file and not self.init.changes_base):
            self.name, self.init = True, find_init_method(True)
        found = find_calibration_result(layer, self.init) if self.init.data else None
        if self.init.data and found is None:
            linear = linear_features(base) is not None
            if linear and not (from_file and not self.init.must_repeat):
                raise InitializationError(
                    f"init_lora_weights={name!r} needs calibration data for this layer: before "
                    f"adding the adapter, run fastlora.{self.init.calibration}(model, config, "
                    "...) with a config whose target_modules select this layer"
                )
            if not linear and not from_file:
                warn(
                    f"init_lora_weights={name!r} is supported only for linear layers; the adapter "
                    f"on a {type(base).__name__} is initialized as with True",
                )
            self.name, self.init = True, find_init_method(True)
        self.data = None if found is None else found[1]

    @torch.no_grad()
    def initialize_weights(
        self, lora_a: nn.Module, lora_b: nn.Module, rank: int | None = None
    ) -> None:
        """Initialize the weights of lora_a and lora_b in place.

        lora_a and lora_b are new factor modules. The attribute ``init`` determines the
        initialization method. A bias of lora_b becomes zero, except with
        ``init_lora_weights=False``.

        Args:
            lora_a: A linear ``[R, K]``, or a convolution.
            lora_b: A linear ``[N, R]``, or a convolution.
            rank: The adapter's rank, if it is not R.

        Raises:
            InitializationError: The initialization cannot start from the layer's weight.
            UnsupportedLayerError: The layer kind does not support this initialization.
        """
        down: Any = lora_a
        up: Any = lora_b
        a, b = self.initial_values(
            down.weight.flatten(1), up.weight.flatten(1), down.weight.dim() == 2, rank
        )
        down.weight.data = a.view(down.weight.shape)
        up.weight.data = b.view(up.weight.shape)
        if up.bias is not None and self.init.name is not False:
            up.bias.zero_()

    @torch.no_grad()
    def initial_values(
        self,
        default_lora_a: torch.Tensor,
        default_lora_b: torch.Tensor,
        linear: bool = True,
        rank: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the initial values of the factors A and B as a tuple.

        A is ``[R, K]``, and B is ``[N, R]``. ``default_lora_a`` and ``default_lora_b`` have these
        shapes, and contain the values with which the layer initializes its factors by default.
        """
        if not linear and not self.init.supports_convolutions:
            raise UnsupportedLayerError(
                f"init_lora_weights={self.name!r} is supported only for linear layers, as in PEFT; "
                "for this layer, use True, False, or 'gaussian', or exclude it with exclude_modules"
            )
        weight = self.base._parameters.get("weight")
        floating = weight is not None and weight.is_floating_point()
        start = self.init.start(
            InitInputs(
                name=str(self.name).lower(),
                rank=rank or default_lora_a.shape[0],
                scaling=self.scaling,
                lora_a=default_lora_a,
                lora_b=default_lora_b,
                read_weight=self._read_base_weight,
                dtype=weight.dtype if weight is not None and floating else default_lora_a.dtype,
                config=self.config,
                data=self.data,
                transposed=stores_weight_transposed(self.base),
            )
        )
        self.weight = start.weight
        return start.lora_a, start.lora_b

    def _read_base_weight(self) -> torch.Tensor:
        layer, name = self.layer, self.name
        if layer.merged_adapters:
            raise AdapterStateError(
                f"init_lora_weights={name!r} reads the base weight, but adapters "
                f"{layer.merged_adapters} are merged into it; unmerge them first"
            )
        if layer.is_split:
            raise UnsupportedLayerError(
                f"init_lora_weights={name!r} needs the full base weight, but this weight is split "
                "across processes; use True, False, 'gaussian', or 'orthogonal'"
            )
        if self.init.changes_base:
            reason = reason_weight_not_replaceable(self.base, self.init.supports_quantized)
            if reason:
                raise UnsupportedLayerError(
                    f"init_lora_weights={name!r} changes the base weight, but {reason}"
                )
        return layer._weight_for_init(f"init_lora_weights={name!r} reads the base weight")


def find_calibration_result(
    layer: InitializableLayer, init: InitMethod
) -> tuple[nn.Module, object] | None:
    """Find a layer's calibration result and the module that holds it.

    The calibration result is the data that the initialization method needs. Returns a tuple
    (module, result), or None if there is no calibration result. The module is the one on which the
    calibration stored its result.
    """
    for module in layer._modules_that_may_hold_calibration_results():
        if init.data in module.__dict__:
            return module, module.__dict__[init.data]
    return None


def delete_calibration_result(layer: InitializableLayer, init: InitMethod) -> None:
    """Delete a layer's calibration result.

    This function is called after an adapter has been initialized from the calibration result, which
    is then no longer needed.
    """
    found = find_calibration_result(layer, init)
    if found is not None:
        delattr(found[0], init.data)
