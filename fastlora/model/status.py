"""Report which adapters of a model are available, active, trainable, and merged.

`get_layer_status` and `get_model_status` return the same fields as in PEFT 0.21.2,
``peft_model.py``. The value of a field is ``"irregular"`` if layers differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from fastlora.layers import LoraLayer, ModuleWrapper
from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters, ParameterLoraLayer
from fastlora.layers.quantized import BaseQuantizedWeight, quantized_weight_of
from fastlora.layers.rank_padding import factor_parameters_by_name
from fastlora.layers.trainable_tokens import TrainableTokensWrapper
from fastlora.model.estimate import unpacked_numel
from fastlora.model.inject import modules_with_adapters
from fastlora.model.tuner import tuner_of
from fastlora.validation import AdapterStateError, UnsupportedLayerError

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"
_T = TypeVar("_T")


@dataclass
class TunerLayerStatus:
    """The status of an adapter layer.

    An adapter layer is a LoRA layer, or a wrapper for ``modules_to_save`` or trainable tokens.

    Args:
        name: The name of the module, relative to the tuner
            (``model.layers.0.self_attn.q_proj``).
        module_type: PEFT's name for the kind of module (``lora.Linear``).
        enabled: Whether adapters are enabled.
        active_adapters: The names of the active adapters. A LoRA layer also lists active adapters
            that it does not have. A module that adapters own copies of lists only the active
            adapters with a copy.
        merged_adapters: The names of the adapters merged into the base weight, in the order of
            merging.
        requires_grad: A dict that maps adapter names to True if all of the adapter's tensors in
            this module require gradients, to False if none does, or to ``"irregular"`` if only some
            do.
        available_adapters: The sorted names of the module's adapters.
        devices: A dict that maps adapter names to the types of the devices that the adapter's
            tensors are on.
        quantization_backend: The quantization of the base weight (``"bnb 4bit"``), or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The status of a whole model.

    Args:
        base_model_type: The class name of the base model, or ``"other"`` for a model that is
            neither a `LoraModel` nor a transformers model.
        adapter_model_type: ``"LoraModel"``, or ``"None"`` for a model that is not wrapped.
        peft_types: A dict that maps each adapter name to ``"LORA"``. It is empty for a model that
            is not wrapped.
        trainable_params: The number of trainable parameters.
        total_params: The number of all parameters.
        num_adapter_layers: The number of modules that contain adapters.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices,
            quantization_backend: See `TunerLayerStatus`. The values combine those of all modules.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each adapter layer of a model.

    The adapter layers are LoRA layers and wrappers for ``modules_to_save`` or trainable tokens. The
    list is in the order of ``named_modules()``.

    Args:
        model: A `LoraModel`, or any module that contains LoRA layers of fastlora.

    Raises:
        AdapterStateError: If the model has no such layers. It is a subclass of `ValueError`, the
            error that PEFT raises.
    """
    found, tuner = [], tuner_of(model)
    parameters = [] if tuner is None else tuner.targeted_parameter_names
    for name, module in modules_with_adapters(tuner or model):
        if isinstance(module, FastLoraAdaptedParameters):  # PEFT nests the layers of parameters.
            layers = reversed(module.adapted_parameters())
            found += [_status(name + ".base_layer" * d, layer) for d, layer in enumerate(layers)]
        elif not isinstance(module, ParameterLoraLayer):
            own = _status(name, module)
            if f"{name.removeprefix('model.')}.weight" in parameters:
                own.module_type = "lora.ParamWrapper"  # fastlora adapts the linear layer as a whole
            found.append(own)
    if not found:
        raise AdapterStateError(
            "No adapter layers found in the model; expected a model from fastlora.get_peft_model "
            "(for PEFT's own layers, use peft.get_layer_status)"
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a whole model.

    Args:
        model: A `LoraModel`, or any module that contains LoRA layers of fastlora.

    Raises:
        AdapterStateError: If the model has no such layers.
    """
    layers = get_layer_status(model)
    tuner = tuner_of(model)
    sizes = [(unpacked_numel(p), p.requires_grad) for p in model.parameters()]
    named = any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    somewhere = set(merged)
    missing = any(
        somewhere & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers
    )
    backends = [layer.quantization_backend for layer in layers]
    return TunerModelStatus(
        base_model_type=type(model if tuner is None else tuner.model).__name__
        if tuner is not None or named
        else "other",
        adapter_model_type="None" if tuner is None else "LoraModel",
        peft_types={} if tuner is None else dict.fromkeys(tuner.peft_config, "LORA"),
        trainable_params=sum(size for size, trains in sizes if trains),
        total_params=sum(size for size, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=_common_or_irregular(layer.enabled for layer in layers),
        # A module without active adapters, such as one that the active adapter has no copy of, is
        # not considered to differ from the others.
        active_adapters=_common_or_irregular(
            [layer.active_adapters for layer in layers if layer.active_adapters]
        ),
        merged_adapters=IRREGULAR if missing else merged,
        requires_grad={
            name: _common_or_irregular(values)
            for name, values in _by_name(layer.requires_grad for layer in layers).items()
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in values for device in devices})
            for name, values in _by_name(layer.devices for layer in layers).items()
        },
        quantization_backend=_common_or_irregular(backends),
    )


def _status(name: str, module: Any) -> TunerLayerStatus:
    tensors, found = _parameters_by_adapter(module), _quantized_weight(module)
    backend = getattr(module, "quantization_backend", None)
    return TunerLayerStatus(
        name=f"{name}.token_adapter" if isinstance(module, TrainableTokensWrapper) else name,
        module_type=_peft_module_type(module, found),
        enabled=not module._disabled,
        active_adapters=module.active_adapters,
        merged_adapters=list(getattr(module, "merged_adapters", ())),
        requires_grad={
            n: _common_or_irregular(p.requires_grad for p in own) for n, own in tensors.items()
        },
        available_adapters=sorted(tensors),
        devices={n: sorted({p.device.type for p in own}) for n, own in tensors.items()},
        quantization_backend=getattr(found, "backend", None)
        if backend is None
        else backend.backend_name,
    )


def _parameters_by_adapter(module: Any) -> dict[str, list[nn.Parameter]]:
    """Return a dict that maps the names of a module's adapters to lists of their parameters."""
    found: dict[str, list[nn.Parameter]] = {}
    if isinstance(module, ModuleWrapper):
        return {name: list(module.adapter_parameters(name)) for name in module.adapter_names}
    holder = getattr(module, "tied_to", module)  # a tied head uses the embedding's factors
    for name in module.r:
        for factor in holder._factors_by_name(name).values():
            found.setdefault(name, []).extend(factor_parameters_by_name(factor).values())
    return found


def _quantized_weight(module: Any) -> BaseQuantizedWeight | None:
    if not isinstance(module, LoraLayer):
        return None
    try:
        return quantized_weight_of(module.get_base_layer())
    except UnsupportedLayerError:  # not quantized yet
        return None


def _peft_module_type(module: Any, quantized_weight: BaseQuantizedWeight | None) -> str:
    """Return the module type that PEFT would report for a LoRA layer or wrapper.

    For a LoRA layer of a parameter, the type is ``"lora.ParamWrapper"``. For any other LoRA layer,
    the type depends on the quantization method of the base layer. If the base layer is not
    quantized or PEFT has no layer type for the quantization method, the type is derived from the
    PyTorch class of the base layer.
    """
    if isinstance(module, TrainableTokensWrapper):
        return "TrainableTokensLayer"
    if not isinstance(module, LoraLayer):
        return type(module).__name__
    if isinstance(module, ParameterLoraLayer):
        return "lora.ParamWrapper"
    if quantized_weight is not None and quantized_weight.peft_layer is not None:
        return f"lora.{quantized_weight.peft_layer[1]}"
    for base in type(module.get_base_layer()).__mro__:
        if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module:
            return f"lora.{base.__name__}"
    return "lora.Linear"


def _common_or_irregular(values: Iterable[Any]) -> Any:
    """Return the first value if all values are equal, or ``"irregular"`` otherwise.

    If there are no values, the result is an empty list.
    """
    found = list(values)
    if not found:
        return []
    return found[0] if all(other == found[0] for other in found) else IRREGULAR


def _by_name(layers: Iterable[dict[str, _T]]) -> dict[str, list[_T]]:
    found: dict[str, list[_T]] = {}
    for layer in layers:
        for name, value in layer.items():
            found.setdefault(name, []).append(value)
    return found
