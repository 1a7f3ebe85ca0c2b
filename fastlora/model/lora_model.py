"""`get_peft_model` and `LoraModel`: create, call, save, and load a model with adapters."""

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
    AdapterContents,
    effective_key_mapping,
    load_adapter_folder,
    save_adapter_folder,
    with_renamed_modules,
)
from fastlora.model.config import LoraConfig
from fastlora.model.estimate import unpacked_numel
from fastlora.model.expert_files import config_for_peft, convert_expert_factors
from fastlora.model.inject import move_adapter_to_meta
from fastlora.model.peft_model_methods import PeftModelMethods
from fastlora.model.plan import AdapterPlan, make_adapter_plan
from fastlora.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
)
from fastlora.model.tuner import LoraTuner
from fastlora.routing.active import check_batch_matches_ids, discard_unused_results
from fastlora.routing.block import adapters
from fastlora.sharding import ShardedSaveCoordinator
from fastlora.validation import PEFT_MODEL_ALTERNATIVE, ConfigError, ImplementationError

# Arguments of PEFT that are accepted and ignored. They have no meaning for a local folder, or for a
# loaded model, which stays on its devices.
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
    """Wrap a model in a `LoraModel`, add a new adapter, and return the `LoraModel`.

    The adapter is added to the given model in place.

    Args:
        model: Any module. Its parameters are frozen.
        peft_config: A `fastlora.LoraConfig` or a ``peft.LoraConfig``.
        adapter_name: The name of the adapter.
        mixed: Must be False. Adapters of types other than LoRA are not supported.
        autocast_adapter_dtype: Whether to store the factors of 16-bit base layers in fp32, as PEFT
            does.
        revision: The revision of the base model to record in the config.
        low_cpu_mem_usage: Whether to create the adapter on the meta device, so that its weights can
            be loaded later.

    Raises:
        TargetNotFoundError: If the config does not match any module of the model.
        UnsupportedLayerError: If the config matches a module that cannot be adapted.
        ConfigError: If a field of the config is invalid.
        InitializationError: If the initialization lacks calibration data, or does not support the
            rank or a weight.
        AdapterStateError: If the model already has LoRA layers, or if the initialization changes a
            weight that another module shares. The model is unchanged after any of these errors.
        ImplementationError: If ``mixed`` is True.
    """
    if mixed:
        raise ImplementationError(
            "mixed=True is not supported because fastlora supports only LoRA; "
            f"{PEFT_MODEL_ALTERNATIVE}"
        )
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


class LoraModel(PeftModelMethods, nn.Module):
    """A model with LoRA adapters.

    Each adapter has a name. If PEFT is imported, every `LoraModel` is also an instance of
    ``peft.PeftModel``. For this reason, the Trainer of transformers saves and resumes only the
    adapters.

    Args:
        model: Any module. Its target modules are replaced with LoRA layers in place.
        peft_config: A `fastlora.LoraConfig` or a ``peft.LoraConfig``.
        adapter_name: The name of the first adapter, which becomes active.
        autocast_adapter_dtype: Whether to store the factors of 16-bit base layers in fp32, as PEFT
            does.
        low_cpu_mem_usage: See `get_peft_model`.

    Attributes:
        base_model: The `LoraTuner` that contains the model and its adapters.

    Raises:
        TargetNotFoundError, UnsupportedLayerError, ConfigError, InitializationError,
            AdapterStateError: See `get_peft_model`.
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
        plan = make_adapter_plan(model, adapter_name, peft_config)
        self._wrap_in_tuner_with_active_adapter(model, plan, adapter_name, autocast_adapter_dtype)
        if low_cpu_mem_usage:
            move_adapter_to_meta(self.get_base_model(), adapter_name)

    def _wrap_in_tuner_with_active_adapter(
        self, model: nn.Module, plan: AdapterPlan, adapter_name: str, autocast_adapter_dtype: bool
    ) -> None:
        """Wrap a model in a `LoraTuner` with a new, active adapter.

        The adapter is added according to ``plan``.
        """
        nn.Module.__init__(self)
        self.base_model = LoraTuner(model)
        self.base_model.add_adapter(
            adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        self.set_adapter(adapter_name, plan.config.inference_mode)
        self.training = model.training
        if _is_checkpointing(model):
            _require_embedding_output_gradients(model)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter to the model.

        The adapter is frozen and inactive until `set_adapter` activates it. As in PEFT, there is
        one exception: the first adapter that trains tokens of a tied embedding is active at once.

        Args:
            adapter_name: The name of the new adapter, which must not be in use.
            peft_config: A `fastlora.LoraConfig` or a ``peft.LoraConfig``.
            low_cpu_mem_usage: See `get_peft_model`.
            autocast_adapter_dtype: See `get_peft_model`.

        Raises:
            AdapterStateError: If the name is in use, if the config trains biases of the base model
                and another adapter already does, or if the initialization changes a weight that
                another module shares, or reads a weight that adapters are merged into.
            TargetNotFoundError, UnsupportedLayerError, ConfigError, InitializationError: See
                `get_peft_model`.
        """
        plan = make_adapter_plan(self.get_base_model(), adapter_name, peft_config)
        self.base_model.add_adapter(
            adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        if low_cpu_mem_usage:
            move_adapter_to_meta(self.get_base_model(), adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one or several adapters. See `LoraTuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. See `LoraTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that disables all adapters. See `LoraTuner.disable_adapter`."""
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
        """Load a saved adapter from a folder into a model, and return a `LoraModel`.

        The folder must contain an adapter in PEFT's format.

        Args:
            model: The base model, or a `LoraModel`. A `LoraModel` gets an additional adapter, which
                becomes active.
            model_id: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
                The folder of an adapter on the Hugging Face Hub must be downloaded first.
            adapter_name: The name of the adapter in the model.
            is_trainable: Whether to continue training the adapter. If False, the adapter is frozen
                and the model is put into evaluation mode.
            config: A config to use instead of the one in the folder. As in PEFT, a `LoraConfig`
                object is not copied: the model uses it as its own config, and updates fields such
                as ``target_modules`` and ``inference_mode`` in it.
            autocast_adapter_dtype: See `get_peft_model`.
            subfolder: The path of the adapter inside the folder.
            ignore_mismatched_sizes: Whether to skip tensors with a shape that differs from the
                model's and emit a warning, instead of raising an error. The parameters of skipped
                tensors keep their values.
            key_mapping: A mapping from regular expressions to replacements, for modules that have
                other names in the file than in the model. With None, the mapping that the model
                itself defines is used, if there is one.
            **unused: Arguments of PEFT that are accepted and ignored: ``torch_device``,
                ``low_cpu_mem_usage``, ``revision``, ``token``, ``cache_dir``, ``device_map``, the
                arguments related to ``device_map``, and ``ephemeral_gpu_offload``. Each adapter is
                placed on the devices of the layers that it adapts.

        Raises:
            CheckpointError: If the folder is missing or damaged, or does not fit the model.
            TargetNotFoundError, UnsupportedLayerError, ConfigError, InitializationError,
                AdapterStateError: See `get_peft_model` and, for a `LoraModel`, `load_adapter`.
            TypeError: If an argument is unknown. The model is unchanged after any of these errors.
        """
        if isinstance(model, LoraModel):
            if config is not None:
                raise ConfigError(
                    "config= is only supported for a base model, and this model already has "
                    "adapters"
                )
            options = {"subfolder": subfolder, "key_mapping": key_mapping, **unused}
            options["ignore_mismatched_sizes"] = ignore_mismatched_sizes
            model.load_adapter(
                model_id, adapter_name, is_trainable, autocast_adapter_dtype, **options
            )
            model.set_adapter(adapter_name, inference_mode=not is_trainable)
            return model
        file = _check_arguments_and_read_folder(model_id, subfolder, unused)
        file = with_renamed_modules(file, effective_key_mapping(model, key_mapping))
        file = convert_expert_factors(model, file)
        chosen = file.config if config is None else config
        plan = make_adapter_plan(model, adapter_name, chosen, file=file)
        plan.config.inference_mode = not is_trainable
        file = adapter_state.check_adapter_fits_model(model, plan, file, ignore_mismatched_sizes)
        if isinstance(config, LoraConfig):
            vars(config).update(vars(plan.config))
            plan = replace(plan, config=config)
        self = cls.__new__(cls)
        self._wrap_in_tuner_with_active_adapter(model, plan, adapter_name, autocast_adapter_dtype)
        adapter_state.load_contents_into_adapter(self, adapter_name, file)
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
        """Load a saved adapter into the model under a given name.

        The adapter is loaded from a local folder, which must contain an adapter in PEFT's format.

        If no adapter with the given name is loaded, a new inactive adapter is added. Otherwise, the
        loaded adapter is overwritten in place, and a scaling that was set with `set_scale` remains
        in effect.

        Args:
            model_id, autocast_adapter_dtype, subfolder, ignore_mismatched_sizes, key_mapping,
                unused: See `from_pretrained`.
            adapter_name: The name of a new adapter, or of the loaded adapter to overwrite.
            is_trainable: Whether to make the adapter trainable, even if it is inactive. If False,
                the model is put into evaluation mode.

        Returns:
            A named tuple with ``missing_keys`` and ``unexpected_keys``, as in the result of
            `nn.Module.load_state_dict`. ``missing_keys`` lists the tensors that were skipped
            because of their shapes. ``unexpected_keys`` is always empty.

        Raises:
            CheckpointError: If the folder is missing or damaged, or does not fit the model.
            TargetNotFoundError, UnsupportedLayerError, InitializationError: See `get_peft_model`.
            AdapterStateError: For a loaded adapter, if it is merged, or if a `fastlora.adapters`
                block of the model is open in any thread. For a new adapter, if both this adapter
                and another one train biases of the base model, if both require the base weights
                to change, or in the cases listed in `add_adapter`.
            ConfigError: If the name or a field of the config is invalid. For a loaded adapter, also
                if the initialization of the loaded or the new adapter changed the base weights, and
                that of the other one did not change them in the same way.
            TypeError: If an argument is unknown. The model is unchanged after any of these errors.
        """
        file = _check_arguments_and_read_folder(model_id, subfolder, unused)
        model = self.get_base_model()
        file = with_renamed_modules(file, effective_key_mapping(model, key_mapping))
        file = whole = convert_expert_factors(model, file)
        plan = make_adapter_plan(model, adapter_name, file.config, file=file)
        plan.config.inference_mode = not is_trainable
        file = adapter_state.check_adapter_fits_model(model, plan, file, ignore_mismatched_sizes)
        if adapter_name in self.peft_config:
            loaded = self.peft_config[adapter_name]
            adapter_state.check_overwritable_from_file(model, adapter_name, loaded, plan, file.path)
            self.base_model.check_adapter_replaceable("load_adapter", adapter_name, plan.config)
        else:
            self.base_model.add_adapter(
                adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
            )
        adapter_state.load_contents_into_adapter(self, adapter_name, file)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        read = [key for key in whole.tensors if file.keys[key].kind != "duplicate"]
        return _IncompatibleKeys([key for key in read if key not in file.tensors], [])

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
        """Save adapters to a folder.

        The files have PEFT's format. The adapter called ``"default"`` is written into the folder,
        and each other adapter into a subfolder with the adapter's name. If parameters are sharded
        over several processes (FSDP2 or tensor parallelism), every process must call this method.
        The first process writes the files, and all processes return when the files are complete.

        Args:
            save_directory: The folder. It is created if it does not exist. If an adapter cannot be
                written, its existing files remain.
            safe_serialization: Must be True. Pickle files are neither read nor written.
            selected_adapters: The adapters to save. With None, all adapters are saved.
            save_embedding_layers: Whether to save the base model's embeddings too. As in PEFT,
                ``"auto"`` saves them if ``embed_tokens`` or ``lm_head`` is a target of the adapter,
                or if the vocabulary size differs from that of the original base model.
            is_main_process: Whether this process writes files.
            path_initial_model_for_weight_conversion: The folder of the untrained adapter. It is
                needed to convert an adapter with an initialization that changed the base weights
                (PiSSA, OLoRA, CorDA, LoRA-GA). The adapter is then saved as plain LoRA of twice the
                rank for the original base weights.
            state_dict: Tensors to save instead of the model's own, by parameter name.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If an adapter is on the meta device and ``state_dict`` is None, or if
                adapters are merged into a base weight or bias that is saved with an adapter and
                whose value from before the merge was not kept.
            CheckpointError: If ``state_dict`` lacks a tensor of the adapter, or if the untrained
                adapter does not fit the trained one.
            ConfigError: If the adapter cannot be converted.
            ValueError: If ``safe_serialization`` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: fastlora writes safetensors only")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            if state_dict is None:
                self.base_model.check_adapter_has_values(name)
            else:
                self.base_model.check_adapter_loaded(name)
        path = path_initial_model_for_weight_conversion
        initial = (
            {}
            if path is None
            else {
                name: conversion.load_untrained_adapter(self.peft_config[name], path)
                for name in names
            }
        )
        gathering = ShardedSaveCoordinator(
            self.parameters() if state_dict is None else state_dict.values()
        )
        if not is_main_process and not gathering.is_model_sharded:
            return
        source = self.state_dict() if state_dict is None else state_dict
        writes = is_main_process and gathering.is_writer
        failure: Exception | None = None
        for name in names:
            tensors = adapter_state.adapter_file_state_dict(
                self, name, source, save_embedding_layers
            )
            tensors = gathering.gather_full_tensors(tensors, return_tensors=writes)
            if writes and failure is None:
                folder = Path(save_directory)
                folder = folder if name == DEFAULT_ADAPTER else folder / name
                config = self.peft_config[name]
                try:
                    if name in initial:
                        config, tensors = conversion.convert_to_original_base(
                            config, tensors, initial[name]
                        )
                    config = config_for_peft(self.get_base_model(), name, config)
                    mapping = _auto_mapping(self.get_base_model()) if not config.task_type else None
                    save_adapter_folder(folder, config, tensors, auto_mapping=mapping)
                except Exception as error:  # `finish` reports it to the waiting processes
                    failure = error
        if writes and failure is None and names:
            self.create_or_update_model_card(save_directory)
        gathering.wait_for_all_or_raise(failure)

    def get_base_model(self) -> nn.Module:
        """Return the base model that this `LoraModel` wraps.

        The LoRA layers are modules of the base model.
        """
        return self.base_model.model

    def forward(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Call the base model with its adapters.

        Args:
            *args: Positional arguments of the base model.
            adapter_names: The adapter to use for each sample of the batch. See `fastlora.adapters`.
            **kwargs: Keyword arguments of the base model.
        """
        with self._adapters_block(adapter_names):
            check_batch_matches_ids(self.base_model.group, args, kwargs)
            try:
                return self.base_model(*args, **kwargs)
            finally:
                discard_unused_results(self.base_model.group)

    def generate(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Generate outputs with the base model's ``generate`` method.

        Beam search is supported.

        Args:
            *args: Positional arguments of ``generate``.
            adapter_names: The adapter to use for each sample of the batch. See `fastlora.adapters`.
            **kwargs: Keyword arguments of ``generate``.
        """
        generate: Any = self.get_base_model().generate
        with self._adapters_block(adapter_names):
            check_batch_matches_ids(self.base_model.group, args, kwargs, per_sample=True)
            try:
                return generate(*args, **kwargs)
            finally:
                discard_unused_results(self.base_model.group)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing in the base model.

        The `Trainer` of transformers 4 calls this method, and uses reentrant checkpointing by
        default. With reentrant checkpointing, the adapters only get gradients if the output of the
        input embedding requires gradients, so this method makes the output require them.

        Args:
            gradient_checkpointing_kwargs: The arguments of `torch.utils.checkpoint.checkpoint`, or
                None for the base model's default.
            **kwargs: Other keyword arguments of the base model's method.
        """
        base: Any = self.get_base_model()
        given = gradient_checkpointing_kwargs
        base.gradient_checkpointing_enable(*(() if given is None else (given,)), **kwargs)
        reentrant = (given or {}).get("use_reentrant", True)
        # Models of transformers 5 have this method, and do the rest themselves.
        if reentrant and not hasattr(base, "activation_checkpointing_enable"):
            _require_embedding_output_gradients(base)

    def _adapters_block(
        self, adapter_names: Sequence[str | None] | None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if adapter_names is None else adapters(self, adapter_names)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters and the total number of parameters."""
        counts = [(unpacked_numel(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters.

        The total number of parameters and the percentage of trainable parameters are printed too.
        The output has the same format as in PEFT.
        """
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201  # this method is meant to print
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of each adapter layer. See `fastlora.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of the model. See `fastlora.get_model_status`."""
        return get_model_status(self)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tuner or, if the tuner does not have it, of the base model.

        For example, the tuner has ``merge_and_unload``, and the base model has ``config``.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _check_arguments_and_read_folder(
    folder: str | os.PathLike[str], subfolder: str | None, other_arguments: dict[str, Any]
) -> AdapterContents:
    """Check the arguments for loading an adapter, and read the adapter's folder.

    ``folder`` is the path of a local folder. Some arguments of PEFT are accepted and ignored. Any
    other additional argument is rejected.

    Raises:
        CheckpointError: See `load_adapter_folder`.
        TypeError: If ``other_arguments`` contains an argument that is not one of the arguments of
            PEFT that are accepted and ignored.
    """
    for name, value in other_arguments.items():
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"unexpected argument {name}={value!r}")
    return load_adapter_folder(Path(folder) / (subfolder or ""))


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """Return the ``auto_mapping`` for a config: the names of the base model's class and library.

    The library is the Python module that defines the class. PEFT's AutoPeftModel loads the base
    model with this class if the config has no task type.
    """
    cls = type(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def _is_checkpointing(model: nn.Module) -> bool:
    # transformers 5 renamed the attribute, and warns about the old one.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False


def _require_embedding_output_gradients(model: nn.Module) -> None:
    """Make the output of the input embedding require gradients.

    Reentrant checkpointing computes gradients only if an input of the checkpointed layers requires
    gradients, and the output of a frozen embedding does not require them. A model without an input
    embedding, such as an audio model, is left unchanged.
    """
    methods: Any = model
    with contextlib.suppress(NotImplementedError):  # as transformers' methods raise
        if hasattr(model, "enable_input_require_grads"):
            methods.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            methods.get_input_embeddings().register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
