"""Lookup of a kernel launch's config, and of the chip that it runs on."""

from __future__ import annotations

import torch

from fastlora.kernels import chips, configs
from fastlora.ops.plans import fp32_precision


def chip_of(x: torch.Tensor) -> chips.Chip:
    """Return the `Chip` of the device that x is on."""
    return chips.chip_of(x.device)


def config_of(
    launch: str,
    x: torch.Tensor,
    m: int = 0,
    n: int = 0,
    k: int = 0,
    r: int = 0,
    *,
    group_size: int = 1,
    batch_invariant: bool = False,
) -> configs.KernelConfig:
    """Return the launch config of a kernel for the given problem sizes.

    The kernel runs on the device of the input x, and computes matrix products in x's dtype. All
    other arguments are as in `fastlora.kernels.configs.choose`.
    """
    return configs.choose(
        *(chips.chip_of(x.device), launch, x.dtype),
        m=m,
        n=n,
        k=k,
        r=r,
        group_size=group_size,
        input_precision=fp32_precision(x.dtype),
        batch_invariant=batch_invariant,
    )
