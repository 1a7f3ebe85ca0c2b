"""`get_peft_model` and `LoraModel`: a model with adapters, its calls and its files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.layers.linear import DEFAULT_ADAPTER
from fastlora.model import adapter_state, conversion
from fastlora.model.adapter_folder import (
    AdapterFile,
    load_adapter_folder,
    renamed,
    save_adapter_folder,
)
from fastlora.model.config import LoraConfig
from fastlora.model.inject import to_meta
from fastlora.model.peft_names import PeftNames
from fastlora.model.plan import Plan, plan_for
from fastlora.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
)
from fastlora.model.tuner import LoraTuner
from fastlora.routing.block import adapters
from fastlora.routing.in_force import check_batch, end_forward
from fastlora.sharding import Gathering
from fastlora.validation import THE_PEFT_WAY, ConfigError, ImplementationError

# Arguments of PEFT's that have no effect on a local folder and a loaded model, which stays on the
# devices that it is on.
_WITHOUT_EFFECT = (
    *("torch_device", "low_cpu_mem_usage", "revision", "token", "cache_dir", "device_map"),
    *("max_memory", "offload_folder", "offload_dir", "offload_index", "ephemeral_gpu_offload"),
)


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = DEFAULT_ADAPTER,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> LoraModel:
    """Adds a LoRA adapter to a model, in place, and returns it wrapped.

    Args:
        model: Any module; its base parameters are frozen.
        peft_config: A `fastlora.LoraConfig`, or PEFT's own.
        adapter_name: Name of the adapter.
        mixed: Must be False: adapters of other kinds than LoRA are not supported.
        autocast_adapter_dtype: Keep factors of 16-bit base layers in fp32, as PEFT does.
        revision: Written into the config.
        low_cpu_mem_usage: Leave the adapter on the meta device, to be loaded into.

    Raises:
        TargetNotFoundError: The config names no module of the model.
        UnsupportedLayerError: It names one that cannot be adapted.
        ConfigError: A field is wrong. The model is unchanged after any of these.
    """
    if mixed:
        raise ImplementationError(f"mixed=True: fastlora has LoRA only; {THE_PEFT_WAY}")
    result = LoraModel(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    if revision is not None:
        result.peft_config[adapter_name].revision = revision
    return result


class LoraModel(PeftNames, nn.Module):
    """A model with named adapters.

    Where peft is imported, the object is also an instance of `peft.PeftModel`, which is what makes
    Hugging Face's Trainer save and resume adapters only.

    Args:
        model: Any module; LoRA layers replace its target modules in place.
        peft_config: A `fastlora.LoraConfig`, or PEFT's own.
        adapter_name: Name of the first adapter, which is active.
        autocast_adapter_dtype: Keep factors of 16-bit base layers in fp32, as PEFT does.
        low_cpu_mem_usage: See `get_peft_model`.

    Attributes:
        base_model: The `LoraTuner` that holds the model and its adapters.

    Raises:
        TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
    """

    base_model: LoraTuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = DEFAULT_ADAPTER,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        plan = plan_for(model, adapter_name, peft_config)
        self._install(model, plan, adapter_name, autocast_adapter_dtype)
        if low_cpu_mem_usage:
            to_meta(self.get_base_model(), adapter_name)

    def _install(
        self, model: nn.Module, plan: Plan, adapter_name: str, autocast_adapter_dtype: bool
    ) -> None:
        """Wraps ``model`` and gives it its first adapter, active."""
        nn.Module.__init__(self)
        self.base_model = LoraTuner(model)
        self.base_model.add_adapter(
            adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        self.set_adapter(adapter_name, plan.config.inference_mode)
        self.training = model.training
        if _is_checkpointing(model):
            _require_input_gradients(model)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter, frozen and not active yet.

        Args:
            adapter_name: A new name.
            peft_config: A `fastlora.LoraConfig`, or PEFT's own.
            low_cpu_mem_usage: See `get_peft_model`.
            autocast_adapter_dtype: See `get_peft_model`.

        Raises:
            AdapterStateError: The name exists, or another adapter trains biases too.
            TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
        """
        plan = plan_for(self.get_base_model(), adapter_name, peft_config)
        self.base_model.add_adapter(
            adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        if low_cpu_mem_usage:
            to_meta(self.get_base_model(), adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """See `LoraTuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `LoraTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model is its base model."""
        return self.base_model.disable_adapter()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        *,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **unused: Any,
    ) -> LoraModel:
        """Wraps a model with an adapter from a PEFT adapter folder.

        Args:
            model: The base model; or one with adapters, which gets another, active.
            model_id: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            adapter_name: Name to give it.
            is_trainable: Whether to go on training it; else it is frozen and in evaluation mode.
            config: In place of the folder's config. A `LoraConfig` is the model's own from then on,
                with its targets resolved and `inference_mode` set; as in PEFT.
            autocast_adapter_dtype: See `get_peft_model`.
            subfolder: Where in the folder the adapter is.
            ignore_mismatched_sizes: Leave tensors of another shape than the model's out, with a
                warning; they stay as initialised.
            key_mapping: Regular expression -> replacement for names of modules in the file that
                the model calls otherwise now; None for the model's own mapping, if it has one.
            **unused: PEFT's ``torch_device``, ``low_cpu_mem_usage``, ``revision``, ``token``,
                ``cache_dir``, ``device_map`` and what belongs to it, which change nothing here:
                adapters go beside the layers of the model, wherever these are.

        Raises:
            CheckpointError: The folder is missing, damaged, or does not fit the model.
            TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
                The model is unchanged after any of these.
        """
        if isinstance(model, LoraModel):
            if config is not None:
                raise ConfigError("config= goes with a base model, and this one has adapters")
            options = {"subfolder": subfolder, "key_mapping": key_mapping, **unused}
            options["ignore_mismatched_sizes"] = ignore_mismatched_sizes
            model.load_adapter(
                model_id, adapter_name, is_trainable, autocast_adapter_dtype, **options
            )
            model.set_adapter(adapter_name, inference_mode=not is_trainable)
            return model
        file = _read_folder(model_id, subfolder, unused)
        file = renamed(file, _names_now(model, key_mapping))
        chosen = file.config if config is None else config
        plan = plan_for(model, adapter_name, chosen, loading=True)
        plan.config.inference_mode = not is_trainable
        file = adapter_state.check_fit(model, plan, file, ignore_mismatched_sizes)
        if isinstance(config, LoraConfig):
            vars(config).update(vars(plan.config))
            plan = replace(plan, config=config)
        self = cls.__new__(cls)
        self._install(model, plan, adapter_name, autocast_adapter_dtype)
        adapter_state.load(self, adapter_name, file)
        return self if is_trainable else self.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **unused: Any,
    ) -> Any:
        """Loads a PEFT adapter folder: as a new adapter, not active yet, or over one in place.

        Over one in place, a scaling that `set_scale` has set stays.

        Args:
            model_id, autocast_adapter_dtype, subfolder, ignore_mismatched_sizes, key_mapping,
                unused: As in `from_pretrained`.
            adapter_name: A new name, or that of an adapter to overwrite in place.
            is_trainable: Has the adapter train, active or not; False puts the model into evaluation
                mode.

        Returns:
            The adapter's missing keys, those of tensors left out for their size, and unexpected
            ones, always none; as `nn.Module.load_state_dict`.

        Raises:
            CheckpointError: The folder is missing, damaged, or does not fit; nothing has changed.
            AdapterStateError: The name is loaded, and a `fastlora.adapters` block of the model is
                open in any thread.
        """
        file = _read_folder(model_id, subfolder, unused)
        model = self.get_base_model()
        file = whole = renamed(file, _names_now(model, key_mapping))
        plan = plan_for(model, adapter_name, file.config, loading=True)
        plan.config.inference_mode = not is_trainable
        file = adapter_state.check_fit(model, plan, file, ignore_mismatched_sizes)
        if adapter_name in self.peft_config:
            loaded = self.peft_config[adapter_name]
            adapter_state.check_same_adapter(model, adapter_name, loaded, plan, file.path)
            self.base_model.check_replaces("load_adapter", adapter_name, plan.config)
        else:
            self.base_model.add_adapter(
                adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
            )
        adapter_state.load(self, adapter_name, file)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return _IncompatibleKeys([key for key in whole.tensors if key not in file.tensors], [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes adapters as PEFT does: ``"default"`` into the folder, others into subfolders.

        Where parameters are sharded over processes (FSDP2, tensor parallelism), every process must
        call this: the first one writes, and all return when the files are there.

        Args:
            save_directory: Made if need be. A failure leaves what was there.
            safe_serialization: Must be True: pickles are neither read nor written.
            selected_adapters: Which; None for all.
            save_embedding_layers: Whether to write the base model's embeddings along. As in PEFT,
                ``"auto"`` does so where ``embed_tokens`` or ``lm_head`` is a target of the adapter,
                and where the vocabulary differs from the base model's.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: Folder of the adapter as it was before its
                training. An adapter whose initialisation changed the base weights (PiSSA, OLoRA,
                CorDA, LoRA-GA) is then written as plain LoRA of twice the rank, for the base
                weights as they were.
            state_dict: Tensors to take in place of the model's own, by its parameter names.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            CheckpointError: ``state_dict`` lacks a tensor of the adapter, or the untrained adapter
                does not fit it.
            ConfigError: The adapter cannot be converted.
            ValueError: ``safe_serialization`` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: fastlora writes safetensors only")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self.base_model.check_known(name)
        path = path_initial_model_for_weight_conversion
        initial = (
            {}
            if path is None
            else {name: conversion.read_initial(self.peft_config[name], path) for name in names}
        )
        gathering = Gathering(self.parameters() if state_dict is None else state_dict.values())
        if not is_main_process and not gathering.needed:
            return
        source = self.state_dict() if state_dict is None else state_dict
        writes = is_main_process and gathering.writes
        failure: Exception | None = None
        for name in names:
            tensors = adapter_state.collect(self, name, source, save_embedding_layers)
            tensors = gathering.tensors(tensors, keep=writes)
            if writes and failure is None:
                folder = Path(save_directory)
                folder = folder if name == DEFAULT_ADAPTER else folder / name
                config = self.peft_config[name]
                try:
                    if name in initial:
                        config, tensors = conversion.convert(config, tensors, initial[name])
                    mapping = _auto_mapping(self.get_base_model()) if not config.task_type else None
                    save_adapter_folder(folder, config, tensors, auto_mapping=mapping)
                except Exception as error:  # the others are waiting, and must hear of it
                    failure = error
        if writes and failure is None and names:
            self.create_or_update_model_card(save_directory)
        gathering.finish(failure)

    def get_base_model(self) -> nn.Module:
        """Returns the model, with the LoRA layers in it."""
        return self.base_model.model

    def forward(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the model.

        Args:
            *args: The model's.
            adapter_names: An adapter for each sample, as in `fastlora.adapters`.
            **kwargs: The model's.
        """
        with self._block(adapter_names):
            check_batch(self.base_model.group, args, kwargs)
            try:
                return self.base_model(*args, **kwargs)
            finally:
                end_forward(self.base_model.group)

    def generate(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the model's `generate`, beam search included; arguments as in `forward`."""
        generate: Any = self.get_base_model().generate
        with self._block(adapter_names):
            check_batch(self.base_model.group, args, kwargs, per_sample=True)
            try:
                return generate(*args, **kwargs)
            finally:
                end_forward(self.base_model.group)

    def _block(
        self, adapter_names: Sequence[str | None] | None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if adapter_names is None else adapters(self, adapter_names)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the number of trainable parameters and of all parameters."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints the two counts and their ratio, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201  # printing is what it is for
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See `fastlora.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See `fastlora.get_model_status`."""
        return get_model_status(self)

    def __getattr__(self, name: str) -> Any:
        """Finds what is not here on the tuner (``merge_and_unload``) or the model (``config``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _read_folder(
    model_id: str | os.PathLike[str], subfolder: str | None, unused: dict[str, Any]
) -> AdapterFile:
    """Reads an adapter folder; raises `TypeError` for arguments other than PEFT's idle ones."""
    for name, value in unused.items():
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"unexpected argument {name}={value!r}")
    return load_adapter_folder(Path(model_id) / (subfolder or ""))


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """Returns the base model's class, by which PEFT's AutoPeftModel finds it without a task."""
    cls = type(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def _names_now(model: nn.Module, key_mapping: Mapping[str, str] | None) -> Mapping[str, str]:
    """Returns the given mapping of names in files, or the one that transformers' models have."""
    if key_mapping is not None:
        return key_mapping
    own = getattr(model, "_checkpoint_conversion_mapping", None)
    return own if isinstance(own, Mapping) else {}


def _is_checkpointing(model: nn.Module) -> bool:
    # transformers 5 renamed the attribute, and warns about the old one.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False


def _require_input_gradients(model: nn.Module) -> None:
    """A frozen embedding would cut checkpointed layers off from the gradient."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]  # transformers' method
    elif hasattr(model, "get_input_embeddings"):
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # as above
        embeddings.register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
