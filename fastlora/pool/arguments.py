"""What an `AdapterPool` accepts as arguments; each check raises before anything is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.routing.ids import BASE
from fastlora.validation import ConfigError, check_rank


def check_limits(
    max_adapters: int, device_bytes: int | None, cpu_bytes: int | None, max_rank: int | None
) -> None:
    """Raises `ConfigError` unless the limits are integers, large enough; None is none."""
    _check_limit("max_adapters", max_adapters, 1)
    for name, value in (("device_bytes", device_bytes), ("cpu_bytes", cpu_bytes)):
        if value is not None:
            _check_limit(name, value, 0)
    if max_rank is not None:
        check_rank(max_rank)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises `ConfigError` unless factors can be stored in it."""
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
        raise ConfigError(f"dtype is {dtype}, expected a float of 16, 32 or 64 bits")


def check_name(name: object) -> None:
    """Raises `ConfigError` unless an adapter can have this name."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(
            f"an adapter's name must be a non-empty string other than {BASE!r}, got {name!r}"
        )


def check_names(names: object) -> None:
    """Raises `TypeError` unless this is a sequence of names, a single name being none."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names is {names!r}, expected a list of names")


def _check_limit(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
