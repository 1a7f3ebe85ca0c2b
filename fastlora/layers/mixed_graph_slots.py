"""A layer's adapters in a compiled mixed batch: one slot for every adapter that the model has."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastlora.layers.dora_rows import DoraSlots, dora_slots
from fastlora.layers.factors import factors_of
from fastlora.ops import schema as ops
from fastlora.ops.factors import Factors, Slots
from fastlora.ops.invariant import is_batch_invariant
from fastlora.routing.routing import Routing

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class GraphSlots(NamedTuple):
    """What the operators of `fastlora.autograd.mixed_graph_ops` take of a layer.

    An adapter has rank 0 where it leaves the layer alone or its DoRA drops.

    Attributes:
        lora_a, lora_b, lora_bias: Of each slot ``[rank, K]``, ``[N, rank]``, ``[N]`` or None.
        scaling: ``[S]``.
        dropout_p: Of each slot, the probability that acts.
        impl: ``"triton"`` or ``"eager"``.
        dora: What is done behind these operators.
        own_lora_a: As lora_a, before the factors got one dtype; None for rank 0.
    """

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    lora_bias: list[torch.Tensor | None]
    scaling: torch.Tensor
    dropout_p: list[float]
    impl: str
    dora: DoraSlots
    own_lora_a: list[torch.Tensor | None]

    def arguments(self, batch: Routing, projection: int) -> tuple[Any, ...]:
        """Returns what stands behind the base layer's tensors in the operators' schemas."""
        number = projection if any(self.dropout_p) else 0
        return *self[:4], batch.ids, batch.seeds, self.dropout_p, number, self.impl


def slots_of(layer: Any, x: torch.Tensor, batch: Routing) -> GraphSlots | None:
    """Returns a layer's slots; None where it cannot be in a graph.

    Args:
        layer: Holds the adapters.
        x: Its input, in the dtype that it computes in.
        batch: The routing's ``whole``.
    """
    if layer.merged_adapters or is_batch_invariant():
        return None
    names = [name for name in batch.names if name in layer.lora_A]
    found = [factors_of(layer, name) for name in names]
    if (
        not names
        or None in found
        or any(f.lora_a.device != x.device for f in found if f is not None)
    ):
        return None
    own = dict(zip(names, found, strict=True))
    dora = dora_slots(layer, batch) or DoraSlots()
    acting = [
        None if slot in dora.dropped else own.get(name) for slot, name in enumerate(batch.names)
    ]
    slots = Slots(tuple(acting))
    dtypes = [t.dtype for t in slots.tensors() if t is not None]
    dtype = functools.reduce(torch.promote_types, dtypes or [x.dtype])
    impl = getattr(layer, "impl", "auto")
    impl = ops.resolve_impl(impl, x) if dtype in _KERNEL_DTYPES or impl == "triton" else "eager"
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    none_a = x.new_empty(0, layer.in_features, dtype=dtype)
    none_b = x.new_empty(layer.out_features, 0, dtype=dtype)
    zero = torch.zeros((), dtype=exact, device=x.device)
    lora_a, lora_b, lora_bias, scalings, dropout_p = [], [], [], [], []
    for factors in acting:
        factors = factors or Factors(none_a, none_b, zero)
        scaling = torch.as_tensor(factors.scaling, dtype=exact, device=x.device)
        down, up, _, bias, p, _ = factors
        lora_a.append(down.to(dtype))
        lora_b.append(up.to(dtype))
        lora_bias.append(None if bias is None else bias.to(dtype))
        scalings.append(scaling.reshape(()))
        dropout_p.append(p)
    own_lora_a = [None if factors is None else factors[0] for factors in acting]
    stacked = torch.stack(scalings)
    return GraphSlots(lora_a, lora_b, lora_bias, stacked, dropout_p, impl, dora, own_lora_a)
