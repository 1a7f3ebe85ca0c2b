"""DoRA on one layer: magnitudes, and the forward of active adapters.

An adapter uses DoRA where the layer's ``lora_magnitude_vector`` has its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.autograd.adapter import autocast_dtype, run_adapter
from fastlora.autograd.dora import DoraLinear, DoraScale, runs_as_one
from fastlora.autograd.dora_dropped import DoraDropped
from fastlora.autograd.linear import records_gradients
from fastlora.layers.active import run_active
from fastlora.layers.factors import scales_by_name, scaling_of
from fastlora.layers.norms import adapter_squares, magnitude_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.why import refuse_triton, uses_dora
from fastlora.ops import backend as ops
from fastlora.ops.factors import Base
from fastlora.ops.invariant import is_batch_invariant, refuse_in_mode
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


def run_active_dora(
    layer: AdapterLayer, x: torch.Tensor, base: Base, names: list[str]
) -> torch.Tensor:
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


def _runs(layer: AdapterLayer, names: list[str]) -> list[list[str]]:
    """Splits names into runs that are one call: DoRA adapters alone, others together."""
    runs: list[list[str]] = []
    for name in names:
        alone = uses_dora(layer, [name])
        if runs and not alone and not uses_dora(layer, runs[-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _run_one(layer: AdapterLayer, x: torch.Tensor, base: Base, name: str) -> torch.Tensor:
    """`run_active_dora` for one adapter with DoRA: a LoRA forward, and a scale of its columns."""
    factors = layer._own_factors(name, x)
    if factors is None:
        refuse_in_mode(layer, f"adapter {name!r} has a factor that is hooked")
        return _called(layer, base.output(x), x, name)
    dtype, impl, weight = autocast_dtype(x), layer.impl, base.weight
    x = x.to(dtype or x.dtype)
    if weight is not None and dtype is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    lora_a, lora_b, scaling, _, dropout_p, _ = factors
    if dropout_p:
        refuse_in_mode(layer, f"dropout_p={dropout_p} acts; call eval()")
    runs = "" if is_batch_invariant() else ops.resolve_impl(impl, x)
    ((magnitude, squares),) = scales_by_name(layer, [name])
    if dropout_p:
        return DoraDropped.apply(
            *(base.y, x, layer._own_weight() if weight is None else weight, base.bias),
            *(None, (), (dropout_p,), runs, lora_a, lora_b, magnitude, squares, scaling),
            layer._own_seed(ops.draw_seed(x, runs)),
        )
    # Without gradients too while training: it may be a checkpoint's forward, to be repeated with.
    trains = torch.is_grad_enabled() or layer.training
    if trains and runs == "eager" and runs_as_one(x, weight, base.bias, lora_a):
        return DoraLinear.apply(x, weight, lora_a, lora_b, magnitude, squares, scaling)
    bias = layer._own_bias()
    u = run_adapter(x, base._replace(bias=None), factors, impl)
    if weight is None and bias is not None:
        u = u - bias.to(u.dtype)
    return scaled(u, bias, magnitude, squares)


def scaled(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor | None,
) -> torch.Tensor:
    """Returns ``g * u + bias`` for ``u [..., N]``, in u's memory where no graph is recorded."""
    if records_gradients(u, bias, magnitude):
        return DoraScale.apply(u, bias, None, magnitude, squares)
    rows = scale_columns(u.reshape(-1, u.shape[-1]), bias, scale_of(magnitude, squares), True)
    return torch.ops.aten._unsafe_view(rows, u.shape)  # no view to autograd: see `run`


def _called(layer: AdapterLayer, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    """Adds a DoRA adapter by calling its modules, as PEFT does."""
    refuse_triton(layer, [name])
    down, up = layer.lora_A[name], layer.lora_B[name]
    dropout, scaling = layer.lora_dropout[name], scaling_of(layer, name)
    bias, magnitude = layer._own_bias(), magnitude_of(layer, name)
    inner = x if torch.is_autocast_enabled(x.device.type) else x.to(down.weight.dtype)
    inner = dropout(inner)
    squares = adapter_squares(layer, down.weight, up.weight, scaling)
    change = magnitude * squares.rsqrt() - 1.0
    update = up(down(inner)) * scaling
    if not isinstance(dropout, nn.Identity) and layer.training:
        weight = layer._own_weight()
        scaled = F.linear(inner.to(weight.dtype), weight)
    else:
        scaled = y if bias is None else y - bias
    return (y + update + change * (scaled + update)).to(y.dtype)
