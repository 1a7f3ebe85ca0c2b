"""Error classes, and argument checks that several public functions share.

Unless documented otherwise, public functions run all checks before they change any state. The
message of a failed check states the invalid value and what was expected.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch

from fastlora.deprecation import renamed_attributes

# Far above any useful rank. PyTorch's integers overflow for much larger ones.
_LARGEST_RANK = 2**31 - 1


class FastLoraError(Exception):
    """Base class of the errors that are specific to fastlora.

    Some functions of fastlora raise a built-in exception instead, such as `ValueError` or
    `TypeError`.
    """


class ConfigError(FastLoraError, ValueError):
    """Raised when a config, such as the `LoraConfig` of an adapter, is invalid.

    The error is also raised for an invalid setting or argument, and for an unsupported value.
    """


class TargetNotFoundError(FastLoraError, ValueError):
    """Raised when a config selects modules that do not exist in the model."""


class UnsupportedLayerError(FastLoraError, ValueError):
    """Raised when fastlora does not support a layer.

    For example, fastlora does not support the type or the current state of the layer. The error is
    also raised for modules that are not layers, such as a whole model.
    """


class InitializationError(FastLoraError, ValueError):
    """Raised when an adapter cannot be initialized.

    For example, the initialization method does not support a base weight, or the data that the
    method needs is missing.
    """


class AdapterNotFoundError(FastLoraError, ValueError):
    """Raised when no adapter with the given name exists.

    For example, the adapter has not been loaded.
    """


class AdapterStateError(FastLoraError, ValueError):
    """Raised when the state of an adapter is not valid for the requested operation.

    For example, an adapter is merged, or an adapter with the same name already exists.
    """


class CheckpointError(FastLoraError, ValueError):
    """Raised when a checkpoint cannot be used, for example because it is damaged.

    The checkpoint may belong to a training run, or be an adapter folder or a model folder. A
    checkpoint also cannot be used if it does not match the model, or if one of its files is missing
    or unsafe. The error is also raised if a checkpoint cannot be written, and for an adapter in
    memory that is invalid or does not match the model.
    """


class PoolClosedError(AdapterStateError):
    """Raised when an adapter pool cannot be used because it is closed.

    The error is also raised while the pool is closing, because the pool then grants no new leases.
    """


class AdapterTooLargeError(CheckpointError):
    """Raised when an adapter is too large for an adapter pool.

    The adapter's rank or its size in bytes exceeds a limit of the pool.

    Attributes:
        argument: Name of the `AdapterPool` argument that sets the limit.
    """

    def __init__(self, message: str, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


# The end of error messages about features that PEFT supports and fastlora does not.
PEFT_MODEL_ALTERNATIVE = (
    "use PEFT for this: model = peft.get_peft_model(model, peft_config), then "
    "fastlora.patch(model), which speeds up the LoRA layers"
)


class PoolFullError(FastLoraError, RuntimeError):
    """Raised when an adapter pool is full.

    The pool has no room for a requested adapter, and cannot make enough room by evicting other
    adapters. A pool may limit the number of adapters and their total size in bytes. A batch may
    request several adapters at once.
    """


class ImplementationError(FastLoraError, RuntimeError):
    """Raised when a requested implementation cannot be used.

    For example, the implementation is not supported, or it is not available on this machine. The
    error is also raised if a requested feature is not supported or not available.
    """


@contextlib.contextmanager
def error_prefix(where: object) -> Iterator[None]:
    """Context manager that adds the prefix ``where`` to the messages of fastlora errors.

    The prefix is added to each `FastLoraError` that is raised in the ``with`` block. Other
    exceptions remain unchanged.
    """
    try:
        yield
    except FastLoraError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise


def near_names(name: str, candidates: Iterable[str], limit: int = 5) -> str:
    """Return the names that are similar to ``name``, as text for an error message.

    The text is a suffix such as ``"; close names: a, b"``.

    Args:
        name: The unknown name.
        candidates: The known names.
        limit: Maximum number of names to list.

    Returns:
        The text, or an empty string if no known name is similar.
    """
    close = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=limit, cutoff=0.4)
    return f"; close names: {', '.join(close)}" if close else ""


def check_rank(r: object, name: str = "r") -> int:
    """Check that a rank is a positive integer, and return it.

    Raises `ConfigError`, whose message contains ``name``, if it is not, or if it is larger than
    2**31 - 1.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
        raise ConfigError(f"{name} must be a positive integer, got {r!r}")
    if r > _LARGEST_RANK:
        raise ConfigError(f"{name} must be at most {_LARGEST_RANK}, got {r}")
    return r


def check_is_module(function: str, model: object) -> None:
    """Check that a function's argument is a module and not, for example, an adapter pool.

    Raises `TypeError`, whose message contains the name of the function, if it is not.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{function}() expects a model (an nn.Module), got a {type(model).__name__}"
        )


def check_dropout(name: str, p: object) -> float:
    """Check that a dropout probability is a number in [0, 1), and return it as a float.

    Raises:
        ConfigError: The probability is not a number in [0, 1).
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ConfigError(f"{name} must be a number in [0, 1), got {p!r}")
    return float(p)


def check_same_device(reference: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raise `ValueError` unless all tensors are on the same device as ``reference``.

    Args:
        reference: The tensor with the expected device.
        **tensors: Tensors by argument name. None is ignored.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {reference.device} (the device of x)"
            )


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` unless the shape of ``tensor`` equals ``expected``."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless the tensor has a floating-point dtype.

    The dtypes are fp16, bf16, fp32, and fp64.
    """
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected a 16-, 32-, or 64-bit floating-point dtype"
        )


def check_dropout_dtype(dtype: torch.dtype) -> None:
    """Raise `TypeError` unless dropout supports the dtype.

    The dtypes are fp16, bf16, fp32, and fp64.
    """
    if not dtype.is_floating_point or dtype.itemsize < torch.float16.itemsize:
        raise TypeError(
            f"dropout does not support {dtype}; expected a 16-, 32-, or 64-bit floating-point "
            "dtype, or a dropout probability of 0"
        )


__getattr__ = renamed_attributes(__name__, {"InitialisationError": "InitializationError"})
