"""Who makes the routing of a model's batches: its tuner, its pool, or what patched it.

Each registers how to find itself, so that `fastlora.adapters` imports none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fastlora.routing.routing import Routing


class Router(Protocol):
    """What makes routings for a model."""

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Returns the routing of one block; ``held`` takes what must last as long as the block."""


_FINDERS: list[Callable[[Any], Router | None]] = []


def register_router(find: Callable[[Any], Router | None]) -> Callable[[Any], Router | None]:
    """Registers how to find the router of a model.

    The earliest registered is asked first: patched models are found by a walk over all modules, of
    which a model with many adapters has tens of thousands, and ours by an attribute.
    """
    _FINDERS.append(find)
    return find


def router_of(model: object) -> Router:
    """Returns the router of a model.

    Raises:
        UnsupportedLayerError: A layer of it cannot take part in a mixed batch.
        TypeError: The model has none.
    """
    for find in _FINDERS:
        router = find(model)
        if router is not None:
            return router
    raise TypeError(
        "adapters() takes a LoraModel, a model with an AdapterPool or a patched PEFT model, got a "
        f"{type(model).__name__}"
    )
