"""Convert between the keys of a model's ``state_dict()`` and the keys of PEFT's adapter files."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.layers import (
    FastLoraLinear,
    LoraLayer,
    ModulesToSaveWrapper,
    ModuleWrapper,
    TrainableTokensWrapper,
)
from fastlora.layers.tied_head import TiedLoraHead
from fastlora.model.adapter_folder import KEY_PREFIX, TOKENS_KEY, AdapterContents, file_key
from fastlora.model.base_modules import (
    base_module_of,
    strip_wrapper_prefixes,
    strip_wrapper_prefixes_from_keys,
)
from fastlora.model.base_state import key_without_adapters, strip_adapter_wrapper_names
from fastlora.model.config import LoraConfig
from fastlora.model.inject import (
    adapted_layers,
    base_biases_trained_by,
    base_parameters,
    modules_adapted_with_embedding,
    modules_with_adapters,
)
from fastlora.model.plan import AdapterPlan
from fastlora.model.replication import temporary_replication
from fastlora.model.tied_weights import (
    EMBEDDING_NAMES,
    are_embeddings_copied_and_targeted,
    input_embedding_name,
)
from fastlora.sharding import copy_full_tensor_
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError, CheckpointError

if TYPE_CHECKING:
    from fastlora.model.lora_model import LoraModel

# The embeddings that PEFT saves with an adapter that targets them.
_SAVED_TARGETS = ("embed_tokens", "lm_head")


def file_keys_to_state_keys(
    lora_model: LoraModel, adapter_name: str, bias: str | None = None
) -> dict[str, str]:
    """Return a dict that maps the keys in an adapter file to keys in the model's state dict.

    The keys in the state dict are those that `strip_wrapper_prefixes_from_keys` returns.

    A file key is the key of a tensor in PEFT's adapter files. It does not contain the adapter's
    name. The file keys of a module in ``modules_to_save`` contain the module's original name, and
    the bias of an adapted layer is named ``base_layer.bias``. File keys are the same as if the
    model had only this adapter.

    Args:
        lora_model: The model that has the adapter.
        adapter_name: The name of the adapter.
        bias: A value of ``LoraConfig.bias``, which determines the base biases that are included.
            With None, the value in the adapter's config is used.
    """
    tuner = lora_model.base_model
    model, bias = tuner.model, bias or tuner.peft_config[adapter_name].bias
    keys: dict[str, str] = {}
    for name, module in modules_with_adapters(model, include_inner_lora_layers=False):
        at = file_key(name, "")
        if isinstance(module, ModuleWrapper) or module._has_adapter(adapter_name):
            for disk, key in module.file_names(adapter_name).items():
                keys[at + disk] = at + key
    for name in base_biases_trained_by(model, adapter_name, bias):
        key = KEY_PREFIX + strip_wrapper_prefixes(name)
        keys[_bias_file_key(model, name, adapter_name)] = key
    return keys


def _bias_file_key(model: nn.Module, name: str, adapter_name: str) -> str:
    """Return the key in an adapter's file of the base bias called ``name``."""
    key = str(key_without_adapters(model, name, adapter_name))
    return KEY_PREFIX + strip_wrapper_prefixes(key)


def check_adapter_fits_model(
    model: nn.Module,
    plan: AdapterPlan,
    file: AdapterContents,
    ignore_mismatched_sizes: bool = False,
) -> AdapterContents:
    """Check that the tensors of an adapter match a model, and return the adapter's contents.

    In the result, the kind of each tensor is that on this model. See `_with_kinds_on_model`.

    Args:
        model: The base model, with or without adapters.
        plan: The plan for the adapter on this model.
        file: The loaded adapter.
        ignore_mismatched_sizes: Whether to leave out tensors with a different shape and emit a
            warning, instead of raising an error.

    Returns:
        The contents without the tensors that were left out.

    Raises:
        CheckpointError: If a tensor is missing, has no counterpart in the model, or has a different
            shape and ``ignore_mismatched_sizes`` is False.
    """
    if plan.tokens or plan.config.ensure_weight_tying:
        file = _with_kinds_on_model(file, plan)
    tensors, path, other = file.tensors, file.path, dict[str, str]()
    with temporary_replication(plan.replication):
        expected = _expected_shapes(model, plan)
        shapes = _file_shapes_of_tied_heads(model, expected, plan) | expected
        biases = _base_biases_by_original_name(model) if plan.config.bias != "none" else {}
        for key, parts in file.keys.items():
            found = base_weight_of_module(model, parts.module) if parts.kind == "base" else None
            if parts.kind == "bias":
                _, found = biases.get(
                    f"{strip_adapter_wrapper_names(parts.module)}.bias", (key, None)
                )
            if found is not None:
                shapes.setdefault(key, tuple(found.shape))
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{path} is missing {len(missing)} tensor(s) that this model needs; the first is "
            f"{missing[0]!r}"
        )
    for key, tensor in tensors.items():
        shape = shapes.get(key)
        if shape is None:
            raise CheckpointError(
                f"{path} contains the tensor {key!r}, but this model has no parameter for it"
            )
        if tuple(tensor.shape) != shape:
            other[key] = f"{key!r} has shape {tuple(tensor.shape)}, but this model expects {shape}"
    if not other:
        return file
    first, more = next(iter(other.values())), f" (and {len(other) - 1} more)"
    message = f"{path}: {first}{more if len(other) > 1 else ''}"
    if not ignore_mismatched_sizes:
        raise CheckpointError(
            f"{message}; pass ignore_mismatched_sizes=True to skip mismatched tensors"
        )
    warn(f"{message}; mismatched tensors keep their initial values")
    return replace(file, tensors={key: t for key, t in tensors.items() if key not in other})


def _with_kinds_on_model(file: AdapterContents, plan: AdapterPlan) -> AdapterContents:
    """Return an adapter's contents, in which the kinds of tensors are those on a model.

    Only the model shows which modules are tied to the input embedding. If a module does not share
    the adapter's copy of the embedding, its weight in the file is a base weight. If a module shares
    the embedding's trained rows, its rows in the file are a duplicate, which is left out.

    Args:
        file: The loaded adapter.
        plan: The plan for the adapter on the model.
    """
    copies = {file_key(name, "") for name in (*plan.modules_to_save, *plan.tied_copies)}
    tied_rows = {file_key(n, "") for n, rows in plan.tokens.items() if rows.tied_to is not None}
    keys = {}
    for key, parts in file.keys.items():
        at = file_key(parts.module, "")
        if parts.kind == "tokens" and at in tied_rows:
            parts = parts._replace(kind="duplicate")
        elif (
            plan.config.ensure_weight_tying
            and parts.kind == "saved"
            and at not in copies
            and key == f"{at}weight"
        ):
            parts = parts._replace(kind="base")
        keys[key] = parts
    tensors = {key: t for key, t in file.tensors.items() if keys[key].kind != "duplicate"}
    return replace(file, keys=keys, tensors=tensors)


def check_overwritable_from_file(
    model: nn.Module, adapter_name: str, loaded_config: LoraConfig, plan: AdapterPlan, path: Path
) -> None:
    """Check that a loaded adapter can be overwritten with the adapter in a file.

    The two adapters must adapt the same modules, with the same rank and scaling for each module,
    own copies of the same modules, and tie the same modules to the input embedding. Both adapters
    must also have the same ``use_dora``, ``lora_bias``, ``bias``, and ``trainable_token_indices``.
    A scaling that was changed with `set_scale` is not compared and remains in effect, as in PEFT.

    Args:
        model: The base model with its adapters.
        adapter_name: The name of the loaded adapter.
        loaded_config: The config of the loaded adapter.
        plan: The plan for the adapter in the file.
        path: The adapter folder, for messages.

    Raises:
        CheckpointError: If the adapters differ.
    """
    config = plan.config
    layers = {
        name: layer
        for name, layer in adapted_layers(model, adapter_name).items()
        if not isinstance(layer, TiedLoraHead)
    }
    if layers.keys() != set(plan.adapted_module_and_parameter_names):
        differing = sorted(layers.keys() ^ set(plan.adapted_module_and_parameter_names))
        raise CheckpointError(
            f"{path} and the loaded adapter {adapter_name!r} adapt different modules (only one of "
            f"them adapts {differing[0]}); load the new adapter under another name"
        )
    for field in ("use_dora", "lora_bias", "bias"):
        mine, other = getattr(config, field), getattr(loaded_config, field)
        if mine != other:
            raise CheckpointError(
                f"{path}: {field}={mine!r}, but the loaded adapter {adapter_name!r} has "
                f"{field}={other!r}; load the new adapter under another name"
            )
    wrappers = [
        (name, module)
        for name, module in modules_with_adapters(model)
        if isinstance(module, ModuleWrapper) and adapter_name in module.adapter_names
    ]
    copied = {name for name, module in wrappers if isinstance(module, ModulesToSaveWrapper)}
    differing = sorted(copied.symmetric_difference((*plan.modules_to_save, *plan.tied_copies)))
    if differing:
        raise CheckpointError(
            f"{path} and the loaded adapter {adapter_name!r} have copies of different modules "
            f"(only one of them has a copy of {differing[0]}); load the new adapter under another "
            "name"
        )
    tied = modules_adapted_with_embedding(model, adapter_name)
    differing = sorted({*tied.heads, *tied.copies} ^ {*plan.tied_heads, *plan.tied_copies})
    if differing:
        raise CheckpointError(
            f"{path} and the loaded adapter {adapter_name!r} differ in ensure_weight_tying (only "
            f"one of them ties {differing[0]} to the input embedding); load the new adapter under "
            "another name"
        )
    rows = {
        name: module.token_indices[adapter_name]
        for name, module in wrappers
        if isinstance(module, TrainableTokensWrapper)
    }
    if rows != {name: tokens.indices for name, tokens in plan.tokens.items()}:
        raise CheckpointError(
            f"{path}: trainable_token_indices={config.trainable_token_indices}, but the loaded "
            f"adapter {adapter_name!r} has {rows}; load the new adapter under another name"
        )
    for name in layers:
        found = (config.rank_for(name), config.scaling_for(name))
        loaded = (layers[name].r[adapter_name], loaded_config.scaling_for(name))
        if found != loaded:
            raise CheckpointError(
                f"{path}: the rank and scaling for {name} are {found}, but the loaded adapter "
                f"{adapter_name!r} has {loaded}; load the new adapter under another name"
            )


def _expected_shapes(model: nn.Module, plan: AdapterPlan) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, target in plan.targets.items():
        at = file_key(name, "")
        for key, shape in target.tensor_shapes_by_key_within_module().items():
            shapes[at + key] = shape
    for name in (*plan.modules_to_save, *plan.tied_copies):
        at = file_key(name, "")
        for key, tensor in base_module_of(model.get_submodule(name)).state_dict().items():
            shapes[at + key] = tuple(tensor.shape)
    for name, tokens in plan.tokens.items():
        if tokens.tied_to is None:
            weight: Any = base_weight_of_module(model, name)
            shapes[file_key(name, TOKENS_KEY)] = (len(tokens.indices), weight.shape[1])
    return shapes


def _file_shapes_of_tied_heads(
    model: nn.Module, embedding_factor_shapes: Mapping[str, tuple[int, ...]], plan: AdapterPlan
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of tied output heads have in adapter files.

    The result is a dict that maps the file keys of these tensors, and no other file keys, to the
    shapes. A tied head uses the LoRA factors of the input embedding. PEFT may save these factors a
    second time, transposed, under the head's name.

    If there are tied heads, ``embedding_factor_shapes`` must contain the shapes of the embedding's
    factors, keyed by file key. Other entries are ignored.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    embedding = str(input_embedding_name(model)) if plan.tied_heads else ""
    for name in plan.tied_heads:
        for end, own in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
            shape = embedding_factor_shapes[file_key(embedding, own)]
            shapes[file_key(name, f"{end}.weight")] = shape[::-1]
    return shapes


def _base_biases_by_original_name(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Return a dict of the base model's biases, keyed by their original names.

    The original names are those that the biases have in a model without adapters. Each value in the
    dict is a tuple of the bias's name in ``model`` and the parameter.
    """
    return {
        strip_wrapper_prefixes(str(key_without_adapters(model, name))): (name, parameter)
        for name, parameter in base_parameters(model)
        if name.rpartition(".")[2] == "bias"
    }


def base_weight_of_module(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the weight of a module's base layer.

    Returns None if there is no such module or weight.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    weight = getattr(base_module_of(module), "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def adapter_file_state_dict(
    lora_model: LoraModel,
    adapter_name: str,
    source: dict[str, torch.Tensor],
    save_embedding_layers: bool | str,
) -> dict[str, torch.Tensor]:
    """Return an adapter's state dict with the keys that PEFT uses in its adapter files.

    Args:
        lora_model: The model that has the adapter.
        adapter_name: The name of the adapter.
        source: A dict with the keys of the model's ``state_dict()``, which provides the tensors.
        save_embedding_layers: See `LoraModel.save_pretrained`.

    Raises:
        CheckpointError: If a tensor of the adapter is missing from ``source``. Trained biases of
            the base model may be missing.
        AdapterStateError: If adapters are merged into a base weight or bias that belongs into the
            file, and its value from before the merge is not available.
    """
    tensors = {}
    base = dict[str, torch.Tensor]()
    source = strip_wrapper_prefixes_from_keys(source)
    for disk, key in file_keys_to_state_keys(lora_model, adapter_name).items():
        if key in source:
            tensors[disk] = source[key]
        elif not disk.endswith("bias") or ".lora_B." in disk:
            raise CheckpointError(
                f"state_dict has no key {key!r}, which adapter {adapter_name!r} needs"
            )
    tuner = lora_model.base_model
    model, config = tuner.model, tuner.peft_config[adapter_name]
    for name, bias in base_biases_trained_by(model, adapter_name, config.bias).items():
        base[_bias_file_key(model, name, adapter_name)] = bias
    for name, module in modules_with_adapters(model):
        if isinstance(module, TiedLoraHead) and adapter_name in module.r:
            embedding = str(input_embedding_name(model))
            for disk, own in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
                factor = tensors[file_key(embedding, own)]
                tensors[file_key(name, f"{disk}.weight")] = factor.t().contiguous()
            if not any(are_embeddings_copied_and_targeted(config)):
                warn(
                    f"{name!r} shares the LoRA factors of {embedding!r} "
                    "(ensure_weight_tying=True), but PEFT will load this adapter without an "
                    "adapter on the head, because PEFT ties only modules named "
                    f"{' or '.join(EMBEDDING_NAMES)}"
                )
    embeddings = _embeddings_by_module_name(model)
    save = save_embedding_layers
    if save == "auto":
        save, reason = _is_vocab_resized(model, config), "the embedding layer has been resized"
        if not save:
            embeddings = {n: m for n, m in embeddings.items() if isinstance(m, LoraLayer)}
            save = _targets_embedding_or_head(embeddings, adapter_name, config)
            reason = "embedding layers found in `target_modules`"
        if save:
            warn(f"Setting `save_embedding_layers` to `True` as {reason}.")
    elif save and not hasattr(model, "get_input_embeddings"):
        warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers "
            "model.",
        )
    if save:
        for name, module in embeddings.items():
            if isinstance(module, ModulesToSaveWrapper):
                continue  # the adapter's copy of the module is saved instead
            inner = "base_layer.weight" if isinstance(module, LoraLayer) else "weight"
            if isinstance(module, TrainableTokensWrapper):
                inner = "token_adapter.base_layer.weight"
            own = "weight" if isinstance(module, FastLoraLinear) else inner
            weight = base_weight_of_module(model, name)
            if weight is not None:
                base[file_key(name, inner)] = weight
                weight = source.get(file_key(name, own), weight)
                tensors[file_key(name, inner)] = weight.detach()
    return tensors | (_values_before_merge(model, base) if base else {})


def _values_before_merge(
    model: nn.Module, base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the values from before the merge of those tensors that adapters are merged into.

    The result has the keys of these tensors in ``base``, which contains parameters of the base
    model.

    Raises:
        AdapterStateError: If such a value is not available.
    """
    changed = [
        pair
        for _, module in modules_with_adapters(model)
        for pair in module._parameters_and_values_before_merge()
    ]
    values: dict[str, torch.Tensor] = {}
    for key, tensor in base.items():
        kept = [value for parameter, value in changed if parameter is tensor]
        full = [v for v in kept if isinstance(v, torch.Tensor) and v.shape == tensor.shape]
        if kept and not full:
            raise AdapterStateError(
                f"adapters are merged into the base tensor {key!r}, which is saved with the "
                "adapter, and its value from before the merge was not kept; call unmerge_adapter() "
                "first"
            )
        if full:
            values[key] = full[0]
    return values


def _embeddings_by_module_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return a dict of a model's embeddings, keyed by module name.

    The embeddings are the input and output embeddings of the model. The function finds the
    embeddings with the methods that transformers models define for this purpose.
    """
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # vision models have no embeddings
            found += [getattr(model, method)()] if hasattr(model, method) else []
    return {name: module for name, module in model.named_modules() if module in found}


def _targets_embedding_or_head(
    embeddings: dict[str, nn.Module], adapter_name: str, config: LoraConfig
) -> bool:
    """Return whether an adapter targets an embedding layer or the output head.

    The criteria are PEFT's. The result is always False if the adapter has
    ``trainable_token_indices``.
    """
    if config.trainable_token_indices is not None:
        return False
    if not isinstance(config.target_modules, str):
        return any(name in (config.target_modules or ()) for name in _SAVED_TARGETS)
    return any(
        isinstance(module, LoraLayer) and adapter_name in module.r
        for name, module in embeddings.items()
        if name.rpartition(".")[2] in _SAVED_TARGETS
    )


def _is_vocab_resized(model: nn.Module, config: LoraConfig) -> bool:
    """Return whether the vocabulary of a model has been resized.

    The current size is compared with the one in the config that the base model was loaded with,
    from a local folder or from the Hugging Face Hub. A config in the Hub's local cache is read
    without a request to the Hub. If the config cannot be read, a warning is emitted and the result
    is False, as in PEFT.
    """
    name = config.base_model_name_or_path
    current: Any = getattr(model, "config", None)
    size = getattr(current, "vocab_size", None)
    if not name or size is None:
        return False
    loaded_from_name = getattr(current, "_name_or_path", None) == name
    revision = getattr(current, "_commit_hash", None) if loaded_from_name else config.revision
    try:
        original = type(current).from_pretrained(name, revision=revision)
    except Exception:  # also what a config class raises for fields that it does not accept
        warn(  # begins as in PEFT
            f"Could not find a config file in {name} - will assume that the vocabulary was not "
            "modified. If it was, pass save_embedding_layers=True",
        )
        return False
    return bool(getattr(original, "vocab_size", size) != size)


@torch.no_grad()
def load_contents_into_adapter(
    lora_model: LoraModel, adapter_name: str, file: AdapterContents
) -> None:
    """Load the contents of an adapter file into an adapter of a model.

    The model must already have the adapter, and the file must have been checked. The tensors of the
    file are copied into the adapter's parameters, which keep their dtypes. If the file contains a
    base embedding, which PEFT saves when the vocabulary was resized, the embedding is copied into
    the base model. If other adapters are merged into it, they are then merged into the new values.

    Args:
        lora_model: The model that has the adapter.
        adapter_name: The name of the adapter.
        file: The file, as returned by `check_adapter_fits_model`.
    """
    set_adapter_tensors(lora_model, adapter_name, file.tensors)
    for disk, parts in file.keys.items():
        if parts.kind == "base" and disk in file.tensors:
            weight = base_weight_of_module(lora_model.base_model.model, parts.module)
            if weight is not None:
                with _unmerged_modules(lora_model.base_model.model, [weight]):
                    copy_full_tensor_(weight, file.tensors[disk])


@contextlib.contextmanager
def _unmerged_modules(model: nn.Module, base_tensors: Collection[torch.Tensor]) -> Iterator[None]:
    """Unmerge adapters for the duration of a ``with`` block that writes to base parameters.

    The adapters of the modules that hold one of ``base_tensors`` are merged again afterwards.
    """
    with contextlib.ExitStack() as stack:
        for _, module in modules_with_adapters(model):
            if module.merged and any(
                parameter is tensor
                for parameter in base_module_of(module).parameters()
                for tensor in base_tensors
            ):
                stack.enter_context(module.disable_adapter())
        yield


def _copy_into_model_tensor(
    lora_model: LoraModel, key: str, target: torch.Tensor, source: torch.Tensor
) -> None:
    """Copy the values of a tensor into the tensor that the model has for a key.

    Both tensors have the same shape, and the values are converted to the dtype of ``target``. If
    ``target`` is sharded, each process copies its own shard. A target on the meta device is
    replaced with a new tensor on the device of the base layer.

    Args:
        lora_model: The model.
        key: The key of ``target`` in the model's state dict.
        target: The tensor of the model.
        source: The tensor to copy.

    Raises:
        CheckpointError: If ``source`` itself is on the meta device.
    """
    if source.is_meta:
        raise CheckpointError(f"the tensor given for {key!r} is on the meta device and has no data")
    if not target.is_meta:
        copy_full_tensor_(target, source)
        return
    name, _, leaf = key.rpartition(".")
    owner = lora_model.get_submodule(name)
    layer = next(
        m
        for n, m in modules_with_adapters(lora_model.base_model.model)
        if f"{key}.".startswith(file_key(n, ""))
    )
    devices = (p.device for p in base_module_of(layer).parameters() if not p.is_meta)
    made = source.detach().to(next(devices, source.device), target.dtype, copy=True)
    old: Any = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        made = nn.Parameter(made, requires_grad=old.requires_grad)
    tied = isinstance(layer, ModulesToSaveWrapper)
    for each in lora_model.modules() if tied else ():
        if each._parameters.get(leaf) is old:  # copies that are tied stay tied
            setattr(each, leaf, made)
    setattr(owner, leaf, made)
    if isinstance(layer, LoraLayer):
        for each in (layer, *layer.inner_layers().values()):
            each._move_scalings_to_factors(each.scaling)


@torch.no_grad()
def set_adapter_tensors(
    lora_model: LoraModel, adapter_name: str, tensors: Mapping[str, torch.Tensor]
) -> Any:
    """Set an adapter's parameters to the given tensors.

    The tensors are copied into the parameters. Parameters without a tensor in ``tensors`` are left
    unchanged.

    Args:
        lora_model: The model that has the adapter.
        adapter_name: The name of the adapter.
        tensors: A mapping from the keys of PEFT's adapter files to tensors.

    Returns:
        A named tuple with ``missing_keys`` and ``unexpected_keys``, as in the result of
        `nn.Module.load_state_dict`. Both are lists of keys of PEFT's adapter files.

    Raises:
        AdapterNotFoundError: If there is no such adapter.
        CheckpointError: If a shape differs. No tensor has been changed in this case.
    """
    tuner = lora_model.base_model
    tuner.check_adapter_loaded(adapter_name)
    state, own = (
        strip_wrapper_prefixes_from_keys(lora_model.state_dict()),
        file_keys_to_state_keys(lora_model, adapter_name),
    )
    keys, others = dict(own), [disk for disk in tensors if disk not in own]
    with_biases = others or tuner.peft_config[adapter_name].bias != "none"
    biases = _base_biases_by_original_name(tuner.model) if with_biases else {}
    for disk in others:  # base biases, regardless of the config's bias field, as in PEFT
        name = strip_adapter_wrapper_names(disk.removeprefix(KEY_PREFIX))
        if name in biases:
            keys[disk] = KEY_PREFIX + strip_wrapper_prefixes(biases[name][0])
    present = {disk: key for disk, key in keys.items() if disk in tensors and key in state}
    for disk, key in present.items():
        if tensors[disk].shape != state[key].shape:
            raise CheckpointError(
                f"{disk!r} has shape {tuple(tensors[disk].shape)}, but this model expects "
                f"{tuple(state[key].shape)}"
            )
    with contextlib.ExitStack() as stack:
        if biases:
            base = {KEY_PREFIX + strip_wrapper_prefixes(n): bias for n, bias in biases.values()}
            written = [base[key] for key in present.values() if key in base]
            stack.enter_context(_unmerged_modules(tuner.model, written))
        for disk, key in present.items():
            _copy_into_model_tensor(lora_model, key, state[key], tensors[disk])
    missing = [disk for disk in own if disk not in tensors]
    return _IncompatibleKeys(missing, [disk for disk in tensors if disk not in keys])
