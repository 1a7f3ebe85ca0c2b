"""LoftQ for quantized models: initialize an adapter to compensate for the quantization error.

The method is that of https://arxiv.org/abs/2310.08659, as implemented in PEFT 0.21.2,
``utils/loftq_utils.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastlora.init.loftq import best_low_rank_factors
from fastlora.init.registry import check_finite_for_init
from fastlora.layers import LoraLayer
from fastlora.layers.base_layers import dense_weight
from fastlora.layers.linear import DEFAULT_ADAPTER
from fastlora.model.inject import lora_layers
from fastlora.model.tuner import tuner_of
from fastlora.validation import (
    CheckpointError,
    ConfigError,
    InitializationError,
    UnsupportedLayerError,
)

_WEIGHTS = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replace an adapter's LoRA weights with initial weights computed by LoftQ.

    The initial weights are meant for 4-bit base layers. On each layer, the factors become the best
    low-rank approximation of ``W - Q``, where ``W`` is the unquantized weight from a file and ``Q``
    is the dequantized weight. The base layers are not changed. Call this function before training.

    Args:
        peft_model: A model with the adapter.
        model_path: The unquantized model: a ``model.safetensors`` file, or a folder that contains
            this file or a sharded checkpoint with a ``model.safetensors.index.json`` file. With
            None, it is the folder that the model was loaded from, or the model's folder in the
            local cache of the Hugging Face Hub.
        adapter_name: The adapter to change.
        callback: A function that is called with the model and the layer's name after each layer. If
            it returns False, the change to the layer is undone. For example, it may compare the
            outputs with those of the unquantized model.

    Raises:
        ConfigError: If the model has no adapters, or if the path of the unquantized model is
            unknown.
        AdapterNotFoundError: If there is no such adapter.
        UnsupportedLayerError: If the adapter is not on any 4-bit layer.
        CheckpointError: If the file is missing, lacks a weight, or has a weight of another shape.
        InitializationError: If a weight is not finite, or if the rank is larger than a dimension of
            a weight. No factor has changed after any of these errors. An error raised by
            ``callback`` leaves the changes made so far.
    """
    tuner = tuner_of(peft_model)
    if tuner is None:
        raise ConfigError("expected a model returned by fastlora.get_peft_model")
    tuner.check_adapter_loaded(adapter_name)
    layers = {
        name: layer
        for name, layer in lora_layers(tuner.model).items()
        if adapter_name in layer.lora_A and _is_4bit(layer)
    }
    if not layers:
        raise UnsupportedLayerError(
            "No bnb LoRA module found on the model: the adapter is not on any layer that "
            "bitsandbytes quantized to 4 bits"
        )
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with contextlib.ExitStack() as opened:
        for name, stored in _open_unquantized_weights(
            opened, tuner.model, model_path, layers
        ).items():
            layer = layers[name]
            base = dense_weight(layer.get_base_layer()).float()
            weight = stored[:].to(base)
            check_finite_for_init(weight, f"layer {name!r}: the unquantized weight")
            rank = layer.r[adapter_name]
            if rank > min(weight.shape):
                raise InitializationError(
                    f"layer {name!r}: r={rank}, expected at most {min(weight.shape)}"
                )
            made[name] = best_low_rank_factors(weight - base, rank)
    for name, layer in layers.items():
        factors: list[Any] = [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]
        before = [factor.clone() for factor in factors]
        for factor, value in zip(factors, made[name], strict=True):
            factor.copy_(value)
        if callback is not None and not callback(peft_model, name):
            for factor, value in zip(factors, before, strict=True):
                factor.copy_(value)


def _is_4bit(layer: LoraLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return type(weight).__name__ == "Params4bit"


def _open_unquantized_weights(
    opened: contextlib.ExitStack,
    model: nn.Module,
    path: str | Path | None,
    layers: Mapping[str, Any],
) -> dict[str, Any]:
    """Open the files that contain the layers' unquantized weights.

    The result is a dict that maps layer names to weights. Each weight is a slice of an open
    safetensors file, of shape ``[N, K]``. Its data is read only when the slice is indexed.

    Args:
        opened: The exit stack that closes the files.
        model: The base model.
        path: See ``model_path`` of `replace_lora_weights_loftq`.
        layers: The layers by name.

    Raises:
        CheckpointError: If a weight is missing or has a different shape.
    """
    place = Path(_local_model_folder(model) if path is None else path)
    place = place if place.name.endswith(_WEIGHTS) else place / _WEIGHTS
    index = place.with_name(f"{_WEIGHTS}.index.json")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if place.is_file():
        files = {place}
    elif index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        full = {f"{name}.weight" for name in layers}
        keys = full | {key.removeprefix(prefix) for key in full}
        # Shards that no layer needs are not opened. They may be damaged or missing.
        files = {place.parent / part for key, part in parts.items() if key in keys}
    else:
        raise CheckpointError(
            f"Could not find the weights file {place}; make sure that the model has a safetensors "
            "checkpoint, sharded or unsharded."
        )
    holders: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            holder = opened.enter_context(safe_open(file, framework="pt"))
            holders |= dict.fromkeys(holder.keys(), holder)
    found = {}
    for name, layer in layers.items():
        key = f"{name}.weight"
        key = key if key in holders else key.removeprefix(prefix)
        if key not in holders:
            raise CheckpointError(f"{place} has no {name}.weight")
        found[name] = holders[key].get_slice(key)
        shape, expected = tuple(found[name].get_shape()), (layer.out_features, layer.in_features)
        if shape != expected:
            raise CheckpointError(
                f"{place}: {key!r} has shape {shape}, but this model expects {expected}"
            )
    return found


def _local_model_folder(model: nn.Module) -> str:
    """Return the path of the folder from which a model was loaded.

    It is the local folder that contains the files of a transformers model. If the model was loaded
    from the Hugging Face Hub, this is its folder in the local cache.

    Raises:
        ConfigError: If the model is not a transformers model, or if its files are not on disk.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        raise ConfigError(
            "The provided model does not appear to be a transformers model or is a local model. In "
            "this case, you must pass the model_path argument that points to the safetensors file."
        )
    if Path(name).is_dir():
        return str(name)
    try:
        hub = importlib.import_module("huggingface_hub")
        return str(hub.snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise ConfigError(
            f"The model.safetensors file of {name!r} must be present on disk, but it could not be "
            "found; pass model_path"
        ) from error
