"""OLoRA: initializes adapters from the QR decomposition of the base weight.

The method is from https://arxiv.org/abs/2406.01775, as implemented in PEFT.
"""

from __future__ import annotations

import torch

from fastlora.init.registry import InitInputs, InitResult, register_init, subtract_update


@register_init("olora", title="OLoRA", changes_base=True, converts=True, supports_quantized=True)
def olora(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer using OLoRA.

    With the QR decomposition ``W = Q R``, A consists of the first rows of R, and B consists of the
    first columns of Q. Their number is the adapter's rank. The new base weight is the old one minus
    the update of these factors.

    Raises:
        InitializationError: The weight has values that are not finite, or the rank exceeds its
            smaller dimension.
    """
    weight, rank = given.base_weight(), given.rank
    given.check_rank_limit(
        min(weight.shape), f"the smaller dimension of the weight {tuple(weight.shape)}"
    )
    q, r = torch.linalg.qr(weight)
    return subtract_update(given, weight, r[:rank].contiguous(), q[:, :rank].contiguous())
