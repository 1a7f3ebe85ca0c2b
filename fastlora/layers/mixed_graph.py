"""A mixed batch in a graph that is being compiled: from a layer to one operator.

Nothing that depends on the mix is read here but as a tensor, so that no mix compiles anything. What
graphs cannot do is left to the forward that runs without them, where a full graph breaks: adapters
of a pool, DoRA, hooked factors, the batch-invariant mode.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastlora import functional, mixed_graph_ops, ops  # noqa: F401 - registers the operators
from fastlora.batch_invariant import is_batch_invariant
from fastlora.layers.branch import factors_of, scaling_of
from fastlora.routing import Routing

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Arguments(NamedTuple):
    """What the operators take of a layer."""

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    lora_bias: list[torch.Tensor | None]
    scaling: torch.Tensor
    ids: torch.Tensor
    seeds: torch.Tensor
    dropout_p: list[float]
    projection: int
    impl: str


def linear(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
) -> torch.Tensor | None:
    """`mixed_forward` in a graph; None where it cannot be in one."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    arguments = _arguments(layer, x, routing, projection)
    if arguments is None:
        return None
    return torch.ops.fastlora.mixed_lora_graph_linear(x, weight, bias, *arguments)


def add(
    layer: Any, y: torch.Tensor, x: torch.Tensor, routing: Routing, projection: int
) -> torch.Tensor | None:
    """`mixed_added_forward` in a graph; None where it cannot be in one."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    arguments = None if x.dtype != y.dtype else _arguments(layer, x, routing, projection)
    if arguments is None:
        return None
    return torch.ops.fastlora.mixed_lora_graph_add(y, x, *arguments)


def _arguments(layer: Any, x: torch.Tensor, routing: Routing, projection: int) -> _Arguments | None:
    batch = routing.graph
    magnitudes = getattr(layer, "lora_magnitude_vector", ())
    if batch is None or layer.merged_adapters or is_batch_invariant() or len(magnitudes):
        return None
    names = [name for name in batch.names if name in layer.lora_A]
    found = [factors_of(layer, name) for name in names]
    if not names or None in found or any(f[0].device != x.device for f in found if f is not None):
        return None
    tensors = [t for f in found if f is not None for t in f[:3] if t is not None]
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    impl = getattr(layer, "impl", "auto")
    impl = ops.resolve_impl(impl, x) if dtype in _KERNEL_DTYPES or impl == "triton" else "eager"
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    none_a = x.new_empty(0, layer.in_features, dtype=dtype)
    none_b = x.new_empty(layer.out_features, 0, dtype=dtype)
    zero = torch.zeros((), dtype=exact, device=x.device)
    lora_a, lora_b, lora_bias, scalings, dropout_p = [], [], [], [], []
    own = dict(zip(names, found, strict=True))
    for name in batch.names:
        factors = own.get(name)
        if factors is None:
            factors = (none_a, none_b, None, 0.0)
            scaling = zero
        else:
            scaling = torch.as_tensor(scaling_of(layer, name), dtype=exact, device=x.device)
        lora_a.append(factors[0].to(dtype))
        lora_b.append(factors[1].to(dtype))
        lora_bias.append(None if factors[2] is None else factors[2].to(dtype))
        scalings.append(scaling.reshape(()))
        dropout_p.append(factors[3])
    return _Arguments(
        lora_a,
        lora_b,
        lora_bias,
        torch.stack(scalings),
        batch.ids,
        batch.seeds,
        dropout_p,
        projection if any(dropout_p) else 0,
        impl,
    )
