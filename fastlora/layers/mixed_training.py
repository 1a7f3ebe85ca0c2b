"""A mixed batch with gradients, or dropout, on Triton kernels: from a layer to one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.autograd import mixed_autograd
from fastlora.layers.compute import is_hooked, plain_weight, why_not_fused
from fastlora.ops import schema as ops
from fastlora.ops.mixed_grad_tables import table
from fastlora.ops.training_routing import TrainingRouting
from fastlora.routing.routing import Routing
from fastlora.validation import ImplementationError, UnsupportedLayerError, check_same_device

_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Part(NamedTuple):
    """One adapter's part in a layer.

    Attributes:
        lora_a, lora_b, lora_bias: ``[rank, K]``, ``[N, rank]``, ``[N]`` or None; not scaled.
        scaling: A number, or a tensor without dimensions.
        dropout_p: Probability that acts now.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None
    scaling: Any
    dropout_p: float


def parts_for_kernels(
    layer: Any, x: torch.Tensor, routing: Routing, without: Sequence[int] = ()
) -> list[Part | None] | None:
    """Returns each slot's part in a layer; None where the batch runs in PyTorch's GEMMs.

    Slots of ``without`` have none: others compute their rows.

    Raises:
        ImplementationError: The layer's ``impl="triton"`` cannot run, and why.
        UnsupportedLayerError: A factor is hooked, or not a plain linear: rows cannot share it.
        ValueError: A factor is on another device than x.
    """
    impl = getattr(layer, "impl", "auto")
    if ops.resolve_impl(impl, x) != "triton":
        return None
    slots = range(len(routing.names))
    parts = [None if slot in without else _part(layer, routing, slot) for slot in slots]
    why = _why_not(routing, parts)
    if why and impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run a mixed batch with gradients: {why}")
    if why:
        return None
    for part in parts:
        if part is not None and part.lora_a.device != x.device:
            check_same_device(x, lora_a=part.lora_a, lora_b=part.lora_b)
    return parts


def _part(layer: Any, routing: Routing, slot: int) -> Part | None:
    """Returns one adapter's part, or None where it leaves the layer alone."""
    if routing.residents is not None:
        found = routing.residents[slot].factors(layer.table_row)
        if found is None:
            return None
        lora_a, rank_rows, scaling, lora_bias = found[:4]  # its magnitude scales what comes out
        return Part(lora_a, rank_rows.t(), lora_bias, scaling, 0.0)
    name, modules = routing.names[slot], layer._modules
    down = modules["lora_A"]._modules.get(name)
    if down is None:
        return None
    up, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    lora_a, lora_b = plain_weight(down), plain_weight(up)
    plain = type(dropout) in (nn.Dropout, nn.Identity) and not is_hooked(dropout)
    if lora_a is None or lora_b is None or not plain:
        raise UnsupportedLayerError(why_not_fused(layer, [name]) + ", which rows cannot share")
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Part(lora_a, lora_b, up._parameters["bias"], layer.scaling[name], dropout_p)


def _why_not(routing: Routing, parts: Sequence[Part | None]) -> str:
    """Returns why kernels cannot take some factors, or an empty string."""
    dtypes: dict[torch.dtype, str] = {}
    for name, part in zip(routing.names, parts, strict=True):
        for tensor in () if part is None else (part.lora_a, part.lora_b, part.lora_bias):
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
    parts: Sequence[Part | None],
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
        parts: Of `parts_for_kernels`.
        s: The layer's own of `shrink`, or None: it is made here.
        plan: As in `fastlora.functional.lora_linear`.
    """
    if not any(parts):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    batch, factors = _batch(x, routing, projection, parts, plan, s)
    if _wants_grad(x, weight, bias, *factors):
        routing.group.packs.clear()  # an optimizer may be about to write into the factors
        return mixed_autograd.MixedLoraLinearKernels.apply(x, weight, bias, batch, s, *factors)
    return mixed_autograd.forward_linear(x, weight, bias, batch, factors)[0]


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    parts: Sequence[Part | None],
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``y [..., N]`` plus every row's own adapter for ``x [..., K]``; s as in `linear`."""
    if not any(parts):
        return y
    batch, factors = _batch(x, routing, projection, parts, "auto", s)
    if _wants_grad(y, x, *factors):
        routing.group.packs.clear()
        return mixed_autograd.MixedLoraAddKernels.apply(y, x, None, batch, s, *factors)
    return mixed_autograd.forward_add(y, x, batch, factors)[0]


def shrink(
    x: torch.Tensor, routing: Routing, projection: int, parts: Sequence[Sequence[Part | None]]
) -> tuple[torch.Tensor, ...]:
    """Returns the s of layers that are fed by the same x and drop nothing, for `linear` and `add`.

    In the backward x is read once for all their d_lora_a.

    Args:
        x: ``[..., K]``.
        routing: The batch's.
        projection: Of the first layer.
        parts: Of each layer.
    """
    batch, _ = _batch(x, routing, projection, parts[0], "auto", None)
    lora_a = [None if part is None else part.lora_a for own in parts for part in own]
    found: tuple[torch.Tensor, ...] = mixed_autograd.MixedLoraShrinkKernels.apply(
        x.detach(), batch, *lora_a
    )
    return found


def _batch(
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    parts: Sequence[Part | None],
    plan: str,
    s: torch.Tensor | None,
) -> tuple[mixed_autograd.KernelBatch, list[torch.Tensor | None]]:
    """Returns what kernels read of the batch, and the factors of all slots in turn.

    The gradient of a lora_a comes through the s that was made with it, if one was.
    """
    training = _training_routing(routing, projection)
    dropout_p = [0.0 if part is None else part.dropout_p for part in parts]
    batch = mixed_autograd.KernelBatch(
        training.groups(x.numel() // x.shape[-1], x.device),
        _scalings(parts, x.device),
        training.seeds_of(projection, x.device) if any(dropout_p) else None,
        dropout_p,
        plan,
    )
    factors: list[torch.Tensor | None] = []
    for part in parts:
        factors += [None] * 3 if part is None else part[:3]
    if s is not None:
        factors[::3] = [None if tensor is None else tensor.detach() for tensor in factors[::3]]
    return batch, factors


def seed_of(routing: Routing, projection: int, slot: int, device: torch.device) -> torch.Tensor:
    """Returns the dropout seed of one adapter on a layer, int64 ``[1]`` on the device."""
    seeds = _training_routing(routing, projection).seeds_of(projection, device)
    return seeds[slot : slot + 1]


def _training_routing(routing: Routing, projection: int) -> TrainingRouting:
    """Returns what a routing keeps for the kernels of training, made once."""
    if not routing.training:
        numbers = dict.fromkeys(
            [*(layer.routed_as for layer in routing.layers if hasattr(layer, "lora_A")), projection]
        )
        routing.training.append(TrainingRouting(routing.ids, routing.seeds, tuple(numbers)))
    return routing.training[0]


def _scalings(parts: Sequence[Part | None], device: torch.device) -> torch.Tensor:
    """Returns the scalings as fp32 ``[S]``; a tensor of PEFT's compiled hot swap is read there."""
    values = [0.0 if part is None else part.scaling for part in parts]
    if not any(isinstance(value, torch.Tensor) for value in values):
        return table(tuple(float(value) for value in values), torch.float32, device)
    return torch.stack(
        [torch.as_tensor(v, dtype=torch.float32, device=device).reshape(()) for v in values]
    )


def _wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
