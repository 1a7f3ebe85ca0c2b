"""OLoRA: the adapter starts as the first columns of the base weight's QR decomposition.

Method: https://arxiv.org/abs/2406.01775, as in PEFT.
"""

from __future__ import annotations

import torch

from fastlora.init.registry import Given, Start, register_init, without


@register_init("olora", title="OLoRA", changes_base=True, converts=True, on_quantised=True)
def olora(given: Given) -> Start:
    """``W = Q R``: B is R columns of Q, A the rows of R beside them.

    Raises:
        InitialisationError: The weight is not finite, or smaller than the rank.
    """
    weight, rank = given.weight(), given.rank
    given.check_rank(min(weight.shape), f"the smaller side of the weight {tuple(weight.shape)}")
    q, r = torch.linalg.qr(weight)
    return without(given, weight, r[:rank].contiguous(), q[:, :rank].contiguous())
