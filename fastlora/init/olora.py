"""OLoRA: the adapter starts from the first columns of the base weight's QR decomposition.

Method: https://arxiv.org/abs/2406.01775, as in PEFT.
"""

from __future__ import annotations

import torch

from fastlora.init.registry import Given, Start, register_init, without


@register_init("olora", title="OLoRA", changes_base=True, converts=True, on_quantised=True)
def olora(given: Given) -> Start:
    """Return the leading rows of R as A and the leading columns of Q as B, where ``W = Q R``.

    The number of rows and columns is the adapter's rank. The base weight is returned without the
    update that they make.

    Raises:
        InitialisationError: The weight is not finite, or the rank exceeds its smaller dimension.
    """
    weight, rank = given.weight(), given.rank
    given.check_rank(min(weight.shape), f"the smaller side of the weight {tuple(weight.shape)}")
    q, r = torch.linalg.qr(weight)
    return without(given, weight, r[:rank].contiguous(), q[:, :rank].contiguous())
