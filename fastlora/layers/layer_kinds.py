"""Layer kinds: the kinds of modules that adapters support, each registered in its own file.

`layer_kind_of` returns the kind of a module, which describes the adapters that fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastlora.validation import UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.layers.lora_layer import LoraLayer

TensorShapes = dict[str, tuple[int, ...]]

# The alternative for modules that PEFT supports and fastlora's own layers do not.
PEFT_LAYER_ALTERNATIVE = (
    "create the layer with peft.get_peft_model(model, config), then call fastlora.patch(model)"
)


class ParameterRankAndAlpha(NamedTuple):
    """The rank and alpha that an adapter uses for one parameter of a module.

    The adapter's other settings are the same for all parameters of the module.

    Attributes:
        name: The name of the parameter, relative to the module.
        r: The rank for this parameter.
        lora_alpha: The alpha for this parameter.
    """

    name: str
    r: int
    lora_alpha: float


class LayerAdapterSettings(NamedTuple):
    """An adapter's settings for one layer.

    They are passed to `LoraLayer.add_adapter`. ``parameters`` lists the parameters that
    ``target_parameters`` selects, in the order of ``named_parameters()``. If it is empty, the
    adapter is on the module as a whole.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    init_config: object | None = None
    from_file: bool = False
    parameters: tuple[ParameterRankAndAlpha, ...] = ()


class LayerKind(NamedTuple):
    """Description of a kind of base layer that supports adapters.

    The description states which modules are of the kind, how the LoRA layer for such a module is
    created, and which shapes an adapter's tensors have.

    Attributes:
        name: Name of the kind, for messages.
        matches: Returns whether a module without adapters is of this kind.
        wrap: Creates the LoRA layer for a module. The new layer has no adapters yet.
        shapes: Returns the shapes of an adapter's tensors in a file, by name relative to the
            module.
        check: Raises `UnsupportedLayerError` if a module does not support the settings, with a
            message that says which settings it supports.
        uses_dropout: Whether lora_dropout has an effect.
        peft_note: A note on adapters that PEFT has trained on this kind, or an empty string.
        adapts_parameters: Whether the kind is for single parameters of a module. Adapters on these
            modules list the parameters in ``LayerAdapterSettings.parameters``.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    wrap: Callable[[Any], LoraLayer]
    shapes: Callable[[nn.Module, LayerAdapterSettings], TensorShapes]
    check: Callable[[nn.Module, LayerAdapterSettings], None]
    uses_dropout: bool = True
    peft_note: str = ""
    adapts_parameters: bool = False


LINEAR = "linear layers"
_KINDS: list[LayerKind] = []


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Register a layer kind.

    The new kind takes precedence over the kinds that were registered before. Returns ``kind``.
    """
    _KINDS.insert(0, kind)
    return kind


def layer_kind_of(module: nn.Module, custom: Mapping[type, type] | None = None) -> LayerKind | None:
    """Return the `LayerKind` of a base layer.

    Returns None if the base layer does not support adapters.

    Args:
        module: The base layer.
        custom: Maps a module class to the user's LoRA layer class for it; takes precedence.
    """
    for base_class, layer_class in (custom or {}).items():
        if isinstance(module, base_class):
            return _kind_of_custom_layer(layer_class)
    return next((k for k in _KINDS if not k.adapts_parameters and k.matches(module)), None)


def parameter_kind_of(module: nn.Module) -> LayerKind | None:
    """Return the `LayerKind` for adapting parameters of a module.

    Returns None if no kind matches the module.
    """
    return next((k for k in _KINDS if k.adapts_parameters and k.matches(module)), None)


def layer_kind_names() -> list[str]:
    """Return a list of the names of all layer kinds.

    The list is sorted and is for messages.
    """
    return sorted({kind.name for kind in _KINDS})


def linear_adapter_shapes(k: int, n: int, settings: LayerAdapterSettings) -> TensorShapes:
    """Return a dict of the shapes of an adapter's tensors for a linear layer.

    The layer has ``k`` input features and ``n`` output features. The dict is keyed by the tensors'
    names in adapter files.
    """
    shapes: TensorShapes = {"lora_A.weight": (settings.r, k), "lora_B.weight": (n, settings.r)}
    if settings.lora_bias:
        shapes["lora_B.bias"] = (n,)
    if settings.use_dora:
        shapes["lora_magnitude_vector"] = (n,)
    return shapes


def _kind_of_custom_layer(lora_layer_class: type) -> LayerKind:
    """Return the layer kind for a custom LoRA layer class.

    A custom class is one that the user has registered for modules of some type.
    """

    def check(module: nn.Module, settings: LayerAdapterSettings) -> None:
        from fastlora.layers.lora_layer import LoraLayer

        if not issubclass(lora_layer_class, LoraLayer):
            raise UnsupportedLayerError(
                f"{lora_layer_class.__name__}, the class registered for this module, is not a "
                "subclass of fastlora.layers.LoraLayer; for a PEFT layer class, "
                f"{PEFT_LAYER_ALTERNATIVE}"
            )

    def shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
        own: Callable[[nn.Module, LayerAdapterSettings], TensorShapes] | None
        own = getattr(lora_layer_class, "file_shapes", None)
        if own is not None:
            return own(module, settings)
        features = [getattr(module, name, None) for name in ("in_features", "out_features")]
        if not all(isinstance(size, int) for size in features):
            raise UnsupportedLayerError(
                f"{type(module).__name__} lacks in_features or out_features; expected "
                f"{lora_layer_class.__name__} to define a static method "
                "file_shapes(module, settings)"
            )
        k, n = (size for size in features if isinstance(size, int))
        return linear_adapter_shapes(k, n, settings)

    return LayerKind(
        lora_layer_class.__name__, lambda module: True, lora_layer_class, shapes, check
    )
