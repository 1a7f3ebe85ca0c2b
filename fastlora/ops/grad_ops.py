"""The registered operators of a backward: schemas, fakes, implementations, and their plans.

`lora_grad_b` reads dy once for ds and d_lora_b, `lora_grad_x` makes dx with the LoRA term in it,
`lora_grad_a` reads x once for the d_lora_a of all siblings. Each repeats bit for bit: sums over
parts of the rows are planes, added in their order.

Shapes: ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``,
``s [M, R]``, ``ds [M, R]``, ``scaling`` without dimensions or ``[R]``. Seeds are one int64 for each
projection, as the forward drew them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.ops.plans import choose_plan
from fastlora.ops.schema import _LIBRARY, _implements, _on_device, _precision
from fastlora.ops.torch import reference

_LIBRARY.define(
    "lora_grad_b(Tensor dy, Tensor s, Tensor lora_b, Tensor scaling, bool with_bias, str impl)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_grad_x(Tensor dy, Tensor weight, Tensor ds, Tensor lora_a, Tensor? seed,"
    " float dropout_p, str impl, str plan) -> Tensor"
)
_LIBRARY.define(
    "lora_grad_a(Tensor x, Tensor[] ds, Tensor[] lora_a, Tensor? seeds, float[] dropout_p,"
    " str impl) -> Tensor[]"
)


def _triton_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch over dy, and one that sums planes where programs shared a sum."""
    from fastlora.kernels import chips, configs, lora_grad_b, plane_sums

    (m, n), r, fp32 = dy.shape, lora_b.shape[1], torch.float32
    chip, precision = chips.chip_of(dy.device), _precision(dy.dtype)
    config = configs.choose(chip, "lora_grad_b", dy.dtype, m=m, n=n, r=r, input_precision=precision)
    columns, splits = configs.cdiv(n, config.block_n), config.splits
    ds, d_lora_b = dy.new_empty(m, r), dy.new_empty(n, r, dtype=lora_b.dtype)
    d_bias = dy.new_empty(n if with_bias else 0, dtype=fp32)
    written = [ds, d_lora_b, d_bias]
    if columns > 1:
        written[0] = dy.new_empty(columns, m, r, dtype=fp32)
    if splits > 1:
        written[1] = dy.new_empty(splits, n, r, dtype=fp32)
        written[2] = dy.new_empty(splits, n, dtype=fp32) if with_bias else d_bias
    lora_grad_b.launch_lora_grad_b(
        written[0],
        written[1],
        written[2] if with_bias else None,
        dy,
        s,
        lora_b,
        scaling,
        config=config,
    )
    result = (ds, d_lora_b, d_bias)
    split = [
        (out, planes) for out, planes in zip(result, written, strict=True) if out is not planes
    ]
    if split:
        outs, stacks = zip(*split, strict=True)
        config = configs.choose(chip, "plane_sums", dy.dtype)
        plane_sums.launch_plane_sums(outs, stacks, config=config)
    return result


def _triton_grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    plan: str,
) -> torch.Tensor:
    """One fused launch, or a GEMM of the library's with an in-place update behind."""
    from fastlora.kernels import chips, configs, lora_expand, lora_linear

    (m, n), (r, k) = dy.shape, lora_a.shape
    chip = chips.chip_of(dy.device)
    sizes: dict[str, Any] = {"m": m, "n": n, "k": k, "r": r}
    sizes["input_precision"] = _precision(dy.dtype)
    dropout = {"seed": seed, "dropout_p": dropout_p if seed is not None else 0.0}
    # A forward's "invariant" is "auto" here: d_lora_a and d_lora_b sum over the batch anyhow.
    if choose_plan(plan, dy, weight, r, "lora_grad_x") == "fused":
        dx = dy.new_empty(m, k)
        lora_linear.launch_lora_linear(
            dx,
            dy,
            weight.t(),
            ds,
            lora_a.t(),
            None,
            bias=None,
            s_out=None,
            config=configs.choose(chip, "lora_grad_x", dy.dtype, **sizes),
            pdl=False,
            **dropout,
        )
        return dx
    dx = dy @ weight
    config = configs.choose(chip, "lora_grad_x_add", dy.dtype, **sizes)
    lora_expand.launch_lora_expand(dx, ds, lora_a.t(), None, config=config, **dropout)
    return dx


def _triton_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> list[torch.Tensor]:
    """One launch over x for each four siblings, and one that sums planes where rows are split."""
    from fastlora.kernels import chips, configs, lora_grad_a, plane_sums

    (m, k), chip = x.shape, chips.chip_of(x.device)
    result = [x.new_empty(factor.shape, dtype=factor.dtype) for factor in lora_a]
    for start in range(0, len(ds), configs.MAX_SIBLINGS):
        part = slice(start, start + configs.MAX_SIBLINGS)
        outs, rows = result[part], [tensor.contiguous() for tensor in ds[part]]
        config = configs.choose(
            chip,
            "lora_grad_a",
            x.dtype,
            m=m,
            k=k,
            r=max(tensor.shape[1] for tensor in rows),
            siblings=len(rows),
            input_precision=_precision(x.dtype),
        )
        written = outs
        if config.splits > 1:
            shapes = ((config.splits, *out.shape) for out in outs)
            written = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
        lora_grad_a.launch_lora_grad_a(
            written,
            x,
            rows,
            seeds=None if seeds is None else seeds[part].contiguous(),
            dropout_p=dropout_p[part],
            config=config,
        )
        if written is not outs:
            config = configs.choose(chip, "plane_sums", x.dtype)
            plane_sums.launch_plane_sums(outs, written, config=config)
    return result


@_implements("lora_grad_b")
def _lora_grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    with_bias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "triton" and dy.numel():
        with _on_device(dy):
            return _triton_grad_b(dy, s, lora_b, scaling, with_bias)
    return reference.lora_grad_b(dy, s, lora_b, scaling, with_bias)


@_implements("lora_grad_x")
def _lora_grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
    plan: str,
) -> torch.Tensor:
    if not dy.numel():
        return dy.new_zeros(dy.shape[0], weight.shape[1])
    if impl == "triton":
        with _on_device(dy):
            return _triton_grad_x(dy, weight, ds, lora_a, seed, dropout_p, plan)
    return reference.lora_grad_x(dy, weight, ds, lora_a, seed, dropout_p)


@_implements("lora_grad_a")
def _lora_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    lora_a: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    impl: str,
) -> list[torch.Tensor]:
    if not x.numel():
        return [torch.zeros_like(factor) for factor in lora_a]
    if impl == "triton":
        with _on_device(x):
            return _triton_grad_a(x, ds, lora_a, seeds, dropout_p)
    return reference.lora_grad_a(x, ds, lora_a, seeds, dropout_p)


@torch.library.register_fake("fastlora::lora_grad_b")
def _(
    dy: torch.Tensor, s: Any, lora_b: torch.Tensor, scaling: Any, with_bias: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (m, n), r = dy.shape, lora_b.shape[1]
    d_bias = dy.new_empty(n if with_bias else 0, dtype=torch.float32)
    return dy.new_empty(m, r), dy.new_empty(n, r, dtype=lora_b.dtype), d_bias


@torch.library.register_fake("fastlora::lora_grad_x")
def _(dy: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@torch.library.register_fake("fastlora::lora_grad_a")
def _(x: torch.Tensor, ds: Any, lora_a: Sequence[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [x.new_empty(factor.shape, dtype=factor.dtype) for factor in lora_a]
