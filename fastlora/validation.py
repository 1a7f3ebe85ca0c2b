"""Named errors, and the checks shared by every public entry point.

Every check runs before any state changes and raises one error that names the offending value and
what was expected.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch


class FastLoraError(Exception):
    """Base class of every error that fastlora defines."""


class ConfigError(FastLoraError, ValueError):
    """A `LoraConfig` field has a value that is wrong, or that nothing here implements."""


class TargetNotFoundError(FastLoraError, ValueError):
    """The config names modules that the model does not have."""


class UnsupportedLayerError(FastLoraError, ValueError):
    """The config targets a module of a type that no LoRA layer here wraps."""


class InitialisationError(FastLoraError, ValueError):
    """An initialisation cannot start from these weights, or lacks the data it was to be given."""


class AdapterNotFoundError(FastLoraError, ValueError):
    """No adapter of that name is loaded."""


class AdapterStateError(FastLoraError, ValueError):
    """The operation does not fit the adapter's state (it exists already, or it is merged)."""


class CheckpointError(FastLoraError, ValueError):
    """An adapter folder is missing, damaged, unsafe, or does not fit the model."""


class PoolClosedError(AdapterStateError):
    """An adapter pool is closed, or it is closing and takes no new leases."""


class AdapterTooLargeError(CheckpointError):
    """An adapter exceeds a limit of its pool.

    Attributes:
        argument: The argument of `AdapterPool` that sets the limit.
    """

    def __init__(self, message: str, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


# What does, with PEFT, what is not ours; ends a message that names what was asked for.
THE_PEFT_WAY = (
    "that is PEFT's to do: model = peft.get_peft_model(model, peft_config), then "
    "fastlora.patch(model), which speeds up the layers that are LoRA"
)


class PoolFullError(FastLoraError, RuntimeError):
    """An adapter pool has no room for what was asked, and eviction cannot make any."""


class ImplementationError(FastLoraError, RuntimeError):
    """The implementation that the caller named cannot run here."""


@contextlib.contextmanager
def error_prefix(where: object) -> Iterator[None]:
    """Puts ``where`` in front of the message of every `FastLoraError` that the block raises."""
    try:
        yield
    except FastLoraError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise


def near_names(name: str, candidates: Iterable[str], limit: int = 5) -> str:
    """Returns ``"; close names: a, b"``, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=limit, cutoff=0.4)
    return f"; close names: {', '.join(close)}" if close else ""


def check_rank(r: object) -> int:
    """Returns ``r`` if it is a positive integer, else raises `ConfigError`."""
    if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
        raise ConfigError(f"r must be a positive integer, got {r!r}")
    return r


def check_dropout(name: str, p: object) -> float:
    """Returns ``p`` as a float if it lies in [0, 1), else raises `ConfigError`."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ConfigError(f"{name} must be a number in [0, 1), got {p!r}")
    return float(p)


def check_same_device(reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises `ValueError` unless every tensor lies on ``reference``'s device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {reference.device}, the device of x"
            )


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raises `ValueError` unless ``tensor`` has exactly the ``expected`` shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises `TypeError` unless ``tensor`` holds fp16, bf16, fp32 or fp64 values."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected a floating-point dtype of 16, 32 or 64 bits"
        )


def check_dropout_dtype(dtype: torch.dtype) -> None:
    """Raises `TypeError` unless dropout has arithmetic in ``dtype``: fp16, bf16, fp32 or fp64."""
    if not dtype.is_floating_point or dtype.itemsize < torch.float16.itemsize:
        raise TypeError(
            f"dropout cannot run in {dtype}; expected a floating-point dtype of 16, 32 or 64 bits, "
            "or a dropout of 0"
        )
