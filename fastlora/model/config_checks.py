"""The checks behind `LoraConfig`: each names the field, its value, and what was expected."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from fastlora.validation import ConfigError, check_dropout, check_rank, near_names

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig

BIAS_MODES = ("none", "all", "lora_only")
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# Initialisations that fastlora runs on a new adapter.
IMPLEMENTED_INITS: tuple[bool | str, ...] = (True, False, "gaussian")
# Initialisations that touch only the factors: a trained file of theirs is a plain LoRA file.
_FACTOR_INITS = ("eva", "orthogonal", "mica")
# These move part of the base weight into the factors. PEFT repeats the first two on every load,
# and needs the calibration data again for corda and a quantizer for loftq.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
_KNOWN_INITS = (*IMPLEMENTED_INITS, *_FACTOR_INITS, *BASE_CHANGING_INITS, "lora_ga")


def normalise(config: LoraConfig) -> None:
    """Brings equal ways to write a value into one: enums to strings, name lists to sets."""
    for name in ("task_type", "peft_type"):
        value = getattr(config, name)
        setattr(config, name, getattr(value, "value", value))  # PEFT's are string enums
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, (list, tuple, set, frozenset)):
            _check_names(name, value)
            setattr(config, name, set(value))
    for name in ("modules_to_save", "layers_to_transform", "layers_pattern", "target_parameters"):
        value = getattr(config, name)
        if isinstance(value, (list, tuple, range)):
            setattr(config, name, list(value))  # the caller's list stays the caller's
        elif isinstance(value, (set, frozenset)):
            setattr(config, name, sorted(value, key=str))
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        if value is None or isinstance(value, dict):
            setattr(config, name, dict(value or {}))
    if isinstance(config.init_lora_weights, str):
        config.init_lora_weights = config.init_lora_weights.lower()
    if config.peft_type is None:
        config.peft_type = "LORA"


def validate(config: LoraConfig) -> None:
    """Raises `ConfigError` for the first value that is wrong or contradicts another."""
    if config.peft_type != "LORA":
        raise ConfigError(f"peft_type must be 'LORA', got {config.peft_type!r}")
    _check_choice("task_type", config.task_type, (None, *TASK_TYPES))
    _check_choice("bias", config.bias, BIAS_MODES)
    for name in (
        *("inference_mode", "fan_in_fan_out", "use_rslora", "lora_bias"),
        *("use_dora", "use_qalora", "ensure_weight_tying"),
    ):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be True or False, got {getattr(config, name)!r}")
    check_rank(config.r)
    _check_number("lora_alpha", config.lora_alpha)
    config.lora_dropout = check_dropout("lora_dropout", config.lora_dropout)
    _validate_init(config)
    _validate_names(config)
    _validate_layers(config)
    _validate_patterns(config)
    if config.lora_bias and config.use_dora:
        raise ConfigError("lora_bias=True is not supported for DoRA; expected use_dora=False")
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ConfigError(
            "lora_bias=True needs init_lora_weights True or False, "
            f"got init_lora_weights={config.init_lora_weights!r}"
        )


def _validate_init(config: LoraConfig) -> None:
    init = config.init_lora_weights
    if isinstance(init, bool):
        return
    if isinstance(init, str) and (init in _KNOWN_INITS or re.fullmatch(r"pissa_niter_\d+", init)):
        return
    names = ", ".join(map(repr, _KNOWN_INITS))
    raise ConfigError(
        f"init_lora_weights must be one of {names} or 'pissa_niter_<n>', got {init!r}"
    )


def _validate_names(config: LoraConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            _check_regex(name, value)
        elif value is not None:
            _check_names(name, value)
    saved = config.modules_to_save
    if saved is not None:
        if not isinstance(saved, list):
            raise ConfigError(f"modules_to_save must be a list of names or None, got {saved!r}")
        _check_names("modules_to_save", saved)
        for entry in saved:
            _check_regex("modules_to_save", entry)


def _validate_layers(config: LoraConfig) -> None:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if layers is not None:
        indices = layers if isinstance(layers, list) else [layers]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            raise ConfigError(
                f"layers_to_transform must be a layer index or a list of them, got {layers!r}"
            )
    if pattern is not None:
        if not isinstance(pattern, (str, list)):
            raise ConfigError(f"layers_pattern must be a name or a list of names, got {pattern!r}")
        for entry in [pattern] if isinstance(pattern, str) else pattern:
            _check_regex("layers_pattern", entry)
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if value is not None and isinstance(config.target_modules, str):
            raise ConfigError(
                f"{name}={value!r} needs a list of target_modules, "
                f"got the string target_modules={config.target_modules!r}"
            )
    if pattern and layers is None:
        raise ConfigError(f"layers_pattern={pattern!r} needs layers_to_transform, got None")


def _validate_patterns(config: LoraConfig) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, dict):
            raise ConfigError(f"{name} must be a dict of module name to value, got {patterns!r}")
        for key, value in patterns.items():
            _check_regex(name, key)
            if name == "alpha_pattern":
                _check_number(f"alpha_pattern[{key!r}]", value)
                continue
            try:
                check_rank(value)
            except ConfigError:
                raise ConfigError(
                    f"rank_pattern[{key!r}] must be a positive integer, got {value!r}"
                ) from None


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        close = near_names(value, [c for c in choices if c]) if isinstance(value, str) else ""
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{close}"
        )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")


def _check_names(name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} must be a list of module names or a string, got {values!r}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{name} must hold module names, got the entry {value!r}")


def _check_regex(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must hold strings, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(
            f"{name} must hold valid regular expressions, got {value!r} ({error})"
        ) from error
