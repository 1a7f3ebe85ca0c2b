"""The adapters of a training run: their configs, and the base model with all of them on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastlora.model import LoraModel, get_peft_model
from fastlora.model.adapter_folder import inspect_adapter_folder
from fastlora.model.config import LoraConfig
from fastlora.model.recommend import Recommendation, recommend
from fastlora.model.targets import check_every_target
from fastlora.train.config import TrainSettings
from fastlora.train.parameters import adapter_parameters, train_adapters
from fastlora.train.prepare import load_base
from fastlora.validation import ConfigError, TargetNotFoundError

_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapters(settings: TrainSettings) -> None:
    """Tries all adapters on the base model without weights, before data or weights are read.

    Raises:
        FastLoraError: See `load_base` and `add_adapters`.
    """
    base = load_base(settings, empty=True)
    add_adapters(base, settings, recommend(base))


def adapter_configs(settings: TrainSettings, advice: Recommendation) -> dict[str, LoraConfig]:
    """Returns each adapter's config.

    Raises:
        ConfigError: A field is wrong.
        CheckpointError: A folder of ``init_from`` is missing or damaged.
    """
    configs = {}
    for adapter in settings.adapters:
        if adapter.init_from is None:
            configs[adapter.name] = adapter.lora_config(advice)
        else:
            configs[adapter.name] = inspect_adapter_folder(adapter.init_from).config
    return configs


def add_adapters(base: Any, settings: TrainSettings, advice: Recommendation) -> LoraModel:
    """Returns the model with every adapter on it, trainable.

    A new adapter's factors depend on the seed and its name, not on the other adapters.

    Raises:
        TargetNotFoundError: An entry of a new adapter's targets matches nothing.
        UnsupportedLayerError, ConfigError: See `get_peft_model`.
        ConfigError: An adapter trains parameters of the base model, and these are in fp16.
        AdapterStateError: An adapter trains biases of the base model, and is not alone.
        CheckpointError: A folder of ``init_from`` does not fit.
    """
    configs = adapter_configs(settings, advice)
    check_dropout_dtype(configs, next(base.parameters()).dtype)
    model: LoraModel | None = None
    for adapter in settings.adapters:
        config = configs[adapter.name]
        if adapter.init_from is None:
            _check_targets(base, adapter.name, config)
        torch.manual_seed(_seed_of(settings.seed, adapter.name))
        if adapter.init_from is not None and not _is_meta(base):
            if model is None:
                model = LoraModel.from_pretrained(base, adapter.init_from, adapter.name, True)
            else:
                model.load_adapter(adapter.init_from, adapter.name, is_trainable=True)
            continue
        if adapter.init_from is not None:  # without weights
            config = config.shapes_only()
        config = replace(config, inference_mode=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name=adapter.name)
        else:
            model.add_adapter(adapter.name, config)
    if model is None:
        raise ConfigError("no adapter is given")
    train_adapters(model, list(configs))
    _check_unscalable(model)
    return model


def _check_targets(base: Any, name: str, config: LoraConfig) -> None:
    try:
        check_every_target(base, config)
    except TargetNotFoundError as error:
        raise TargetNotFoundError(f"adapter {name!r}: {error}") from error


def _check_unscalable(model: LoraModel) -> None:
    """Raises `ConfigError` where an adapter trains what is in fp16: torch unscales no such ones.

    Its factors are fp32; biases of the base model and copies of its modules are as it is.
    """
    for name, config in model.peft_config.items():
        for key, parameter in adapter_parameters(model, name).items():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                copied = ".modules_to_save." in key
                field, instead = (
                    ("modules_to_save", "no modules_to_save") if copied else ("bias", "bias='none'")
                )
                raise ConfigError(
                    f"adapter {name!r} has {field}={getattr(config, field)!r}, and what it trains "
                    "of the base model so is in float16, whose gradients cannot be unscaled; "
                    f"expected dtype 'bfloat16' or 'float32', or {instead}"
                )


def check_dropout_dtype(configs: Mapping[str, LoraConfig], dtype: torch.dtype) -> None:
    """Raises `ConfigError` where an adapter has dropout and the model computes in another dtype
    than a float of 16, 32 or 64 bits."""
    for name, config in configs.items():
        if config.lora_dropout and dtype not in _COMPUTE_DTYPES:
            raise ConfigError(
                f"adapter {name!r} has lora_dropout={config.lora_dropout:g}, and the base model is "
                f"in {dtype}; dropout needs a float of 16, 32 or 64 bits: set dtype, or "
                "lora_dropout to 0"
            )


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _is_meta(model: nn.Module) -> bool:
    return all(p.is_meta for p in model.parameters())
