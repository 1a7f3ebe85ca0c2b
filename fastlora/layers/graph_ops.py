"""The operators that a layer calls in a compiled graph and that decompose where autograd is traced.

`lora_mixed` is a mixed batch. All that depends on the mix are tensors: slots of the samples or
tokens, and dropout seeds. The factors of every adapter that the model has are arguments, whether it
has rows or not, so that a graph serves any mix. In the backward, adapters without rows get zeros.
Rows are sorted once a graph: layers call `fastlora.ops.rows.sort_rows` alike.

`lora_shared` is s, by kernels, of layers that are fed by the same x. Every sibling calls it with
the factors of all and gets its own share. The first call that is traced makes one node, and the
others, which bring the very same tensors, find what it made; so one node has the gradients of all.
Calls that a compiler merges afterwards would each keep a backward, with one gradient to do. Where
nothing is traced each call makes its own.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, ids and seeds int64 ``[B]`` and ``[S]``;
of each slot ``lora_a [rank, K]``, ``lora_b [N, rank]`` and ``lora_bias [N]`` in turn, three None
for an adapter that leaves the layer alone, and ``scaling [S]``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastlora.autograd.linear import run
from fastlora.autograd.shared_input import Shared, shrink
from fastlora.layers.shared_input import Results
from fastlora.ops.factors import Base, Operands, present
from fastlora.ops.library import composes, define
from fastlora.ops.rows import sort_rows
from fastlora.ops.seeds import seeds_of_layer

# What the first call of `lora_shared` in a trace made for those behind it.
_TRACED = Results()

define(
    "lora_mixed(Tensor x, Tensor? weight, Tensor? bias, Tensor? y, Tensor?[] factors,"
    " Tensor scaling, Tensor ids, Tensor seeds, float[] dropout_p, int projection, str impl,"
    " Tensor? s) -> Tensor"
)
define(
    "lora_shared(Tensor x, Tensor[] lora_a, int[] places, int own, float[] dropout_p, Tensor? ids,"
    " int slots, ScalarType dtype, ScalarType? factor_dtype) -> (Tensor, Tensor[])"
)


@composes("lora_mixed")
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
    """`fastlora.autograd.linear.run` of a mixed batch; factors are taken in one dtype."""
    rows = sort_rows(ids, x.numel() // x.shape[-1], len(dropout_p), x.device)
    drawn = None
    if any(dropout_p):
        drawn = seeds_of_layer(seeds, projection)
        if impl == "triton":
            drawn = drawn.to(x.device, non_blocking=True)
    # In PyTorch, too, a tracer is not shown how rows lie.
    name = "opaque" if impl == "eager" else impl
    dtypes = [tensor.dtype for tensor in factors if tensor is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    factors = [None if tensor is None else tensor.to(dtype) for tensor in factors]
    downs, ups, biases = present(factors[::3], 0), present(factors[1::3], 1), factors[2::3]
    operands = Operands(downs, ups, biases, scaling, tuple(dropout_p), drawn)
    return run(x, Base(weight, bias, y), operands, name, rows=rows, s=s)


@composes("lora_shared")
def _lora_shared(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    places: list[int],
    own: int,
    dropout_p: list[float],
    ids: torch.Tensor | None,
    slots: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns s of layer number ``own``, and its seed if it has dropout.

    ``places`` has the place of each lora_a among those of all layers and slots; without ids one
    adapter has all rows. Factors are taken in ``factor_dtype``, or as they are.
    """
    by_place = dict(zip(places, lora_a, strict=True))

    def make(layers: Sequence[int]) -> list[Shared]:
        flat = x.to(dtype)
        m = flat.numel() // flat.shape[-1]
        rows = None if ids is None else sort_rows(ids, m, slots, flat.device)
        each = [[by_place.get(layer * slots + i) for i in range(slots)] for layer in layers]
        if factor_dtype is not None:
            each = [[None if a is None else a.to(factor_dtype) for a in own] for own in each]
        return shrink(flat, each, [dropout_p[layer] for layer in layers], "triton", rows)

    found: Any = None
    if not isinstance(x, (FakeTensor, FunctionalTensor)):
        # Nothing says whether the others will call, so nothing is kept for them.
        (found,) = make([own])
    else:
        context = (*lora_a, ids)
        versions = [tensor._version for tensor in context if tensor is not None]
        others = places, dropout_p, slots, dtype, factor_dtype, torch.is_grad_enabled()
        key = (versions, *others)
        known, found = _TRACED.take(x, own, context) or (None, None)
        if known != key:
            _TRACED.discard()  # of layers that are not in their graph
            made = make(range(len(dropout_p)))
            _TRACED.put(x, context, own, {i: (key, s) for i, s in enumerate(made) if i != own})
            found = made[own]
    return found.s, [] if found.seed is None else [found.seed]
