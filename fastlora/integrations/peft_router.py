"""The router for mixed batches in patched PEFT models."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastlora.integrations.peft_layers import FusedForwardMixin, patched_class_for
from fastlora.layers.adapter_factors import ModelAdapterSource
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.active import (
    check_batch_matches_ids,
    discard_unused_results,
    skip_batch_size_check,
)
from fastlora.routing.block import routing_from_parameters, sample_routings_from_parameters
from fastlora.routing.routing import RoutedLayerGroup, Routing, add_to_group
from fastlora.validation import AdapterNotFoundError, AdapterStateError, UnsupportedLayerError

# Held while a router is created or searches for layers: two threads must create only one group.
search_lock = threading.Lock()


class PatchedModelRouter:
    """Router that assigns the rows of a batch to the adapters of a patched PEFT model.

    Each row of a mixed batch is routed to its own adapter. The router is stored on the base model,
    so that a `PeftModel`, its tuner, and the base model share one router.

    Args:
        model: The base model, into which PEFT has injected the LoRA layers.

    Attributes:
        group: The object that identifies the model's layers. It is never replaced, because open
            blocks refer to it. A deep copy or an unpickled model has a group of its own.
        names: The names of the model's adapters, in the order of ``peft_config``.
        routed_layers: The LoRA layers; an empty list until they are looked up.
        batch_check: The forward pre-hook that checks the batch size, or None. A tuner checks the
            batch size itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.group = model, RoutedLayerGroup()
        self.names: tuple[str, ...] = ()
        self.routed_layers: list[Any] = []
        self.batch_check: RemovableHandle | None = None

    def install_batch_check(self) -> None:
        """Install a batch-size check on the base model.

        The batch size must match the number of adapter ids. The check is for calls that do not go
        through a tuner, because a tuner checks the batch size itself. If the model's class has a
        ``generate`` method, the method is overridden on the model with a
        `_GenerateAfterBatchSizeCheck`. A ``generate`` method that was set on the model itself is
        not overridden. If the check is already installed, nothing is changed.
        """
        if self.batch_check is not None:
            return
        model = self.model
        self.batch_check = model.register_forward_pre_hook(
            _check_batch_size_of_base_model, with_kwargs=True
        )
        if hasattr(type(model), "generate") and (
            "generate" not in vars(model) or _has_checked_generate(model)
        ):
            vars(model)["generate"] = _GenerateAfterBatchSizeCheck(model)

    def find_routed_layers(self, root: nn.Module, *, search: bool = True) -> None:
        """Find the model's routed layers, and store them in ``routed_layers``.

        A routed layer is a LoRA layer that selects an adapter for each row of a mixed batch. The
        caller holds `search_lock`.

        Args:
            root: The tuner or the model whose ``peft_config`` names the adapters.
            search: Whether to search the modules even if the adapters have not changed. A tuner
                reports the layers that it adds.

        Raises:
            UnsupportedLayerError: A module with adapters does not support mixed batches.
            AdapterStateError: A `fastlora.adapters` block is open for another model that shares
                layers with this one.
        """
        names: tuple[str, ...] = tuple(getattr(root, "peft_config", None) or ())
        group, before = self.group, self.routed_layers
        # A copy has no row checks yet, and another router may have taken layers into its group.
        joined = group.row_checks is not None and all(
            getattr(layer, "routing_group", None) is group for layer in before
        )
        if not search and before and joined and names == self.names:
            return
        layers: list[tuple[str, Any]] = []
        others: list[tuple[str, Any]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, FusedForwardMixin):
                layers.append((name, module))
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                others.append((name, module))
        found = [layer for _, layer in layers]
        try:
            if not joined or [*map(id, found)] != [*map(id, before)]:
                self._add_to_routed_layer_group(layers)  # even if others fail: blocks may be open
            for name, module in others:
                _raise_mixed_batch_unsupported(name, module, root is not self.model)
        except (UnsupportedLayerError, AdapterStateError):
            self.routed_layers = []
            raise
        patch_activation_checkpointing()  # because adapter_names= opens blocks too
        # Other threads read both without the lock, so they never see an unfinished search.
        self.names, self.routed_layers = names, found

    def _add_to_routed_layer_group(self, layers: list[tuple[str, Any]]) -> None:
        """Add layers to the router's group of routed layers.

        Raises:
            AdapterStateError: A `fastlora.adapters` block is open for another model that contains
                one of the layers.
        """
        for _, layer in layers:
            if (
                layer.routing_group not in (None, self.group)
                and layer.routing_group.has_open_blocks
            ):
                raise AdapterStateError(
                    "a fastlora.adapters() block is open for another model that contains layers of "
                    f"this {type(self.model).__name__}; exit that block first"
                )
        add_to_group(self.group, self.model, layers)

    def update_routed_layers(self, root: nn.Module) -> None:
        """Look up the model's routed layers again.

        Errors are not raised here, because the next batch raises them.
        """
        with search_lock, contextlib.suppress(UnsupportedLayerError, AdapterStateError):
            self.find_routed_layers(root)

    def _check_adapters_have_layers(self, ids: Sequence[str | None] | torch.Tensor) -> None:
        """Raise `AdapterNotFoundError` if ``ids`` contains an adapter that no LoRA layer has.

        Slots on a GPU are not checked.
        """
        present = set[str]().union(*(layer.lora_A for layer in self.routed_layers))
        for slot, name in enumerate(self.names):
            if name in present or (isinstance(ids, torch.Tensor) and ids.is_cuda):
                continue
            if bool((ids == slot).any()) if isinstance(ids, torch.Tensor) else name in ids:
                raise AdapterNotFoundError(
                    f"no LoRA layer has the adapter {name!r}, although peft_config contains it"
                )

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Create the routing that assigns an adapter to each row of a batch.

        The routing is for a `fastlora.adapters` block. See `fastlora.adapters`.
        """
        group, layers, known = self.group, self.routed_layers, self.names
        if self.batch_check is not None:  # Calls without a tuner change layers one by one.
            self._check_adapters_have_layers(ids)
        return routing_from_parameters(
            group, layers, known, ModelAdapterSource, ids, seeds, validate
        )

    def sample_routings(self, adapters: int | None, ranks: Sequence[int] | None) -> list[Routing]:
        """Return example routings for `warm_up`.

        See `fastlora.routing.routers.AdapterRouter`.
        """
        group, layers, known = self.group, self.routed_layers, self.names
        return sample_routings_from_parameters(
            group, layers, known, ModelAdapterSource, adapters, ranks
        )


def router_of_base_model(model: nn.Module) -> PatchedModelRouter | None:
    router: PatchedModelRouter | None = vars(model).get("_fastlora_router")
    return router


def remove_router(base_model: nn.Module) -> None:
    """Remove the router of a base model.

    The batch size check and the ``generate`` method that the router installed on the model are also
    removed. If the model has no router, the model is not changed.
    """
    router = router_of_base_model(base_model)
    if router is None:
        return
    del vars(base_model)["_fastlora_router"]
    if router.batch_check is not None:
        router.batch_check.remove()
    if _has_checked_generate(base_model):
        del vars(base_model)["generate"]


def _raise_mixed_batch_unsupported(name: str, module: nn.Module, has_tuner: bool) -> NoReturn:
    """Raise `UnsupportedLayerError` for a module that does not support mixed batches.

    The module has adapters, but fastlora does not route them. If ``has_tuner`` is True, the
    error message may suggest passing ``adapter_names`` to the model.
    """
    if patched_class_for(type(module)) is not None:  # type: ignore[arg-type]  # as above
        raise UnsupportedLayerError(
            f"{name!r} was added after fastlora.patch() and is not patched; call "
            "fastlora.patch(model) again"
        )
    kind, instead = type(module).__name__, "; pass adapter_names= to the model instead"
    if not isinstance(module, (PeftLoraLayer, AuxiliaryTrainingWrapper)):
        kind = f"{kind} of {type(module).__module__}"  # another method than LoRA
    raise UnsupportedLayerError(
        f"{name!r} is a PEFT {kind}, which fastlora.adapters() does not support"
        f"{instead if has_tuner else ''}"
    )


def _check_batch_size_of_base_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook that checks that the batch size matches the number of adapter ids.

    Raises:
        ValueError: The batch size does not match the number of adapter ids.
    """
    router = router_of_base_model(model)
    if router is not None:
        check_batch_matches_ids(router.group, args, kwargs)


class _GenerateAfterBatchSizeCheck:
    """Wrapper for a model's ``generate`` method that first checks the batch size.

    The number of adapter ids must match the number of samples. Beam search later adds rows to the
    batch, so the forward passes within ``generate`` do not check the batch size.

    A model that has this object as an attribute can be pickled and copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, which also provides the signature."""
        method: Callable[..., Any] = cast(Any, type(self._model)).generate.__get__(self._model)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method.

        Raises:
            ValueError: The batch size does not match the number of adapter ids.
        """
        router = router_of_base_model(self._model)
        if router is None:  # The model is no longer patched.
            return self.__wrapped__(*args, **kwargs)
        check_batch_matches_ids(router.group, args, kwargs, per_sample=True)
        try:
            with skip_batch_size_check():
                return self.__wrapped__(*args, **kwargs)
        finally:
            discard_unused_results(router.group)


def _has_checked_generate(model: nn.Module) -> bool:
    """Return whether the model's ``generate`` has been replaced with one that checks the batch.

    The router has then replaced the method with a `_GenerateAfterBatchSizeCheck`, which first
    checks the batch size.
    """
    return isinstance(vars(model).get("generate"), _GenerateAfterBatchSizeCheck)
