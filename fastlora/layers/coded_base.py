"""Quantized base layers on kernels, which read the quantized weight instead of calling the module.

If kernels run and the module computes only a matrix product with a bias, the layer's `Base` is like
that of a plain linear, with a `CodedWeight` as its weight. The forward pass, shared inputs, mixed
batches, and DoRA then work as for a plain linear. Otherwise the module is called unchanged, and the
fusion report gives the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.coded_weight import CodedWeight
from fastlora.layers.bases import why_hooked, why_not_plain
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.norms import may_keep
from fastlora.layers.quantised import (
    Quantised,
    Repacked,
    keeps_layout,
    quantised,
    warn_of_repacked,
)
from fastlora.ops.factors import Base
from fastlora.routing.in_force import is_captured
from fastlora.validation import UnsupportedLayerError
from fastlora.weight_marks import Kept, Stamp, stamp_of

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer

_UNCOUNTED = "its base weight was created in inference mode, in which PyTorch does not count writes"
_CAPTURED = "a CUDA graph is being captured; run a forward pass before the capture"


class Code(NamedTuple):
    """A quantized base weight in the form that kernels read, and its kind of quantization."""

    weight: CodedWeight
    kind: Quantised


# A module's quantization kind, and by dtype its weight for kernels or the fallback reason.
_Found = tuple[Quantised | None, dict[torch.dtype, Code | str]]


class KeptCode(Kept):
    """A layer's cache of its quantized base weight for kernels, valid until the weight changes.

    Entries are stored by dtype of x, and include fallback reasons. Switching autocast on and off
    therefore recomputes nothing. A copied layer starts with an empty cache.

    Attributes:
        dtype: Dtype of x in the last forward pass.
        repacked: The product over a copy of the codes, for evaluation on a CPU; None until it is
            first used.
    """

    dtype: torch.dtype | None
    repacked: Repacked | None
    # The module, its weight's stamp, and the entries: one tuple, so that threads read it
    # atomically.
    _of: tuple[nn.Module | None, Stamp | None, _Found | None]

    def __init__(self) -> None:
        self._captured: list[CodedWeight] = []
        self.forget()

    def find(self, module: nn.Module, dtype: torch.dtype | None) -> Code | str:
        """Return a module's weight for x in ``dtype``, or the reason why the module is called.

        If ``dtype`` is None, the dtype that the module computes in is used.
        """
        if dtype is not None:
            self.dtype = dtype
        why = why_hooked(module)
        if why:
            return why
        try:
            kept = self._look(module)
        except (UnsupportedLayerError, AttributeError) as error:
            return str(error)
        if kept is None:
            return _UNCOUNTED
        kind, made = kept
        dtype = dtype or (kind and kind.computes_in()) or next(reversed(made), torch.float16)
        code = made.get(dtype)
        if code is None:
            if kind is None:
                code = why_not_plain(module) or "its base layer runs unchanged"
            elif not may_keep(kind.codes().device):
                return _CAPTURED
            else:
                # A later backward pass may need it.
                with torch.inference_mode(False), torch.no_grad():
                    weight = kind.coded(dtype)
                code = weight if isinstance(weight, str) else Code(weight, kind)
            made[dtype] = code
        return code

    def base_of(self, code: Code) -> Base:
        """Return the `Base` that replaces a call of the module in a forward pass.

        A weight that a CUDA graph reads is kept until `fastlora.refresh`.
        """
        weight, kind = code
        if is_captured(weight) and all(weight is not known for known in self._captured):
            self._captured.append(weight)
        return Base(weight, kind.bias_in(weight.dtype))

    def forget(self, captured: bool = False) -> None:
        """Clear the cache; if ``captured`` is set, also release weights that CUDA graphs read."""
        self.dtype = self.repacked = None
        self._of = None, None, None
        if captured:
            self._captured.clear()

    def evaluated(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the output of a module computed from repacked codes, or None if unsupported.

        The module is one for which `keeps_layout` is true.
        """
        try:
            if self._look(module) is None:
                return None
        except (UnsupportedLayerError, AttributeError):
            return None
        repacked = self.repacked
        if repacked is None:
            repacked = self.repacked = Repacked(module)
        return None if not repacked.takes(x) or why_hooked(module) else repacked(x)

    def _look(self, module: nn.Module) -> _Found | None:
        """Return a tuple (kind, cached entries), or None if writes cannot be detected.

        Entries of another weight, or from before a write, are dropped.

        Raises:
            UnsupportedLayerError: The weight is not quantized yet.
            AttributeError: The weight is from an unsupported version of a library.
        """
        known, stamp, kept = self._of
        if kept is not None and stamp is not None and known is module:
            watched = _watched(module, kept[0])
            if watched is not None and stamp.holds(*watched):
                return kept
        self._of, self.repacked = (None, None, None), None
        kind = quantised(module)
        watched = _watched(module, kind)
        stamp, kept = None if watched is None else stamp_of(*watched), (kind, {})
        self._of = module, stamp, kept
        return None if stamp is None else kept


def coded_base(call: LayerCall | MixedCall) -> Base | None:
    """Return a `Base` with the quantized weight, or None if the base layer must be called."""
    conditions, x = call.conditions, call.x
    # In the batch-invariant mode "auto" means kernels, and the forward raises if they cannot run.
    runs = conditions.impl == "triton" or (conditions.invariant and conditions.impl == "auto")
    if not runs or conditions.compiling or conditions.tracing:
        return None
    kept = _kept(call.layer)
    code = kept.find(call.layer.get_base_layer(), x.dtype)
    if isinstance(code, str) or code.weight.device != x.device:
        return None
    if code.weight.shape[1] != x.shape[-1]:
        return None
    if x.dtype is not call.given.dtype and not code.kind.casts:
        return None
    return kept.base_of(code)


def call_base(
    call: LayerCall | MixedCall, module: nn.Module, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Call a base layer with the input that its LoRA layer was called with.

    In evaluation on a CPU, the output for a few rows may instead come from a product with a copy of
    the 4-bit codes (`Repacked`). The copy is dropped by the next call with gradients, or when the
    cached weight for kernels is cleared.
    """
    layer, x, conditions = call.layer, call.given, call.conditions
    made: torch.Tensor | None = None
    if conditions.compiling or conditions.tracing:
        pass
    elif not keeps_layout(module):
        warn_of_repacked(layer, module, x)
    elif module.training or x.requires_grad:
        if "_coded" in layer.__dict__:
            _kept(layer).repacked = None
    elif not (args or kwargs) and type(x) is torch.Tensor:
        made = _kept(layer).evaluated(module, x)
    return module(x, *args, **kwargs) if made is None else made


def sibling_base(layer: AdaptedLayer) -> Base | None:
    """Return a `Base` with a layer's quantized weight in its own dtype, or None if unsupported."""
    kept = _kept(layer)
    code = kept.find(layer.get_base_layer(), None)
    return None if isinstance(code, str) else kept.base_of(code)


def why_called(layer: AdaptedLayer) -> str:
    """Return the reason why a layer's base layer must be called, or an empty string.

    The base layer is not a plain linear.
    """
    kept = _kept(layer)
    code = kept.find(layer.get_base_layer(), kept.dtype)
    return code if isinstance(code, str) else ""


def reads_codes(layer: AdaptedLayer) -> str:
    """Return a text with the quantization that kernels read and the dtype they compute in.

    `why_called` must have been called before. The text is empty if the weight is plain or if the
    base layer is called.
    """
    kept: KeptCode | None = layer.__dict__.get("_coded")
    code = "" if kept is None else kept.find(layer.get_base_layer(), kept.dtype)
    if isinstance(code, str):
        return ""
    return f"{code.kind.says}, {code.weight.dtype}".replace("torch.", "")


def as_called(call: LayerCall | MixedCall, base: Base, y: torch.Tensor) -> torch.Tensor:
    """Return ``y`` in the dtype that a call of the base layer would return, which is that of x."""
    dtype = call.given.dtype
    if y.dtype is dtype or not isinstance(base.weight, CodedWeight):
        return y
    return y.to(dtype)


def forget_weights(layer: object, captured: bool = False) -> None:
    """Clear a layer's cached DoRA norms and its cached quantized weight for kernels.

    If ``captured`` is set, weights that CUDA graphs read are released too.
    """
    own = layer.__dict__
    own.pop("_dora_norms", None)
    kept = own.get("_coded")
    if isinstance(kept, KeptCode):
        kept.forget(captured)
        if "_shared_input" in own:
            own["_shared_input"].launches.clear()  # Launches of the group hold the weights too.


def _watched(
    module: nn.Module, kind: Quantised | None
) -> tuple[Sequence[torch.Tensor], tuple[Hashable, ...]] | None:
    """Return the arguments for `stamp_of` a module's weight, or None if the weight was replaced."""
    if kind is None:
        weight = module._parameters.get("weight")
        identity: tuple[Any, ...] = id(weight), type(weight)
        return (), identity
    try:
        return (kind.watched(), (kind.settings(),)) if kind.is_there() else None
    except AttributeError as error:
        raise AttributeError(kind.lacks(error)) from error


def _kept(layer: AdaptedLayer) -> KeptCode:
    own = layer.__dict__
    kept: KeptCode | None = own.get("_coded")
    if kept is None:
        kept = own["_coded"] = KeptCode()
    return kept
