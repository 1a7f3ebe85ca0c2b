"""Autograd functions of DoRA: scaling of a LoRA output, and adapters with active dropout.

With ``u = x @ weight.T + scaling * s @ lora_b.T``, the layer's output is ``g * u + bias``. Here
``g = magnitude / ||weight + scaling * lora_b @ lora_a||`` per output row, with a detached norm. Any
implementation of a LoRA forward pass can compute u. DoRA then scales each column of u.

With active dropout, the base weight is also multiplied by the input after dropout, as in PEFT:
``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T``.
If there are several adapters, each has its own rows, and both base products are computed for these
rows only. One operator for the forward pass and one for the backward pass find the rows by id. In a
compiled graph, which serves any mix of adapters, they do so when the graph runs. An adapter without
rows gets gradients of zeros.

Method: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353,
sections 4.1 and 4.3 (the detached norm); PEFT 0.21.2, ``tuners/lora/dora.py``, for dropout.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``, ``u``
and ``y [M, N]``, ``magnitude [N]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from fastlora.autograd.lora_linear import once_differentiable_without_autocast
from fastlora.ops.library import define_operator, register_fake, register_implementation
from fastlora.ops.rows import sort_rows
from fastlora.ops.torch.dora import (
    DoraAdapterWithDropout,
    dora_scale,
    forward_with_dropout,
    gradients,
    scale_and_add_bias,
    scale_columns_backward,
)


class ApplyDoraScaleAndAddBias(torch.autograd.Function):
    """Autograd function that applies DoRA's scale and adds the bias.

    It computes the DoRA output ``y = g * u + bias`` from the LoRA output u, which is without bias.
    Saves u if the magnitude needs a gradient; no other gradient depends on u. Also saves the
    magnitude and the squared norms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        bias: torch.Tensor | None,
        magnitude: torch.Tensor,
        squared_norms: torch.Tensor | None,
    ) -> torch.Tensor:
        """Apply the DoRA scale to the output of a LoRA linear layer, and then add the bias.

        The layer's output u does not include the bias, and the bias is not scaled. The DoRA scale,
        by which u is multiplied, is computed from the magnitude and the squared norms. Returns the
        sum, which is ``[..., N]`` like u. Tensors that the backward pass needs are saved in
        ``ctx``.
        """
        rows = u.reshape(-1, u.shape[-1])
        y = scale_and_add_bias(rows, bias, dora_scale(magnitude, squared_norms))
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(u if ctx.needs_input_grad[2] else None, magnitude, squared_norms)
        return torch.ops.aten._unsafe_view(y, u.shape)

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, magnitude, squared_norms = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        rows = None if u is None else u.reshape(dy.shape)
        du, d_own = scale_columns_backward(dy, rows, magnitude, squared_norms)
        d_magnitude = None if d_own is None else d_own.to(magnitude.dtype)
        d_bias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        d_u = du.view(grad.shape) if ctx.needs_input_grad[0] else None
        return d_u, d_bias, d_magnitude, None


# ------------------------------------------------------------------------- active dropout

_Item = TypeVar("_Item")

# Number of tensors per adapter: lora_a, lora_b, magnitude, squared_norms, scaling, seed.
_EACH = 6
_BATCH = "Tensor[] adapters, Tensor ids, int[] slots, float[] dropout_p, str impl"
# The operators read each adapter's number of rows on the host, which a CUDA graph cannot record.
_TAGS = (torch.Tag.cudagraph_unsafe,)
define_operator(
    f"dora_dropped(Tensor y, Tensor x, Tensor weight, {_BATCH}, bool keeps_z)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
define_operator(
    f"dora_dropped_backward(Tensor dy, Tensor x, Tensor weight, {_BATCH}, Tensor s, Tensor z,"
    " bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)


def _chunked(chunk_length: int, items: Sequence[_Item]) -> list[Sequence[_Item]]:
    """Split a sequence into chunks of a given length."""
    return [items[at : at + chunk_length] for at in range(0, len(items), chunk_length)]


def _enumerate_adapters_with_rows(
    x: torch.Tensor,
    adapters: Sequence[torch.Tensor],
    ids: torch.Tensor,
    slot_of_adapter: list[int],
    dropout_p: list[float],
    impl: str,
) -> Iterator[tuple[int, torch.Tensor, slice, DoraAdapterWithDropout]]:
    """Iterate over the adapters that have rows in the batch.

    For each of these adapters, yields a tuple (index, rows, positions, adapter). ``index`` is the
    adapter's index among all adapters, and ``rows`` are the indices of its rows in x.
    ``positions`` is the slice of these rows in the batch sorted by slot, which is the order of s
    and z. ``slot_of_adapter`` lists each adapter's slot in ids.
    """
    batch = sort_rows(ids, x.shape[0], max(slot_of_adapter) + 1)
    starts = batch.slot_start.tolist()
    for place, own in enumerate(_chunked(_EACH, adapters)):
        start, stop = starts[slot_of_adapter[place]], starts[slot_of_adapter[place] + 1]
        if start < stop:
            adapter = DoraAdapterWithDropout._make((*own, dropout_p[place], impl))
            seed = adapter.seed.to(x.device if impl == "triton" else "cpu")
            rows = batch.order[start:stop].long().to(x.device)
            yield place, rows, slice(start, stop), adapter._replace(seed=seed)


def _allocate_shrink_and_base_products(
    y: torch.Tensor, x: torch.Tensor, adapters: Sequence[torch.Tensor], needs_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the tensors for the adapters' shrink products and for the base products.

    `_dora_with_dropout` computes the shrink product s and the base product z of DoRA with dropout,
    and the backward pass uses them. The tensor s is for ``dropout(x) @ lora_a.T``, and z is for
    ``dropout(x) @ weight.T``. If ``needs_z`` is False, z has no rows. The tensors are not
    initialized. Only the rows of adapters are used later.
    """
    rank = max(lora_a.shape[0] for lora_a in adapters[::_EACH])
    return x.new_empty(x.shape[0], rank), x.new_empty(x.shape[0] if needs_z else 0, y.shape[1])


def _allocate_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[torch.Tensor],
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Allocate tensors for the gradients of x, the weight, and the adapters.

    The backward pass of DoRA adapters with dropout computes these gradients. The result is a list
    of tensors for the gradients of x, the weight, and each adapter's lora_a, lora_b, and magnitude
    in turn. The tensors are not initialized. The tensor of a gradient that is not wanted has no
    elements.
    """
    like = [x, weight, *(t for own in _chunked(_EACH, adapters) for t in own[:3])]
    return [
        tensor.new_empty(tensor.shape if asked else (0,))
        for tensor, asked in zip(like, wanted, strict=True)
    ]


@register_implementation("dora_dropped")
def _dora_with_dropout(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the output of DoRA adapters with dropout.

    This function implements the operator ``fastlora::dora_dropped``. The batch is mixed, so its
    rows may use different adapters. Returns a tuple (output, s, z). The output is y with the
    adapters applied. The backward pass uses the intermediate results s and z. s is
    ``dropout(x) @ lora_a.T``, and z is ``dropout(x) @ weight.T``. If ``keeps_z`` is False, z has no
    rows.
    """
    y = y.clone(memory_format=torch.contiguous_format)
    s, z = _allocate_shrink_and_base_products(y, x, batch[0], batch[-1])
    for _, rows, part, adapter in _enumerate_adapters_with_rows(x, *batch[:-1]):
        y[rows], own_s, own_z = forward_with_dropout(
            y[rows], x[rows], weight, None, adapter, inplace=True
        )
        s[part, : own_s.shape[1]] = own_s
        if z.shape[0]:
            z[part] = own_z
    return y, s, z


@register_fake("dora_dropped")
def _(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), *_allocate_shrink_and_base_products(y, x, batch[0], batch[-1])


@register_implementation("dora_dropped_backward")
def _dora_with_dropout_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any
) -> list[torch.Tensor]:
    """Compute the gradients of x, the weight, and the parameters of DoRA adapters with dropout.

    This function implements the operator ``fastlora::dora_dropped_backward``, the backward pass of
    `_dora_with_dropout`. Returns a list of the gradients of x, the weight, and each adapter's
    lora_a, lora_b, and magnitude, in that order.
    """
    *batch_of, s, z, wanted = batch
    found = _allocate_gradients(x, weight, batch_of[0], wanted)
    for tensor in found:
        tensor.zero_()
    wants_x, wants_weight, *wants = wanted
    for place, rows, part, adapter in _enumerate_adapters_with_rows(x, *batch_of):
        own = slice(3 * place, 3 * place + 3)
        dx, d_weight, d_factors = gradients(
            *(dy[rows], x[rows], weight, adapter, s[part, : adapter.lora_a.shape[0]]),
            z[part] if z.shape[0] else None,
            own_base=False,
            wants_x=wants_x,
            wants_weight=wants_weight,
            wants_a_b_magnitude=wants[own],
        )
        if dx is not None:
            found[0][rows] = dx
        if d_weight is not None:
            found[1] += d_weight
        for result, gradient in zip(found[2:][own], d_factors, strict=True):
            if gradient is not None:
                result.copy_(gradient)
    return found


@register_fake("dora_dropped_backward")
def _(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *batch: Any) -> list[torch.Tensor]:
    return _allocate_gradients(x, weight, batch[0], batch[-1])


class DoraLinearWithDropout(torch.autograd.Function):
    """Autograd function for a linear layer that has DoRA adapters with dropout.

    The dropout of the adapters is active. The output is the sum of the base output, which is
    computed from x, and two terms that are computed from ``dropout(x)``. One of these two terms is
    a second product with the base weight; see the module's docstring.

    The function saves x, s, the seeds, and the parameters. If a magnitude needs a gradient, the
    function also saves ``z = dropout(x) @ weight.T``, in PyTorch without the mask's factor
    ``1 / (1 - p)``. The backward pass computes the mask again from the seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor | None,
        slots: tuple[int, ...],
        dropout_p: tuple[float, ...],
        impl: str,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        """Run the forward pass of a linear layer with DoRA adapters, and return the layer's output.

        If ``ids [B]`` is given, the batch is mixed, and ``ids`` chooses the adapter of each row: it
        contains the slot of each sample or token. ``slots`` lists the slot of each adapter. A mixed
        batch requires ``base``. If ``ids`` is None, there is one adapter, which applies to all
        rows.

        The adapters have active dropout with the probabilities ``dropout_p``. ``adapters`` contains
        six tensors for each adapter; see `DoraAdapterWithDropout`. The output is computed from the
        base layer's output ``base``, or from weight and bias if ``base`` is None. Tensors that the
        backward pass needs are saved in ``ctx``.
        """
        flat = None if base is None else base.reshape(-1, base.shape[-1])
        rows, needs = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad
        needs_a, needs_b, needs_m = (any(needs[at::_EACH]) for at in (8, 9, 10))
        if ids is None:
            own = DoraAdapterWithDropout._make((*adapters, *dropout_p, impl))
            y, s, z = forward_with_dropout(flat, rows, weight, bias, own)
        else:
            y, s, z = torch.ops.fastlora.dora_dropped(
                *(flat, rows, weight, adapters, ids, slots, dropout_p, impl, needs_m)
            )
        ctx.slots, ctx.dropout_p, ctx.impl = slots, dropout_p, impl
        ctx.x_shape, ctx.x_dtype, ctx.own_base = x.shape, x.dtype, base is None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if needs[2] or needs_a or ids is not None else None,
            weight,
            ids,
            s if needs_b or needs_m else None,
            z if needs_m else None,
            *adapters,
        )
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable_without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, ids, s, z, *adapters = ctx.saved_tensors
        needs_base, needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        own_needs = _chunked(_EACH, ctx.needs_input_grad[8:])
        wanted = [needs_x, needs_weight, *(need for own in own_needs for need in own[:3])]
        dy = grad.reshape(-1, grad.shape[-1]).to(ctx.x_dtype)
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        found: Sequence[torch.Tensor | None]
        if ids is None:
            adapter = DoraAdapterWithDropout._make((*adapters, *ctx.dropout_p, ctx.impl))
            dx, d_weight, d_factors = gradients(
                *(dy, rows, weight, adapter, s, z),
                own_base=ctx.own_base,
                wants_x=needs_x,
                wants_weight=needs_weight,
                wants_a_b_magnitude=wanted[2:],
            )
            found = dx, d_weight, *d_factors
        else:
            s = dy.new_empty(0, 0) if s is None else s
            z = dy.new_empty(0, 0) if z is None else z
            found = torch.ops.fastlora.dora_dropped_backward(
                *(dy, rows, weight, adapters, ids, ctx.slots, ctx.dropout_p, ctx.impl),
                *(s, z, wanted),
            )
        dx, d_weight, *d_own = (t if ask else None for t, ask in zip(found, wanted, strict=True))
        dx = None if dx is None else dx.view(ctx.x_shape)
        d_bias = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        d_adapters = [d for own in _chunked(3, d_own) for d in (*own, None, None, None)]
        return (
            *(grad if needs_base else None, dx, d_weight, d_bias),
            *(None, None, None, None, *d_adapters),
        )
