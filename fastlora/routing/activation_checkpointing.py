"""Activation checkpointing in mixed batches: recomputation uses the original routing.

A checkpoint runs its function again in the backward pass. By then, the `fastlora.adapters` block
that set the routing may have ended, and the backward pass may run in another thread. Therefore the
function that `torch.utils.checkpoint` stores is wrapped together with its routing. This works for
both kinds of checkpoints and for every caller (transformers, user code). torch has no hook for it,
so the two names that its `checkpoint` looks up at each call are replaced. One of them depends on
the version of torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from fastlora.routing.active import active_routings, replace_active_routings


@functools.cache
def patch_activation_checkpointing() -> None:
    """Patch `torch.utils.checkpoint` so that recomputation uses the original routing.

    The patch applies to all checkpoints that the process creates afterwards. It is applied when a
    model gets LoRA layers, because activations of a forward pass before the first block may be
    recomputed inside a block.
    """
    module: Any = torch_checkpoint
    reentrant = module.CheckpointFunction
    name = "_checkpoint_without_reentrant_generator"
    if hasattr(module, f"{name}_impl"):  # torch 2.14 and newer
        name = f"{name}_impl"
    other = getattr(module, name)

    class CheckpointFunction(reentrant):  # type: ignore[misc, valid-type]  # made once
        """An autograd function for activation checkpointing that keeps the original routing.

        The class replaces torch's `CheckpointFunction`. Activations are recomputed with the routing
        that was active in the original forward pass.
        """

        @classmethod
        def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(_with_routing(function, runs_first=True), *args)

    @functools.wraps(other)
    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return other(_with_routing(function), *args, **kwargs)

    module.CheckpointFunction = CheckpointFunction
    setattr(module, name, generator)
    importer = sys.modules.get("torch.distributed._composable.checkpoint_activation")
    if hasattr(importer, name):  # It has imported the function by its name.
        setattr(importer, name, generator)


def _with_routing(function: Callable[..., Any], runs_first: bool = False) -> Callable[..., Any]:
    """Return a wrapper that recomputes a function with the routings of the original forward pass.

    The wrapper runs ``function`` with the routings that are active when `_with_routing` is called,
    if any. Each recomputation counts the calls of layers from the same numbers, so that it has the
    dropout masks of the original forward pass.

    Args:
        function: The function of the checkpoint.
        runs_first: Whether the first run of the wrapper is the original forward pass itself.
    """
    routings = active_routings()
    for routing in routings:
        if routing.needs_missing_seeds:  # A draw within the checkpoint would not be repeated.
            routing.draw_missing_seeds()
    calls = [dict(routing.dropout_calls) for routing in routings]

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs_first
        if runs_first:
            runs_first = False
            return function(*args, **kwargs)
        copies = zip(routings, map(dict, calls), strict=True)
        own = tuple(replace(r, dropout_calls=c, recomputes=True) for r, c in copies)
        with replace_active_routings(own):
            return function(*args, **kwargs)

    return run
