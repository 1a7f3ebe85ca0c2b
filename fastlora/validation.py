"""Error classes, and the checks that public entry points share.

Every check runs before any state changes. A failed check raises one error that names the offending
value and says what was expected.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch


class FastLoraError(Exception):
    """Base class of every error that fastlora defines."""


class ConfigError(FastLoraError, ValueError):
    """A `LoraConfig` field or an argument has an invalid or unsupported value."""


class TargetNotFoundError(FastLoraError, ValueError):
    """The config names modules that the model does not have."""


class UnsupportedLayerError(FastLoraError, ValueError):
    """A module has a type or a state that fastlora's LoRA layers do not support."""


class InitialisationError(FastLoraError, ValueError):
    """An initialization cannot use the given weights, or the data that it needs is missing."""


class AdapterNotFoundError(FastLoraError, ValueError):
    """No adapter with the given name is loaded."""


class AdapterStateError(FastLoraError, ValueError):
    """The operation is not possible in the current state, such as while an adapter is merged."""


class CheckpointError(FastLoraError, ValueError):
    """An adapter folder is missing, damaged, unsafe, or does not match the model."""


class PoolClosedError(AdapterStateError):
    """An adapter pool is closed, or it is closing and grants no new leases."""


class AdapterTooLargeError(CheckpointError):
    """An adapter exceeds a limit of its pool.

    Attributes:
        argument: Name of the `AdapterPool` argument that sets the limit.
    """

    def __init__(self, message: str, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


# Ends a message that names a feature which PEFT supports and fastlora does not.
THE_PEFT_WAY = (
    "that is PEFT's to do: model = peft.get_peft_model(model, peft_config), then "
    "fastlora.patch(model), which speeds up the layers that are LoRA"
)


class PoolFullError(FastLoraError, RuntimeError):
    """An adapter pool has no room for the request, and eviction cannot make any."""


class ImplementationError(FastLoraError, RuntimeError):
    """The implementation that the caller requested cannot run here."""


@contextlib.contextmanager
def error_prefix(where: object) -> Iterator[None]:
    """Prefix the message of every `FastLoraError` that the block raises with ``where``."""
    try:
        yield
    except FastLoraError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise


def near_names(name: str, candidates: Iterable[str], limit: int = 5) -> str:
    """Return ``"; close names: a, b"`` for an error message, or ``""`` if no name is close."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=limit, cutoff=0.4)
    return f"; close names: {', '.join(close)}" if close else ""


def check_rank(r: object) -> int:
    """Return ``r`` if it is a positive integer. Raise `ConfigError` otherwise."""
    if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
        raise ConfigError(f"r must be a positive integer, got {r!r}")
    return r


def check_dropout(name: str, p: object) -> float:
    """Return ``p`` as a float if it is in [0, 1). Raise `ConfigError` otherwise."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ConfigError(f"{name} must be a number in [0, 1), got {p!r}")
    return float(p)


def check_same_device(reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raise `ValueError` unless every tensor is on the device of ``reference``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {reference.device}, the device of x"
            )


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` unless ``tensor`` has exactly the ``expected`` shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless the dtype of ``tensor`` is fp16, bf16, fp32, or fp64."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected a floating-point dtype of 16, 32 or 64 bits"
        )


def check_dropout_dtype(dtype: torch.dtype) -> None:
    """Raise `TypeError` unless dropout can run in ``dtype``: fp16, bf16, fp32, or fp64."""
    if not dtype.is_floating_point or dtype.itemsize < torch.float16.itemsize:
        raise TypeError(
            f"dropout cannot run in {dtype}; expected a floating-point dtype of 16, 32 or 64 bits, "
            "or a dropout of 0"
        )
