"""DoRA on one layer: the forward of active adapters.

An adapter uses DoRA where the layer's ``lora_magnitude_vector`` has its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.autograd.adapter import run_adapter
from fastlora.autograd.dora import DoraScale
from fastlora.autograd.dora_dropped import DoraDropped
from fastlora.autograd.linear import records_gradients
from fastlora.layers.call import LayerCall
from fastlora.layers.factors import scales_by_name, scaling_beside
from fastlora.layers.norms import adapter_squares, adapter_sums, magnitude_of
from fastlora.layers.why import refuse_triton
from fastlora.ops import backend as ops
from fastlora.ops.factors import Base
from fastlora.ops.torch.scale import scale_columns, scale_of


def run_dora(call: LayerCall, base: Base, name: str) -> torch.Tensor:
    """Returns ``[..., N]`` of a base layer and one adapter with DoRA.

    It is a LoRA forward, and a scale of its columns.
    """
    layer, x, conditions = call.layer, call.x, call.conditions
    factors = layer._own_factors(name, call)
    if factors is None:
        conditions.refuse(layer, f"adapter {name!r} has a factor that is hooked")
        return _called(call, base.output(call.given), name)
    weight = base.weight
    if weight is not None and conditions.autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    lora_a, lora_b, scaling, _, dropout_p, _ = factors
    if dropout_p:
        conditions.refuse(layer, f"dropout_p={dropout_p} acts; call eval()")
    ((magnitude, squares),) = scales_by_name(call, [name])
    if dropout_p:
        runs = conditions.impl if conditions.impl == "triton" else conditions.backend
        return DoraDropped.apply(
            *(base.y, x, _weight_of(call) if weight is None else weight, base.bias),
            *(None, (), (dropout_p,), runs),
            *(lora_a, lora_b, magnitude, squares, scaling),
            layer._own_seed(ops.draw_seed(x, conditions.impl)),
        )
    bias = layer._own_bias()
    u = run_adapter(x, base._replace(bias=None), factors, conditions)
    if weight is None and bias is not None:
        u = u - bias.to(u.dtype)
    return _scaled(u, bias, magnitude, squares, conditions.compiling)


def _weight_of(call: LayerCall) -> torch.Tensor:
    return call.layer._weight_to_save(call.conditions.compiling or call.conditions.tracing)


def _scaled(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor | None,
    traced: bool,
) -> torch.Tensor:
    """Returns ``g * u + bias`` for ``u [..., N]``, in u's memory where no graph is recorded."""
    if records_gradients(u, bias, magnitude):
        return DoraScale.apply(u, bias, traced, magnitude, squares)
    rows, scale = u.reshape(-1, u.shape[-1]), scale_of(magnitude, squares)
    rows = scale_columns(rows, bias, scale, True, traced=traced)
    return torch.ops.aten._unsafe_view(rows, u.shape)  # no view to autograd: see `run`


def _called(call: LayerCall, y: torch.Tensor, name: str) -> torch.Tensor:
    """Adds a DoRA adapter by calling its modules, as PEFT does."""
    layer, x, conditions = call.layer, call.given, call.conditions
    refuse_triton(layer, [name])
    down, up = layer.lora_A[name], layer.lora_B[name]
    dropout, scaling = layer.lora_dropout[name], scaling_beside(layer, name, call)
    bias, magnitude = layer._own_bias(), magnitude_of(layer, name)
    inner = x.to(down.weight.dtype) if conditions.autocast is None else x
    inner = dropout(inner)
    factors = down.weight, up.weight, scaling
    if conditions.tracing:  # ONNX lacks what takes zeros out elsewhere
        sums = adapter_sums(layer, *factors, True)
        squares = sums.masked_fill(sums <= 0, torch.inf)
    else:
        squares = adapter_squares(layer, *factors, conditions.compiling)
    change = magnitude * squares.rsqrt() - 1.0
    update = up(down(inner)) * scaling
    if not isinstance(dropout, nn.Identity) and layer.training:
        weight = _weight_of(call)
        scaled = F.linear(inner.to(weight.dtype), weight)
    else:
        scaled = y if bias is None else y - bias
    return (y + update + change * (scaled + update)).to(y.dtype)
