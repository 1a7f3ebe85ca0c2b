"""Named kernel arguments that launchers derive from tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.kernels.config_tables import MAX_GROUP_SIZE


def strides(name: str, axes: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """Return the strides of a tensor: stride_xm and stride_xk for ``("x", "mk", x)``.

    A leading axis that the tensor does not have gets 0, and so do all axes if the tensor is None.
    An axis "_" is left out.
    """
    own = () if tensor is None else tensor.stride()
    pairs = zip(axes, (0,) * (len(axes) - len(own)) + own, strict=True)
    return {f"stride_{name}{axis}": stride for axis, stride in pairs if axis != "_"}


def numbered(name: str, values: Sequence[Any], unused: Any = None) -> dict[str, Any]:
    """Return the values of modules: the first under the plain name, others under numbered ones.

    ``name`` has a place for the number, as in ``"y{}_ptr"``. Modules that the launch does not have
    get ``unused``.
    """
    every = [*values, *[unused] * (MAX_GROUP_SIZE - len(values))]
    return {name.format(f"_{i}" if i else ""): value for i, value in enumerate(every)}


def padded(values: Sequence[Any], count: int) -> list[Any]:
    """Return ``count`` values: the given ones, and the first one in place of each missing one."""
    return [*values, *[values[0]] * (count - len(values))]


def dropout_of(seed: torch.Tensor | None, p: float) -> dict[str, Any]:
    """Return the arguments of a kernel that drops elements with probability ``p``."""
    return {
        "seed_ptr": seed if p > 0.0 else None,
        "threshold": round(p * 65536),
        "inv_keep": 1.0 / (1.0 - p),
        "HAS_DROPOUT": p > 0.0,
    }
