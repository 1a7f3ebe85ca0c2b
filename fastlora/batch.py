"""`adapters`: a batch whose rows belong to different adapters, or to none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fastlora import recompute
from fastlora.routing import make_routing, routed
from fastlora.validation import AdapterStateError

if TYPE_CHECKING:
    from fastlora.model import LoraModel


@contextlib.contextmanager
def adapters(
    model: LoraModel,
    ids: Sequence[str | None] | torch.Tensor,
    *,
    seeds: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Within the block, every row of a forward of ``model`` uses its own adapter.

    For serving and for training: a backward may run after the block and in another thread, through
    activation checkpoints too. Blocks nest, and each thread has its own.

    Args:
        model: With its adapters loaded; which of them are active is of no consequence here.
        ids: For each sample a name, or None (or ``"__base__"``) for the base model alone; or an int
            tensor of slots, an index into ``list(model.peft_config)`` for each sample or token, -1
            for none.
        seeds: Dropout seed of each adapter in this forward. With the same seed an adapter drops the
            same elements whatever else is in the batch. Those not given are drawn.

    Raises:
        AdapterNotFoundError: A name or slot that is not there.
        AdapterStateError: An adapter is merged.
        ValueError, TypeError: ``ids`` is not as described.
    """
    tuner = model.base_model
    for module in tuner.routed:
        merged = getattr(module, "merged_adapters", None)
        if merged:
            raise AdapterStateError(
                f"adapters {merged} are merged into the base weights, which every row shares; "
                "call unmerge_adapter() first"
            )
    routing = make_routing(tuner.group, list(model.peft_config), ids, seeds)
    if torch.is_grad_enabled():
        recompute.keep_routing()
    with routed(routing):
        yield
