"""LoftQ for a model that is quantised already: factors for what quantisation lost.

Method: https://arxiv.org/abs/2310.08659, as in PEFT 0.21.2, ``utils/loftq_utils.py``.
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

from fastlora.init.loftq import best_of_rank
from fastlora.init.registry import check_finite
from fastlora.layers import LoraLayer
from fastlora.layers.bases import dense_weight
from fastlora.layers.linear import DEFAULT_ADAPTER
from fastlora.model.inject import lora_layers
from fastlora.model.tuner import tuner_of
from fastlora.validation import (
    CheckpointError,
    ConfigError,
    InitialisationError,
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
    """Makes an adapter on bitsandbytes' 4-bit layers what their quantisation lost.

    Its factors become the best of their rank for ``W - Q``, W from a file, one layer at a time. The
    base layers stay as they are. Call it before training.

    Args:
        peft_model: A model with the adapter.
        model_path: The unquantised model: a ``model.safetensors``, or the folder that has it, in
            parts too. None takes the folder that the model was loaded from, or the Hugging Face
            Hub's cache of it.
        adapter_name: Which adapter.
        callback: Called with the model and the layer's name after each layer; False takes the
            layer's change back. It may compare the outputs with those of the unquantised model.

    Raises:
        ConfigError: The model is no model with adapters, or no file is known.
        UnsupportedLayerError: The adapter is on no 4-bit layer.
        CheckpointError: The file is missing, or lacks a weight.
        InitialisationError: A weight is not finite, or smaller than the rank. No factor has changed
            after any of these but one that ``callback`` raises.
    """
    tuner = tuner_of(peft_model)
    if tuner is None:
        raise ConfigError("expected the result of fastlora.get_peft_model")
    tuner.check_known(adapter_name)
    layers = {
        name: layer
        for name, layer in lora_layers(tuner.model).items()
        if adapter_name in layer.lora_A and _is_4bit(layer)
    }
    if not layers:
        raise UnsupportedLayerError(
            "No bnb LoRA module found on the model: the adapter is on no layer that bitsandbytes "
            "quantised to 4 bits"
        )
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with contextlib.ExitStack() as opened:
        for name, stored in _weights(opened, tuner.model, model_path, layers).items():
            layer = layers[name]
            base = dense_weight(layer.get_base_layer()).float()
            weight = stored[:].to(base)
            check_finite(weight, f"layer {name!r}: its unquantised weight")
            rank = layer.r[adapter_name]
            if rank > min(weight.shape):
                raise InitialisationError(
                    f"layer {name!r}: r={rank}, expected at most {min(weight.shape)}"
                )
            made[name] = best_of_rank(weight - base, rank)
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


def _weights(
    opened: contextlib.ExitStack,
    model: nn.Module,
    path: str | Path | None,
    layers: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the slice of a file that is each layer's unquantised weight ``[N, K]``, to be read.

    Raises `CheckpointError` unless all are there, in their shapes.
    """
    place = Path(_folder_of(model) if path is None else path)
    place = place if place.name.endswith(_WEIGHTS) else place / _WEIGHTS
    index = place.with_name(f"{_WEIGHTS}.index.json")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if place.is_file():
        files = {place}
    elif index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        full = {f"{name}.weight" for name in layers}
        keys = full | {key.removeprefix(prefix) for key in full}
        # A part that no layer needs may be damaged, or not there.
        files = {place.parent / part for key, part in parts.items() if key in keys}
    else:
        raise CheckpointError(
            f"Could not find file for {place}, ensure that there is a (sharded) safetensors "
            "file of the model."
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
                f"{place}: {key!r} has shape {shape}, this model expects {expected}"
            )
    return found


def _folder_of(model: nn.Module) -> str:
    """Returns where a transformers model was loaded from; raises `ConfigError` for any other."""
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
