"""`get_peft_model` and `LoraModel`: adapters on a whole model, with PEFT's names and meaning."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora import adapter_state, inject
from fastlora.batch import adapters
from fastlora.checkpoint import load_adapter_folder, save_adapter_folder
from fastlora.config import LoraConfig
from fastlora.layers.linear import DEFAULT_ADAPTER
from fastlora.targets import resolve_target_modules
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    near_names,
)


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
) -> LoraModel:
    """Adds a LoRA adapter to a model, in place, and returns it wrapped.

    Args:
        model: Any module; its base parameters are frozen.
        peft_config: A `fastlora.LoraConfig`, or PEFT's own.
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep factors of 16-bit base layers in fp32, as PEFT does.

    Raises:
        TargetNotFoundError: The config names no module of the model.
        UnsupportedLayerError: It names one that is not linear.
        ConfigError: A field is wrong. The model is unchanged after any of these.
    """
    return LoraModel(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )


class AdaptedModel(nn.Module):
    """Holds the model under the name that PEFT gives it: ``base_model.model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Finds what is not here on the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class LoraModel(nn.Module):
    """A model with named adapters.

    Where transformers and peft are installed and the model is transformers' own, the object is also
    an instance of `peft.PeftModel`, which is what makes Hugging Face's Trainer save and resume
    adapters only.

    Args:
        model: Any module; LoRA layers replace its target modules in place.
        peft_config: A `fastlora.LoraConfig`, or PEFT's own.
        adapter_name: Name of the first adapter, which is active.
        autocast_adapter_dtype: Keep factors of 16-bit base layers in fp32, as PEFT does.

    Raises:
        TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
    """

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> LoraModel:
        if cls is LoraModel and model is not None:
            from fastlora.integrations.transformers import lora_model_class

            cls = lora_model_class(model)
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        config, plan = self._plan(model, adapter_name, peft_config)
        self._install(model, config, plan, adapter_name, autocast_adapter_dtype)

    def _install(
        self,
        model: nn.Module,
        config: LoraConfig,
        plan: inject.Plan,
        adapter_name: str,
        autocast_adapter_dtype: bool,
    ) -> None:
        """Wraps ``model`` and gives it its first adapter, active."""
        if any(True for _ in inject.lora_layers(model)):
            raise AdapterStateError(
                "the model has LoRA layers already; use add_adapter(), or unload() it first"
            )
        nn.Module.__init__(self)
        inject.add_adapter(
            model, adapter_name, config, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        self.base_model = AdaptedModel(model)
        self._configs: dict[str, LoraConfig] = {adapter_name: config}
        self._active: list[str] = []
        self._activate([adapter_name])
        self.training = model.training
        if _is_checkpointing(model):
            model.enable_input_require_grads()  # type: ignore[operator]  # transformers' method

    # ------------------------------------------------------------------------------ adapters

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to config."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(self._active)

    @property
    def active_adapter(self) -> str:
        """Name of the first adapter that acts."""
        return self._active[0] if self._active else ""

    def add_adapter(
        self, adapter_name: str, peft_config: Any, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Adds an adapter, not active yet.

        Raises:
            AdapterStateError: The name exists.
            TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
        """
        if adapter_name in self._configs:
            raise AdapterStateError(f"adapter {adapter_name!r} exists already")
        model = self.get_base_model()
        config, plan = self._plan(model, adapter_name, peft_config)
        inject.add_adapter(
            model, adapter_name, config, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        self._configs[adapter_name] = config
        self._activate(self._active)

    @staticmethod
    def _plan(
        model: nn.Module, adapter_name: str, peft_config: Any, *, loading: bool = False
    ) -> tuple[LoraConfig, inject.Plan]:
        """Returns the config with its targets resolved, and what it will touch."""
        if not adapter_name or "." in adapter_name:
            raise ConfigError(
                f"adapter_name must be a non-empty string without dots, got {adapter_name!r}"
            )
        config = peft_config
        if not isinstance(config, LoraConfig):
            config = LoraConfig.from_peft(config)
        config = copy.deepcopy(config)
        config.check_supported("load" if loading else "new")
        plan = inject.plan_adapter(model, config)
        config.target_modules = resolve_target_modules(model, config)
        if plan.modules_to_save and not config.modules_to_save:
            config.modules_to_save = [name.rpartition(".")[2] for name in plan.modules_to_save]
        if not config.base_model_name_or_path:
            name = getattr(model, "name_or_path", None) or getattr(
                getattr(model, "config", None), "_name_or_path", None
            )
            config.base_model_name_or_path = name or None
        return config, plan

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters act, and them alone trainable.

        Args:
            adapter_name: One name, or several whose updates add up.
            inference_mode: Leave all of them frozen.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._check_known(name)
        self._activate(names, inference_mode)

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        self._active = list(dict.fromkeys(names))
        model = self.get_base_model()
        frozen = [n for n in self._configs if self._configs[n].inference_mode]
        for layer in inject.lora_layers(model):
            layer._activate(self._active, inference_mode)
        for wrapper in inject.saved_modules(model):
            wrapper._activate(self._active, inference_mode)
        inject.set_trainable(model, [] if inference_mode else self._active, self._configs)
        self._freeze(frozen)

    def _freeze(self, names: list[str]) -> None:
        """Freezes adapters made or loaded for inference, active or not."""
        model = self.get_base_model()
        for name in names:
            for layer in inject.lora_layers(model):
                if name in layer.lora_A:
                    layer.lora_A[name].requires_grad_(False)
                    layer.lora_B[name].requires_grad_(False)
            for wrapper in inject.saved_modules(model):
                if name in wrapper.modules_to_save:
                    wrapper.modules_to_save[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; where it was active, another one takes its place if there is one.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            AdapterStateError: It is merged.
        """
        self._check_known(adapter_name)
        inject.delete_adapter(self.get_base_model(), adapter_name)
        del self._configs[adapter_name]
        active = [name for name in self._active if name != adapter_name]
        if not active and self._configs:
            active = [next(iter(self._configs))]
        self._activate(active)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base model."""
        model = self.get_base_model()
        with contextlib.ExitStack() as stack:
            for layer in inject.lora_layers(model):
                stack.enter_context(layer.disable_adapter())
            for wrapper in inject.saved_modules(model):
                stack.callback(setattr, wrapper, "_disabled", wrapper._disabled)
                wrapper._disabled = True
            yield

    def _check_known(self, name: str) -> None:
        if name not in self._configs:
            raise AdapterNotFoundError(
                f"no adapter {name!r}; loaded are {list(self._configs)}"
                f"{near_names(name, self._configs)}"
            )

    # ------------------------------------------------------------------------------- merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep_base: bool = True,
    ) -> None:
        """Merges adapters into the base weights until `unmerge_adapter`; see `LoraLayer.merge`.

        Raises:
            AdapterNotFoundError, AdapterStateError, UnsupportedLayerError: Nothing has changed.
        """
        for name in adapter_names or []:
            self._check_known(name)
        model = self.get_base_model()
        layers = list(inject.lora_layers(model))
        chosen = [inject.present(layer, adapter_names) for layer in layers]
        for layer, names in zip(layers, chosen, strict=True):
            merges = layer.check_merge(safe_merge, names)
            tied = inject.shared_with(model, layer) if merges else None
            if tied:
                raise AdapterStateError(
                    f"a target shares its weight with {tied}, which merging would change too; "
                    "merge_and_unload() gives it its own"
                )
        for layer, names in zip(layers, chosen, strict=True):
            layer.merge(adapter_names=names, keep_base=keep_base)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the base weights again."""
        for layer in inject.lora_layers(self.get_base_model()):
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merges adapters into the base weights and returns the bare model.

        Args:
            progressbar: Show one, where tqdm is installed.
            safe_merge: Refuse weights that are not finite.
            adapter_names: Which; None for the active ones.

        Raises:
            AdapterNotFoundError, AdapterStateError, UnsupportedLayerError: Nothing has changed.
        """
        for name in adapter_names or []:
            self._check_known(name)
        return inject.unload(
            self.get_base_model(),
            merge=True,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
            progressbar=progressbar,
        )

    def unload(self) -> nn.Module:
        """Drops all adapters and returns the bare model."""
        return inject.unload(self.get_base_model(), merge=False)

    # --------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> LoraModel:
        """Wraps a model with an adapter from a PEFT adapter folder.

        Args:
            model: The base model.
            model_id: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            adapter_name: Name to give it.
            is_trainable: Whether to go on training it; else it is frozen and in evaluation mode.
            autocast_adapter_dtype: See `get_peft_model`.

        Raises:
            CheckpointError: The folder is missing, damaged, or does not fit the model.
            TargetNotFoundError, UnsupportedLayerError, ConfigError: See `get_peft_model`.
                The model is unchanged after any of these.
        """
        file = load_adapter_folder(model_id)
        config = copy.deepcopy(file.config)
        config.inference_mode = not is_trainable
        config, plan = cls._plan(model, adapter_name, config, loading=True)
        adapter_state.check_fit(model, plan, config, file)
        self = cls.__new__(cls, model)
        self._install(model, config, plan, adapter_name, autocast_adapter_dtype)
        adapter_state.load(self, adapter_name, file)
        return self if is_trainable else self.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        **_: Any,
    ) -> None:
        """Loads a PEFT adapter folder: as a new adapter, not active yet, or over one in place.

        Args:
            model_id: As in `from_pretrained`.
            adapter_name: A new name, or that of an adapter to overwrite in place.
            is_trainable: Whether to go on training; else a new adapter is frozen, and the model
                goes into evaluation mode.
            autocast_adapter_dtype: See `get_peft_model`.

        Raises:
            CheckpointError: The folder is missing, damaged, or does not fit; nothing has changed.
        """
        file = load_adapter_folder(model_id)
        model = self.get_base_model()
        config = copy.deepcopy(file.config)
        config.inference_mode = not is_trainable
        config, plan = self._plan(model, adapter_name, config, loading=True)
        adapter_state.check_fit(model, plan, config, file)
        if adapter_name in self._configs:
            adapter_state.check_same_adapter(model, adapter_name, plan, config, Path(model_id))
        else:
            inject.add_adapter(
                model, adapter_name, config, plan, autocast_adapter_dtype=autocast_adapter_dtype
            )
            self._configs[adapter_name] = config
            self._activate(self._active)
        adapter_state.load(self, adapter_name, file)
        if not is_trainable:
            self.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """Writes adapters as PEFT does: ``"default"`` into the folder, others into subfolders.

        Args:
            save_directory: Made if need be. A failure leaves what was there.
            safe_serialization: Must be True: pickles are neither read nor written.
            selected_adapters: Which; None for all.
            state_dict: Tensors to take in place of the model's own, by its parameter names.
            is_main_process: False writes nothing.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            ValueError: ``safe_serialization`` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: fastlora writes safetensors only")
        names = list(self._configs) if selected_adapters is None else selected_adapters
        for name in names:
            self._check_known(name)
        if not is_main_process:
            return
        source = self.state_dict() if state_dict is None else state_dict
        for name in names:
            folder = Path(save_directory)
            folder = folder if name == DEFAULT_ADAPTER else folder / name
            keys = adapter_state.key_map(self, name)
            tensors = {disk: source[key] for disk, key in keys.items()}
            save_adapter_folder(folder, self._configs[name], tensors)

    # --------------------------------------------------------------------------- as a module

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
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with adapters(self, adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the model's `generate`, beam search included; arguments as in `forward`."""
        generate: Any = self.get_base_model().generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        with adapters(self, adapter_names):
            return generate(*args, **kwargs)

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

    def __getattr__(self, name: str) -> Any:
        """Finds what is not here on the base model (``config``, ``device``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _is_checkpointing(model: nn.Module) -> bool:
    # transformers 5 renamed the attribute, and warns about the old one.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False
