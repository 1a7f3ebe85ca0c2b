"""Layer kinds: the kinds of modules that adapters support, each registered in its own file.

`kind_of` returns the kind of a module, which describes the adapters that fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.base import LoraLayer

Shapes = dict[str, tuple[int, ...]]

# The alternative for modules that PEFT supports and fastlora's own layers do not.
INSTEAD = (
    "create the layer with peft.get_peft_model(model, config), then call fastlora.patch(model)"
)


class Settings(NamedTuple):
    """The settings of an adapter on one module: the arguments of `LoraLayer.add_adapter`."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    init_config: object | None = None
    from_file: bool = False


class Kind(NamedTuple):
    """A kind of module that adapters support.

    Attributes:
        name: Name of the kind, for messages.
        takes: Returns whether a module without adapters is of this kind.
        wrap: Creates the layer for a module's adapters, without any adapter.
        shapes: Returns the shapes of an adapter's tensors in a file, by name relative to the
            module.
        check: Raises `UnsupportedLayerError` if a module does not support the settings, with a
            message that says which settings it supports.
        drops: Whether lora_dropout has an effect.
        of_peft: A note on adapters that PEFT has trained on this kind, or an empty string.
    """

    name: str
    takes: Callable[[nn.Module], bool]
    wrap: Callable[[Any], LoraLayer]
    shapes: Callable[[nn.Module, Settings], Shapes]
    check: Callable[[nn.Module, Settings], None]
    drops: bool = True
    of_peft: str = ""


LINEAR = "linear layers"
_KINDS: list[Kind] = []


def register_kind(kind: Kind) -> Kind:
    """Register a layer kind; if several kinds accept a module, the last one registered wins."""
    _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module, custom: Mapping[type, type] | None = None) -> Kind | None:
    """Return the `Kind` of a module without adapters, or None if adapters do not support it.

    Args:
        module: The base layer.
        custom: Maps a module class to the user's LoRA layer class for it; takes precedence.
    """
    for base_class, layer_class in (custom or {}).items():
        if isinstance(module, base_class):
            return _custom(layer_class)
    for kind in _KINDS:
        if kind.takes(module):
            return kind
    return None


def known_kinds() -> list[str]:
    """Return a sorted list of the names of all layer kinds, for messages."""
    return sorted({kind.name for kind in _KINDS})


def linear_shapes(k: int, n: int, asked: Settings) -> Shapes:
    """Return the shapes of an adapter's tensors on a linear with k input and n output features."""
    shapes: Shapes = {"lora_A.weight": (asked.r, k), "lora_B.weight": (n, asked.r)}
    if asked.lora_bias:
        shapes["lora_B.bias"] = (n,)
    if asked.use_dora:
        shapes["lora_magnitude_vector"] = (n,)
    return shapes


def _custom(layer_class: type) -> Kind:
    """Return the layer kind for a LoRA layer class that the user has registered."""

    def check(module: nn.Module, asked: Settings) -> None:
        from fastlora.layers.base import LoraLayer

        if not issubclass(layer_class, LoraLayer):
            raise UnsupportedLayerError(
                f"{layer_class.__name__}, the class registered for it, is not a subclass of "
                f"fastlora.layers.LoraLayer; for a PEFT layer class, {INSTEAD}"
            )

    def shapes(module: nn.Module, asked: Settings) -> Shapes:
        own: Callable[[nn.Module, Settings], Shapes] | None
        own = getattr(layer_class, "file_shapes", None)
        if own is not None:
            return own(module, asked)
        features = [getattr(module, name, None) for name in ("in_features", "out_features")]
        if not all(isinstance(size, int) for size in features):
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no in_features and out_features; expected "
                f"{layer_class.__name__} to define a static method file_shapes(module, settings)"
            )
        k, n = (size for size in features if isinstance(size, int))
        return linear_shapes(k, n, asked)

    return Kind(layer_class.__name__, lambda module: True, layer_class, shapes, check)
