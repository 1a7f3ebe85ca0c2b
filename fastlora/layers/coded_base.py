"""A quantised base layer on kernels: its weight for them, in place of a call of its module.

On kernels, where the module does nothing but its product, a layer's `Base` is that of a plain
linear, with a `CodedWeight` for the weight: its forward, siblings, mixed batches and DoRA go as a
plain linear's. Elsewhere the module is called as it is, and the fusion report says why.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from fastlora.coded_weight import CodedWeight
from fastlora.layers.bases import why_hooked, why_not_plain
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.norms import may_keep
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.quantised import Quantised, quantised
from fastlora.ops.factors import Base
from fastlora.routing.in_force import is_captured
from fastlora.validation import UnsupportedLayerError

_UNCOUNTED = "its base weight was made in inference mode, where nobody counts writes"
_CAPTURED = "a CUDA graph is being captured; run a forward before"


class KeptCode:
    """What a layer keeps of its base layer's weight while that is the same and unwritten.

    A copied layer starts without any.

    Attributes:
        weight: For kernels; None where the module must be called.
        why: Why it must.
        found: The kind of the weight; None where there is none.
    """

    def __init__(self) -> None:
        self.weight: CodedWeight | None = None
        self.why = ""
        self.found: Quantised | None = None
        self._captured: list[CodedWeight] = []
        self._for: tuple[nn.Module, Hashable, torch.dtype] | None = None

    def find(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Finds them for a module that gets x in ``dtype``; None is what it computes in."""
        why = why_hooked(module)
        try:
            if not why and self._holds(module, dtype):
                return
            self.weight, self._for = None, None
            self.why = why or self._code(module, dtype)
        except UnsupportedLayerError as error:  # not quantised yet
            self.weight, self.found, self.why = None, None, str(error)
        except AttributeError as error:  # another version of a library's
            self.weight, found = None, self.found
            self.why = str(error) if found is None else found.lacks(error)

    def base(self) -> Base | None:
        """Returns what stands for the module in a forward, or None."""
        weight, found = self.weight, self.found  # once: another thread may find anew
        return None if weight is None or found is None else self.base_of(weight, found)

    def base_of(self, weight: CodedWeight, found: Quantised) -> Base:
        """`base` of what was found; what a CUDA graph reads stays until `fastlora.refresh`."""
        if is_captured(weight) and all(weight is not known for known in self._captured):
            self._captured.append(weight)
        return Base(weight, found.bias_in(weight.dtype))

    def forget(self) -> None:
        """Drops all but what CUDA graphs read, at its address."""
        self.weight, self.why, self.found, self._for = None, "", None, None

    def _holds(self, module: nn.Module, dtype: torch.dtype | None) -> bool:
        if self._for is None or self.found is None:
            return False
        known, stamp, own = self._for
        return (
            module is known
            and (dtype is None or dtype is own)
            and self.found.is_there()
            and self.found.stamp() == stamp
        )

    def _code(self, module: nn.Module, dtype: torch.dtype | None) -> str:
        """Makes the weight for kernels; returns why there is none."""
        self.found = found = quantised(module)
        if found is None:
            return why_not_plain(module) or "its base layer is called as it is"
        stamp, dtype = found.stamp(), dtype or found.computes_in() or torch.float16
        if stamp is None:
            return _UNCOUNTED
        if not may_keep(found.codes().device):
            return _CAPTURED
        with torch.inference_mode(False), torch.no_grad():  # for a backward one day
            weight = found.coded(dtype)
        self._for = module, stamp, dtype
        if isinstance(weight, str):
            return weight
        self.weight = weight
        return ""

    def __deepcopy__(self, memo: dict[int, object]) -> KeptCode:
        return KeptCode()

    def __reduce__(self) -> tuple[type[KeptCode], tuple[()]]:
        return KeptCode, ()


def coded_base(call: LayerCall | MixedCall) -> Base | None:
    """Returns what stands for a layer's base layer in a forward; None where that must be called."""
    conditions, x = call.conditions, call.x
    if conditions.impl != "triton" or conditions.compiling or conditions.tracing:
        return None
    if conditions.invariant:  # whose rows have one plan, in one dtype of one weight
        return None
    kept, module = _kept(call.layer), call.layer.get_base_layer()
    kept.find(module, x.dtype)
    weight, found = kept.weight, kept.found
    if weight is None or found is None or weight.device != x.device:
        return None
    if weight.shape[1] != x.shape[-1] or (x.dtype is not call.given.dtype and not found.casts):
        return None
    return kept.base_of(weight, found)


def sibling_base(layer: AdapterLayer) -> Base | None:
    """Returns what stands for a layer's base layer on kernels, in the dtype it computes in."""
    kept = _kept(layer)
    kept.find(layer.get_base_layer(), None)
    return kept.base()


def why_called(layer: AdapterLayer) -> str:
    """Returns why a base layer that is no plain linear is called on kernels; empty if it is not."""
    kept = _kept(layer)
    kept.find(layer.get_base_layer(), None)
    return kept.why


def reads_codes(layer: nn.Module) -> str:
    """Returns what kernels read of a layer's base weight, and in which dtype they compute.

    Known once `why_called` was asked; empty where the weight is plain, or the base layer called.
    """
    kept: KeptCode | None = layer.__dict__.get("_coded")
    if kept is None or kept.weight is None or kept.found is None:
        return ""
    return f"{kept.found.says}, {kept.weight.dtype}".replace("torch.", "")


def as_called(call: LayerCall | MixedCall, base: Base, y: torch.Tensor) -> torch.Tensor:
    """Returns a layer's output in the dtype that its base layer would give it: x's."""
    dtype = call.given.dtype
    if y.dtype is dtype or not isinstance(base.weight, CodedWeight):
        return y
    return y.to(dtype)


def _kept(layer: AdapterLayer) -> KeptCode:
    own = layer.__dict__
    kept: KeptCode | None = own.get("_coded")
    if kept is None:
        kept = own["_coded"] = KeptCode()
    return kept
