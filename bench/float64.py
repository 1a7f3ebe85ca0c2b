"""A model's outputs in float64, computed from its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class Float64(TorchFunctionMode):
    """A mode in which torch computes in float64, regardless of the dtypes of weights and casts."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` with float64 in place of every floating-point tensor and dtype argument."""
        if getattr(func, "__name__", "") == "__get__":  # attribute access: no arithmetic
            return func(*args, **(kwargs or {}))
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value
