"""One adapter on a base layer: which backend, in which dtype, with which dropout seed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastlora.autograd import linear
from fastlora.autograd.shrink import Shrunk
from fastlora.ops import backend
from fastlora.ops.factors import Base, Factors
from fastlora.ops.invariant import invariant_impl, is_batch_invariant
from fastlora.validation import ImplementationError, check_same_device


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Returns the dtype to compute in where autocast is on for x, else None."""
    device_type = x.device.type
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def run_adapter(
    x: torch.Tensor,
    base: Base,
    factors: Factors,
    impl: str = "auto",
    plan: str = "auto",
    shrunk: Shrunk | None = None,
    own_seed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer with one adapter, whose tensors fit.

    Args:
        x: ``[..., K]``.
        base: The base layer.
        factors: One adapter, with a scaling that is a tensor without dimensions or ``[R]``, in fp32
            (fp64 for an fp64 x); a lora_bias goes with one without dimensions.
        impl, plan: As in `fastlora.functional.lora_linear`.
        shrunk: The layer's share of a pass over x, where siblings shared one; x, dropout_p and impl
            are then those that it was made with.
        own_seed: Returns the seed to use in place of a drawn one, where processes share a layer.
    """
    lora_a, lora_b, scaling, lora_bias, dropout_p, _ = factors
    weight = base.weight
    if (
        weight is not None
        and not dropout_p
        and shrunk is None
        and (lora_bias is None or lora_bias.dtype is x.dtype)
        and (impl == "auto" or impl == "eager")
        and plan == "auto"
        and not is_batch_invariant()
        and linear.records_natively(x, weight, base.bias, lora_a, lora_b, scaling)
    ):
        bias = base.bias
        if lora_bias is not None:
            bias = lora_bias * scaling if bias is None else bias + lora_bias * scaling
        return linear.native_linear(x, weight, bias, lora_a, lora_b, scaling)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    elif weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    device = x.device
    if lora_a.device != device or lora_b.device != device:
        check_same_device(x, lora_a=lora_a, lora_b=lora_b)
    if plan == "invariant" or is_batch_invariant():
        if weight is None:
            raise ImplementationError(
                "lora_add cannot run in the batch-invariant mode: whatever made y may go by the "
                "number of rows"
            )
        impl, plan = invariant_impl(impl, plan, x, dropout_p), "invariant"
    else:
        impl = backend.resolve_impl(impl, x)
    s = seed = None
    if shrunk is not None:
        s, seed = shrunk
    elif dropout_p > 0.0:
        seed = backend.draw_seed(x, impl)
        seed = seed if own_seed is None else own_seed(seed)
    call = linear.Call(impl, plan, (dropout_p,))
    return linear.run(x, base, call, scaling, seed, (lora_a, lora_b, lora_bias), s)
