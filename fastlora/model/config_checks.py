"""Check the values of `LoraConfig` fields.

Each error message names the field, its value, and the expected value.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from fastlora.init import find_init_method
from fastlora.patterns import check_pattern, count_toward_matching_time_limit
from fastlora.validation import ConfigError, check_dropout, check_rank, near_names


class TaskType(str, enum.Enum):
    """Enum of the task types of PEFT.

    A task type is a task that a model can be trained for. The names and values are those of PEFT.
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """Enum of PEFT types that stands in for PEFT's ``PeftType``.

    The only member is ``LORA``, because fastlora supports no other type.
    """

    LORA = "LORA"


class ConfigTypeError(ConfigError, TypeError):
    """Raised if a value in a config has the wrong type.

    The error is only raised where PEFT raises `TypeError`. Elsewhere, `ConfigError` is raised.
    """


# The PEFT version that the fields, the defaults, and the file format follow.
PEFT_VERSION = "0.21.2"
BIAS_MODES = ("none", "all", "lora_only")


def check_and_normalize_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of a config, and return a dict of the normalized values.

    For example, collections of names become new sets or lists, and ``task_type`` becomes a string.

    Args:
        given: A mapping from field names to values.

    Raises:
        ConfigError: If a value is invalid or contradicts another value.
    """
    fields = dict(given)
    for name in ("task_type", "peft_type"):
        fields[name] = getattr(fields[name], "value", fields[name])  # string enums in PEFT
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields[name], (list, tuple, set, frozenset)):
            _check_names(name, fields[name])
            fields[name] = set(fields[name])
    for name in ("modules_to_save", "layers_to_transform", "layers_pattern", "target_parameters"):
        if isinstance(fields[name], (list, tuple, range)):
            fields[name] = list(fields[name])  # a copy, so that later changes do not affect it
        elif isinstance(fields[name], (set, frozenset)):
            fields[name] = sorted(fields[name], key=str)
    for name in ("rank_pattern", "alpha_pattern"):
        if fields[name] is None or isinstance(fields[name], dict):
            fields[name] = dict(fields[name] or {})
    if isinstance(fields["init_lora_weights"], str):
        fields["init_lora_weights"] = fields["init_lora_weights"].lower()
    if fields["peft_type"] is None:
        fields["peft_type"] = "LORA"
    fields["layer_replication"] = _check_and_normalize_layer_replication(
        fields["layer_replication"]
    )
    fields["trainable_token_indices"] = _check_and_normalize_token_indices(
        fields["trainable_token_indices"]
    )
    _check_values(fields)
    return fields | {
        "peft_type": PeftType(fields["peft_type"]),
        "lora_dropout": float(fields["lora_dropout"]),
    }


def _check_values(fields: Mapping[str, Any]) -> None:
    """Check that the fields of a config have valid values.

    A value that contradicts another value is invalid too.

    Raises:
        ConfigError: If a field has an invalid value.
    """
    if fields["peft_type"] != "LORA":
        raise ConfigError(f"peft_type must be 'LORA', got {fields['peft_type']!r}")
    _check_choice("task_type", fields["task_type"], (None, *(task.value for task in TaskType)))
    _check_choice("bias", fields["bias"], BIAS_MODES)
    for name in (
        *("inference_mode", "fan_in_fan_out", "use_rslora", "lora_bias"),
        *("use_dora", "use_qalora", "ensure_weight_tying"),
    ):
        if not isinstance(fields[name], bool):
            raise ConfigError(f"{name} must be True or False, got {fields[name]!r}")
    check_rank(fields["r"])
    _check_number("lora_alpha", fields["lora_alpha"])
    check_dropout("lora_dropout", fields["lora_dropout"])
    init = fields["init_lora_weights"]
    find_init_method(init)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields[name], str):
            _check_regex(name, fields[name])
        elif fields[name] is not None:
            _check_names(name, fields[name])
    saved = fields["modules_to_save"]
    if saved is not None and not isinstance(saved, list):
        raise ConfigError(f"modules_to_save must be a list of names or None, got {saved!r}")
    _check_names("modules_to_save", saved or [])
    _check_regexes("modules_to_save", saved or [])
    parameters = fields["target_parameters"]
    if parameters is not None and not isinstance(parameters, list):
        raise ConfigTypeError(
            "`target_parameters` must be a list of strings or None; got "
            f"target_parameters={parameters!r}"
        )
    _check_names("target_parameters", parameters or [], "parameter names")
    _check_layers(fields["layers_to_transform"], fields["layers_pattern"], fields["target_modules"])
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, fields[name])
    if fields["lora_bias"] and fields["use_dora"]:
        raise ConfigError(
            "The argument lora_bias=True is not supported for DoRA; expected use_dora=False"
        )
    if fields["lora_bias"] and init not in (True, False):
        raise ConfigError(
            "The argument lora_bias=True is only supported if init_lora_weights is True or False, "
            f"got init_lora_weights={init!r}"
        )


def _check_and_normalize_layer_replication(given: Any) -> Any:
    """Check the value of ``layer_replication``, and return a normalized copy.

    The copy is a list.

    Raises:
        ConfigError: If the value is invalid.
    """
    if given is None or not isinstance(given, (list, tuple)):
        pairs: list[Any] = [] if given is None else [given]
    else:
        pairs = list(given)
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and all(type(i) is int for i in pair)
        if not whole or len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                "layer_replication must be a list of layer ranges (start, end) with "
                f"0 <= start < end, where end is exclusive; got {pair!r}"
            )
    return None if given is None else pairs


def _check_and_normalize_token_indices(given: Any) -> Any:
    """Check the value of ``trainable_token_indices``, and return a normalized copy.

    Raises:
        ConfigError: If the value is invalid.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        _check_names("trainable_token_indices", list(given))
        if not given:
            raise ConfigError("trainable_token_indices must name at least one module, got {}")
        return {
            name: _normalize_token_list(f"[{name!r}]", tokens) for name, tokens in given.items()
        }
    return _normalize_token_list("", given)


def _normalize_token_list(where: str, tokens: Any) -> list[int]:
    name = f"trainable_token_indices{where}"
    if not isinstance(tokens, (list, tuple, range)) or not tokens:
        raise ConfigError(f"{name} must be a list of token ids, got {tokens!r}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(f"{name} must contain non-negative token ids, got {token!r}")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if list(tokens).count(token) > 1)
        raise ConfigError(f"{name} must contain each token id at most once, got {twice} twice")
    return list(tokens)


def _check_layers(layers: Any, pattern: Any, targets: Any) -> None:
    if layers is not None:
        indices = layers if isinstance(layers, list) else [layers]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            raise ConfigError(
                "layers_to_transform must be a layer index or a list of layer indices, "
                f"got {layers!r}"
            )
    if pattern is not None:
        if not isinstance(pattern, (str, list)):
            raise ConfigError(f"layers_pattern must be a name or a list of names, got {pattern!r}")
        _check_regexes("layers_pattern", [pattern] if isinstance(pattern, str) else pattern)
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if value is not None and isinstance(targets, str):
            raise ConfigError(
                f"{name}={value!r} requires target_modules to be a list, got the string {targets!r}"
            )
    if pattern and layers is None:
        raise ConfigError(
            f"layers_pattern={pattern!r} requires layers_to_transform, which is not set"
        )


def _check_pattern(name: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise ConfigError(f"{name} must be a dict with module names as keys, got {patterns!r}")
    _check_regexes(name, patterns)
    for key, value in patterns.items():
        if name == "alpha_pattern":
            _check_number(f"alpha_pattern[{key!r}]", value)
        else:
            check_rank(value, f"rank_pattern[{key!r}]")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        close = near_names(value, [c for c in choices if c]) if isinstance(value, str) else ""
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{close}"
        )


def _check_number(name: str, value: Any) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name} must be a finite number, got {value!r}")


def _check_names(name: str, values: Any, expected: str = "module names") -> None:
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} must be a list of {expected} or a string, got {values!r}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"the entries of {name} must be {expected}, got {value!r}")


def _check_regexes(name: str, values: Iterable[Any]) -> None:
    with count_toward_matching_time_limit(name):
        for value in values:
            _check_regex(name, value)


def _check_regex(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must contain only strings, got {value!r}")
    check_pattern(name, value)
