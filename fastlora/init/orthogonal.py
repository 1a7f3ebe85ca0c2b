"""Orthogonal initialization: nonzero factors whose product is zero.

The method is from https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialization, as
implemented in PEFT.
"""

from __future__ import annotations

import torch

from fastlora.init.registry import InitInputs, InitResult, register_init
from fastlora.validation import InitializationError


@register_init("orthogonal")
def orthogonal(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer using orthogonal initialization.

    A is built from the even rows of a random orthogonal matrix, and B from its odd rows, so
    ``B A = 0``. The size of the matrix is the adapter's rank.

    Raises:
        InitializationError: The rank is odd.
    """
    rank = given.rank
    if rank % 2:
        raise InitializationError(
            f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead."
        )
    (n, k), half = (given.lora_b.shape[0], given.lora_a.shape[1]), rank // 2
    rows, _ = torch.linalg.qr(torch.randn(rank, rank))
    lora_a = (torch.randn(k, half) @ rows[0::2]).T / 10.0
    lora_b = torch.randn(half, n).T @ rows[1::2] / 10.0
    return InitResult(lora_a, lora_b)
