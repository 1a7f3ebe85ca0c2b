"""The kinds of modules that adapters go on: a file each, which registers its `Kind`.

Whoever needs to know what a module is, and which adapter fits it, asks `kind_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.base import LoraLayer

Shapes = dict[str, tuple[int, ...]]

# What does for PEFT's layers what none of ours does.
INSTEAD = "make it with peft.get_peft_model(model, config), then fastlora.patch(model)"


class Settings(NamedTuple):
    """What an adapter is to be on one module: the arguments of `LoraLayer.add_adapter`."""

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
    """A kind of module that adapters go on.

    Attributes:
        name: What messages call it.
        takes: Whether a module, without adapters, is of the kind.
        wrap: Makes the layer that holds a module's adapters, with none yet.
        shapes: What a file holds of an adapter on a module: name below the module to shape.
        check: Raises `UnsupportedLayerError` where an adapter cannot be on a module as asked, and
            says what can.
        drops: Whether lora_dropout acts there.
        of_peft: What to know of an adapter there that PEFT has trained; empty for nothing.
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
    """Registers a kind; of those that take a module the last one registered has it."""
    _KINDS.insert(0, kind)
    return kind


def kind_of(module: nn.Module, custom: Mapping[type, type] | None = None) -> Kind | None:
    """Returns the kind of a module without adapters; None where adapters cannot go on it.

    Args:
        module: The base layer.
        custom: Class of a module to the user's class of its LoRA layer; these come first.
    """
    for base_class, layer_class in (custom or {}).items():
        if isinstance(module, base_class):
            return _custom(layer_class)
    for kind in _KINDS:
        if kind.takes(module):
            return kind
    return None


def known_kinds() -> list[str]:
    """Returns what kinds of modules adapters go on, for messages."""
    return sorted({kind.name for kind in _KINDS})


def linear_shapes(k: int, n: int, asked: Settings) -> Shapes:
    """Returns `Kind.shapes` of a linear from k features to n."""
    shapes: Shapes = {"lora_A.weight": (asked.r, k), "lora_B.weight": (n, asked.r)}
    if asked.lora_bias:
        shapes["lora_B.bias"] = (n,)
    if asked.use_dora:
        shapes["lora_magnitude_vector"] = (n,)
    return shapes


def _custom(layer_class: type) -> Kind:
    """Returns the kind of modules that a class of the user's makes LoRA layers for."""

    def check(module: nn.Module, asked: Settings) -> None:
        from fastlora.layers.base import LoraLayer

        if not issubclass(layer_class, LoraLayer):
            raise UnsupportedLayerError(
                f"{layer_class.__name__}, registered for it, is no subclass of "
                f"fastlora.layers.LoraLayer; for one of PEFT's, {INSTEAD}"
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
                f"{layer_class.__name__} to have a static method file_shapes(module, settings)"
            )
        k, n = (size for size in features if isinstance(size, int))
        return linear_shapes(k, n, asked)

    return Kind(layer_class.__name__, lambda module: True, layer_class, shapes, check)
