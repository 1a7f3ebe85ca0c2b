"""A mixed batch with gradients, or dropout: from a layer to one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.autograd.linear import Call, LoraShrink, run
from fastlora.layers.factors import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops import schema as ops
from fastlora.ops.factors import Slots
from fastlora.ops.rows import Rows
from fastlora.ops.triton.tables import table
from fastlora.routing.routing import Routing
from fastlora.validation import ImplementationError, check_dropout_dtype, check_same_device

_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def slots_for_kernels(
    layer: AdapterLayer, x: torch.Tensor, routing: Routing, without: Sequence[int] = ()
) -> Slots | None:
    """Returns the batch's adapters on a layer; None where it runs in PyTorch's GEMMs.

    Slots of ``without`` have none: others compute their rows.

    Raises:
        ImplementationError: The layer's ``impl="triton"`` cannot run, and why.
        UnsupportedLayerError: A factor is hooked, or not a plain linear: rows cannot share it.
        ValueError: A factor is on another device than x.
    """
    if ops.resolve_impl(layer.impl, x) != "triton":
        return None
    slots = slots_of(routing.source, layer, range(len(routing.names)), without)
    why = _why_not(routing, slots)
    if why and layer.impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run a mixed batch with gradients: {why}")
    if why:
        return None
    for factors in slots.present:
        if factors.lora_a.device != x.device:
            check_same_device(x, lora_a=factors.lora_a, lora_b=factors.lora_b)
    return slots


def _why_not(routing: Routing, slots: Slots) -> str:
    """Returns why kernels cannot take some factors, or an empty string."""
    dtypes: dict[torch.dtype, str] = {}
    for name, factors in zip(routing.names, slots.own, strict=True):
        for tensor in () if factors is None else (*factors[:2], factors.lora_bias):
            if tensor is not None:
                dtypes.setdefault(tensor.dtype, name)
    for dtype, name in dtypes.items():
        if dtype not in _FACTOR_DTYPES:
            return f"adapter {name!r} has a factor of {dtype}, expected fp16, bf16 or fp32"
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} (adapter {name!r})" for dtype, name in dtypes.items())
        return f"factors have more than one dtype, {found}"
    return ""


def mixed_run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    routing: Routing,
    number: int,
    slots: Slots,
    impl: str,
    which: tuple[int, ...] | None = None,
    s: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    inplace: bool = False,
    rows: Rows | None = None,
) -> torch.Tensor:
    """Returns ``[..., N]`` with every row's own adapter, by `fastlora.autograd.linear.run`.

    Args:
        x: ``[..., K]``.
        weight, bias: Of a plain linear base layer; None where y is given.
        y: ``[..., N]``, what the base layer made.
        routing: The batch's.
        number: The layer's in its model, which makes its dropout its own.
        slots: The adapters.
        impl: Name of the backend.
        which: Their slots; None for all.
        s: Of `shrink`, or None: it is made here.
        seeds: Of their dropout, ``[S]``; None for those of the routing.
        inplace: Whether y may be overwritten where no gradient is recorded.
        rows: Of the batch; None to look them up.
    """
    tensors: list[torch.Tensor | None] = []
    scalings: list[Any] = []
    dropout_p: list[float] = []
    found = drops = False
    for factors in slots.own:
        if factors is None:
            tensors += (None, None, None)
            scalings.append(0.0)
            dropout_p.append(0.0)
            continue
        found, drops = True, drops or bool(factors.dropout_p)
        tensors += (factors.lora_a, factors.lora_b, factors.lora_bias)
        scalings.append(factors.scaling)
        dropout_p.append(factors.dropout_p)
    if not found and y is not None:
        return y
    if not found and impl != "eager":
        base: Any = weight
        return F.linear(x, base.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if not found and weight is not None:
        # An adapter of rank 0: the base product and its gradients are the backend's all the same.
        (n, k), zero = weight.shape, scalings_beside((0.0,), x)
        return run(
            *(x, weight, bias, None, Call(impl), zero.reshape(()), None),
            (x.new_empty(0, k), x.new_empty(n, 0), None),
        )
    if drops and seeds is None:
        check_dropout_dtype(x.dtype)
        seeds = routing.seeds_of(number, x.device if impl == "triton" else torch.device("cpu"))
        seeds = seeds if which is None else seeds[list(which)]
    rows = routing.rows(x.numel() // x.shape[-1], x.device) if rows is None else rows
    call = Call(impl, "auto", tuple(dropout_p), rows, which)
    return run(x, weight, bias, y, call, scalings_beside(scalings, x), seeds, tensors, s, inplace)


def shrink(
    x: torch.Tensor, routing: Routing, layers: Sequence[Slots], impl: str
) -> tuple[torch.Tensor, ...]:
    """Returns the s of layers that are fed by the same x and drop nothing, for `mixed_run`.

    In the backward x is read once for all their d_lora_a.

    Args:
        x: ``[..., K]``.
        routing: The batch's.
        layers: The adapters on each layer, all slots.
        impl: Name of the backend.
    """
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    lora_a = [lora_a for slots in layers for lora_a in slots.tensors()[::3]]
    none = (None,) * len(layers), (0.0,) * len(layers)
    found: tuple[torch.Tensor, ...] = LoraShrink.apply(x.detach(), *none, impl, rows, *lora_a)
    return found


def scalings_beside(values: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """Returns scalings as a tensor beside x, fp32 (fp64 for fp64) ``[S]``.

    A tensor of PEFT's compiled hot swap is read on its device.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for value in values:
        if isinstance(value, torch.Tensor):
            same = [torch.as_tensor(v, dtype=dtype, device=x.device).reshape(()) for v in values]
            return torch.stack(same)
    return table(tuple(values), dtype, x.device)
