"""The operator of a mixed batch in a compiled graph, which decomposes when autograd is traced.

Everything that depends on the mix of adapters is a tensor: the slots of samples or tokens, and the
dropout seeds. The factors of all adapters of the model are arguments, whether or not an adapter has
rows, so one graph serves any mix. In the backward pass, adapters without rows get gradients of
zeros. Rows are sorted once per graph, because all layers call `fastlora.ops.rows.sort_rows` with
the same arguments.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, ids and seeds int64 ``[B]`` and ``[S]``,
and ``scaling [S]``; for each slot ``lora_a [rank, K]``, ``lora_b [N, rank]``, and ``lora_bias [N]``
in turn, or three times None for an adapter that does not adapt the layer.
"""

from __future__ import annotations

import functools

import torch

from fastlora.autograd.lora_linear import run_adapters
from fastlora.ops.factors import Base, LayerAdapterOperands, replace_missing_with_empty
from fastlora.ops.library import define_operator, register_composite_implicit_autograd
from fastlora.ops.rows import sort_rows
from fastlora.ops.seeds import derive_seeds_of_layer

define_operator(
    "lora_mixed(Tensor x, Tensor? weight, Tensor? bias, Tensor? y, Tensor?[] factors,"
    " Tensor scaling, Tensor ids, Tensor seeds, float[] dropout_p, int projection, str impl,"
    " Tensor? s) -> Tensor"
)


@register_composite_implicit_autograd("lora_mixed")
def _lora_mixed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    factors: list[torch.Tensor | None],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
    s: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the output of a LoRA linear layer for a mixed batch.

    This function implements the operator ``fastlora::lora_mixed``. The output is the base layer's
    output plus the update of each row's adapter, as in
    `fastlora.autograd.lora_linear.run_adapters`. Factors of several dtypes are converted to a
    common one.
    """
    rows = sort_rows(ids, x.numel() // x.shape[-1], len(dropout_p), x.device)
    drawn = None
    if any(dropout_p):
        drawn = derive_seeds_of_layer(seeds, projection)
        if impl == "triton":
            drawn = drawn.to(x.device, non_blocking=True)
    dtypes = [tensor.dtype for tensor in factors if tensor is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    factors = [None if tensor is None else tensor.to(dtype) for tensor in factors]
    downs, ups, biases = (
        replace_missing_with_empty(factors[::3], 0),
        replace_missing_with_empty(factors[1::3], 1),
        factors[2::3],
    )
    operands = LayerAdapterOperands(downs, ups, biases, scaling, tuple(dropout_p), drawn)
    return run_adapters(x, Base(weight, bias, y), operands, impl, rows=rows, s=s)
