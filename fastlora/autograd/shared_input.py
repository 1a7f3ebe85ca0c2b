"""Autograd nodes for layers that receive the same x.

`GroupedLoraLinear` computes every y and every gradient. It requires one adapter per layer, and
kernels (`fastlora.ops.backend.Backend.grouped_forward`). Its backward waits for the gradients of
all outputs that were used, and returns one dx. Like `fastlora.autograd.lora_linear.LoraLinear`, it
saves x itself, s, the seeds, and the parameters.

`GroupedLoraShrink` computes every s. Its backward computes every layer's d_lora_a from one read of
x, and nothing else. The layers' own nodes (`fastlora.autograd.lora_linear.LoraLinear`) return the
rest.

Shapes: ``x [..., K]``; for each layer ``weight [N, K]``, ``bias [N]`` or None, ``lora_a [R, K]``,
``lora_b [N, R]``, ``y [..., N]``; s as in `fastlora.ops.backend.Backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._C._functorch import unwrap_if_dead

import fastlora.ops.operator_backend  # noqa: F401  # registers a backend
from fastlora.autograd.lora_linear import once_differentiable_without_autocast
from fastlora.ops import backend
from fastlora.ops.backend import BACKENDS
from fastlora.ops.factors import replace_missing_with_empty
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products

_Factor = torch.Tensor | None


class PrecomputedResult(NamedTuple):
    """The precomputed result of a layer that shares its input with other layers.

    The result is either the layer's output y or the shrink output s. If the result is s, the layer
    computes y from s. The result is usually computed together with the results of the other layers.

    Attributes:
        y: ``[..., N]``, the layer's output, or None if the layer computes it from s.
        s: The layer's s in the dtype of the products, or None if y is given.
        seed: Seed of the dropout mask in s, int64 ``[1]``; None without dropout.
    """

    y: torch.Tensor | None = None
    s: torch.Tensor | None = None
    seed: torch.Tensor | None = None


def run_grouped_linears(
    x: torch.Tensor, operands: Sequence[_Factor], dropout_p: tuple[float, ...], impl: str
) -> Sequence[torch.Tensor]:
    """Run a group of LoRA linear layers that share the input x, and return their outputs.

    The group has 1 to 4 layers. The result has one output ``[..., N]`` for each layer. An autograd
    graph is recorded if gradients are enabled.

    ``operands`` are as in `fastlora.ops.backend.Backend.grouped_forward`. ``impl`` is a backend
    that computes all layers in one call, in x's dtype.
    """
    if torch.is_grad_enabled():
        given = unwrap_if_dead(x), operands, dropout_p, impl
        ys: tuple[torch.Tensor, ...] = _recorded(*given, *operands[: 4 * len(dropout_p)])
        return ys
    return _restore_leading_dims(BACKENDS[impl].grouped_forward(_to_2d(x), operands, dropout_p), x)


class GroupedLoraLinear(torch.autograd.Function):
    """Autograd function for LoRA linear layers that share the input x.

    It computes the outputs of all layers as one autograd node. `run_grouped_linears` calls it. The
    weights, biases, lora_a, and lora_b of all layers are passed a second time, because autograd
    does not look into nested arguments. A layer with an unused y takes no part in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        operands: Sequence[_Factor],
        dropout_p: tuple[float, ...],
        impl: str,
        *parameters: _Factor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        made = BACKENDS[impl].grouped_forward(_to_2d(x), operands, dropout_p, True)
        count, needs = len(dropout_p), ctx.needs_input_grad
        # Trainable weights need x, as every lora_a does.
        saves_x = any(needs[4 : 4 + count]) or any(needs[4 + 2 * count : 4 + 3 * count])
        ctx.call = impl, dropout_p, x.shape
        ctx.save_for_backward(x if saves_x else None, *operands, *made[count:])
        return tuple(_restore_leading_dims(made[:count], x))

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # Access `saved_tensors` once: a checkpoint lets its tensors be unpacked a single time.
        x, *saved = ctx.saved_tensors
        (impl, dropout_p, shape), (needs_x, _, _, _, *needs) = ctx.call, ctx.needs_input_grad
        count, dys = len(dropout_p), grads
        if len(shape) != 2:
            x = None if x is None else x.reshape(-1, shape[-1])
            dys = tuple(None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads)
        operands, s = saved[: 6 * count], saved[6 * count :]
        dx, *found = BACKENDS[impl].grouped_gradients(
            dys, x, operands, dropout_p, s, (needs_x, *needs)
        )
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        d_weights: list[torch.Tensor | None] = [None] * count
        if any(needs[: 2 * count]):  # Base layers train.
            for i, (dy, weight, bias) in enumerate(
                zip(dys, operands, operands[count : 2 * count], strict=False)
            ):
                if needs[i] and dy is not None:
                    d_weights[i] = products.mm(dy.t(), x).to(weight.dtype)
                if bias is not None and (d_bias := found[i]) is not None:
                    found[i] = d_bias.to(bias.dtype)
        return dx, None, None, None, *d_weights, *found


# Function.apply without the checks for torch.func in `GroupedLoraLinear.apply`. They ask whether a
# transform is active, and whether one has left behind a dead wrapper. None is active here, and only
# x can be a wrapper.
_recorded: Any = super(torch.autograd.Function, GroupedLoraLinear).apply


def grouped_shrink(
    x: torch.Tensor,
    lora_a: Sequence[Sequence[_Factor]],
    dropout_p: Sequence[float],
    impl: str,
    rows: Rows | None = None,
) -> list[PrecomputedResult]:
    """Compute the LoRA shrink outputs s of layers that share the input x.

    A layer's s is the product of x and the transpose of the layer's lora_a. The result is a list of
    `PrecomputedResult`, one for each of the G layers. A single autograd function computes s for all
    layers. In the backward pass, this autograd function computes the gradients of lora_a, and the
    layers themselves compute the gradient of x. Dropout seeds are drawn in the order in which the
    layers would draw them.

    Args:
        x: The layers' input, in the dtype of the products.
        lora_a: For each layer, the lora_a of its adapters by slot, with None for an adapter that
            does not adapt the layer. Without rows, each layer has one lora_a.
        dropout_p: Active dropout probability of each layer; 0 with rows.
        impl: Name of the backend.
        rows: The adapter of each row, or None if one adapter applies to all rows.
    """
    x = x.detach()  # The layers' own nodes compute the gradient of x.
    seeds = tuple(backend.draw_dropout_seed(x, impl) if p > 0.0 else None for p in dropout_p)
    flat = [tensor for own in lora_a for tensor in own]
    made = GroupedLoraShrink.apply(x, seeds, tuple(dropout_p), impl, rows, *flat)
    return [PrecomputedResult(None, *each) for each in zip(made, seeds, strict=True)]


class GroupedLoraShrink(torch.autograd.Function):
    """Autograd function for the LoRA shrink of a group of layers that share the input x.

    It computes the shrink product s of each of G layers, as one autograd node. x is passed
    detached, because this node does not compute its gradient. There is a seed or None for each
    layer. The lora_a of all layers follow in turn. Each layer has one per slot, or without rows
    only one.

    Saves x, the seeds, and the factors. The backward pass reads x once for all d_lora_a. A layer
    with an unused s takes no part in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seeds: tuple[torch.Tensor | None, ...],
        dropouts: tuple[float, ...],
        impl: str,
        rows: Rows | None,
        *lora_a: _Factor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dropouts, ctx.impl, ctx.rows = dropouts, impl, rows
        ctx.save_for_backward(x, *lora_a, *seeds)
        layers = _split_by_layer(lora_a, len(dropouts))
        return tuple(BACKENDS[impl].grouped_shrink(_to_2d(x), layers, seeds, dropouts, rows))

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.dropouts)
        x, *saved = ctx.saved_tensors
        lora_a, seeds = saved[: len(saved) - count], saved[len(saved) - count :]
        each, needs = len(lora_a) // count, ctx.needs_input_grad[5:]
        found: list[torch.Tensor | None] = [None] * len(lora_a)
        wanted = [
            i
            for i in range(count)
            if grads[i] is not None and any(needs[i * each : (i + 1) * each])
        ]
        if wanted:
            ds: Any = [grads[i] for i in wanted]
            layers = _split_by_layer(lora_a, count)
            gradients = BACKENDS[ctx.impl].grouped_grad_a(
                _to_2d(x),
                ds,
                [layers[i] for i in wanted],
                [seeds[i] for i in wanted],
                [ctx.dropouts[i] for i in wanted],
                ctx.rows,
            )
            positions = [i * each + slot for i in wanted for slot in range(each)]
            for position, gradient in zip(positions, gradients, strict=True):
                found[position] = gradient if needs[position] else None
        return None, None, None, None, None, *found


def _to_2d(x: torch.Tensor) -> torch.Tensor:
    """Flatten the leading dimensions of x, and return the result as a 2-D tensor.

    The result is ``[M, K]``. If x has two dimensions, ``reshape`` is not called, because it takes
    1.6 us.
    """
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _restore_leading_dims(ys: Sequence[torch.Tensor], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Reshape the outputs to have the same leading dimensions as x.

    A backend's outputs ``[M, N]`` become ``[..., N]``.
    """
    if x.dim() == 2:
        return ys
    # Not views for autograd, which would not allow in-place writes to them.
    unflat, shape = torch.ops.aten._unsafe_view.default, x.shape[:-1]
    return [unflat(y, (*shape, y.shape[1])) for y in ys]


def _split_by_layer(lora_a: Sequence[_Factor], num_layers: int) -> list[list[torch.Tensor]]:
    """Split a flat sequence of lora_a tensors into one list for each layer.

    An adapter that a layer lacks gets a lora_a of rank 0.
    """
    each = len(lora_a) // num_layers
    return [
        replace_missing_with_empty(lora_a[start : start + each], 0)
        for start in range(0, len(lora_a), each)
    ]
