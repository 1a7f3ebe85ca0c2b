"""A mixed batch with gradients, or dropout, on Triton kernels: from a layer to one function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastlora.autograd import mixed_autograd
from fastlora.layers.factors import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops import schema as ops
from fastlora.ops.factors import Slots
from fastlora.ops.triton.tables import table
from fastlora.routing.routing import Routing
from fastlora.validation import ImplementationError, check_same_device

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


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
    slots: Slots,
    s: torch.Tensor | None = None,
    plan: str = "auto",
) -> torch.Tensor:
    """Returns ``[..., N]`` of a plain linear base layer with every row's own adapter.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        routing: The batch's.
        projection: The layer's number in its model, which makes its dropout its own.
        slots: Of `slots_for_kernels`.
        s: The layer's own of `shrink`, or None: it is made here.
        plan: As in `fastlora.functional.lora_linear`.
    """
    if not any(slots.own):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    batch, factors = _batch(x, routing, projection, slots, plan, s)
    if _wants_grad(x, weight, bias, *factors):
        return mixed_autograd.MixedLoraLinearKernels.apply(x, weight, bias, batch, s, *factors)
    return mixed_autograd.forward_linear(x, weight, bias, batch, factors)[0]


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    slots: Slots,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``y [..., N]`` plus every row's own adapter for ``x [..., K]``; s as in `linear`."""
    if not any(slots.own):
        return y
    batch, factors = _batch(x, routing, projection, slots, "auto", s)
    if _wants_grad(y, x, *factors):
        return mixed_autograd.MixedLoraAddKernels.apply(y, x, None, batch, s, *factors)
    return mixed_autograd.forward_add(y, x, batch, factors)[0]


def shrink(
    x: torch.Tensor, routing: Routing, projection: int, layers: Sequence[Slots]
) -> tuple[torch.Tensor, ...]:
    """Returns the s of layers that are fed by the same x and drop nothing, for `linear` and `add`.

    In the backward x is read once for all their d_lora_a.

    Args:
        x: ``[..., K]``.
        routing: The batch's.
        projection: Of the first layer.
        layers: The adapters on each layer.
    """
    batch, _ = _batch(x, routing, projection, layers[0], "auto", None)
    lora_a = [lora_a for slots in layers for lora_a in slots.tensors()[::3]]
    found: tuple[torch.Tensor, ...] = mixed_autograd.MixedLoraShrinkKernels.apply(
        x.detach(), batch, *lora_a
    )
    return found


def _batch(
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    slots: Slots,
    plan: str,
    s: torch.Tensor | None,
) -> tuple[mixed_autograd.KernelBatch, list[torch.Tensor | None]]:
    """Returns what kernels read of the batch, and the factors of all slots in turn.

    The gradient of a lora_a comes through the s that was made with it, if one was.
    """
    dropout_p = slots.dropout_p
    batch = mixed_autograd.KernelBatch(
        routing.rows(x.numel() // x.shape[-1], x.device),
        _scalings(slots, x.device),
        routing.seeds_of(projection, x.device) if any(dropout_p) else None,
        dropout_p,
        plan,
    )
    factors = slots.tensors()
    if s is not None:
        factors[::3] = [None if tensor is None else tensor.detach() for tensor in factors[::3]]
    return batch, factors


def _scalings(slots: Slots, device: torch.device) -> torch.Tensor:
    """Returns the scalings as fp32 ``[S]``; a tensor of PEFT's compiled hot swap is read there."""
    values = [0.0 if factors is None else factors.scaling for factors in slots.own]
    if not any(isinstance(value, torch.Tensor) for value in values):
        return table(tuple(float(value) for value in values), torch.float32, device)
    return torch.stack(
        [torch.as_tensor(v, dtype=torch.float32, device=device).reshape(()) for v in values]
    )


def _wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
