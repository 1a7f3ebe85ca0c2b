"""DoRA on one layer: magnitudes, and the forward of active adapters.

An adapter uses DoRA where the layer's ``lora_magnitude_vector`` has its name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora import functional
from fastlora.autograd.dora import DoraLinear, DoraScale, runs_as_one
from fastlora.autograd.dora_dropped import DoraDropped
from fastlora.autograd.linear import records_gradients
from fastlora.layers.active import run_active
from fastlora.layers.bases import dense_weight
from fastlora.layers.factors import factors_of, scale_by_name, scaling_of
from fastlora.layers.norms import adapter_squares, base_squares, magnitude_of
from fastlora.layers.why import refuse_triton, uses_dora
from fastlora.ops import backend as ops
from fastlora.ops.factors import Base, Factors
from fastlora.ops.invariant import is_batch_invariant, refuse_in_mode
from fastlora.ops.torch.dora_dropped import joins
from fastlora.ops.torch.scale import scale_columns, scale_of


class DoraMagnitude(nn.Module):
    """One adapter's magnitude: ``weight [N]``, under the name that PEFT gives it.

    Args:
        magnitude: Its first value.
    """

    def __init__(self, magnitude: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)


# ------------------------------------------------------------------------------------- forward


def run_active_dora(layer: Any, x: torch.Tensor, base: Base, names: list[str]) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer and its active adapters, some of them with DoRA.

    One after the other, as PEFT does: DoRA scales what came before it, other adapters too.
    """
    for run in _runs(layer, names):
        if not uses_dora(layer, run):
            y = run_active(layer, x, base, run)
        else:
            y = _run_one(layer, x, base, run[0])
        base = Base(y=y, inplace=True)
    return y


def _run_one(layer: Any, x: torch.Tensor, base: Base, name: str) -> torch.Tensor:
    """`run_active_dora` for one adapter with DoRA."""
    branch = factors_of(layer, name, x)
    if branch is None:
        refuse_in_mode(layer, f"adapter {name!r} has a factor that is hooked")
        return _called(layer, base.output(x), x, name)
    if base.weight is not None:
        return _fused(layer, x, base.weight, base.bias, name, branch, layer.impl)
    return _added(layer, base.output(x), x, name, branch, layer.impl, base.inplace)


def _runs(layer: Any, names: list[str]) -> list[list[str]]:
    """Splits names into runs that are one call: DoRA adapters alone, others together."""
    runs: list[list[str]] = []
    for name in names:
        alone = uses_dora(layer, [name])
        if runs and not alone and not uses_dora(layer, runs[-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _fused(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    name: str,
    branch: Factors,
    impl: str,
) -> torch.Tensor:
    """A plain base layer with one DoRA adapter: a LoRA forward, and a scale of its columns."""
    dtype = functional.autocast_dtype(x)
    x = x.to(dtype or x.dtype)
    if dtype is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    eager = not is_batch_invariant() and ops.resolve_impl(impl, x) == "eager"
    # Without gradients too while training: it may be a checkpoint's forward, to be repeated with.
    trains = torch.is_grad_enabled() or layer.training
    if trains and eager and not branch.dropout_p and runs_as_one(x, weight, bias, branch.lora_a):
        squares = base_squares(layer, weight)
        factors = branch.lora_a, branch.lora_b, magnitude_of(layer, name)
        return DoraLinear.apply(
            x, weight, *factors, squares, branch.scaling, scaling_of(layer, name)
        )
    if branch.dropout_p:
        return _dropped(layer, None, x, weight, bias, name, branch, impl)
    u = functional.apply(x, Base(weight), branch, impl)
    return scaled(u, bias, *scale_by_name(layer, name))


def _added(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    name: str,
    branch: Factors,
    impl: str,
    inplace: bool,
) -> torch.Tensor:
    """One DoRA adapter beside a base layer that was called, or behind other adapters."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    base = layer.get_base_layer()
    if branch.dropout_p:
        return _dropped(layer, y, x, dense_weight(base), None, name, branch, impl)
    scale = scale_by_name(layer, name)
    return added(y, x, branch, getattr(base, "bias", None), *scale, impl, inplace)


def added(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: Factors,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: Any,
    impl: str,
    inplace: bool,
) -> torch.Tensor:
    """Adds an adapter to the output ``y [..., N]`` of a base layer with this bias, and scales it.

    No dropout acts. ``inplace`` says whether y may be overwritten where no gradient is recorded.
    """
    u = functional.apply(x, Base(y=y, inplace=inplace), factors, impl)
    return scaled(u if bias is None else u - bias.to(u.dtype), bias, magnitude, squares)


def scaled(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: Any,
) -> torch.Tensor:
    """Returns ``g * u + bias`` for ``u [..., N]``, in u's memory where no graph is recorded."""
    if records_gradients(u, bias, magnitude):
        return DoraScale.apply(u, bias, None, magnitude, squares)
    rows = scale_columns(u.reshape(-1, u.shape[-1]), bias, scale_of(magnitude, squares), True)
    return torch.ops.aten._unsafe_view(rows, u.shape)  # no view to autograd: see `run`


def _dropped(
    layer: Any,
    base: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    name: str,
    branch: Factors,
    impl: str,
) -> torch.Tensor:
    """One DoRA adapter whose dropout acts."""
    if is_batch_invariant():
        refuse_in_mode(layer, f"dropout_p={branch.dropout_p} acts; call eval()")
    impl = ops.resolve_impl(impl, x)
    seed, norm_scaling = ops.draw_seed(x, impl), None
    # Without gradients too: a checkpoint's first forward has none, and its repetition's bits.
    if joins(x, weight, branch.lora_a, seed, impl):
        magnitude, squares = magnitude_of(layer, name), base_squares(layer, weight)
        norm_scaling = scaling_of(layer, name)
    else:
        magnitude, squares = scale_by_name(layer, name)
    return DoraDropped.apply(
        *(base, x, weight, bias, None, None, (branch.dropout_p,), impl, norm_scaling),
        *(branch.lora_a, branch.lora_b, magnitude, squares, branch.scaling, seed),
    )


def _called(layer: Any, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    """Adds a DoRA adapter by calling its modules, as PEFT does."""
    refuse_triton(layer, [name])
    down, up = layer.lora_A[name], layer.lora_B[name]
    dropout, scaling = layer.lora_dropout[name], scaling_of(layer, name)
    base = layer.get_base_layer()
    bias, magnitude = getattr(base, "bias", None), magnitude_of(layer, name)
    inner = x if torch.is_autocast_enabled(x.device.type) else x.to(down.weight.dtype)
    inner = dropout(inner)
    squares = adapter_squares(layer, down.weight, up.weight, scaling)
    change = magnitude * squares.rsqrt() - 1.0
    update = up(down(inner)) * scaling
    if not isinstance(dropout, nn.Identity) and layer.training:
        weight = dense_weight(base)
        scaled = F.linear(inner.to(weight.dtype), weight)
    else:
        scaled = y if bias is None else y - bias
    return (y + update + change * (scaled + update)).to(y.dtype)
