"""The operators by which a mixed batch enters a compiled graph.

All that depends on the mix are tensors: slots of the samples or tokens, and dropout seeds. The
factors of every adapter that the model has are arguments, whether it has rows or not, so that a
graph serves any mix. In the backward, adapters without rows get zeros.

`mixed_lora_graph_linear` and `mixed_lora_graph_add` decompose where autograd is traced, into
`fastlora.mixed_autograd`. `mixed_lora_groups` sorts rows, once a graph: layers call it alike.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, ids and seeds int64 ``[B]`` and ``[S]``;
of each slot ``lora_a [rank, K]``, ``lora_b [N, rank]``, ``lora_bias [N]``, and ``scaling [S]``. An
adapter that leaves the layer alone has rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora import mixed_autograd
from fastlora.ops import _LIBRARY, _implements
from fastlora.row_groups import RowGroups, build_row_groups
from fastlora.training_routing import seeds_of_layer

_FACTORS = "Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_bias, Tensor scaling"
_BATCH = "Tensor ids, Tensor seeds, float[] dropout_p, int projection, str impl"
_LIBRARY.define(
    f"mixed_lora_graph_linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_BATCH})"
    " -> Tensor"
)
_LIBRARY.define(f"mixed_lora_graph_add(Tensor y, Tensor x, {_FACTORS}, {_BATCH}) -> Tensor")
_LIBRARY.define(
    "mixed_lora_groups(Tensor ids, SymInt m, int slots, Device device)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@_implements("mixed_lora_groups")
def _mixed_lora_groups(
    ids: torch.Tensor, m: int, slots: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Order, segment_of, segment_slot, the flag of invalid ids, slot_start; see `RowGroups`."""
    groups = build_row_groups(ids, m, slots, device)
    route = groups.order, groups.segment_of, groups.segment_slot
    return *route, groups.invalid, groups.slot_start


@torch.library.register_fake("fastlora::mixed_lora_groups")
def _(ids: torch.Tensor, m: int, slots: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    present = torch.sym_min(m, slots + 2)
    return empty(m), empty(m), empty(present), empty(1, torch.bool), empty(slots + 1)


def _batch(
    x: torch.Tensor,
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
) -> mixed_autograd.KernelBatch:
    m, slots, device = x.numel() // x.shape[-1], len(dropout_p), x.device
    order, segment_of, segment_slot, invalid, slot_start = torch.ops.fastlora.mixed_lora_groups(
        ids, m, slots, device
    )
    groups = RowGroups(order, segment_of, segment_slot, invalid, m, slots, slot_start)
    drawn = None
    if any(dropout_p):
        drawn = seeds_of_layer(seeds, projection)
        if impl == "triton":
            drawn = drawn.to(device, non_blocking=True)
    return mixed_autograd.KernelBatch(groups, scaling, drawn, dropout_p, impl=impl)


def _in_turn(*factors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [tensor for slot in zip(*factors, strict=True) for tensor in slot]


@torch.library.impl(_LIBRARY, "mixed_lora_graph_linear", "CompositeImplicitAutograd")
def _mixed_lora_graph_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
) -> torch.Tensor:
    batch = _batch(x, scaling, ids, seeds, dropout_p, projection, impl)
    factors = _in_turn(lora_a, lora_b, lora_bias)
    return mixed_autograd.MixedLoraLinearKernels.apply(x, weight, bias, batch, *factors)


@torch.library.impl(_LIBRARY, "mixed_lora_graph_add", "CompositeImplicitAutograd")
def _mixed_lora_graph_add(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
) -> torch.Tensor:
    batch = _batch(x, scaling, ids, seeds, dropout_p, projection, impl)
    factors = _in_turn(lora_a, lora_b, lora_bias)
    return mixed_autograd.MixedLoraAddKernels.apply(y, x, None, batch, *factors)
