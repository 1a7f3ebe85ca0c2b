"""Mixed batches on Triton kernels with gradients: what is saved, and every gradient.

Saved for backward are x itself, s, the dropout seeds and the parameters. The same results as
`fastlora.autograd.mixed`, which is plain PyTorch, except for the dropout's draws.

One function does a layer. Where layers fed by the same tensor share their passes over it, the graph
has two kinds of node, as in `fastlora.autograd`: `MixedLoraShrinkKernels` makes every sibling's s,
and its backward yields their d_lora_a and nothing else; each layer's function takes its s.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, and of each slot ``lora_a [rank, K]``,
``lora_b [N, rank]`` and ``lora_bias [N]``, not scaled yet; all three None where an adapter leaves
the layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastlora.autograd.linear import plain_backward
from fastlora.ops import schema  # noqa: F401 - registers operators
from fastlora.ops.layout import split_grad_a, split_grad_b
from fastlora.ops.rows import Rows
from fastlora.ops.torch import products
from fastlora.ops.triton.configs import rows_listed, runs_a, runs_b

_Factor = torch.Tensor | None


class KernelBatch(NamedTuple):
    """What a layer's kernels read beside tensors with gradients.

    Attributes:
        rows: The rows.
        scaling: fp32 ``[S]``.
        seeds: The layer's dropout seeds, int64 ``[S]``, or None where no dropout acts.
        dropout_p: Of each slot.
        plan: As in `fastlora.functional.lora_linear`.
        impl: ``"triton"``, or ``"eager"`` for the same operators in PyTorch.
    """

    rows: Rows
    scaling: torch.Tensor
    seeds: torch.Tensor | None
    dropout_p: list[float]
    plan: str = "auto"
    impl: str = "triton"

    @property
    def in_pieces(self) -> list[torch.Tensor]:
        """What the forward's operators take as rows; PyTorch has no pieces."""
        return rows_listed(self.rows) if self.impl == "triton" else self.rows.tensors()


def forward_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch: KernelBatch,
    factors: Sequence[_Factor],
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y and s, without recording a graph; ``factors`` holds three of each slot in turn.

    ``s`` is made here unless a sibling made it.
    """
    base = (
        x.reshape(-1, x.shape[-1]),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
    )
    rows = batch.in_pieces if s is None else batch.rows.tensors()
    y, *own = torch.ops.fastlora.lora_linear(
        *(*base, rows, s, factors, batch.scaling, batch.seeds, batch.dropout_p),
        *(batch.impl, batch.plan),
    )
    return y.view(*x.shape[:-1], weight.shape[0]), own[0] if s is None else s


def forward_add(
    y: torch.Tensor,
    x: torch.Tensor,
    batch: KernelBatch,
    factors: Sequence[_Factor],
    s: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y plus every row's own adapter, and s; y itself is not written."""
    if s is None:
        flat = x.reshape(-1, x.shape[-1])
        drop = batch.seeds, batch.dropout_p
        s = torch.ops.fastlora.lora_shrink(
            flat, batch.in_pieces, factors[::3], 1, *drop, batch.impl
        ).squeeze(0)
    result = y.reshape(-1, y.shape[-1]).clone(memory_format=torch.contiguous_format)
    torch.ops.fastlora.lora_expand_(
        result, s, batch.rows.tensors(), factors[1::3], factors[2::3], batch.scaling, batch.impl
    )
    return result.view(y.shape), s


class MixedLoraShrinkKernels(torch.autograd.Function):
    """s ``[M, R]`` of modules that are fed by the same x, without dropout.

    Takes x detached, since its gradient is not this node's part; a batch, of which the rows count;
    and the modules' lora_a, each with all slots. Saves x and the factors. The backward reads x once
    for all d_lora_a; a module whose s nobody used takes no part in it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, batch: KernelBatch, *lora_a: _Factor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.batch = batch
        ctx.save_for_backward(x, *lora_a)
        modules, none = len(lora_a) // len(batch.dropout_p), [0.0] * len(lora_a)
        s: torch.Tensor = torch.ops.fastlora.lora_shrink(
            *(x.reshape(-1, x.shape[-1]), batch.in_pieces, lora_a, modules),
            *(None, none, batch.impl),
        )
        return s.unbind()

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        batch, needs, slots = ctx.batch, ctx.needs_input_grad[2:], len(ctx.batch.dropout_p)
        found: list[torch.Tensor | None] = [None] * len(saved)
        wanted = [g for g, grad in enumerate(grads) if grad is not None]
        places = [g * slots + slot for g in wanted for slot in range(slots)]
        if any(needs[place] for place in places):
            lora_a, flat = [saved[place] for place in places], x.reshape(-1, x.shape[-1])
            gradients = _grad_a(flat, [grads[g] for g in wanted], batch, lora_a, None)
            for place, gradient in zip(places, gradients, strict=True):
                found[place] = gradient if needs[place] else None
        return None, None, *found


class MixedLoraLinearKernels(torch.autograd.Function):
    """`fastlora.autograd.mixed.MixedLoraLinear` on kernels; see `forward_linear`.

    With an ``s`` of `MixedLoraShrinkKernels`, every lora_a comes detached, and x is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        batch: KernelBatch,
        s: torch.Tensor | None,
        *factors: _Factor,
    ) -> torch.Tensor:
        y, s = forward_linear(x, weight, bias, batch, factors, s)
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save(ctx, x, weight, s, batch, factors, keep_x=ctx.needs_input_grad[1])
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = grad.reshape(-1, grad.shape[-1])
        # Once: what checkpoints recompute can be taken a single time.
        x, weight, *saved = ctx.saved_tensors
        dx, ds, d_factors = _backward(ctx, dy, x, weight.to(dy.dtype), saved, needs_x)
        d_weight = d_bias = None
        if needs_weight:
            d_weight = products.mm(dy.t(), x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            d_bias = dy.sum(0).to(ctx.bias_dtype)
        return dx, d_weight, d_bias, None, ds, *d_factors


class MixedLoraAddKernels(torch.autograd.Function):
    """`fastlora.autograd.mixed.MixedLoraAdd` on kernels; see `forward_add`, and on s the linear."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        _: None,
        batch: KernelBatch,
        s: torch.Tensor | None,
        *factors: _Factor,
    ) -> torch.Tensor:
        result, s = forward_add(y, x, batch, factors, s)
        ctx.x_dtype = x.dtype
        _save(ctx, x, None, s, batch, factors)
        return result

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        x, _, *saved = ctx.saved_tensors
        dx, ds, d_factors = _backward(ctx, dy, x, None, saved, ctx.needs_input_grad[1])
        return grad, dx, None, None, ds, *d_factors


def _save(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    s: torch.Tensor,
    batch: KernelBatch,
    factors: Sequence[_Factor],
    keep_x: bool = False,
) -> None:
    """Keeps what the backward needs, and no more."""
    needs = ctx.needs_input_grad[5:]
    ctx.batch, ctx.x_shape = batch._replace(seeds=None), x.shape
    ctx.save_for_backward(
        x if keep_x or any(needs[::3]) else None, weight, s, batch.seeds, *factors
    )


def _in_runs(of: Any, batch: KernelBatch, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Returns rows, and how many make a run, of an operator over ``x [M, columns]``."""
    if batch.impl != "triton":
        return batch.rows.tensors(), 0
    found: tuple[list[torch.Tensor], int] = of(batch.rows, x.dtype, x.shape[1])
    return found


def _backward(
    ctx: Any,
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    saved: Sequence[torch.Tensor],
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Returns the gradients of x, of an s that came in, and of all factors in turn.

    Args:
        ctx: As `_save` left it.
        dy: ``[M, N]``, any strides.
        x: ``[..., K]``, where a lora_a needs it.
        weight: ``[N, K]`` in dy's dtype; None for dx of the adapters' term alone.
        saved: s, the seeds and the factors.
        needs_x: Whether x needs a gradient.
    """
    s, seeds, *factors = saved
    batch, needs = ctx.batch, ctx.needs_input_grad[5:]
    lora_a, lora_b = factors[::3], factors[1::3]
    with_bias = [bias is not None for bias in factors[2::3]]
    with_factors = any(needs[1::3]) or any(needs[2::3])
    operators, slots = torch.ops.fastlora, len(with_bias)
    ds, packed, _ = operators.lora_grad_b(
        *(dy, s, *_in_runs(runs_b, batch, dy), lora_b, with_bias),
        *(batch.scaling, with_factors, batch.impl),
    )
    dx = None
    if needs_x:
        drop = seeds, batch.dropout_p
        dx = operators.lora_grad_x(
            dy, weight, ds, batch.rows.tensors(), lora_a, *drop, batch.impl, batch.plan
        ).view(ctx.x_shape)
    gradients: list[torch.Tensor | None] = [None] * (3 * slots)
    if with_factors:
        for slot, (d_lora_b, d_bias) in enumerate(split_grad_b(packed, lora_b, with_bias)):
            gradients[3 * slot + 1 : 3 * slot + 3] = [d_lora_b, d_bias]
    if x is not None and any(needs[::3]):
        flat = x.reshape(-1, x.shape[-1])
        gradients[::3] = _grad_a(flat, [ds], batch, lora_a, seeds)
    d_s = ds if ctx.needs_input_grad[4] else None
    if d_s is not None and torch.is_anomaly_enabled():
        d_s = _without_the_unwritten(ds, batch, lora_a)
    return (
        dx,
        d_s,
        [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)],
    )


def _grad_a(
    flat: torch.Tensor,
    ds: Sequence[torch.Tensor | None],
    batch: KernelBatch,
    lora_a: Sequence[_Factor],
    seeds: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Returns the gradients of the lora_a of G modules, for ds ``[M, R]`` of each."""
    (packed,) = torch.ops.fastlora.lora_grad_a(
        *(flat, ds, *_in_runs(runs_a, batch, flat), lora_a, seeds),
        *(batch.dropout_p * len(ds), batch.impl),
    )
    return split_grad_a(packed, lora_a)


def _without_the_unwritten(
    ds: torch.Tensor, batch: KernelBatch, lora_a: Sequence[_Factor]
) -> torch.Tensor:
    """Returns ds with zeros where no adapter has anything, so that no NaN is found there."""
    # Slots -2 and -1 are rows without an adapter.
    found = [0 if factor is None else factor.shape[0] for factor in lora_a]
    ranks = torch.tensor([*found, 0, 0], device=ds.device)
    own = ranks[batch.rows.segment_slot.long()[batch.rows.segment_of.long()]]
    return torch.where(torch.arange(ds.shape[1], device=ds.device) < own[:, None], ds, 0)
