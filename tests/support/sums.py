"""Products of matrices whose sums take one term after another, as kernels' do.

A library of the CPU adds in parts, side by side, and may come much nearer to the truth than the
same expression on a GPU. An error budget is that of PyTorch's own result; on a CPU the worst one of
several orders says how far off that may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.env import triton_interpreted
from fastlora.testing import run_with_largest_error

# Orders that are drawn, beside that of K and the library's.
_DRAWN = 3

Results = Mapping[str, torch.Tensor]
_T = TypeVar("_T")


def _in_order(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Returns ``start + a @ b``; each product is added exactly and rounded, as by an FMA."""
    total = start.clone()
    for k in range(a.shape[-1]):
        term = a[..., :, k, None].double() * b[..., k, None, :].double()
        total = (total.double() + term).to(start.dtype)
    return total


class InOrder(TorchDispatchMode):
    """Has fp32 products add in the order of K, or in one that is drawn.

    Args:
        seed: Of the drawn orders; None for that of K.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") not in ("mm", "bmm", "addmm", "baddbmm"):
            return func(*args, **kwargs)
        *start, a, b = args
        if b.dtype is not torch.float32:
            return func(*args, **kwargs)
        if self._generator is not None:
            order = torch.randperm(a.shape[-1], generator=self._generator)
            a, b = a.index_select(-1, order), b.index_select(-2, order)
        total = a.new_zeros(*a.shape[:-1], b.shape[-1])
        beta = kwargs.get("beta", 1)
        if start and beta:
            total += start[0] * beta
        total = _in_order(a * kwargs.get("alpha", 1), b, total)
        into = start[0] if name.endswith("_") else kwargs.get("out")
        return total if into is None else into.copy_(total)


def in_orders(compute: Callable[[], _T]) -> list[_T]:
    """Returns what PyTorch computes in its own order, and on a CPU in other ones.

    On a GPU, and where NumPy multiplies for Triton's interpreter, PyTorch's own order is enough.
    """
    runs = [compute()]
    if not triton_interpreted() and not torch.cuda.is_available():
        for seed in (None, *range(_DRAWN)):
            with InOrder(seed):
                runs.append(compute())
    return runs


def yardstick(compute: Callable[[], Results], exact: Results) -> dict[str, torch.Tensor]:
    """Returns of each of PyTorch's results that of several orders which is farthest off.

    Args:
        compute: What PyTorch computes in the dtype under test, by name.
        exact: The float64 results.
    """
    runs = in_orders(compute)
    return {
        name: run_with_largest_error((run[name] for run in runs), exact[name]) for name in runs[0]
    }
