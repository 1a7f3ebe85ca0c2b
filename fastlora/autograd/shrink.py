"""s of layers that are fed by the same x: one node of the graph for all of them.

Its backward forms every layer's d_lora_a from one read of x, and nothing else; the layers' own
nodes (`fastlora.autograd.linear.LoraLinear`) return the rest.

Shapes: ``x [..., K]``; of each adapter ``lora_a [R, K]``; s as in `fastlora.ops.backend.Backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastlora.ops.operators  # noqa: F401  # registers a backend
from fastlora.autograd.linear import plain_backward
from fastlora.ops import backend
from fastlora.ops.factors import present
from fastlora.ops.rows import Rows

_Factor = torch.Tensor | None


class Shrunk(NamedTuple):
    """A layer's share of `shrink`.

    Attributes:
        s: In the dtype of the products.
        seed: Of its dropout mask, int64 ``[1]``; None without dropout.
    """

    s: torch.Tensor
    seed: torch.Tensor | None


def shrink(
    x: torch.Tensor,
    lora_a: Sequence[Sequence[_Factor]],
    dropout_p: Sequence[float],
    impl: str,
    rows: Rows | None = None,
) -> list[Shrunk]:
    """Returns s of each of G layers. Seeds are drawn in order, as the layers would by themselves.

    Args:
        x: Their input, in the dtype of the products.
        lora_a: Of each layer its adapters' by slot, None where one leaves the layer alone; one
            each without rows.
        dropout_p: Probability that acts on each layer; 0 with rows.
        impl: Name of the backend.
        rows: Which adapter each row has; None where one has all.
    """
    x = x.detach()  # the gradient of x is the layers' own part
    seeds = tuple(backend.draw_seed(x, impl) if p > 0.0 else None for p in dropout_p)
    flat = [tensor for own in lora_a for tensor in own]
    made = LoraShrink.apply(x, seeds, tuple(dropout_p), impl, rows, *flat)
    return [Shrunk(*each) for each in zip(made, seeds, strict=True)]


class LoraShrink(torch.autograd.Function):
    """s of G layers that are fed by the same x.

    Takes x detached, since its gradient is not this node's part; of each layer a seed or None, and
    the lora_a of its adapters in turn: one each without rows, one of every slot with them. Saves x,
    the seeds and the factors. The backward reads x once for all d_lora_a; a layer with an s that
    nobody used takes no part in it.
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
        layers = _by_layer(lora_a, len(dropouts))
        return tuple(backend.BACKENDS[impl].shrink(_flat(x), layers, seeds, dropouts, rows))

    @staticmethod
    @plain_backward
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
            layers = _by_layer(lora_a, count)
            gradients = backend.BACKENDS[ctx.impl].grad_a(
                _flat(x),
                ds,
                [layers[i] for i in wanted],
                [seeds[i] for i in wanted],
                [ctx.dropouts[i] for i in wanted],
                ctx.rows,
            )
            places = [i * each + slot for i in wanted for slot in range(each)]
            for place, gradient in zip(places, gradients, strict=True):
                found[place] = gradient if needs[place] else None
        return None, None, None, None, None, *found


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Returns ``[M, K]``; x itself if it is that, for which ``reshape`` takes 1.6 us."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _by_layer(lora_a: Sequence[_Factor], layers: int) -> list[list[torch.Tensor]]:
    """Returns the lora_a of each layer, of rank 0 where an adapter leaves it alone."""
    each = len(lora_a) // layers
    return [present(lora_a[start : start + each], 0) for start in range(0, len(lora_a), each)]
