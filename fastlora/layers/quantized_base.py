"""Quantized base layers whose weights kernels read directly, without calling the module.

If kernels run and the module computes only a matrix product with a bias, the layer's `Base` is like
that of a plain linear layer, with a `QuantizedTensor` as its weight. The forward pass, shared
inputs, mixed batches, and DoRA then work as for a plain linear layer. Otherwise, the module is
called unchanged, and the fusion report gives the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.base_layers import fallback_reason_hooked, fallback_reason_not_plain_linear
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora_norms import is_device_capturing
from fastlora.layers.quantized import (
    BaseQuantizedWeight,
    ProductWithRepackedCopy,
    is_bitsandbytes_repacking_prevented,
    quantized_weight_of,
    warn_if_gradients_blocked,
)
from fastlora.ops.factors import Base
from fastlora.quantized_tensor import QuantizedTensor
from fastlora.routing.active import is_capturing_cuda_graph
from fastlora.validation import UnsupportedLayerError
from fastlora.weights_version import TensorStamp, UncopiedCache, stamp_tensors

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters

_UNCOUNTED = "its base weight was created in inference mode, in which PyTorch does not count writes"
_CAPTURED = "a CUDA graph is being captured; run a forward pass before the capture"


class KernelWeight(NamedTuple):
    """A base weight in the format that the kernels expect.

    The weight is quantized. ``kind`` is its kind of quantization.
    """

    weight: QuantizedTensor
    kind: BaseQuantizedWeight


# A module's quantization kind, and by dtype its weight for kernels or the fallback reason.
_Found = tuple[BaseQuantizedWeight | None, dict[torch.dtype, KernelWeight | str]]


class KernelWeightCache(UncopiedCache):
    """Cache for quantized base weights in the format that the kernels expect.

    Each layer has its own cache. The entries are keyed by the dtype of x, so switching autocast on
    and off recomputes nothing. An entry is a weight or a fallback reason, and is valid until the
    layer's base weight changes. A copied layer starts with an empty cache.

    Attributes:
        dtype: Dtype of x in the last forward pass.
        repacked: The product over a copy of the codes, for evaluation on a CPU; None until it is
            first used.
    """

    dtype: torch.dtype | None
    repacked: ProductWithRepackedCopy | None
    # The module, its weight's stamp, and the entries: one tuple, so that threads read it
    # atomically.
    _of: tuple[nn.Module | None, TensorStamp | None, _Found | None]

    def __init__(self) -> None:
        self._captured: list[QuantizedTensor] = []
        self.clear()

    def weight_or_fallback_reason(
        self, module: nn.Module, dtype: torch.dtype | None
    ) -> KernelWeight | str:
        """Return a module's weight as a `KernelWeight`, or the reason why kernels cannot be used.

        The weight is in the format that the kernels expect for x in ``dtype``. If ``dtype`` is
        None, the dtype that the module computes in is used. If the kernels cannot be used, the
        module itself must be called.
        """
        if dtype is not None:
            self.dtype = dtype
        reason = fallback_reason_hooked(module)
        if reason:
            return reason
        try:
            entries = self._cache_entries_if_cacheable(module)
        except (UnsupportedLayerError, AttributeError) as error:
            return str(error)
        if entries is None:
            return _UNCOUNTED
        kind, made = entries
        dtype = dtype or (kind and kind.compute_dtype()) or next(reversed(made), torch.float16)
        kernel_weight = made.get(dtype)
        if kernel_weight is None:
            if kind is None:
                kernel_weight = (
                    fallback_reason_not_plain_linear(module)
                    or "its base layer's own forward pass is used"
                )
            elif is_device_capturing(kind.codes().device):
                return _CAPTURED
            else:
                # A later backward pass may need it.
                with torch.inference_mode(False), torch.no_grad():
                    weight = kind.tensor_or_fallback_reason(dtype)
                kernel_weight = weight if isinstance(weight, str) else KernelWeight(weight, kind)
            made[dtype] = kernel_weight
        return kernel_weight

    def create_base(self, kernel_weight: KernelWeight) -> Base:
        """Create a `Base` from a kernel weight.

        The `Base` also contains the module's bias, and is used instead of calling the module. A
        weight that a CUDA graph reads is kept until `fastlora.clear_caches` is called.
        """
        weight, kind = kernel_weight
        if is_capturing_cuda_graph(weight) and all(weight is not known for known in self._captured):
            self._captured.append(weight)
        return Base(weight, kind.bias_as_module_adds_it(weight.dtype))

    def clear(self, release_cuda_graph_weights: bool = False) -> None:
        """Clear the cache.

        Weights that CUDA graphs read are cleared only if ``release_cuda_graph_weights`` is set.
        """
        self.dtype = self.repacked = None
        self._of = None, None, None
        if release_cuda_graph_weights:
            self._captured.clear()

    def output_from_repacked_codes(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Compute a module's output from repacked quantization codes, if possible.

        Returns None if the module must be called, or if calling it is faster. The module is one for
        which `is_bitsandbytes_repacking_prevented` is true.
        """
        try:
            if self._cache_entries_if_cacheable(module) is None:
                return None
        except (UnsupportedLayerError, AttributeError):
            return None
        repacked = self.repacked
        if repacked is None:
            repacked = self.repacked = ProductWithRepackedCopy(module)
        return (
            None
            if not repacked.supports_and_is_faster(x) or fallback_reason_hooked(module)
            else repacked(x)
        )

    def _cache_entries_if_cacheable(self, module: nn.Module) -> _Found | None:
        """Return what is cached for a module's weight, or None if the weight cannot be cached.

        The cache entries are a tuple (kind, dict), and are created if needed. A weight without a
        stamp cannot be cached. Entries for another weight, or from before a write to the weight,
        are dropped.

        Raises:
            UnsupportedLayerError: The weight is not quantized yet.
            AttributeError: The weight is from an unsupported version of a library.
        """
        known, stamp, entries = self._of
        if entries is not None and stamp is not None and known is module:
            watched = _arguments_for_weight_stamp(module, entries[0])
            if watched is not None and stamp.matches(*watched):
                return entries
        self._of, self.repacked = (None, None, None), None
        kind = quantized_weight_of(module)
        watched = _arguments_for_weight_stamp(module, kind)
        stamp, entries = None if watched is None else stamp_tensors(*watched), (kind, {})
        self._of = module, stamp, entries
        return None if stamp is None else entries


def quantized_base_for_kernels(call: UniformCall | MixedCall) -> Base | None:
    """Return a layer's quantized base weight in the format that the kernels expect.

    The result is a `Base` for the given call. Returns None if the kernels cannot be used and the
    base layer itself must be called.
    """
    conditions, x = call.conditions, call.x
    # In the batch-invariant mode "auto" means kernels, and the forward raises if they cannot run.
    runs = conditions.impl == "triton" or (conditions.invariant and conditions.impl == "auto")
    if not runs or conditions.compiling or conditions.tracing:
        return None
    cache = _cache_of(call.layer)
    kernel_weight = cache.weight_or_fallback_reason(call.layer.get_base_layer(), x.dtype)
    if isinstance(kernel_weight, str) or kernel_weight.weight.device != x.device:
        return None
    if kernel_weight.weight.shape[1] != x.shape[-1]:
        return None
    if x.dtype is not call.original_x.dtype and not kernel_weight.kind.casts:
        return None
    return cache.create_base(kernel_weight)


def call_base_layer(
    call: UniformCall | MixedCall, base_layer: nn.Module, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Call a base layer, and return its output.

    The base layer is called with the input of its LoRA layer and with ``args`` and ``kwargs``.

    In evaluation on a CPU, the output for a few rows may instead come from a product with a copy of
    the 4-bit codes (`ProductWithRepackedCopy`). The copy is dropped by the next call with
    gradients, or when the cached weight for kernels is cleared.
    """
    layer, x, conditions = call.layer, call.original_x, call.conditions
    made: torch.Tensor | None = None
    if conditions.compiling or conditions.tracing:
        pass
    elif not is_bitsandbytes_repacking_prevented(base_layer):
        warn_if_gradients_blocked(layer, base_layer, x)
    elif base_layer.training or x.requires_grad:
        if "_kernel_weights" in layer.__dict__:
            _cache_of(layer).repacked = None
    elif not (args or kwargs) and type(x) is torch.Tensor:
        made = _cache_of(layer).output_from_repacked_codes(base_layer, x)
    return base_layer(x, *args, **kwargs) if made is None else made


def quantized_base_of_layer(layer: BaseLinearWithAdapters) -> Base | None:
    """Return a layer's quantized base weight as a `Base` for the kernels.

    The weight has the dtype that the base layer computes in. Returns None if the weight is not
    quantized, or if the base layer itself must be called, for example because the kernels cannot
    read the weight.
    """
    cache = _cache_of(layer)
    kernel_weight = cache.weight_or_fallback_reason(layer.get_base_layer(), None)
    return None if isinstance(kernel_weight, str) else cache.create_base(kernel_weight)


def fallback_reason_base_called(layer: BaseLinearWithAdapters) -> str:
    """Return the reason why a base layer is called instead of its weight being used directly.

    The result is an empty string if kernels can be used instead of the base layer. If the base
    layer is not quantized, the result is never empty.
    """
    cache = _cache_of(layer)
    kernel_weight = cache.weight_or_fallback_reason(layer.get_base_layer(), cache.dtype)
    return kernel_weight if isinstance(kernel_weight, str) else ""


def describe_quantization(layer: BaseLinearWithAdapters) -> str:
    """Describe a layer's quantization.

    The text also states the dtype that kernels compute in. `fallback_reason_base_called` must have
    been called before. The text is empty if the weight is plain or if the base layer is called.
    """
    cache: KernelWeightCache | None = layer.__dict__.get("_kernel_weights")
    kernel_weight = (
        ""
        if cache is None
        else cache.weight_or_fallback_reason(layer.get_base_layer(), cache.dtype)
    )
    if isinstance(kernel_weight, str):
        return ""
    return f"{kernel_weight.kind.quantization_name}, {kernel_weight.weight.dtype}".replace(
        "torch.", ""
    )


def to_base_output_dtype(
    call: UniformCall | MixedCall, base: Base, y: torch.Tensor
) -> torch.Tensor:
    """Convert ``y`` to the base layer's output dtype.

    The output dtype is the dtype of x.
    """
    dtype = call.original_x.dtype
    if y.dtype is dtype or not isinstance(base.weight, QuantizedTensor):
        return y
    return y.to(dtype)


def clear_base_and_adapter_caches(layer: object, release_cuda_graph_weights: bool = False) -> None:
    """Clear the values that a layer has cached for its base weight and its adapters.

    The caches contain the DoRA norms, the rank rows of a stack's adapters, and the quantized base
    weight for kernels. If ``release_cuda_graph_weights`` is set, cached weights that CUDA graphs
    read are released too.
    """
    own = layer.__dict__
    own.pop("_dora_norms", None)
    own.pop("_rank_rows", None)
    cache = own.get("_kernel_weights")
    if isinstance(cache, KernelWeightCache):
        cache.clear(release_cuda_graph_weights)
        if "_shared_input_group" in own:
            own["_shared_input_group"].launches.clear()  # Launches hold the weights too.


def _arguments_for_weight_stamp(
    module: nn.Module, kind: BaseQuantizedWeight | None
) -> tuple[Sequence[torch.Tensor], tuple[Hashable, ...]] | None:
    """Return the tensors and other values from which a module's weight is stamped.

    They are the arguments for `stamp_tensors`. Returns None if the module's weight is no longer the
    object that ``kind`` refers to.
    """
    if kind is None:
        weight = module._parameters.get("weight")
        identity: tuple[Any, ...] = id(weight), type(weight)
        return (), identity
    try:
        return (
            (kind.tensor_dependencies(), (kind.non_tensor_dependencies(),))
            if kind.refers_to_current_weight()
            else None
        )
    except AttributeError as error:
        raise AttributeError(kind.fallback_reason_missing_field(error)) from error


def _cache_of(layer: BaseLinearWithAdapters) -> KernelWeightCache:
    own = layer.__dict__
    cache: KernelWeightCache | None = own.get("_kernel_weights")
    if cache is None:
        cache = own["_kernel_weights"] = KernelWeightCache()
    return cache
