"""The operators that scale the rows of a pool's DoRA adapters, after everybody's LoRA term.

``y = (y - bias) * g + bias`` in the rows whose adapter has scales g on the module, for y ``[M, N]``
and bias ``[N]`` or None, in place; other rows keep their bits. As in `fastlora.ops.mixed_ops` all
that depends on the mix are tensors: ``scale_address``, int64 ``[G, P]``, says where the g of a
column's adapter lies, fp32 ``[N]`` at a multiple of 16 bytes; 0 is none. Rows whose scales are yet
to be made, `PENDING`, become NaN.

`mixed_dora_scale_` runs over Triton; `mixed_dora_pool_scale_` reads the same addresses on a CPU.
Addresses are trusted: the memory behind them must outlive the call.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.autograd.dora import times
from fastlora.autograd.mixed_graph_ops import block_at
from fastlora.ops.schema import _LIBRARY, _implements, _on_device

# In place of an address. A kernel's hints hold for it: a multiple of 16.
PENDING = 16

_LIBRARY.define(
    "mixed_dora_scale_(Tensor(a!) y, Tensor? bias, Tensor order, Tensor segment_of,"
    " Tensor segment_slot, Tensor pieces, Tensor scale_address, int index) -> ()"
)
_LIBRARY.define(
    "mixed_dora_pool_scale_(Tensor(a!) y, Tensor? bias, Tensor columns, Tensor scale_address,"
    " int index) -> ()"
)


@_implements("mixed_dora_scale_")
def _mixed_dora_scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    segment_of: torch.Tensor,
    segment_slot: torch.Tensor,
    pieces: torch.Tensor,
    scale_address: torch.Tensor,
    index: int,
) -> None:
    """One launch, whatever the batch; `fastlora.ops.mixed_ops.pieces_of` gives the pieces."""
    from fastlora.kernels import chips, configs, mixed_dora_scale

    (m, n), chip = y.shape, chips.chip_of(y.device)
    with _on_device(y):
        mixed_dora_scale.launch_mixed_dora_scale(
            y,
            None if bias is None else bias.contiguous(),
            order,
            segment_of,
            segment_slot,
            pieces,
            scale_address[index],
            config=configs.choose(chip, "mixed_dora_scale", y.dtype, m=m, n=n),
        )


@_implements("mixed_dora_pool_scale_")
def _mixed_dora_pool_scale_(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    columns: torch.Tensor,
    scale_address: torch.Tensor,
    index: int,
) -> None:
    """For the column of each sample or token, ``[B]``; negative ones have no scales."""
    if not y.numel():
        return
    addresses = scale_address[index][columns.clamp(min=0)].masked_fill(columns < 0, 0)
    samples = y.unflatten(0, (columns.shape[0], -1))
    shift = None if bias is None else bias.to(y.dtype)
    for address in addresses.unique().tolist():
        if not address:
            continue
        own = addresses == address
        if address == PENDING:
            samples[own] = float("nan")
            continue
        part = samples[own]
        scale = block_at(address, (y.shape[1],), torch.float32)
        scaled = times(part if shift is None else part - shift, scale)
        samples[own] = scaled if shift is None else scaled.add_(shift)


@torch.library.register_fake("fastlora::mixed_dora_scale_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("fastlora::mixed_dora_pool_scale_")
def _(*_: Any) -> None:
    return None
