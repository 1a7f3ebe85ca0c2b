"""Which implementation of the operators runs where: Triton's kernels or plain PyTorch.

Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastlora import env
from fastlora.validation import ImplementationError, check_dropout_dtype

IMPLEMENTATIONS = ("auto", "triton", "eager")

# Types of devices that "auto" means kernels for, where they run.
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = env.triton_interpreted()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Has `torch.compile` call the function while it traces, and keep the result as a constant.

    This is `torch.compiler.assume_constant_result` without its import of the compiler, which takes
    longer than that of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _gpu_status(index: int) -> tuple[bool, str]:
    """Whether GPU ``index`` is one that the kernels are built for."""
    properties = torch.cuda.get_device_properties(index)
    from fastlora.kernels import chips

    chip = chips.chip_of(torch.device("cuda", index))
    if not chip.is_supported:
        return False, f"{properties.name} is {chip.arch}, for which there are no kernel configs"
    return True, f"{properties.name} ({chip.arch})"


@constant_when_compiled
def triton_status(device_type: str, index: int = 0) -> tuple[bool, str]:
    """Returns whether the Triton kernels can run on a device, and why or why not.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` (also ROCm), or any other device type of torch.
        index: Which device of that type.
    """
    if not _HAS_TRITON:
        return False, "triton is not installed"
    if device_type == "cuda":
        return _gpu_status(index)
    if _INTERPRETED:
        return True, "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    return False, f"no Triton kernels for device type {device_type!r}"


def resolve_impl(impl: str, x: torch.Tensor) -> str:
    """Returns ``"triton"`` or ``"eager"`` for what the caller asked.

    Raises:
        ValueError: ``impl`` is not one of `IMPLEMENTATIONS`.
        ImplementationError: ``impl="triton"`` cannot run on x; a named implementation is never
            replaced by another.
    """
    if impl == "eager":
        return impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    device_type = x.device.type
    if impl == "auto" and device_type not in KERNEL_DEVICES:
        return "eager"
    runs, why = triton_status(device_type, x.device.index or 0)
    if runs and x.dtype not in _TRITON_DTYPES:
        runs, why = False, f"the kernels take fp16, bf16 and fp32, got {x.dtype}"
    if runs:
        return "triton"
    if impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run: {why}")
    return "eager"


def draw_seed(x: torch.Tensor, impl: str) -> torch.Tensor:
    """Draws a dropout seed (one int64) from torch's default generator.

    It stays on the device for kernels, so nothing waits, and on the CPU for the eager path. Drawn
    from the global generator, it repeats when activation checkpointing restores that.

    Raises:
        TypeError: x's dtype is one that dropout cannot run in; the generator has not moved.
    """
    check_dropout_dtype(x.dtype)
    device = x.device if impl == "triton" else torch.device("cpu")
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
