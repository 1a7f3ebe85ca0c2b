"""Hot swap: another adapter's weights in the tensors of one that is loaded.

Nothing is compiled anew: parameters stay the same objects of the same shape, and graphs take
scalings as inputs. Names and arguments are those of PEFT 0.21.2, ``utils/hotswap.py``. Everything
is checked before the first tensor is written.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers import LoraLayer, ModulesToSaveWrapper
from fastlora.layers.common import CommonLayer, forget_kept
from fastlora.layers.ranks import blocks_of, put_rows, resized, set_factors, set_scaling, tensors_of
from fastlora.model import adapter_state
from fastlora.model.adapter_folder import KEY_PREFIX, load_adapter_folder
from fastlora.model.config import LoraConfig
from fastlora.model.inject import lora_layers
from fastlora.model.plan import factor_shapes, own_config
from fastlora.model.tuner import tuner_of
from fastlora.model.walk import peft_function
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnsupportedLayerError,
    check_rank,
)
from fastlora.weight_marks import marks

if TYPE_CHECKING:
    from fastlora.model.lora_model import LoraModel

# Fields of a config that the tensors do not show, and that a layer cannot change in place.
_MUST_AGREE = ("use_dora", "lora_bias", "lora_dropout", "bias", "trainable_token_indices")


class HotswapError(CheckpointError, RuntimeError):
    """The weights have no place in the adapter that they are to replace."""


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Gives all adapters of a model one rank, so that swaps between ranks compile nothing.

    Call it after the first adapter is loaded and before the model is compiled. What the model
    computes stays the same. Swaps between adapters of one rank do not need it.

    Args:
        model: One with adapters.
        target_rank: The largest rank that will be swapped in; None leaves ranks as they are.
        config: A config, or configs by adapter name, whose ranks are set to ``target_rank``; the
            model's own are up to date without it.
        check_compiled: What to do about a model that is compiled already: ``"error"``, ``"warn"``
            or ``"ignore"``.

    Raises:
        AdapterStateError: The model has no adapter, or is compiled already.
        ConfigError: ``check_compiled`` is none of the three, or an adapter has a larger rank.
        UnsupportedLayerError: A layer is split over processes. Nothing has changed then.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            "check_compiles should be one of 'error', 'warn', or 'ignore', got "
            f"{check_compiled!r} instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise AdapterStateError(
                "Call prepare_model_for_compiled_hotswap *before* compiling the model"
            )
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already "
                "compiled; other ranks will compile it anew",
                stacklevel=2,
            )
    tuner = tuner_of(getattr(model, "_orig_mod", model))
    layers = lora_layers(model if tuner is None else tuner.model)
    if not layers:
        theirs = _theirs(model, "prepare_model_for_compiled_hotswap")
        theirs(model, target_rank=target_rank, config=config, check_compiled="ignore")
        return
    if target_rank is None:
        return
    check_rank(target_rank)
    made = []
    for name, layer in layers.items():
        for adapter, r in layer.r.items():
            if r > target_rank:
                raise ConfigError(
                    f"Trying to pad the adapter to the target rank {target_rank}, but the original "
                    f"rank is larger ({r}): adapter {adapter!r} on {name!r}"
                )
            groups = blocks_of(layer, "lora_A")
            if target_rank % groups:
                raise ConfigError(
                    f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank "
                    f"{target_rank}, but the target rank is not divisible by {groups}. Please "
                    f"choose a target rank that is divisible by {groups}. It is {name!r}."
                )
            if r < target_rank:
                _refuse_split(name, layer)
                made.append((layer, adapter, resized(layer, adapter, target_rank)))
    for layer, adapter, factors in made:
        set_factors(layer, adapter, factors, target_rank)
    configs = {} if tuner is None else tuner.peft_config
    for adapter, of_model in configs.items():
        _fit_config(of_model, adapter, layers)
    given = config if isinstance(config, Mapping) else {"": config}
    for each in given.values():
        if each is not None and not any(each is of_model for of_model in configs.values()):
            each.r = target_rank
            each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replaces a loaded adapter by one from a PEFT adapter folder, in place.

    Layers that the new adapter does not have get an update of zero. A larger rank than the loaded
    one's makes new tensors, and compiled models compile anew: see
    `prepare_model_for_compiled_hotswap`.

    Args:
        model: A `LoraModel`, compiled or not. (PEFT's own models go to PEFT's function.)
        model_name_or_path: A local folder.
        adapter_name: The adapter to replace; it keeps its name.
        torch_device: Without effect: tensors go where the adapter's are.
        **kwargs: ``subfolder``: where in the folder the adapter is. PEFT's others change nothing.

    Raises:
        AdapterNotFoundError: There is no such adapter.
        AdapterStateError: It is merged, or a `fastlora.adapters` block of the model is open.
        ConfigError: The two differ in DoRA, lora_bias or dropout.
        CheckpointError: The folder is missing or damaged.
        HotswapError: It has tensors that the loaded adapter has no place for. Nothing has changed
            after any of these.
    """
    own: Any = getattr(model, "_orig_mod", model)
    if tuner_of(own) is None:
        _theirs(model, "hotswap_adapter")(
            model, model_name_or_path, adapter_name, torch_device, **kwargs
        )
        # PEFT writes where nothing sees it, maybe into patched layers.
        marks.end_all()
        for layer in own.modules():
            if isinstance(layer, CommonLayer):
                forget_kept(layer)
        return
    file = load_adapter_folder(Path(model_name_or_path) / (kwargs.get("subfolder") or ""))
    _swap(own, file.tensors, adapter_name, file.config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Replaces a loaded adapter by tensors, in place.

    Args:
        model: A `LoraModel`, compiled or not.
        state_dict: By names as in the model's ``state_dict()``, or as in a file.
        adapter_name: The adapter to replace.
        config: That of the new one.
        parameter_prefix: PEFT's argument, without effect.

    Raises:
        AdapterNotFoundError, AdapterStateError, ConfigError, HotswapError: See `hotswap_adapter`.
    """
    own: Any = getattr(model, "_orig_mod", model)
    if tuner_of(own) is None:
        raise UnsupportedLayerError(
            f"hotswap_adapter_from_state_dict takes a fastlora.LoraModel, got "
            f"{type(own).__name__}; for PEFT's use peft.utils.hotswap"
        )
    own.base_model.check_known(adapter_name)
    given = own_config(config)
    disk = {key: name for name, key in adapter_state.key_map(own, adapter_name).items()}
    _swap(own, {disk.get(key, key): t for key, t in state_dict.items()}, adapter_name, given)


@torch.no_grad()
def _swap(
    model: LoraModel, tensors: Mapping[str, torch.Tensor], adapter_name: str, config: LoraConfig
) -> None:
    """Checks everything, and then writes ``tensors``, by file key, into an adapter."""
    tuner = model.base_model
    tuner.check_known(adapter_name)
    old = tuner.peft_config[adapter_name]
    for field in _MUST_AGREE:
        mine, other = getattr(old, field), getattr(config, field)
        if mine != other:
            raise ConfigError(
                f"Configs are incompatible: for {field}, {mine!r} != {other!r}; load the adapter "
                "under another name"
            )
    tuner.check_replaces("hotswap_adapter", adapter_name, config)
    layers = {n: layer for n, layer in lora_layers(tuner.model).items() if adapter_name in layer.r}
    for layer in layers.values():
        if adapter_name in layer.merged_adapters:
            raise AdapterStateError(
                f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the "
                "base weights; call unmerge_adapter() first"
            )
    keys = adapter_state.key_map(model, adapter_name)
    tensors = _without_base_weights(tuner.model, tensors, keys)
    unexpected = [key for key in tensors if key not in keys]
    if unexpected:
        names = ", ".join(_with_name(key, adapter_name) for key in unexpected)
        raise HotswapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {names}. Adapters "
            "that adapt other layers are to be loaded under another name"
        )
    given = {name: _given(name, layer, tensors, config) for name, layer in layers.items()}
    copies = _copies(model, adapter_name, tensors, keys)
    grown = {}
    for name, layer in layers.items():
        rank = config.rank_for(name)
        if given[name] and rank > layer.r[adapter_name]:
            _refuse_split(name, layer)
            grown[name] = resized(layer, adapter_name, rank), rank
    # From here on nothing is refused.
    for name, (factors, rank) in grown.items():
        set_factors(layers[name], adapter_name, factors, rank)
    for name, layer in layers.items():
        layer.use_rslora[adapter_name] = config.use_rslora
        set_scaling(layer, adapter_name, config.scaling_for(name))
        _write(layer, adapter_name, given[name])
    for target, source in copies:
        target.copy_(source)
    made = dataclasses.replace(copy.deepcopy(old), use_rslora=config.use_rslora)
    _fit_config(made, adapter_name, layers)
    tuner.peft_config[adapter_name] = made


def _given(
    name: str, layer: LoraLayer, tensors: Mapping[str, torch.Tensor], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """Returns what a layer gets, by file name below it: all of it, or nothing.

    Raises `HotswapError` for a part of it, and for other shapes.
    """
    expected = factor_shapes(layer, name, config)
    at = f"{KEY_PREFIX}{name}."
    found = {key: tensors[f"{at}{key}"] for key in expected if f"{at}{key}" in tensors}
    for key, tensor in found.items():
        if tuple(tensor.shape) != tuple(expected[key]):
            raise HotswapError(
                f"{at}{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key])} by "
                "the adapter's config"
            )
    missing = [key for key in expected if key not in found]
    if found and missing:
        raise HotswapError(f"the new adapter has {at}{next(iter(found))}, but no {at}{missing[0]}")
    return found


def _write(layer: LoraLayer, adapter_name: str, new: Mapping[str, torch.Tensor]) -> None:
    """Writes what a layer gets into its factors; an update of zero where it gets nothing."""
    held = layer._held_parts(adapter_name)
    for part, factor in held.items():
        if part == "lora_magnitude_vector" and not new:
            continue
        for name, tensor in tensors_of(factor).items():
            source = new.get(f"{part}.{name}", new.get(part))
            if source is None:
                tensor.zero_()
            else:
                put_rows(tensor, source, blocks_of(layer, part) if name == "weight" else 1)
    if not new and "lora_magnitude_vector" in held:
        # With an update of zero, the norms of the weight's own rows change nothing.
        kept: Any = layer.lora_magnitude_vector[adapter_name]
        layer.reset_magnitude(adapter_name)
        fresh: Any = layer.lora_magnitude_vector[adapter_name]
        kept.weight.copy_(fresh.weight)
        layer.lora_magnitude_vector[adapter_name] = kept
    layer._forget_packed()


def _copies(
    model: LoraModel,
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    keys: Mapping[str, str],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns what is written outside of LoRA layers, and what into it.

    A copied module that the new adapter does not have becomes the original again.
    """
    base = model.base_model.model
    state = model.state_dict()
    inside = tuple(f"{KEY_PREFIX}{name}." for name in lora_layers(base))
    pairs = []
    for disk, key in keys.items():
        if disk.startswith(inside) and not disk.endswith("base_layer.bias"):
            continue
        source = tensors.get(disk)
        if source is None:
            source = _original(base, key)
        if source is None:
            if disk.endswith("bias"):
                continue  # PEFT leaves some out
            raise HotswapError(f"the new adapter has no {disk}")
        if source.shape != state[key].shape:
            raise HotswapError(
                f"{disk} has shape {tuple(source.shape)}, this model expects "
                f"{tuple(state[key].shape)}"
            )
        pairs.append((state[key], source))
    return pairs


def _original(base: nn.Module, key: str) -> torch.Tensor | None:
    """Returns the tensor that an adapter's copy was made from; None for what is no copy."""
    name, found, rest = key.removeprefix(KEY_PREFIX).partition(".modules_to_save.")
    wrapper = base.get_submodule(name) if found else None
    if not isinstance(wrapper, ModulesToSaveWrapper):
        return None
    original: torch.Tensor = wrapper.original_module.state_dict()[rest.partition(".")[2]]
    return original


def _fit_config(config: LoraConfig, adapter_name: str, layers: Mapping[str, LoraLayer]) -> None:
    """Makes a config say what the ranks and scalings of layers are, so that files of it load."""
    own = {name: layer for name, layer in layers.items() if adapter_name in layer.r}
    if not own:
        return
    ranks = {name: layer.r[adapter_name] for name, layer in own.items()}
    rank = max(ranks.values())
    config.r = rank
    others = {_exactly(name): r for name, r in ranks.items() if r != rank}
    config.rank_pattern = others or dict.fromkeys(config.rank_pattern, rank)
    alphas = {}
    for name, layer in own.items():
        by = math.sqrt(ranks[name]) if config.use_rslora else ranks[name]
        alphas[name] = float(layer.scaling[adapter_name]) * by
    config.lora_alpha = next(iter(alphas.values()))
    config.alpha_pattern = {
        _exactly(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _without_base_weights(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], keys: Container[str]
) -> dict[str, torch.Tensor]:
    """Returns a file's tensors but those that the base model has as they are: embeddings."""
    own = dict(model.named_parameters())
    kept = {}
    for key, tensor in tensors.items():
        weight = own.get(key.removeprefix("base_model.model."))
        same = key not in keys and weight is not None and weight.shape == tensor.shape
        if not (same and weight is not None and torch.equal(weight, tensor.to(weight))):
            kept[key] = tensor
    return kept


def _with_name(key: str, adapter_name: str) -> str:
    """Returns a file key with the adapter's name in it, as PEFT's message has it."""
    return re.sub(r"(\.lora_[^.]*)", rf"\1.{adapter_name}", key, count=1)


def _refuse_split(name: str, layer: LoraLayer) -> None:
    if layer.is_split:
        raise UnsupportedLayerError(
            f"{name!r} is split over processes, and its factors cannot get another rank; load the "
            "adapter with the largest rank first"
        )


def _theirs(model: nn.Module, function: str) -> Any:
    refusal = AdapterStateError(
        "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` "
        "after loading the first adapter and before loading the second adapter."
    )
    return peft_function(model, "peft.utils.hotswap", function, refusal)
