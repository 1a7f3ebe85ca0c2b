"""The functional API, which validates arguments and calls `fastlora.autograd.adapter`."""

from __future__ import annotations

import torch

from fastlora.autograd.adapter import run_adapter
from fastlora.ops.execution_mode import ExecutionMode, execution_mode_of
from fastlora.ops.factors import Base, Factors
from fastlora.ops.plans import PLANS
from fastlora.validation import check_dropout, check_floating, check_same_device, check_shape


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
    plan: str = "auto",
) -> torch.Tensor:
    """Compute ``x @ weight.T + bias + scaling * dropout(x) @ lora_a.T @ lora_b.T``.

    This is the low-rank adaptation of Hu et al., https://arxiv.org/abs/2106.09685, with the factors
    in PEFT's layout. The function is differentiable with respect to x, weight, bias, lora_a, and
    lora_b. Second derivatives raise an error, except in some cases with few rows on a CPU. Under
    autocast, x and weight are cast to the autocast dtype.

    Args:
        x: Input, ``[..., K]``, in fp16, bf16, fp32, or fp64.
        weight: Base weight, ``[N, K]``, in the dtype of x unless autocast is enabled.
        lora_a: Down projection, ``[R, K]``, in fp16, bf16, fp32, or fp64. It is cast to the dtype
            of x for the product. If x has only a few rows in bf16 on a CPU, x is cast instead.
        lora_b: Up projection, ``[N, R]``, in one of the same dtypes. It is cast in the same way.
        scaling: A number, or a tensor with 1 element or R elements (one per row of lora_a).
        bias: Base bias, ``[N]``, or None.
        dropout_p: Probability, in [0, 1), of zeroing an element of the input of lora_a. The input
            of the base layer is not affected. The mask is drawn from torch's default generator. In
            evaluation, pass 0 to disable dropout.
        impl: ``"triton"``, ``"eager"``, or ``"auto"``. ``"auto"`` selects Triton on a supported GPU
            and eager otherwise.
        plan: The kernels that the Triton implementation launches. ``"fused"`` is one GEMM with the
            LoRA term in its epilogue. ``"split"`` computes the LoRA update first, and cuBLAS then
            adds the base product to it. ``"invariant"`` is the fused plan of
            `fastlora.batch_invariant`; in that mode, it replaces ``"auto"`` and ``"fused"``, and
            ``"split"`` raises an error. ``"auto"`` is the plan that ``FASTLORA_PLAN`` names, or, if
            the variable is not set, a plan chosen by GPU, dtype, number of rows, and rank.

    Returns:
        Output, ``[..., N]``, in the dtype of x, or in the autocast dtype if autocast is enabled.

    Raises:
        ValueError: Shapes or devices do not match, or an option has an unknown value.
        TypeError: A tensor is not in fp16, bf16, fp32, or fp64, or, if autocast is off, the dtype
            of weight differs from that of x.
        ImplementationError: ``impl="triton"`` or batch-invariant mode cannot be used with these
            arguments or on this machine.
    """
    dropout_p = check_dropout("dropout_p", dropout_p)
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    _check_factors(x, lora_a, lora_b)
    check_floating("weight", weight)
    check_shape("weight", weight, (lora_b.shape[0], x.shape[-1]))
    check_same_device(x, weight=weight, bias=bias)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
    factors = Factors(lora_a, lora_b, _scaling_tensor(scaling, x, lora_a.shape[0]), None, dropout_p)
    conditions = execution_mode_of(x, impl, plan)
    return run_adapter(
        _cast_for_autocast(x, conditions), Base(weight, bias), factors, conditions, plan
    )


def lora_add(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float | torch.Tensor,
    *,
    dropout_p: float = 0.0,
    impl: str = "auto",
    inplace: bool = False,
) -> torch.Tensor:
    """Compute ``y + scaling * dropout(x) @ lora_a.T @ lora_b.T``.

    Use this function if y is computed by the base layer itself, for example by a quantized or
    tensor-parallel layer.

    Args:
        y: Output of the base layer, ``[..., N]``.
        x: Input of the base layer, ``[..., K]``, with the same leading dimensions as y.
        lora_a: Down projection, ``[R, K]``.
        lora_b: Up projection, ``[N, R]``.
        scaling: A number, or a tensor with 1 element or R elements (one per row of lora_a).
        dropout_p: As in `lora_linear`.
        impl: As in `lora_linear`.
        inplace: Whether y may be overwritten and returned if autograd does not record the call.

    Returns:
        Output, ``[..., N]``, in the dtype of y.

    Raises:
        ValueError: Shapes or devices do not match, or an option has an invalid value.
        TypeError: A tensor is not in fp16, bf16, fp32, or fp64.
        ImplementationError: ``impl="triton"`` cannot be used with these arguments or on this
            machine, or batch-invariant mode is enabled.
    """
    dropout_p = check_dropout("dropout_p", dropout_p)
    _check_factors(x, lora_a, lora_b)
    check_floating("y", y)
    check_shape("y", y, (*x.shape[:-1], lora_b.shape[0]))
    check_same_device(x, y=y)
    factors = Factors(lora_a, lora_b, _scaling_tensor(scaling, x, lora_a.shape[0]), None, dropout_p)
    conditions = execution_mode_of(x, impl)
    return run_adapter(
        _cast_for_autocast(x, conditions), Base(y=y, inplace=inplace), factors, conditions
    )


def _cast_for_autocast(x: torch.Tensor, conditions: ExecutionMode) -> torch.Tensor:
    return x if conditions.autocast is None else x.to(conditions.autocast)


def _check_factors(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_floating(name, tensor)
    if x.dim() < 1:
        raise ValueError("x has no dimensions, expected [..., K]")
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] < 1:
        raise ValueError(
            f"lora_a and lora_b have shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}; "
            "expected [R, K] and [N, R] with R >= 1"
        )
    check_shape("lora_a", lora_a, (lora_a.shape[0], x.shape[-1]))
    check_shape("lora_b", lora_b, (lora_b.shape[0], lora_a.shape[0]))
    check_same_device(x, lora_a=lora_a, lora_b=lora_b)


def _scaling_tensor(scaling: float | torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(scaling, torch.Tensor):
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            raise TypeError(f"scaling must be a number or a tensor, got {scaling!r}")
        return torch.full((), float(scaling), dtype=dtype, device=x.device)
    if scaling.requires_grad:
        raise ValueError(
            "scaling requires a gradient, but gradients of scaling are not supported; pass "
            "scaling.detach()"
        )
    if scaling.numel() not in (1, rank) or scaling.dim() > 1:
        raise ValueError(
            f"scaling has shape {tuple(scaling.shape)}; expected a scalar or one value for each "
            f"row of lora_a ({rank})"
        )
    check_same_device(x, scaling=scaling)
    return scaling.to(dtype).reshape(() if scaling.numel() == 1 else (-1,))
