"""Activation checkpoints in mixed batches: a recomputed forward has the routing of the first.

A checkpoint runs a function again in the backward, when the block that set the routing has closed
and maybe in another thread. So what `torch.utils.checkpoint` keeps to run again is the function
with its routing, for either kind of checkpoint and whoever calls it (transformers, a user). torch
has no hook for this: the two names that its `checkpoint` looks up at each call are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from fastlora.routing.in_force import only_routed, open_routings


@functools.cache
def keep_routing() -> None:
    """Makes checkpoints keep the routing in force, from now on in this process."""
    reentrant = torch_checkpoint.CheckpointFunction
    other = torch_checkpoint._checkpoint_without_reentrant_generator

    class CheckpointFunction(reentrant):  # type: ignore[misc, valid-type]  # made once
        """torch's, whose function keeps its routing."""

        @classmethod
        def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(_with_routing(function), *args)

    @functools.wraps(other)
    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return other(_with_routing(function), *args, **kwargs)

    module: Any = torch_checkpoint
    module.CheckpointFunction = CheckpointFunction
    module._checkpoint_without_reentrant_generator = generator


def _with_routing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` as it runs now: also where there is no routing now."""
    routings = open_routings()

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with only_routed(routings):
            return function(*args, **kwargs)

    return run
