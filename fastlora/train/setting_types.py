"""Types of settings. A type defines how a setting's value is checked and how its flag is parsed."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.train.data.formats import COLUMNS
from fastlora.validation import ConfigError, near_names

# PyTorch multiplies parameters by fp32 scalars. This is just below the largest fp32 number.
LARGEST = 3.4e38
LARGEST_EPOCHS = 1_000_000
# The first step of AdamW divides the learning rate by 1 - beta1 = 0.1.
LARGEST_RATE = 3.4e37


class SettingType(NamedTuple):
    """The type of a setting, which defines how the setting's value is parsed and checked.

    Attributes:
        check: Function that takes a value and the setting's name for error messages. The function
            returns the converted value or raises `ConfigError`.
        flag: Keyword arguments for `argparse.ArgumentParser.add_argument`. They define how the
            setting's flag is parsed.
    """

    check: Callable[[Any, str], Any]
    flag: dict[str, Any]


def integer_from(low: int, high: float = math.inf) -> SettingType:
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where} must be an integer, got {value!r}")
        if value < low:
            raise ConfigError(f"{where} must be at least {low}, got {value}")
        if value > high:
            raise ConfigError(f"{where} must be at most {high}, got {value}")
        return value

    return SettingType(check, {"type": int, "metavar": "N"})


def number_up_to(high: float) -> SettingType:
    def check(value: Any, where: str) -> float:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0.0 <= value <= high:
            large = real and value > high
            ends = f"from 0 to {high:g}" if high < LARGEST_RATE or large else "at least 0"
            raise ConfigError(f"{where} must be a number {ends}, got {value!r}")
        return float(value)

    return SettingType(check, {"type": float, "metavar": "X"})


def one_of(*choices: str) -> SettingType:
    def check(value: Any, where: str) -> Any:
        if value not in choices:
            raise ConfigError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return SettingType(check, {"choices": choices})


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ConfigError(f"{where} must be a path, got {value!r}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{where}: cannot expand the home directory in {value}; specify the full path"
        ) from error


def _files(value: Any, where: str) -> tuple[Path, ...]:
    files = value if isinstance(value, (list, tuple)) else [value]
    if not files:
        raise ConfigError(f"{where} is empty, expected a file or a list of files")
    return tuple(_path(file, where) for file in files)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(t and isinstance(t, str) for t in texts):
        raise ConfigError(f"{where} must be a string or a list of strings, got {value!r}")
    return tuple(texts)


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, got {value!r}")
    return value


def as_table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table, got {value!r}")
    return dict(value)


def _columns(value: Any, where: str) -> dict[str, str]:
    table = as_table(value, where)
    for ours, theirs in table.items():
        if ours not in COLUMNS:
            raise ConfigError(
                f"{where}: unknown column {ours!r}{near_names(ours, COLUMNS)}; expected a table "
                f"that maps one or more of {', '.join(COLUMNS)} to column names in the data files"
            )
        if not isinstance(theirs, str) or not theirs:
            raise ConfigError(f"{where}.{ours} must be a column name, got {theirs!r}")
    return table


def _parse_comma_list(text: str) -> list[str]:
    """Parse a comma-separated list such as ``"a, b"``, and return the items."""
    return [name.strip() for name in text.split(",")]


def _pairs(text: str) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in _parse_comma_list(text)]
    if not all(ours and found and theirs for ours, found, theirs in pairs):
        raise argparse.ArgumentTypeError(f"expected FIELD=COLUMN,..., got {text!r}")
    return {ours: theirs for ours, _, theirs in pairs}


SWITCH = SettingType(_truth, {"action": "store_const", "const": True})
DIR = SettingType(_path, {"metavar": "DIR"})
FILE = SettingType(_path, {"metavar": "FILE"})
FILES = SettingType(_files, {})
TEXTS = SettingType(_texts, {"type": _parse_comma_list, "metavar": "NAME,NAME,..."})
PAIRS = SettingType(_columns, {"type": _pairs, "metavar": "FIELD=COLUMN,..."})


def setting_field(
    setting_type: SettingType, text: str = "", default: Any = dataclasses.MISSING
) -> Any:
    """Return a dataclass field for a setting of the given type.

    ``text`` is the help text of the setting's flag. If ``text`` is empty, the setting has no flag.
    """
    if text and isinstance(default, (int, float, str)) and not isinstance(default, bool):
        text += f" (default: {default if isinstance(default, str) else format(default, 'g')})"
    return dataclasses.field(default=default, metadata={"setting_type": setting_type, "help": text})


def select_and_validate_settings(
    settings_class: type, given: Mapping[str, Any], message_prefix: str
) -> dict[str, Any]:
    """Select the settings that ``settings_class`` defines, validate them, and return their values.

    The result is a dict that maps the names of the given settings to their values. Settings in
    ``given`` that ``settings_class`` does not define are ignored. The values are converted to the
    types of the settings. None is accepted for a field whose default is None. ``message_prefix``
    precedes the name of a setting in error messages.
    """
    found = {}
    for own in dataclasses.fields(settings_class):
        if own.name in given and "setting_type" in own.metadata:
            value = given[own.name]
            if value is not None or own.default is not None:
                value = own.metadata["setting_type"].check(value, f"{message_prefix}{own.name}")
            found[own.name] = value
    return found
