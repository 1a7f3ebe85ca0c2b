"""Gradients of one adapter in PyTorch, as the kernels of a backward give them."""

from __future__ import annotations

import torch

from fastlora.ops.torch import reference


def grad_b(
    dy: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ds ``[M, R]``, d_lora_b ``[N, R]`` and the sums of dy's columns, fp32 at least."""
    sums = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return reference.lora_ds(dy, lora_b, scaling), reference.lora_d_b(dy, s, lora_b, scaling), sums
