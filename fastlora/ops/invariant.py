"""The batch-invariant mode: a row's result does not depend on what else is in its batch.

``with fastlora.batch_invariant():`` holds for LoRA linears, of one adapter and of a mixed batch,
without gradients. Their rows come out the same, bit for bit, for any number of rows, at any place
among them, beside any adapters, whatever the largest rank, and whether siblings such as q, k and v
shared a shrink. Bit equality is claimed of GPUs only, and only as far as the native test was run.

It holds because one kernel, tile, split of K and plan serve every batch, and no arithmetic of other
rows reaches a row's accumulator (`docs/decisions.md`, Kernels). What cannot keep it raises
`ImplementationError`. What is no LoRA linear (attention, norms, an unadapted lm_head) is PyTorch's,
in the mode as outside.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from fastlora import env
from fastlora.ops.backend import resolve_impl
from fastlora.validation import ImplementationError

_thread = threading.local()
_FROM_THE_START = env.batch_invariant()


def is_batch_invariant() -> bool:
    """Whether the mode is on in this thread."""
    return getattr(_thread, "on", _FROM_THE_START)


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Turns the batch-invariant mode on, or off, for the forwards of this thread in the block.

    ``FASTLORA_BATCH_INVARIANT=1`` in the environment turns it on for all threads, which a forward
    that activation checkpointing repeats in the backward needs. The mode is slower; by how much was
    not measured.

    Args:
        enabled: False turns it off.
    """
    before = is_batch_invariant()
    _thread.on = enabled
    try:
        yield
    finally:
        _thread.on = before


def invariant_impl(impl: str, plan: str, x: torch.Tensor, dropout_p: float = 0.0) -> str:
    """Returns ``"triton"``, the implementation of the mode.

    Raises:
        ImplementationError: What was asked for cannot run in the mode.
        ValueError: ``impl`` does not exist.
    """
    if impl == "eager" or plan not in ("auto", "fused", "invariant"):
        asked = f"impl={impl!r}" if impl == "eager" else f"plan={plan!r}"
        raise ImplementationError(
            f"{asked} cannot run in the batch-invariant mode: PyTorch's GEMMs go by the number of "
            "rows"
        )
    if dropout_p:
        raise ImplementationError(
            f"dropout_p={dropout_p} cannot act in the batch-invariant mode: the mask of a row goes "
            "by its place in the batch; call eval()"
        )
    try:
        return resolve_impl("triton" if impl == "auto" else impl, x)
    except ImplementationError as error:
        raise ImplementationError(
            f"the batch-invariant mode needs the Triton kernels: {error}"
        ) from None


class _Layer(Protocol):
    in_features: int
    out_features: int

    def get_base_layer(self) -> nn.Module: ...


def refuse_in_mode(layer: _Layer, why: str) -> None:
    """Raises `ImplementationError` for a layer that has to run otherwise, if the mode is on."""
    if is_batch_invariant():
        base = layer.get_base_layer()
        raise ImplementationError(
            f"{type(layer).__name__} over {type(base).__name__} ({layer.in_features} to "
            f"{layer.out_features} features) cannot run in the batch-invariant mode: {why}"
        )
