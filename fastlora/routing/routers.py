"""Routers, which create the routing for a model's batches: a tuner, a pool, or a patch.

Each kind of router registers a function that finds it for a model, so `fastlora.adapters` does not
need to import any of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fastlora.routing.routing import Routing


class AdapterRouter(Protocol):
    """Protocol for a router, which determines the adapter for each row of a batch.

    A router turns the adapter ids of a batch, such as adapter names, into the `Routing` of a block.
    Tuners, pools, and patches implement the protocol.
    """

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Return the `Routing` for the ids and seeds of a batch.

        It is the routing of one block. Resources that the block needs are entered on ``held``,
        which is closed when the block ends.
        """

    def sample_routings(self, adapters: int | None, ranks: Sequence[int] | None) -> list[Routing]:
        """Return example routings for the given number of adapters and the given ranks.

        The routings are used by `warm_up`. Together, the routings cover every kernel used for mixed
        batches. Each routing has one id. ``adapters`` is the largest number of adapters in a batch,
        or None for all adapters. ``ranks`` lists the ranks of adapters, or is None for all ranks.
        """


_FINDERS: list[Callable[[Any], AdapterRouter | None]] = []


def register_adapter_router(
    find_model_router: Callable[[Any], AdapterRouter | None],
) -> Callable[[Any], AdapterRouter | None]:
    """Register a function that finds a model's router.

    `fastlora.adapters` then accepts the models for which the function finds a router.
    ``find_model_router`` returns the router, or None if it finds none. `register_adapter_router`
    returns ``find_model_router`` itself, so it can be used as a decorator. Functions are tried in
    the order of their registration. The order matters for speed: patched models are found by a walk
    over all modules, of which a model with many adapters has tens of thousands, whereas fastlora's
    own models are found by an attribute.
    """
    _FINDERS.append(find_model_router)
    return find_model_router


def router_of(model: object) -> AdapterRouter:
    """Return the adapter router of a model.

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
        f"but got {type(model).__name__}"
    )
