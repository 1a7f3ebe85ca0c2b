"""The operators by which a mixed batch enters a compiled graph.

All that depends on the mix are tensors: slots of the samples or tokens, and dropout seeds. The
factors of every adapter that the model has are arguments, whether it has rows or not, so that a
graph serves any mix. In the backward, adapters without rows get zeros.

`lora_mixed` and `mixed_lora_graph_shrink` decompose where autograd is traced, into
`fastlora.autograd.linear`. The last is called by layers fed by the same x with the factors of all,
as in `fastlora.autograd.sibling_ops`, and each hands its s to its own operator. Rows are sorted
once a graph: layers call `fastlora.ops.rows.sort_rows` alike.

Shapes: ``x [..., K]``, ``weight [N, K]``, ``y [..., N]``, ids and seeds int64 ``[B]`` and ``[S]``;
of each slot ``lora_a [rank, K]``, ``lora_b [N, rank]``, ``lora_bias [N]``, and ``scaling [S]``. An
adapter that leaves the layer alone has rank 0.
"""

from __future__ import annotations

import torch

from fastlora.autograd.linear import Call, LoraShrink, run
from fastlora.ops.library import composes, define
from fastlora.ops.rows import sort_rows
from fastlora.ops.seeds import seeds_of_layer
from fastlora.routing.siblings import is_traced, keep_made, take_made

_FACTORS = "Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_bias, Tensor scaling"
_BATCH = "Tensor ids, Tensor seeds, float[] dropout_p, int projection, str impl, Tensor? s"
define(
    f"lora_mixed(Tensor x, Tensor? weight, Tensor? bias, Tensor? y, {_FACTORS}, {_BATCH}) -> Tensor"
)
define(
    "mixed_lora_graph_shrink(Tensor x, Tensor[] lora_a, int[] places, int modules, int own,"
    " Tensor ids, int slots, ScalarType dtype, ScalarType factor_dtype, str impl) -> Tensor"
)


def _call(
    x: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
) -> tuple[Call, torch.Tensor | None]:
    """Returns what `run` takes beside tensors, and the layer's dropout seeds."""
    rows = sort_rows(ids, x.numel() // x.shape[-1], len(dropout_p), x.device)
    drawn = None
    if any(dropout_p):
        drawn = seeds_of_layer(seeds, projection)
        if impl == "triton":
            drawn = drawn.to(x.device, non_blocking=True)
    # How rows lie is not to be seen by whoever traces.
    return Call(_opaque(impl), "auto", tuple(dropout_p), rows), drawn


def _opaque(impl: str) -> str:
    return "opaque" if impl == "eager" else impl


@composes("lora_mixed")
def _lora_mixed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: torch.Tensor,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    dropout_p: list[float],
    projection: int,
    impl: str,
    s: torch.Tensor | None,
) -> torch.Tensor:
    """`fastlora.autograd.linear.run` of a mixed batch."""
    call, drawn = _call(x, ids, seeds, dropout_p, projection, impl)
    each = zip(lora_a, lora_b, lora_bias, strict=True)
    factors = [tensor for slot in each for tensor in slot]
    return run(x, weight, bias, y, call, scaling, drawn, factors, s)


@composes("mixed_lora_graph_shrink")
def _mixed_lora_graph_shrink(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    places: list[int],
    modules: int,
    own: int,
    ids: torch.Tensor,
    slots: int,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    """Returns s ``[M, R]`` of module ``own``.

    ``places`` has the place of each lora_a among those of all modules and slots.
    """
    by_place = {place: a.to(factor_dtype) for place, a in zip(places, lora_a, strict=True)}

    def make(some: range) -> tuple[torch.Tensor, ...]:
        rows = x.detach().to(dtype)
        m = rows.numel() // rows.shape[-1]
        factors = [by_place.get(module * slots + slot) for module in some for slot in range(slots)]
        none = (None,) * len(some), (0.0,) * len(some)
        made: tuple[torch.Tensor, ...] = LoraShrink.apply(
            rows, *none, _opaque(impl), sort_rows(ids, m, slots, rows.device), *factors
        )
        return made

    if not is_traced(x):
        return make(range(own, own + 1))[0]
    key = tuple(places), modules, slots, dtype, factor_dtype, impl, torch.is_grad_enabled()
    known = take_made(x, [*lora_a, ids], key)
    shares = make(range(modules)) if known is None else known
    if known is None:
        keep_made(x, [*lora_a, ids], key, shares, modules)
    return shares[own]
