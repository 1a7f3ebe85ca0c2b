"""In training, layers fed by the same tensor share their passes over it.

The first of them computes every sibling's s in one node of the graph, whose backward forms all
their d_lora_a (`fastlora.autograd.LoraShrink`). Found by watching, used by the tensor's identity:
see `fastlora.routing.siblings`. Where that would not be safe or saves nothing, each layer has its
own node, and the fusion report says why.

A compiled graph must not see what one call leaves for another. There every sibling calls one
operator with all their factors and takes its own share (`fastlora.autograd.sibling_ops`). Who is a
sibling was seen in a forward before; what one leaves afterwards changes no graph.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora import functional
from fastlora.layers.factors import factors_of, is_hooked
from fastlora.ops import schema as ops
from fastlora.ops.factors import Factors
from fastlora.ops.invariant import is_batch_invariant
from fastlora.routing.siblings import Family, family_of, keep_shares, known_family, take_share

_UNKNOWN = "no training forward seen yet"
_CHECKPOINT = (
    "saved-tensor hooks are in force (activation checkpointing, offloading): a recomputed forward "
    "must save what the first one saved"
)
_INVARIANT = "the batch-invariant mode is on"
# From here on sharing pays on a CPU. Forward and backward of SmolLM2's q/k/v (rank 16, one Xeon
# core), shared over apart, at 512, 2,048 and 8,192 rows: fp32 1.015, 0.98 and 0.95, bf16 1.004,
# 1.006 and 0.997; of gate/up: fp32 1.008, 1.001 and 0.996, bf16 1.002, 0.991 and 0.995.
MIN_ROWS = 1024
_FEW_ROWS = f"below {MIN_ROWS} rows PyTorch is as fast apart"
UNSEEN = "no forward was seen before torch.compile"
LAST = "no sibling that is called after it can share"
_DROPOUT = "PyTorch has nothing to share under dropout, where each projection masks x for itself"


def shared_shrink(
    layer: Any, x: torch.Tensor, branch: Factors, impl: str
) -> functional.Shrunk | None:
    """Returns the layer's s from the pass over x that it shares, None where it has its own.

    Args:
        layer: With one acting adapter.
        x: Its input, the very tensor that it was called with.
        branch: The adapter's.
        impl: As in `fastlora.functional.lora_linear`.
    """
    grad = torch.is_grad_enabled() and branch.lora_a.requires_grad
    if torch.compiler.is_compiling():
        return _shared_in_graph(layer, x, branch, impl) if grad else None
    if not grad or x.is_inference():
        if "_family" not in layer.__dict__:
            family_of(layer, x)
        return None
    few = x.numel() < MIN_ROWS * x.shape[-1] and ops.resolve_impl(impl, x) != "triton"
    family = known_family(layer)
    if family is None:
        family = family_of(layer, x)
    if family is None or len(family.members) < 2:
        return None
    if branch.dropout_p and (few or ops.resolve_impl(impl, x) != "triton"):
        why = _DROPOUT
    else:
        why = _FEW_ROWS if few else why_not_now()
    shrunk = None
    if not why:
        context = (impl, functional.autocast_dtype(x))
        shrunk = take_share(layer, x, context, _key(branch.lora_a, branch.dropout_p))
        if shrunk is None:
            shrunk, why = _share(layer, x, family, context)
    family.why_not[id(layer)] = why
    return shrunk


def _shared_in_graph(
    layer: Any, x: torch.Tensor, branch: Factors, impl: str
) -> functional.Shrunk | None:
    """`shared_shrink` in a graph that is being compiled; for any number of rows."""
    if not layer.knows_siblings():
        layer.note_compiled(UNSEEN)
        return None
    members = [reference() for reference in layer._family.members]
    found, why = _sharing(members, layer, x, impl)
    lora_a = [factor for _, factor, _ in found]
    own = [index for index, factor in enumerate(lora_a) if factor is branch.lora_a]
    if is_batch_invariant():
        why = _INVARIANT
    elif len(members) < 2:
        why = "none"
    elif len(found) > 1 and own:
        layer.note_compiled("")
        return functional.shrink_in_graph(x, lora_a, [p for _, _, p in found], own[0], impl)
    layer.note_compiled(why or LAST)
    return None


@torch.compiler.assume_constant_result
def knows_siblings(self: Any) -> bool:
    """Whether a forward has shown a layer's siblings; no reason to compile again once one has."""
    return known_family(self) is not None


@torch.compiler.assume_constant_result
def note_compiled(self: Any, why: str) -> None:
    """Keeps why a layer shares nothing in the graph that is being compiled, empty if it does."""
    self.__dict__["_compiled_alone"] = why


def why_not_now() -> str:
    """Returns why no layer may share at this moment, or an empty string."""
    # A forward that runs within a backward is a checkpoint's, whose first run could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return _INVARIANT if is_batch_invariant() else ""


def _key(lora_a: torch.Tensor, dropout_p: float) -> tuple[Any, ...]:
    return id(lora_a), lora_a._version, dropout_p


def _share(
    layer: Any, x: torch.Tensor, family: Family, context: tuple[str, torch.dtype | None]
) -> tuple[functional.Shrunk | None, str]:
    """Computes for a layer and those siblings that have yet to be called.

    Returns:
        The layer's share, or None and why there is none.
    """
    members = [reference() for reference in family.members]
    found, why = _sharing(members[members.index(layer) :], layer, x, context[0])
    if len(found) < 2:
        return None, why or LAST
    lora_a, dropouts = [factor for _, factor, _ in found], [p for _, _, p in found]
    shrunk = functional.shrink(x, lora_a, dropouts, context[0])
    shares = [
        (member, _key(factor, p), share)
        for (member, factor, p), share in zip(found, shrunk, strict=True)
    ]
    keep_shares(x, context, shares[1:])
    return shrunk[0], ""


def _sharing(
    members: list[Any], layer: Any, x: torch.Tensor, impl: str
) -> tuple[list[tuple[Any, torch.Tensor, float]], str]:
    """Returns those of a layer's siblings that share with it: each, its lora_a and its dropout.

    None at all where the layer itself cannot; and why the last of the others does not.
    """
    kernels, why = ops.resolve_impl(impl, x) == "triton", ""
    found: list[tuple[Any, torch.Tensor, float]] = []
    for member in members:
        if member is None:
            continue
        lora_a, dropout_p, reason = _sibling_factor(member, x, impl)
        if lora_a is not None and dropout_p and not kernels:
            lora_a, reason = None, _DROPOUT
        if lora_a is not None:
            found.append((member, lora_a, dropout_p))
        elif member is layer:
            return [], reason
        else:
            why = f"of its siblings, {reason}"
    return found, why


def _sibling_factor(
    layer: Any, x: torch.Tensor, impl: str
) -> tuple[torch.Tensor | None, float, str]:
    """Returns the lora_a and dropout that a sibling will compute with, or None, 0 and why not."""
    names = layer._acting()
    if len(names) != 1:
        return None, 0.0, f"{len(names)} adapters act on one of them"
    if is_hooked(layer):
        return None, 0.0, "one of them has hooks"
    if getattr(layer, "impl", "auto") != impl:
        return None, 0.0, "they have different implementations"
    if names[0] in getattr(layer, "lora_magnitude_vector", ()):
        return None, 0.0, "one of them is DoRA"
    factors = factors_of(layer, names[0])
    if factors is None:
        return None, 0.0, "one of them has a factor or dropout that is hooked, or not plain"
    lora_a, dropout_p = factors.lora_a, factors.dropout_p
    if not lora_a.requires_grad:
        return None, 0.0, "one of them is frozen"
    if lora_a.device != x.device or lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        return None, 0.0, "one of them has its factors elsewhere"
    return lora_a, dropout_p, ""


def sibling_note(layer: Any) -> str:
    """Returns what the fusion report says of a layer's siblings in training."""
    family, compiled = known_family(layer), layer.__dict__.get("_compiled_alone")
    if family is not None and len(family.members) < 2:
        return "none"
    eager = _UNKNOWN
    if family is not None:
        eager = _verdict(family, family.why_not.get(id(layer), ""))
    if compiled is None:
        return eager
    graph = f"not shared: {compiled}" if family is None else _verdict(family, compiled)
    return eager if graph == eager else f"{eager}; compiled: {graph}"


def _verdict(family: Family, why: str) -> str:
    count = len(family.members)
    return f"{count}, not shared: {why}" if why else f"{count} share x"
