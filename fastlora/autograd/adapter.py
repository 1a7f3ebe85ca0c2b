"""The output of a base layer with one adapter, and the choice of the autograd nodes.

For few rows on a CPU, PyTorch's own autograd nodes are used. Otherwise, those of
`fastlora.autograd.lora_linear` are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastlora.autograd import lora_linear
from fastlora.autograd.shared_input import PrecomputedResult
from fastlora.ops import backend
from fastlora.ops.execution_mode import ExecutionMode
from fastlora.ops.factors import Base, Factors, LayerAdapterOperands
from fastlora.ops.torch import products
from fastlora.validation import ImplementationError, check_same_device

# With fewer rows than this, Python code in the backward costs more than a second buffer for dx.
# PyTorch's nodes take 0.97 times as long for a step of SmolLM2 at 256 rows, and 1.00 times as long
# at 896 (fp32, one AVX2 core).
_FEW_ROWS = 1024
# Time of a bf16 step relative to PEFT at 8, 32, and 64 rows (SmolLM2, one Zen 5 core). With fp32
# factors: 0.96, 0.98, 0.97 by PyTorch's nodes, and 1.14, 1.05, 0.92 by the autograd function. With
# bf16 factors: 1.00, 0.98, 0.98 by the nodes, and 1.04, 1.00, 1.00 by the function.
_FEW_BF16_ROWS = 64


def run_adapter(
    x: torch.Tensor,
    base: Base,
    factors: Factors,
    conditions: ExecutionMode,
    plan: str = "auto",
    precomputed: PrecomputedResult | None = None,
    adjust_seed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a base layer with one adapter, and return the output.

    The output is ``[..., N]``. The gradients are computed by a custom autograd function or, where
    this is faster, by PyTorch's native autograd. The caller ensures that the shapes match.

    Args:
        x: ``[..., K]``, in autocast's dtype if autocast is on.
        base: The base layer.
        factors: One adapter. Its scaling is a tensor without dimensions or ``[R]``, in fp32 (fp64
            for an fp64 x). With a lora_bias it must have no dimensions.
        conditions: The conditions of the call.
        plan: As in `fastlora.functional.lora_linear`.
        precomputed: The s that was computed for the layer together with others, or None. It must
            have been computed with the same x, dropout_p, and implementation.
        adjust_seed: Maps a drawn seed to the seed to use, for a layer that is split over processes.
    """
    lora_a, lora_b, scaling, lora_bias, dropout_p, _ = factors
    weight, name = base.weight, conditions.backend
    base_tensor = base.y if weight is None else weight
    if (
        name == "eager"
        and not conditions.compiling
        and base_tensor is not None
        and not (weight is None and (conditions.invariant or lora_bias is not None))
        and not dropout_p
        and precomputed is None
        and plan == "auto"
        and conditions.autocast is None
        and not conditions.tracing
        and (lora_bias is None or lora_bias.dtype is x.dtype)
        and _native_autograd_is_faster(x, base_tensor, base.bias, lora_a, lora_b, scaling)
    ):
        if weight is None:
            return _add_with_native_autograd(base_tensor, x, lora_a, lora_b, scaling, base.inplace)
        bias = base.bias
        if lora_bias is not None:
            bias = lora_bias * scaling if bias is None else bias + lora_bias * scaling
        return _linear_with_native_autograd(x, weight, bias, lora_a, lora_b, scaling)
    if weight is not None and weight.dtype != x.dtype and conditions.autocast is None:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype} (the dtype of x)")
    device = x.device
    if lora_a.device != device or lora_b.device != device:
        check_same_device(x, lora_a=lora_a, lora_b=lora_b)
    if conditions.invariant:
        if weight is None:
            raise ImplementationError(
                "lora_add cannot run in batch-invariant mode, because the operation that "
                "produced y may depend on the number of rows"
            )
        conditions.check_supports_batch_invariance(x, plan, dropout_p)
        plan = "invariant"
    s = seed = None
    if precomputed is not None:
        s, seed = precomputed.s, precomputed.seed
    elif dropout_p > 0.0:
        seed = backend.draw_dropout_seed(x, conditions.impl)
        seed = seed if adjust_seed is None else adjust_seed(seed)
    operands = LayerAdapterOperands([lora_a], [lora_b], [lora_bias], scaling, (dropout_p,), seed)
    return lora_linear.run_adapters(x, base, operands, name, plan, s=s)


def _native_autograd_is_faster(
    x: torch.Tensor,
    base_tensor: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> bool:
    """Return whether PyTorch's native autograd is faster than a custom autograd function.

    The arguments describe a layer without active dropout, which should use native autograd if the
    result is True. The result is True only for a few rows on a CPU.

    ``base_tensor`` is the base weight, or the output of a base layer that was called.

    The function is not called for compiled graphs, because a graph must not depend on the number of
    rows. The result is False if x would have to be copied to reshape it to rows.
    """
    dtype, factors, few = x.dtype, lora_a.dtype, _FEW_ROWS
    rows = x.numel() // max(x.shape[-1], 1)
    if dtype is torch.bfloat16 and not products.native_product_may_be_slow(dtype, rows):
        few, fits = _FEW_BF16_ROWS, factors is dtype or factors is torch.float32
    else:
        fits = factors is dtype and (dtype is torch.float32 or dtype is torch.float64)
    return (
        fits
        and x.is_cpu
        and (x.dim() == 2 or x.is_contiguous())
        and rows < few
        and base_tensor.dtype is dtype
        and lora_b.dtype is factors
        and base_tensor.is_cpu
        and lora_a.is_cpu
        and lora_b.is_cpu
        and (bias is None or bias.dtype is dtype)
        and not scaling.dim()
    )


def _linear_with_native_autograd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """Return the output of a linear layer with a LoRA update, using PyTorch's native autograd.

    This function is used where it is faster than `fastlora.autograd.lora_linear.run_adapters`. No
    Python code runs in the backward pass, and little runs here: between two products of a large
    model, code is evicted from the processor's cache, so each call takes microseconds. The
    autograd nodes save x, ``scaling * s``, and the parameters. dx is the sum of two products, where
    `LoraLinear` adds one to the other in place.

    In fp32 and fp64, the result has the same bits as the result of `run_adapters`. In bf16, the
    update is rounded before it is added, and x is converted for fp32 factors.
    """
    shape = x.shape
    # A 2-D input makes fewer nodes. Without gradients, y would be a view that cannot be written to
    # with gradients enabled.
    as_rows = len(shape) > 2 and torch.is_grad_enabled()
    if as_rows:
        x = x.view(-1, shape[-1])
    y = F.linear(x, weight, bias)
    if torch._C._len_torch_dispatch_stack():
        y = products.make_writable(y)
    # There are so few rows that another pass over y costs little.
    if x.dtype is torch.bfloat16:
        y.add_(F.linear(F.linear(x.to(lora_a.dtype), lora_a) * scaling, lora_b))
    else:
        s = F.linear(x, lora_a) * scaling
        if as_rows or len(shape) == 2:
            y.addmm_(s, lora_b.t())
        else:
            y.view(-1, y.shape[-1]).addmm_(s.view(-1, s.shape[-1]), lora_b.t())
    return y.view(*shape[:-1], y.shape[-1]) if as_rows else y


def _add_with_native_autograd(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    inplace: bool,
) -> torch.Tensor:
    """Return y plus the LoRA update, using PyTorch's native autograd.

    y is a base layer's output, ``[..., N]``. ``inplace`` is as in `Base`.
    """
    inplace = inplace and not lora_linear.records_gradients(y, x, lora_a, lora_b)
    if x.dtype is torch.bfloat16:
        update = F.linear(F.linear(x.to(lora_a.dtype), lora_a) * scaling, lora_b)
        return y.add_(update) if inplace else (y + update).to(y.dtype)
    s = F.linear(x.reshape(-1, x.shape[-1]), lora_a) * scaling
    rows = y.reshape(-1, y.shape[-1])
    if inplace and rows.data_ptr() == y.data_ptr():
        rows.addmm_(s, lora_b.t())
        return y
    return torch.addmm(rows, s, lora_b.t()).view(y.shape)
