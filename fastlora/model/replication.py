"""`layer_replication`: build a deeper model by repeating a model's layers.

For a model with layers 0 to 4, the ranges ``[[0, 4], [2, 5]]`` give the layers 0, 1, 2, 3, 2, 3, 4.
Copies of a layer share the base weights, but each copy has its own adapters.

The implementation follows `replicate_layers` in PEFT 0.21.2, ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastlora.model.base_modules import is_auxiliary_wrapper, is_lora_layer
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError

# Paths of the list of layers inside the innermost model: for Llama and GPT-NeoX, for BERT, and for
# Falcon and GPT-2.
_LISTS = ("layers", "encoder.layer", "h")
# Fields of a model's config that have one value per layer.
_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")

Ranges = Sequence[Sequence[int]]


class RevertibleLayerReplication:
    """A replication of a model's layers that can be undone.

    The replication replaces the model's list of layers with a longer list that contains copies of
    the layers. The model is not changed before `apply` is called.

    Args:
        model: The base model.
        ranges: Pairs ``[start, end]`` of layer indices, where ``end`` is excluded.

    Raises:
        ConfigError: If a range is not within the model's layers.
        UnsupportedLayerError: If the model's list of layers cannot be found.
        AdapterStateError: If the layers already have adapters.
    """

    def __init__(self, model: nn.Module, ranges: Ranges) -> None:
        self._config: Any = getattr(model, "config", None)
        self._holder, self._name, self._old = _find_layer_list(model)
        order = [i for start, end in _checked(ranges, len(self._old)) for i in range(start, end)]
        if any(is_lora_layer(m) or is_auxiliary_wrapper(m) for m in self._old.modules()):
            raise AdapterStateError(
                f"layer_replication={list(ranges)} can only be applied to layers without adapters; "
                "set it when you add the model's first adapter, or call unload() to remove the "
                "existing adapters"
            )
        self._new = nn.ModuleList(
            _copy_layer_sharing_parameters(self._old[i], at) for at, i in enumerate(order)
        )
        self._new.training = self._old.training
        self._new.__dict__["replication"] = [list(pair) for pair in ranges]
        self._settings = {"num_hidden_layers": len(order)} | {
            name: [values[i] for i in order]
            for name in _BY_LAYER
            if isinstance(values := getattr(self._config, name, None), list)
            and len(values) == len(self._old)
        }
        self._before = {
            name: getattr(self._config, name)
            for name in self._settings
            if hasattr(self._config, name)
        }

    def apply(self) -> None:
        """Apply the replication to the model.

        The model's list of layers is replaced with the list of replicated layers, and the model's
        config is updated.
        """
        setattr(self._holder, self._name, self._new)
        for name in self._before:
            setattr(self._config, name, self._settings[name])

    def undo(self) -> None:
        """Restore the model's original list of layers.

        The original values in the model's config are restored too.
        """
        setattr(self._holder, self._name, self._old)
        for name, value in self._before.items():
            setattr(self._config, name, value)


@contextlib.contextmanager
def temporary_replication(replication: RevertibleLayerReplication | None) -> Iterator[None]:
    """Temporarily apply layer replication to a model.

    The replication is undone at the end of the ``with`` block. If ``replication`` is None, nothing
    is done.
    """
    if replication is None:
        yield
        return
    replication.apply()
    try:
        yield
    finally:
        replication.undo()


def plan_layer_replication(
    model: nn.Module, ranges: Ranges | None
) -> RevertibleLayerReplication | None:
    """Plan the replication of a model's layers according to the given ranges.

    An adapter's config specifies the ranges. The model is not changed before
    `RevertibleLayerReplication.apply` is called, and the replication can be undone. The result is
    None if the config requires no replication, or if the model's layers are already replicated with
    the same ranges.

    Args:
        model: The base model.
        ranges: The config's ``layer_replication``.

    Raises:
        ConfigError: If the model's layers are already replicated with different ranges.
        ConfigError, UnsupportedLayerError, AdapterStateError: See `RevertibleLayerReplication`.
    """
    there = _recorded_ranges(model)
    asked = [list(pair) for pair in ranges or ()]
    if there is not None:
        if asked != there:
            raise ConfigError(
                f"layer_replication={ranges!r}, but the layers of this model are already "
                f"replicated with {there}; expected the same value for all adapters"
            )
        return None
    return RevertibleLayerReplication(model, asked) if asked else None


def clear_layer_replication_record(model: nn.Module) -> None:
    """Remove the record of a model's layer replication.

    The replicated layers then count as the model's original layers. Adapters that are added later
    do not need ``layer_replication`` in their configs.
    """
    if _recorded_ranges(model) is not None:
        holder, name, _ = _find_layer_list(model)
        del getattr(holder, name).__dict__["replication"]


def _recorded_ranges(model: nn.Module) -> list[list[int]] | None:
    try:
        _, _, layers = _find_layer_list(model)
    except UnsupportedLayerError:
        return None
    ranges: Any = layers.__dict__.get("replication")
    return ranges


def _find_layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find a model's list of layers.

    Returns:
        A tuple of the list's parent module, the name of the list's attribute, and the list.
    """
    part, seen = model, {model}
    while True:
        for path in _LISTS:
            head, _, name = path.rpartition(".")
            holder: Any = getattr(part, head, None) if head else part
            layers = getattr(holder, name, None)
            if isinstance(holder, nn.Module) and isinstance(layers, nn.ModuleList):
                return holder, name, layers
        names = ("model", "bert", getattr(part, "base_model_prefix", None) or "model")
        inner = (getattr(part, name, None) for name in names)
        found = next((m for m in inner if isinstance(m, nn.Module) and m not in seen), None)
        if found is None:
            raise UnsupportedLayerError(
                f"layer_replication could not find the list of layers in a {type(model).__name__}; "
                "it supports models such as Llama, Mistral, Qwen, BERT, Falcon, GPT-NeoX, and "
                f"GPT-2, whose list of layers has one of the names {', '.join(_LISTS)}. Use such a "
                "model, or set layer_replication=None"
            )
        part = found
        seen.add(found)


def _checked(ranges: Ranges, count: int) -> Ranges:
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(
                f"layer_replication contains the range [{start}, {end}], expected "
                f"0 <= start < end <= {count} (the number of layers in the model)"
            )
    return ranges


def _copy_layer_sharing_parameters(layer: nn.Module, new_index: int) -> nn.Module:
    """Return a copy of a layer that shares the parameters of the original.

    The copy also shares the buffers and configs of the original.

    Args:
        layer: The layer to copy.
        new_index: The index of the copy in the new list of layers.
    """
    configs = [m.__dict__["config"] for m in layer.modules() if "config" in m.__dict__]
    shared = [*layer.parameters(), *layer.buffers(), *configs]
    made = copy.deepcopy(layer, {id(part): part for part in shared})
    for module in made.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = new_index  # type: ignore[assignment]  # the layer's KV-cache index
    return made
