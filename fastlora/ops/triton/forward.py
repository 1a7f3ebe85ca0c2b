"""The operators of a forward pass, which run the kernel launches for one or many adapters.

If one slot has all rows, ``rows`` is empty, and the kernels for one adapter run. Otherwise the
kernels for mixed batches read factors by address. The addresses are those of a list of parameters,
or come from tables that the caller keeps valid. Both cases use the same launches.

Arguments are as in the operators of `fastlora.ops.schema`, which finds operators here by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.kernels import lora_dropout, mixed_dora_scale
from fastlora.kernels.launch import cached_launches, empty
from fastlora.ops.triton.expand import add_at_, expand_
from fastlora.ops.triton.launch_configs import config_of
from fastlora.ops.triton.linear import grouped_forward, linear, linear_at, mixed_grouped_forward
from fastlora.ops.triton.shrink import shrink

__all__ = [
    "add_at_",
    "dropout",
    "expand_",
    "linear",
    "linear_at",
    "scale_",
    "shrink",
    "grouped_forward",
    "mixed_grouped_forward",
]


@cached_launches
def dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Return x with dropout applied.

    x is ``[M, K]``, and the mask is that of one adapter.
    """
    (m, k), out = x.shape, empty(x, *x.shape)
    config = config_of("lora_dropout", x, m, k=k)
    lora_dropout.launch_lora_dropout(out, x, seed=seed, dropout_p=dropout_p, config=config)
    return out


@cached_launches
def scale_(
    y: torch.Tensor,
    included_bias: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    dora_scale_address: torch.Tensor,
    index: int,
) -> None:
    """Scale the rows of y by their adapters' DoRA scales, in place.

    Only rows of DoRA adapters are changed. ``included_bias`` is the base layer's bias that y
    includes, or None. The bias itself is not scaled.
    """
    whole_bias = None if included_bias is None else included_bias.contiguous()
    mixed_dora_scale.launch_mixed_dora_scale(
        *(y, whole_bias, rows, dora_scale_address[index]),
        config=config_of("mixed_dora_scale", y, *y.shape),
    )
