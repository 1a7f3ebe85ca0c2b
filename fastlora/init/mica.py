"""MiCA: freezes B at the smallest singular directions of the base weight, and trains A from zero.

The method is from https://arxiv.org/abs/2604.01694, as implemented in PEFT.
"""

from __future__ import annotations

import torch

from fastlora.init.registry import InitInputs, InitResult, register_init


@register_init("mica", title="MiCA", frozen=("lora_B",))
def mica(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer using MiCA.

    MiCA uses the minor singular components of the weight W: B contains the last R columns of U,
    where ``W = U S V^T``, and A is zero. The base weight does not change.

    Raises:
        InitializationError: The weight has values that are not finite, or R exceeds its smaller
            dimension.
    """
    weight, rank = given.base_weight(), given.rank
    given.check_rank_limit(
        min(weight.shape),
        f"MiCA requires `r` <= min(in_features, out_features) of the weight {tuple(weight.shape)}",
    )
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return InitResult(torch.zeros_like(given.lora_a), u[:, -rank:].contiguous())
