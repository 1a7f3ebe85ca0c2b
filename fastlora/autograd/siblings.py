"""Layers that are fed by the same x, as one node of the graph: every y, and every gradient.

For one adapter each, on kernels (`fastlora.ops.backend.Backend.siblings`). The backward waits for
the gradients of all outputs that were used, and returns one dx. Saved are x itself, s, the seeds
and the parameters, as by `fastlora.autograd.linear.LoraLinear`.

Shapes: ``x [..., K]``, of each layer ``weight [N, K]``, ``bias [N]`` or None, ``lora_a [R, K]``,
``lora_b [N, R]``, ``y [..., N]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._functorch import unwrap_if_dead

from fastlora.autograd.linear import plain_backward
from fastlora.ops.backend import BACKENDS, Siblings
from fastlora.ops.torch import products


def run_siblings(x: torch.Tensor, siblings: Siblings, impl: str) -> Sequence[torch.Tensor]:
    """Returns y ``[..., N]`` of each of 1 to 4 layers, recorded where gradients are.

    ``impl`` is a backend that computes them at once, in x's dtype.
    """
    if torch.is_grad_enabled():
        parameters = siblings.operands[: 4 * len(siblings.dropout_p)]
        ys: tuple[torch.Tensor, ...] = _recorded(unwrap_if_dead(x), siblings, impl, *parameters)
        return ys
    return _shaped(BACKENDS[impl].siblings(_flat(x), siblings), x)


class LoraSiblings(torch.autograd.Function):
    """`run_siblings` where a graph is recorded.

    Takes weights, biases, lora_a and lora_b of all once more: autograd looks into no record. A
    layer with a y that nobody used takes no part in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, siblings: Siblings, impl: str, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        operands, dropout_p = siblings
        made = BACKENDS[impl].siblings(_flat(x), siblings, True)
        count, needs = len(dropout_p), ctx.needs_input_grad
        # Weights that train need x as every lora_a does.
        saves_x = any(needs[3 : 3 + count]) or any(needs[3 + 2 * count : 3 + 3 * count])
        ctx.call = impl, dropout_p, x.shape
        ctx.save_for_backward(x if saves_x else None, *operands, *made[count:])
        return tuple(_shaped(made[:count], x))

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # Once: what is saved can be taken a single time.
        x, *saved = ctx.saved_tensors
        (impl, dropout_p, shape), (needs_x, _, _, *needs) = ctx.call, ctx.needs_input_grad
        count, dys = len(dropout_p), grads
        if len(shape) != 2:
            x = None if x is None else x.reshape(-1, shape[-1])
            dys = tuple(None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads)
        operands, s = saved[: 6 * count], saved[6 * count :]
        dx, *found = BACKENDS[impl].siblings_gradients(
            dys, x, Siblings(operands, dropout_p), s, (needs_x, *needs)
        )
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        d_weights: list[torch.Tensor | None] = [None] * count
        if any(needs[: 2 * count]):  # base layers that train
            for i, (dy, weight, bias) in enumerate(
                zip(dys, operands, operands[count : 2 * count], strict=False)
            ):
                if needs[i] and dy is not None:
                    d_weights[i] = products.mm(dy.t(), x).to(weight.dtype)
                if bias is not None and (d_bias := found[i]) is not None:
                    found[i] = d_bias.to(bias.dtype)
        return dx, None, None, *d_weights, *found


# Called where no transform of torch.func is in force: `LoraSiblings.apply` would ask for one, and
# whether one has left an argument behind, which only x can be.
_recorded: Any = super(torch.autograd.Function, LoraSiblings).apply


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(ys: Sequence[torch.Tensor], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns ``[..., N]`` of what a backend made as ``[M, N]``."""
    if x.dim() == 2:
        return ys
    # Not views to autograd, which would refuse to let anyone write into them.
    unflat, shape = torch.ops.aten._unsafe_view.default, x.shape[:-1]
    return [unflat(y, (*shape, y.shape[1])) for y in ys]
