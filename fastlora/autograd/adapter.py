"""One adapter on a base layer: which dtype, with which dropout seed, recorded by whom.

On a CPU, where rows are few, PyTorch's own nodes compute it; else `fastlora.autograd.linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastlora.autograd import linear
from fastlora.autograd.shared_input import Shared
from fastlora.ops import backend
from fastlora.ops.conditions import Conditions
from fastlora.ops.factors import Base, Factors, Operands
from fastlora.ops.torch import products
from fastlora.validation import ImplementationError, check_same_device

# Below so many rows Python in a backward costs more than a second buffer for dx: of SmolLM2's step
# PyTorch's nodes take 0.97 at 256 rows and 1.00 at 896 (fp32, one AVX2 core).
_FEW_ROWS = 1024
# Of bf16's step over PEFT's at 8, 32 and 64 rows: with fp32 factors 0.96, 0.98, 0.97 by the nodes
# and 1.14, 1.05, 0.92 by the function, with bf16 factors 1.00, 0.98, 0.98 and 1.04, 1.00, 1.00
# (SmolLM2, one Zen 5 core).
_FEW_BF16_ROWS = 64


def run_adapter(
    x: torch.Tensor,
    base: Base,
    factors: Factors,
    conditions: Conditions,
    plan: str = "auto",
    shared: Shared | None = None,
    own_seed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer with one adapter, whose tensors fit.

    Args:
        x: ``[..., K]``, in autocast's dtype where that is on.
        base: The base layer.
        factors: One adapter, with a scaling that is a tensor without dimensions or ``[R]``, in fp32
            (fp64 for an fp64 x); a lora_bias goes with one without dimensions.
        conditions: What the call runs under.
        plan: As in `fastlora.functional.lora_linear`.
        shared: The s that was made for the layer together with others, if it was; x, dropout_p and
            implementation are then those that it was made with.
        own_seed: Returns the seed to use in place of a drawn one, where processes share a layer.
    """
    lora_a, lora_b, scaling, lora_bias, dropout_p, _ = factors
    weight, name = base.weight, conditions.backend
    known = base.y if weight is None else weight
    if (
        name == "eager"
        and not conditions.compiling
        and known is not None
        and not (weight is None and (conditions.invariant or lora_bias is not None))
        and not dropout_p
        and shared is None
        and plan == "auto"
        and conditions.autocast is None
        and not conditions.tracing
        and (lora_bias is None or lora_bias.dtype is x.dtype)
        and _records_natively(x, known, base.bias, lora_a, lora_b, scaling)
    ):
        if weight is None:
            return _native_add(known, x, lora_a, lora_b, scaling, base.inplace)
        bias = base.bias
        if lora_bias is not None:
            bias = lora_bias * scaling if bias is None else bias + lora_bias * scaling
        return _native_linear(x, weight, bias, lora_a, lora_b, scaling)
    if weight is not None and weight.dtype != x.dtype and conditions.autocast is None:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    device = x.device
    if lora_a.device != device or lora_b.device != device:
        check_same_device(x, lora_a=lora_a, lora_b=lora_b)
    if conditions.invariant:
        if weight is None:
            raise ImplementationError(
                "lora_add cannot run in the batch-invariant mode: whatever made y may go by the "
                "number of rows"
            )
        conditions.check_invariant(x, plan, dropout_p)
        plan = "invariant"
    s = seed = None
    if shared is not None:
        s, seed = shared.s, shared.seed
    elif dropout_p > 0.0:
        seed = backend.draw_seed(x, conditions.impl)
        seed = seed if own_seed is None else own_seed(seed)
    operands = Operands([lora_a], [lora_b], [lora_bias], scaling, (dropout_p,), seed)
    return linear.run(x, base, operands, name, plan, s=s)


def _records_natively(
    x: torch.Tensor,
    known: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> bool:
    """Whether PyTorch's own nodes are to compute a layer, for the PyTorch path without dropout.

    ``known`` is the base weight, or the output of a base layer that was called.

    Not in compiled graphs, for which nobody asks: they would be one for few rows and another for
    many. Nor where x would be saved as a copy in rows.
    """
    dtype, factors, few = x.dtype, lora_a.dtype, _FEW_ROWS
    rows = x.numel() // max(x.shape[-1], 1)
    if dtype is torch.bfloat16 and not products.is_slow(dtype, rows):
        few, fits = _FEW_BF16_ROWS, factors is dtype or factors is torch.float32
    else:
        fits = factors is dtype and (dtype is torch.float32 or dtype is torch.float64)
    return (
        fits
        and x.is_cpu
        and (x.dim() == 2 or x.is_contiguous())
        and rows < few
        and known.dtype is dtype
        and lora_b.dtype is factors
        and known.is_cpu
        and lora_a.is_cpu
        and lora_b.is_cpu
        and (bias is None or bias.dtype is dtype)
        and not scaling.dim()
    )


def _native_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """`fastlora.autograd.linear.run` in PyTorch's own nodes.

    In fp32 and fp64 the same bits; in bf16 the update is rounded before it is added, and x is
    widened for fp32 factors. No Python runs in the backward, and little here: between two products
    of a large model its code has left the cache, and each call takes microseconds. Saves x,
    ``scaling * s`` and the parameters. dx is the sum of two products, where `LoraLinear` adds one
    to the other in place.
    """
    shape = x.shape
    # Rows make fewer nodes. Without gradients y would be a view that nobody may write to with them.
    as_rows = len(shape) > 2 and torch.is_grad_enabled()
    if as_rows:
        x = x.view(-1, shape[-1])
    y = F.linear(x, weight, bias)
    if x.dtype is torch.bfloat16:  # so few rows that another pass over y costs little
        y.add_(F.linear(F.linear(x.to(lora_a.dtype), lora_a) * scaling, lora_b))
    else:
        s = F.linear(x, lora_a) * scaling
        if as_rows or len(shape) == 2:
            y.addmm_(s, lora_b.t())
        else:
            y.view(-1, y.shape[-1]).addmm_(s.view(-1, s.shape[-1]), lora_b.t())
    return y.view(*shape[:-1], y.shape[-1]) if as_rows else y


def _native_add(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    inplace: bool,
) -> torch.Tensor:
    """As `_native_linear`, onto the output ``[..., N]`` of a base layer that was called.

    ``inplace`` as in `Base`.
    """
    inplace = inplace and not linear.records_gradients(y, x, lora_a, lora_b)
    if x.dtype is torch.bfloat16:
        update = F.linear(F.linear(x.to(lora_a.dtype), lora_a) * scaling, lora_b)
        return y.add_(update) if inplace else (y + update).to(y.dtype)
    s = F.linear(x.reshape(-1, x.shape[-1]), lora_a) * scaling
    rows = y.reshape(-1, y.shape[-1])
    if inplace and rows.data_ptr() == y.data_ptr():
        rows.addmm_(s, lora_b.t())
        return y
    return torch.addmm(rows, s, lora_b.t()).view(y.shape)
