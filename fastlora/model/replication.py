"""`layer_replication`: a deeper model out of a model's own layers, which keep their weights.

Ranges ``[[0, 4], [2, 5]]`` make of layers 0 to 4 the layers 0, 1, 2, 3, 2, 3, 4. Copies share their
base weights; each has its own adapters.

Method: PEFT 0.21.2, ``tuners/tuners_utils.py``, `replicate_layers`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastlora.model.walk import is_lora_layer, is_wrapper
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError

# Where the list of layers is below a model's innermost part: Llama's and GPT-NeoX's, BERT's,
# Falcon's and GPT-2's.
_LISTS = ("layers", "encoder.layer", "h")
# Fields of a model's config that hold a value for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")

Ranges = Sequence[Sequence[int]]


class Replication:
    """A model's list of layers, and the longer one to put in its place.

    Args:
        model: The base model.
        ranges: First layer of each run, and the one behind its last.

    Raises:
        ConfigError: A range is none of the model's layers.
        UnsupportedLayerError: The model's layers are not found.
        AdapterStateError: The layers have adapters.
    """

    def __init__(self, model: nn.Module, ranges: Ranges) -> None:
        self._config: Any = getattr(model, "config", None)
        self._holder, self._name, self._old = _layers_of(model)
        order = [i for start, end in _checked(ranges, len(self._old)) for i in range(start, end)]
        if any(is_lora_layer(m) or is_wrapper(m) for m in self._old.modules()):
            raise AdapterStateError(
                f"layer_replication={list(ranges)} needs layers without adapters; replicate them "
                "with the model's first adapter, or unload() it"
            )
        self._new = nn.ModuleList(_copy_of(self._old[i], at) for at, i in enumerate(order))
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
        """Puts the longer list in place."""
        setattr(self._holder, self._name, self._new)
        for name in self._before:
            setattr(self._config, name, self._settings[name])

    def undo(self) -> None:
        """Puts the model's own list back, and its config's values."""
        setattr(self._holder, self._name, self._old)
        for name, value in self._before.items():
            setattr(self._config, name, value)


@contextlib.contextmanager
def in_place(replication: Replication | None) -> Iterator[None]:
    """Within the block a model has its layers replicated."""
    if replication is None:
        yield
        return
    replication.apply()
    try:
        yield
    finally:
        replication.undo()


def replication_for(model: nn.Module, ranges: Ranges | None) -> Replication | None:
    """Returns what an adapter's config asks for; None where the model is so already.

    Raises:
        ConfigError: The model's layers are replicated in another way.
        ConfigError, UnsupportedLayerError, AdapterStateError: As `Replication`.
    """
    there = _mark_of(model)
    asked = [list(pair) for pair in ranges or ()]
    if there is not None:
        if asked != there:
            raise ConfigError(
                f"layer_replication={ranges!r}, but the adapters of this model replicate its "
                f"layers by {there}; expected the same for all"
            )
        return None
    return Replication(model, asked) if asked else None


def forget_replication(model: nn.Module) -> None:
    """Makes replicated layers the model's own, for adapters to come."""
    if _mark_of(model) is not None:
        holder, name, _ = _layers_of(model)
        del getattr(holder, name).__dict__["replication"]


def _mark_of(model: nn.Module) -> list[list[int]] | None:
    try:
        _, _, layers = _layers_of(model)
    except UnsupportedLayerError:
        return None
    mark: Any = layers.__dict__.get("replication")
    return mark


def _layers_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Returns a model's list of layers, what holds it, and under which name."""
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
                f"layer_replication: a {type(model).__name__} has no list of layers where Llama, "
                "Mistral, Qwen, BERT, Falcon, GPT-NeoX or GPT-2 have theirs "
                f"({', '.join(_LISTS)}); expected such a model, or layer_replication=None"
            )
        part = found
        seen.add(found)


def _checked(ranges: Ranges, count: int) -> Ranges:
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(
                f"layer_replication has the range [{start}, {end}], expected 0 <= first < last "
                f"within the model's {count} layers"
            )
    return ranges


def _copy_of(layer: nn.Module, place: int) -> nn.Module:
    """Returns a copy of a layer that shares its parameters, buffers and the model's config."""
    configs = [m.__dict__["config"] for m in layer.modules() if "config" in m.__dict__]
    shared = [*layer.parameters(), *layer.buffers(), *configs]
    made = copy.deepcopy(layer, {id(part): part for part in shared})
    for module in made.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]  # where its keys are cached
    return made
