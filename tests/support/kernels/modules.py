"""Which module has a kernel."""

from __future__ import annotations

import importlib
from types import ModuleType

# Kernels for mixed batches in the file of the kernel for one adapter.
_IN_ONE_FILE = ("mixed_lora_shrink", "mixed_lora_grad_a", "mixed_lora_grad_b")


def module_of(kernel: str) -> ModuleType:
    """Returns the module with ``_<kernel>_kernel`` and ``launch_<kernel>``."""
    stem = kernel.removeprefix("mixed_") if kernel in _IN_ONE_FILE else kernel
    return importlib.import_module(f"fastlora.kernels.{stem}")
