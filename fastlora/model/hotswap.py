"""Hot-swapping: replace the weights of a loaded adapter in place with those of another adapter.

Compiled models are not recompiled, because the parameters remain the same objects with the same
shapes, and the scalings are inputs of the compiled graphs. Function names and arguments are those
of PEFT 0.21.2, ``utils/hotswap.py``. All checks are made before the first tensor is written.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.layers import LoraLayer, ModulesToSaveWrapper
from fastlora.layers.adapted_parameters import file_prefixes_by_parameter
from fastlora.layers.base_adapter_layer import BaseAdapterLayer, clear_layer_caches
from fastlora.layers.embedding import FastLoraEmbedding
from fastlora.layers.rank_padding import (
    copy_zero_padded,
    factor_parameters_by_name,
    factors_padded_to_rank,
    replace_factors,
    set_scaling_and_alpha,
)
from fastlora.layers.tied_head import TiedLoraHead
from fastlora.model import adapter_state
from fastlora.model.adapter_folder import (
    KEY_PREFIX,
    effective_key_mapping,
    load_adapter_folder,
    with_renamed_modules,
)
from fastlora.model.base_modules import (
    peft_function_or_raise,
    strip_wrapper_prefixes,
    strip_wrapper_prefixes_from_keys,
)
from fastlora.model.base_state import key_without_adapters, strip_adapter_wrapper_names
from fastlora.model.config import LoraConfig
from fastlora.model.expert_files import convert_expert_factors
from fastlora.model.inject import (
    adapted_layers,
    layers_with_own_factors,
    lora_layers,
    modules_adapted_with_embedding,
)
from fastlora.model.plan import adapter_tensor_shapes, plan_target_modules, to_lora_config
from fastlora.model.tied_weights import (
    NO_TIED_MODULES,
    ModulesAdaptedWithEmbedding,
    input_embedding_name,
    update_config_for_tied_embedding,
)
from fastlora.model.tuner import tuner_of
from fastlora.user_warnings import warn
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnsupportedLayerError,
    check_rank,
)
from fastlora.weights_version import weights_versions

if TYPE_CHECKING:
    from fastlora.model.lora_model import LoraModel

# Config fields that must be equal in both adapters. They are not visible in the tensors, and a
# layer cannot change them in place.
_MUST_AGREE = ("use_dora", "lora_bias", "lora_dropout", "bias", "trainable_token_indices")


class HotswapError(CheckpointError, RuntimeError):
    """Raised if an adapter cannot be hot-swapped.

    The reason is that the new weights do not match the loaded adapter.
    """


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Prepare a model so that adapters can be hot-swapped without recompilation.

    The factors of all adapters are padded to the same rank. Call this function after the first
    adapter is loaded and before the model is compiled. This function does not change the model's
    outputs. The call is not needed if all adapters have the same rank.

    Args:
        model: A model with adapters.
        target_rank: The largest rank of the adapters that will be hot-swapped into the model. With
            None, the ranks are not changed.
        config: A config, or a mapping from adapter names to configs, in which the ranks are set to
            ``target_rank``. The configs in the model are always updated.
        check_compiled: The action to take if the model is already compiled: ``"error"``,
            ``"warn"``, or ``"ignore"``.

    Raises:
        AdapterStateError: If the model has no adapter or is already compiled.
        ConfigError: If ``check_compiled`` is invalid, if an adapter has a rank larger than
            ``target_rank``, if the groups of a convolution do not divide ``target_rank``, or if the
            initialization of an adapter with a smaller rank changed the base weights.
        UnsupportedLayerError: If a layer is split over several processes. The model is unchanged
            after any of these errors.
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
            warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already "
                "compiled; swapping in an adapter of another rank will recompile it",
            )
    tuner = tuner_of(model._modules.get("_orig_mod", model))
    adapted = model if tuner is None else tuner.model
    layers = layers_with_own_factors(adapted)
    if not layers:
        theirs = _peft_function(model, "prepare_model_for_compiled_hotswap")
        theirs(model, target_rank=target_rank, config=config, check_compiled="ignore")
        return
    if target_rank is None:
        return
    check_rank(target_rank)
    made = []
    for name, layer in layers.items():
        for adapter, r in layer.r.items():
            if r > target_rank:
                raise ConfigError(  # the first sentence is PEFT's
                    f"Trying to pad the adapter to the target rank {target_rank}, but the original "
                    f"rank is larger ({r}). Adapter {adapter!r} has rank {r} on {name!r}; choose "
                    f"a target rank of at least {r}"
                )
            groups = int(getattr(layer.get_base_layer(), "groups", 1))
            if target_rank % groups:
                raise ConfigError(  # the first two sentences are PEFT's
                    f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank "
                    f"{target_rank}, but the target rank is not divisible by {groups}. Please "
                    f"choose a target rank that is divisible by {groups}. The layer is {name!r}."
                )
            if r < target_rank:
                _raise_if_split(name, layer)
                made.append((layer, adapter, factors_padded_to_rank(layer, adapter, target_rank)))
    configs = {} if tuner is None else tuner.peft_config
    for adapter in {adapter: None for _, adapter, _ in made if adapter in configs}:
        configs[adapter].check_plain("an adapter of another rank")
    for layer, adapter, factors in made:
        replace_factors(layer, adapter, factors, target_rank)
        for head in _heads_with_factors_of(adapted, layer, adapter):
            replace_factors(head, adapter, {}, target_rank)
    for adapter, of_model in configs.items():
        _copy_ranks_and_scalings_to_config(of_model, adapter, layers)
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
    """Replace a loaded adapter's weights in place with those of a saved adapter.

    For a `LoraModel`, the saved adapter is read from a local folder in PEFT's format. For a PEFT
    model, PEFT's function of the same name is called, which also accepts the name of a repository
    on the Hugging Face Hub.

    On layers that the new adapter does not adapt, the update becomes zero. Usually, compiled models
    are not recompiled. However, if the new adapter has a larger rank than the loaded adapter, new
    tensors are allocated and compiled models are recompiled. Calling
    `prepare_model_for_compiled_hotswap` first avoids this recompilation.

    Args:
        model: A `LoraModel` or a PEFT model, compiled or not.
        model_name_or_path: A local folder. For a PEFT model, anything that PEFT accepts.
        adapter_name: The adapter to replace. Its name does not change.
        torch_device: Ignored. The adapter's tensors stay on their devices.
        **kwargs: ``subfolder`` is the path of the adapter inside the folder, and ``key_mapping`` is
            that of `LoraModel.load_adapter`. Other arguments of PEFT are ignored.

    Raises:
        AdapterNotFoundError: If there is no such adapter.
        AdapterStateError: If the model has no adapters, if the adapter is merged or on the meta
            device, if a `fastlora.adapters` block of the model is open, or if the file contains a
            base tensor that other adapters are merged into and whose value from before the merge
            was not kept.
        ConfigError: If the two configs differ in ``use_dora``, ``lora_bias``, ``lora_dropout``,
            ``bias``, or ``trainable_token_indices``; if the two adapters tie different modules to
            the input embedding (``ensure_weight_tying``); or if the initialization of one of the
            two adapters changed the base weights and that of the other one did not change them in
            the same way.
        CheckpointError: If the folder is missing or damaged.
        UnsupportedLayerError: If a layer that is split over several processes needs a larger rank.
        HotswapError: If the new weights do not match the loaded adapter. The model is unchanged
            after any of these errors.
    """
    own: Any = model._modules.get("_orig_mod", model)
    if tuner_of(own) is None:
        _peft_function(model, "hotswap_adapter")(
            model, model_name_or_path, adapter_name, torch_device, **kwargs
        )
        # PEFT may have written into layers that fastlora has patched, without any notification.
        weights_versions.invalidate_all()
        for layer in own.modules():
            if isinstance(layer, BaseAdapterLayer):
                clear_layer_caches(layer)
        return
    file = load_adapter_folder(Path(model_name_or_path) / (kwargs.get("subfolder") or ""))
    base = own.get_base_model()
    file = with_renamed_modules(file, effective_key_mapping(base, kwargs.get("key_mapping")))
    file = convert_expert_factors(base, file)
    _check_and_write_tensors(own, file.tensors, adapter_name, file.config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the weights of a loaded adapter in place with tensors from a state dict.

    Args:
        model: A `LoraModel`, compiled or not.
        state_dict: The new tensors. The keys are those of the model's ``state_dict()`` or those of
            an adapter file.
        adapter_name: The adapter to replace.
        config: The config of the new adapter.
        parameter_prefix: Accepted for compatibility with PEFT and ignored.

    Raises:
        UnsupportedLayerError: If the model is not a `LoraModel`, or in the case listed in
            `hotswap_adapter`.
        AdapterNotFoundError, AdapterStateError, ConfigError, HotswapError: See `hotswap_adapter`.
    """
    own: Any = model._modules.get("_orig_mod", model)
    if tuner_of(own) is None:
        raise UnsupportedLayerError(
            f"hotswap_adapter_from_state_dict expects a fastlora.LoraModel, got "
            f"{type(own).__name__}; for a PEFT model, use peft.utils.hotswap"
        )
    own.base_model.check_adapter_loaded(adapter_name)
    given = to_lora_config(config)
    disk = {
        key: name for name, key in adapter_state.file_keys_to_state_keys(own, adapter_name).items()
    }
    tensors = strip_wrapper_prefixes_from_keys(state_dict)
    _check_and_write_tensors(
        own, {disk.get(key, key): t for key, t in tensors.items()}, adapter_name, given
    )


@torch.no_grad()
def _check_and_write_tensors(
    model: LoraModel, tensors: Mapping[str, torch.Tensor], adapter_name: str, config: LoraConfig
) -> None:
    """Check the tensors of a new adapter, and then write them into a loaded adapter.

    The keys of ``tensors`` are those of PEFT's adapter files.
    """
    tuner = model.base_model
    tuner.check_adapter_has_values(adapter_name)
    old = tuner.peft_config[adapter_name]
    for field in _MUST_AGREE:
        mine, other = getattr(old, field), getattr(config, field)
        if mine != other:
            raise ConfigError(
                f"Configs are incompatible: for {field}, {mine!r} != {other!r}; load the adapter "
                "under another name"
            )
    tied = modules_adapted_with_embedding(tuner.model, adapter_name)
    _check_ties_agree(tuner.model, tied, tensors, config)
    owners = layers_with_own_factors(tuner.model).items()
    layers = {name: layer for name, layer in owners if adapter_name in layer.r}
    keys = adapter_state.file_keys_to_state_keys(model, adapter_name)
    tensors = _drop_unchanged_and_shared_tensors(tuner.model, tensors, keys, tied.heads)
    prefixes = _file_key_prefixes_by_adapted_parameter(tuner.model, adapter_name)
    tensors = _with_keys_of_loaded_adapter(tuner.model, tensors, config, prefixes)
    unexpected = [key for key in tensors if key not in keys]
    if unexpected:
        names = ", ".join(_insert_adapter_name(key, adapter_name) for key in unexpected)
        raise HotswapError(  # the first sentence is PEFT's
            f"Hot swapping the adapter did not succeed, unexpected keys found: {names}. If the "
            "new adapter targets different layers, load it under another name. A hot swap does not "
            "change base weights"
        )
    given = {
        name: _checked_new_layer_tensors(
            name, layer, tensors, config, prefixes.get(name, adapter_state.file_key(name, ""))
        )
        for name, layer in layers.items()
    }
    left_out = [name for name in layers if not given[name]]
    tuner.check_adapter_replaceable("hotswap_adapter", adapter_name, config, left_out)
    copies = _tensors_outside_layers(model, adapter_name, tensors, keys)
    grown = {}
    for name, layer in layers.items():
        rank = config.rank_for(name)
        if given[name] and rank > layer.r[adapter_name]:
            _raise_if_split(name, layer)
            grown[name] = factors_padded_to_rank(layer, adapter_name, rank), rank
    # All checks have passed. The model is changed from here on.
    for name, (factors, rank) in grown.items():
        replace_factors(layers[name], adapter_name, factors, rank)
        for head in _heads_with_factors_of(tuner.model, layers[name], adapter_name):
            replace_factors(head, adapter_name, {}, rank)
    for name, layer in layers.items():
        for each in (layer, *_heads_with_factors_of(tuner.model, layer, adapter_name)):
            each.use_rslora[adapter_name] = config.use_rslora
            set_scaling_and_alpha(each, adapter_name, config.scaling_for(name))
        _write_layer_tensors(layer, adapter_name, given[name])
    with adapter_state._unmerged_modules(tuner.model, [target for target, _ in copies]):
        for target, source in copies:
            target.copy_(source)
    made = dataclasses.replace(copy.deepcopy(old), use_rslora=config.use_rslora)
    _copy_ranks_and_scalings_to_config(made, adapter_name, layers)
    tuner.peft_config[adapter_name] = made


def _check_ties_agree(
    model: nn.Module,
    loaded: ModulesAdaptedWithEmbedding,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
) -> None:
    """Check that a new adapter ties the same modules to the input embedding as the loaded one.

    An adapter that adapts neither the embedding nor a tied module can always be loaded.

    Args:
        model: The base model with its adapters.
        loaded: The modules that the loaded adapter adapts together with the embedding.
        tensors: The tensors of the new adapter.
        config: The config of the new adapter.

    Raises:
        ConfigError: If only one of the adapters ties a module.
    """
    new = NO_TIED_MODULES
    if config.ensure_weight_tying:
        new = update_config_for_tied_embedding(model, copy.deepcopy(config), tensors)
    differing = sorted({*loaded.heads, *loaded.copies} ^ {*new.heads, *new.copies})
    names = (input_embedding_name(model), *differing) if differing else ()
    prefixes = tuple(adapter_state.file_key(str(name), "") for name in names)
    if any(key.startswith(prefixes) for key in tensors):
        raise ConfigError(
            f"Configs are incompatible: only one of the adapters ties {differing[0]!r} to the "
            "input embedding (ensure_weight_tying); load the adapter under another name"
        )


def _heads_with_factors_of(
    model: nn.Module, layer: LoraLayer, adapter_name: str
) -> list[TiedLoraHead]:
    """Return the tied heads that share a layer's factors for an adapter.

    Only an embedding shares its factors. The rank and the scaling of a tied head must be those of
    the embedding.
    """
    if not isinstance(layer, FastLoraEmbedding):
        return []
    heads = [head for head in lora_layers(model).values() if isinstance(head, TiedLoraHead)]
    return [head for head in heads if head.tied_to is layer and adapter_name in head.r]


def _checked_new_layer_tensors(
    name: str,
    layer: LoraLayer,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    at: str,
) -> dict[str, torch.Tensor]:
    """Check the new adapter's tensors for a layer, and return them.

    The result is a dict whose keys are those of PEFT's adapter files without the layer's name. The
    dict is empty if the new adapter does not adapt the layer. ``at`` is the part of the keys of
    ``tensors`` that precedes the keys of the result.

    Raises:
        HotswapError: If only some of the layer's tensors are given, or if a shape differs.
    """
    expected = adapter_tensor_shapes(layer, name, config)
    found = {key: tensors[f"{at}{key}"] for key in expected if f"{at}{key}" in tensors}
    for key, tensor in found.items():
        if tuple(tensor.shape) != tuple(expected[key]):
            raise HotswapError(
                f"{at}{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[key])} "
                "according to the adapter's config"
            )
    missing = [key for key in expected if key not in found]
    if found and missing:
        raise HotswapError(f"the new adapter has {at}{next(iter(found))}, but no {at}{missing[0]}")
    return found


def _file_key_prefixes_by_adapted_parameter(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return a dict that maps adapted parameters to their key prefixes in the adapter's files.

    The keys of the dict are the full names of the parameters that the adapter adapts.
    """
    by_module: dict[str, list[str]] = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        if not layer.replaces_module:
            module, _, parameter = name.rpartition(".")
            by_module.setdefault(module, []).append(parameter)
    return _file_key_prefixes_by_parameter(by_module)


def _file_key_prefixes_by_parameter(
    adapted_parameters_by_module: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Map each adapted parameter to its key prefix in adapter files.

    The keys of the result are the full names of the parameters. The argument maps the names of
    modules to the names of the parameters that an adapter adapts in these modules.
    """
    return {
        f"{module}.{name}": adapter_state.file_key(module, prefix)
        for module, names in adapted_parameters_by_module.items()
        for name, prefix in file_prefixes_by_parameter(names).items()
    }


def _with_keys_of_loaded_adapter(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    loaded_prefixes: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Rename the keys of a new adapter's tensors to match those of the loaded adapter.

    The result is a dict with the keys that a file of the loaded adapter would have. The keys in a
    file depend on which parameters the file's adapter adapts. Tensors that are not factors of
    adapted parameters keep their keys.

    Args:
        model: The base model with its adapters.
        tensors: The tensors of the new adapter, with the keys of its file.
        config: The config of the new adapter.
        loaded_prefixes: The result of `_file_key_prefixes_by_adapted_parameter`.
    """
    if not loaded_prefixes:
        return dict(tensors)
    names = (key.partition(".lora_")[0].removeprefix(KEY_PREFIX) for key in tensors)
    layers = {name.replace(".base_layer", "") for name in names}
    plan = plan_target_modules(model, copy.deepcopy(config), from_file=True, layers_in_file=layers)
    given = _file_key_prefixes_by_parameter(
        {
            name: [p.name for p in target.settings.parameters]
            for name, target in plan.targets.items()
        }
    )
    new_keys = {
        f"{prefix}{part}": f"{loaded_prefixes.get(name, adapter_state.file_key(name, ''))}{part}"
        for name, prefix in given.items()
        for part in ("lora_A.weight", "lora_B.weight")
    }
    return {new_keys.get(key, key): tensor for key, tensor in tensors.items()}


def _write_layer_tensors(
    layer: LoraLayer, adapter_name: str, new: Mapping[str, torch.Tensor]
) -> None:
    """Copy new tensors into the parameters that a layer holds for an adapter.

    If ``new`` is empty, the parameters are set so that the adapter does not change the output.
    """
    held = layer._factors_by_name(adapter_name)
    for part, factor in held.items():
        if part == "lora_magnitude_vector" and not new:
            continue
        for name, tensor in factor_parameters_by_name(factor).items():
            source = new.get(f"{part}.{name}", new.get(part))
            if source is None:
                tensor.zero_()
            else:
                copy_zero_padded(
                    tensor, source, layer._num_rank_blocks(part) if name == "weight" else 1
                )
    if not new and "lora_magnitude_vector" in held:
        # If the update is zero and the magnitude equals the norms of the weight's rows, DoRA does
        # not change the layer's output.
        magnitude: Any = layer.lora_magnitude_vector[adapter_name]
        layer.reset_magnitude(adapter_name)
        fresh: Any = layer.lora_magnitude_vector[adapter_name]
        magnitude.weight.copy_(fresh.weight)
        layer.lora_magnitude_vector[adapter_name] = magnitude
    layer._clear_model_packed_factors()


def _tensors_outside_layers(
    model: LoraModel,
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    keys: Mapping[str, str],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a list of pairs ``(target, source)`` for the tensors outside the LoRA layers.

    If the new adapter has no copy of a module in ``modules_to_save``, the sources for the loaded
    adapter's copy are the tensors of the original module.

    Raises:
        HotswapError: If a tensor is missing or has a different shape.
    """
    base = model.base_model.model
    state = strip_wrapper_prefixes_from_keys(model.state_dict(keep_vars=True))
    inside = {
        adapter_state.file_key(name, key)
        for name, layer in lora_layers(base).items()
        if layer._has_adapter(adapter_name)
        for key in layer.file_names(adapter_name)
    }
    given = {id(state[key]) for disk, key in keys.items() if disk in tensors}
    pairs = []
    for disk, key in keys.items():
        if disk in inside:
            continue
        source = tensors.get(disk)
        if source is None and id(state[key]) in given:
            continue  # A tied copy gets the values that the file has under another key.
        if source is None:
            source = _original_of_copied_tensor(base, key)
        if source is None:
            if disk.endswith("bias"):
                continue  # PEFT does not save some biases
            raise HotswapError(f"the new adapter has no {disk}")
        if source.shape != state[key].shape:
            raise HotswapError(
                f"{disk} has shape {tuple(source.shape)}, but this model expects "
                f"{tuple(state[key].shape)}"
            )
        pairs.append((state[key], source))
    return pairs


def _original_of_copied_tensor(base: nn.Module, copy_key: str) -> torch.Tensor | None:
    """Return the original tensor from which the tensor with the given key was copied.

    The copy belongs to an adapter, and the original to the module that was copied. The result is
    None if the key is not that of a tensor in such a copy.
    """
    name, found, rest = copy_key.removeprefix(KEY_PREFIX).partition(".modules_to_save.")
    wrapper = base.get_submodule(name) if found else None
    if not isinstance(wrapper, ModulesToSaveWrapper):
        return None
    original: torch.Tensor = wrapper.original_module.state_dict()[rest.partition(".")[2]]
    return original


def _copy_ranks_and_scalings_to_config(
    config: LoraConfig, adapter_name: str, layers: Mapping[str, LoraLayer]
) -> None:
    """Copy the ranks and scalings of an adapter's layers into the adapter's config.

    The config stores each scaling as an alpha. Scalings that were changed with `set_scale` are not
    stored. If the adapter is then saved, its files are consistent and can be loaded.
    """
    own = {name: layer for name, layer in layers.items() if adapter_name in layer.r}
    if not own:
        return
    ranks = {name: layer.r[adapter_name] for name, layer in own.items()}
    rank = max(ranks.values())
    config.r = rank
    alphas = {name: float(layer.lora_alpha[adapter_name]) for name, layer in own.items()}
    config.lora_alpha = next(iter(alphas.values()))
    before = config.rank_pattern
    config._set_layer_ranks_and_alphas(ranks, alphas)
    config.rank_pattern = config.rank_pattern or dict.fromkeys(before, rank)


def _drop_unchanged_and_shared_tensors(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_keys: Container[str],
    tied_heads: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Drop the tensors that are given in addition to an adapter's own tensors.

    These are tensors of the base model, which are dropped if they are equal to the model's from
    before any merge, and the copies of the factors that tied heads share with the input embedding.
    PEFT saves such tensors of embeddings and heads, and a model's state dict contains all of them.
    The result is a new dict.

    Args:
        model: The base model with its adapters.
        tensors: A mapping from the keys of PEFT's adapter files to tensors.
        adapter_keys: The keys of the loaded adapter's own tensors. Tensors with these keys are
            kept.
        tied_heads: The names of the heads that share the embedding's factors for this adapter.
    """
    parts = ("lora_A", "lora_B")
    shared = {adapter_state.file_key(n, f"{p}.weight") for n in tied_heads for p in parts}
    remaining = {key: tensor for key, tensor in tensors.items() if key not in shared}
    names = {
        key: strip_adapter_wrapper_names(key.removeprefix(KEY_PREFIX))
        for key in remaining
        if key not in adapter_keys
    }
    own = _base_tensors_by_original_name(model) if names else {}
    base = {key: own[name] for key, name in names.items() if name in own}
    for key, value in (base | adapter_state._values_before_merge(model, base)).items():
        tensor = remaining[key]
        if value.shape == tensor.shape and torch.equal(value, tensor.to(value)):
            del remaining[key]
    return remaining


def _base_tensors_by_original_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base model's parameters and buffers, keyed by their names without adapters."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    bare = ((key_without_adapters(model, name), tensor) for name, tensor in named)
    return {strip_wrapper_prefixes(name): tensor for name, tensor in bare if name is not None}


def _insert_adapter_name(key: str, adapter_name: str) -> str:
    """Insert an adapter's name into a state-dict key.

    The key is that of a tensor in an adapter file. The result has the form of the keys in PEFT's
    error messages.
    """
    return re.sub(r"(\.lora_[^.]*)", rf"\1.{adapter_name}", key, count=1)


def _raise_if_split(name: str, layer: LoraLayer) -> None:
    if layer.is_split:
        raise UnsupportedLayerError(
            f"{name!r} is split across processes, so the rank of its factors cannot change; load "
            "the adapter with the largest rank first"
        )


def _peft_function(model: nn.Module, function: str) -> Any:
    error = AdapterStateError(
        "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` "
        "after loading the first adapter and before loading the second adapter."
    )
    return peft_function_or_raise(model, "peft.utils.hotswap", function, error)
