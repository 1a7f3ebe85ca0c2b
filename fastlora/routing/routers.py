"""Routers, which make the routing of a model's batches: a tuner, a pool, or a patch.

Each router registers a function that finds it, so `fastlora.adapters` imports none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fastlora.routing.routing import Routing


class Router(Protocol):
    """Makes the routings of a model."""

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Return the routing of one block; ``held`` gets what must stay alive during the block."""


_FINDERS: list[Callable[[Any], Router | None]] = []


def register_router(find: Callable[[Any], Router | None]) -> Callable[[Any], Router | None]:
    """Register a function that returns a model's router or None.

    Functions are tried in the order of their registration. Patched models are found by a walk over
    all modules, and a model with many adapters has tens of thousands. fastlora's own models are
    found by an attribute.
    """
    _FINDERS.append(find)
    return find


def router_of(model: object) -> Router:
    """Return the router of a model.

    Raises:
        UnsupportedLayerError: A layer of the model does not support mixed batches.
        TypeError: The model has no router.
    """
    for find in _FINDERS:
        router = find(model)
        if router is not None:
            return router
    raise TypeError(
        "adapters() expects a LoraModel, a model with an AdapterPool, or a patched PEFT model, "
        f"got a {type(model).__name__}"
    )
