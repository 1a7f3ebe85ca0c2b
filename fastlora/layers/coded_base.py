"""A quantised base layer on kernels: its weight for them, in place of a call of its module.

On kernels, where the module does nothing but its product, a layer's `Base` is that of a plain
linear, with a `CodedWeight` for the weight: its forward, siblings, mixed batches and DoRA go as a
plain linear's. Elsewhere the module is called as it is, and the fusion report says why.
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

_UNCOUNTED = "its base weight was made in inference mode, where nobody counts writes"
_CAPTURED = "a CUDA graph is being captured; run a forward before"


class Code(NamedTuple):
    """A base layer's weight for kernels, and its kind."""

    weight: CodedWeight
    kind: Quantised


# A module's kind; and by dtype its weight for kernels, or why there is none.
_Found = tuple[Quantised | None, dict[torch.dtype, Code | str]]


class KeptCode(Kept):
    """What a layer keeps of its base layer's weight while that is the same and unwritten.

    By dtype of x, refusals too: with autocast on and off by turns nothing is made anew. A copied
    layer starts without any.

    Attributes:
        dtype: Of x in the last forward.
        repacked: The product of evaluations on a CPU over a copy of the codes, once there was one.
    """

    dtype: torch.dtype | None
    repacked: Repacked | None
    # Of which module and weight, and what was made of that: in one, for threads.
    _of: tuple[nn.Module | None, Stamp | None, _Found | None]

    def __init__(self) -> None:
        self._captured: list[CodedWeight] = []
        self.forget()

    def find(self, module: nn.Module, dtype: torch.dtype | None) -> Code | str:
        """Returns the weight for a module that gets x in ``dtype``, or why it must be called.

        ``dtype`` is None for what the module computes in.
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
                code = why_not_plain(module) or "its base layer is called as it is"
            elif not may_keep(kind.codes().device):
                return _CAPTURED
            else:
                with torch.inference_mode(False), torch.no_grad():  # for a backward one day
                    weight = kind.coded(dtype)
                code = weight if isinstance(weight, str) else Code(weight, kind)
            made[dtype] = code
        return code

    def base_of(self, code: Code) -> Base:
        """Returns what stands for the module in a forward.

        What a CUDA graph reads stays until `fastlora.refresh`.
        """
        weight, kind = code
        if is_captured(weight) and all(weight is not known for known in self._captured):
            self._captured.append(weight)
        return Base(weight, kind.bias_in(weight.dtype))

    def forget(self, captured: bool = False) -> None:
        """Drops all but what CUDA graphs read, at its address; ``captured`` that too."""
        self.dtype = self.repacked = None
        self._of = None, None, None
        if captured:
            self._captured.clear()

    def evaluated(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Returns what a module that `keeps_layout` makes of x; None where it is to be called."""
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
        """Returns a module's kind, and what was made of its weight; None if nobody counts writes.

        What is of another weight, or was made before a write, is forgotten.

        Raises:
            UnsupportedLayerError: The weight is not quantised yet.
            AttributeError: It is of another version of a library's.
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
    """Returns what stands for a layer's base layer in a forward; None where that must be called."""
    conditions, x = call.conditions, call.x
    # In the batch-invariant mode "auto" means kernels, and the forward says where there are none.
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
    """Returns what a base layer makes of the very tensor that its layer got, by calling it.

    In evaluation few rows on a CPU may take a product over a copy of 4-bit codes (`Repacked`). The
    copy goes with the next gradient, and with what ends codes for kernels.
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
    """Returns what stands for a layer's base layer on kernels, in the dtype it computes in."""
    kept = _kept(layer)
    code = kept.find(layer.get_base_layer(), None)
    return None if isinstance(code, str) else kept.base_of(code)


def why_called(layer: AdaptedLayer) -> str:
    """Returns why a base layer that is no plain linear is called on kernels; empty if it is not."""
    kept = _kept(layer)
    code = kept.find(layer.get_base_layer(), kept.dtype)
    return code if isinstance(code, str) else ""


def reads_codes(layer: AdaptedLayer) -> str:
    """Returns what kernels read of a layer's base weight, and in which dtype they compute.

    Known once `why_called` was asked; empty where the weight is plain, or the base layer called.
    """
    kept: KeptCode | None = layer.__dict__.get("_coded")
    code = "" if kept is None else kept.find(layer.get_base_layer(), kept.dtype)
    if isinstance(code, str):
        return ""
    return f"{code.kind.says}, {code.weight.dtype}".replace("torch.", "")


def as_called(call: LayerCall | MixedCall, base: Base, y: torch.Tensor) -> torch.Tensor:
    """Returns a layer's output in the dtype that its base layer would give it: x's."""
    dtype = call.given.dtype
    if y.dtype is dtype or not isinstance(base.weight, CodedWeight):
        return y
    return y.to(dtype)


def forget_weights(layer: object, captured: bool = False) -> None:
    """Drops what a layer keeps of its weights: norms, and codes for kernels.

    ``captured`` says that no CUDA graph reads them any longer.
    """
    own = layer.__dict__
    own.pop("_dora_norms", None)
    kept = own.get("_coded")
    if isinstance(kept, KeptCode):
        kept.forget(captured)
        if "_shared_input" in own:
            own["_shared_input"].launches.clear()  # a sibling has them too


def _watched(
    module: nn.Module, kind: Quantised | None
) -> tuple[Sequence[torch.Tensor], tuple[Hashable, ...]] | None:
    """Returns what a stamp of a module's weight is made of; None where the weight was replaced."""
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
