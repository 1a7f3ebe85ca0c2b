"""In training, layers fed by the same tensor share their passes over it.

The first of them computes every sibling's s in one node of the graph, whose backward forms all
their d_lora_a (`fastlora.autograd.LoraShrink`). Found by watching, used by the tensor's identity:
see `fastlora.siblings`. Where that would not be safe or saves nothing, each layer has its own node,
and the fusion report says why.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora import functional, ops
from fastlora.batch_invariant import is_batch_invariant
from fastlora.layers.branch import Branch, branch_of, is_hooked
from fastlora.siblings import Family, family_of, keep_shares, known_family, take_share

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
_LAST = "no sibling that is called after it can share"
_DROPOUT = "PyTorch has nothing to share under dropout, where each projection masks x for itself"


def shared_shrink(
    layer: Any, x: torch.Tensor, branch: Branch, impl: str
) -> functional.Shrunk | None:
    """Returns the layer's s from the pass over x that it shares, None where it has its own.

    Args:
        layer: With one acting adapter.
        x: Its input, the very tensor that it was called with.
        branch: The adapter's.
        impl: As in `fastlora.functional.lora_linear`.
    """
    # A compiled graph must not see what one call leaves for another.
    if torch.compiler.is_compiling():
        return None
    if not torch.is_grad_enabled() or not branch.lora_a.requires_grad or x.is_inference():
        return None
    family = family_of(layer, x)
    if family is None or len(family.members) < 2:
        return None
    why = _why_not_now()
    if not why and ops.resolve_impl(impl, x) != "triton":
        few = x.numel() < MIN_ROWS * x.shape[-1]
        why = _DROPOUT if branch.dropout_p else _FEW_ROWS if few else ""
    shrunk = None
    if not why:
        context = (impl, functional.autocast_dtype(x))
        shrunk = take_share(layer, x, context, _key(branch))
        if shrunk is None:
            shrunk, why = _share(layer, x, family, context)
    family.why_not[id(layer)] = why
    return shrunk


def _why_not_now() -> str:
    # A forward that runs within a backward is a checkpoint's, whose first run could not share.
    recomputed = torch._C._current_graph_task_id() != -1
    if recomputed or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return _CHECKPOINT
    return _INVARIANT if is_batch_invariant() else ""


def _key(branch: Branch) -> tuple[Any, ...]:
    return id(branch.lora_a), branch.lora_a._version, branch.dropout_p


def _share(
    layer: Any, x: torch.Tensor, family: Family, context: tuple[str, torch.dtype | None]
) -> tuple[functional.Shrunk | None, str]:
    """Computes for a layer and those siblings that have yet to be called.

    Returns:
        The layer's share, or None and why there is none.
    """
    impl, why = context[0], ""
    kernels = ops.resolve_impl(impl, x) == "triton"
    members = [reference() for reference in family.members]
    found: list[tuple[Any, Branch]] = []
    for member in members[members.index(layer) :]:
        if member is None:
            continue
        branch, reason = _sibling_branch(member, x, impl)
        if branch is not None and branch.dropout_p and not kernels:
            branch, reason = None, _DROPOUT
        if branch is not None:
            found.append((member, branch))
        elif member is layer:
            return None, reason
        else:
            why = f"of its siblings, {reason}"
    if len(found) < 2:
        return None, why or _LAST
    branches = [branch for _, branch in found]
    dropouts = [branch.dropout_p for branch in branches]
    shrunk = functional.shrink(x, [branch.lora_a for branch in branches], dropouts, impl)
    shares = [
        (member, _key(branch), share) for (member, branch), share in zip(found, shrunk, strict=True)
    ]
    keep_shares(x, context, shares[1:])
    return shrunk[0], ""


def _sibling_branch(layer: Any, x: torch.Tensor, impl: str) -> tuple[Branch | None, str]:
    """Returns the one branch that a sibling will compute with, or None and why there is none."""
    names = layer._acting()
    if len(names) != 1:
        return None, f"{len(names)} adapters act on one of them"
    if is_hooked(layer):
        return None, "one of them has hooks"
    if getattr(layer, "impl", "auto") != impl:
        return None, "they have different implementations"
    if names[0] in getattr(layer, "lora_magnitude_vector", ()):
        return None, "one of them is DoRA"
    branch = branch_of(layer, names[0], x)
    if branch is None:
        return None, "one of them has a factor or dropout that is hooked, or not plain"
    lora_a = branch.lora_a
    if not lora_a.requires_grad:
        return None, "one of them is frozen"
    if lora_a.device != x.device or lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        return None, "one of them has its factors elsewhere"
    return branch, ""


def sibling_note(layer: Any) -> str:
    """Returns what the fusion report says of a layer's siblings in training."""
    family = known_family(layer)
    if family is None:
        return _UNKNOWN
    if len(family.members) < 2:
        return "none"
    why = family.why_not.get(id(layer), "")
    if why:
        return f"{len(family.members)}, not shared: {why}"
    return f"{len(family.members)} share x"
