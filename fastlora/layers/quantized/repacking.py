"""Prevention of bitsandbytes' repacking of 4-bit weights on CPUs with AVX512 bf16.

On these CPUs, a forward pass with an x that needs no gradient repacks the codes for a special
matrix product, and rounds the blocks' absmax values to bf16. From then on, the module computes no
gradient for x, and no error is raised. The change cannot be undone, because the old values are gone
(bitsandbytes 0.50).

For this reason, `prevent_bitsandbytes_repacking` prevents repacking in the 4-bit layers of a model
with trained adapters. LoRA layers run the special product over a repacked copy of the codes instead
(`ProductWithRepackedCopy`). They cache the copy while they evaluate; see
`fastlora.layers.quantized_base`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from typing import Any

import torch
from torch import nn

from fastlora.layers.quantized.base_weight import qualified_class_name
from fastlora.user_warnings import warn

# Classes with a known forward; a subclass may do anything.
MODULES = tuple(
    f"bitsandbytes.nn.modules.{name}" for name in ("Linear4bit", "LinearNF4", "LinearFP4")
)
_REPACKS = "support_avx512bf16_for_cpu"
# Set where `prevent_bitsandbytes_repacking` has cleared the flag above. By default, bitsandbytes
# would repack.
_PREVENTED = "_fastlora_keeps_layout"
# With more rows than this, it is faster in bf16 to dequantize the weight and multiply. The product
# over repacked codes takes 0.83 to 0.95 times as long at 64 rows, and 1.00 to 1.18 times at 128. In
# fp32 it takes 0.42 to 0.67 times as long at 64 rows, and 0.54 to 0.69 times at 128 (N and K from
# 192 to 4096, one Zen 4 core).
_FEW_BF16_ROWS = 64
_TILE = 32  # Rows of a weight that bitsandbytes packs together.
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # Block sizes that its product supports.


def prevent_bitsandbytes_repacking(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking a model's 4-bit weights.

    Without this function, forward passes on some CPUs may repack the weights, which changes the
    layout of the weights in memory. bitsandbytes cannot dequantize a repacked weight, and kernels
    cannot read it. A layer with a repacked weight computes no gradient for its input, so this
    function is for models with trainable adapters. The function applies to all 4-bit layers,
    because gradients also pass through layers without adapters.
    """
    repacked = False
    for module in model.modules():
        own = module.__dict__
        if _REPACKS in own:
            if own[_REPACKS]:
                own[_REPACKS] = False
                if qualified_class_name(module) in MODULES:
                    own[_PREVENTED] = True
            repacked = repacked or is_repacked_by_bitsandbytes(module)
    if repacked:
        _warn()


def is_bitsandbytes_repacking_prevented(module: nn.Module) -> bool:
    """Return whether bitsandbytes is prevented from repacking a module's weight.

    The function that prevents it is `prevent_bitsandbytes_repacking`.
    """
    return _PREVENTED in module.__dict__


def warn_if_gradients_blocked(layer: object, base: nn.Module, x: torch.Tensor) -> None:
    """Warn if gradients cannot flow through a LoRA layer's base layer.

    Gradients cannot flow through the base layer if bitsandbytes has repacked its weight. The
    warning is emitted only if gradients are needed.
    """
    if not (torch.is_grad_enabled() and x.is_cpu and is_repacked_by_bitsandbytes(base)):
        return
    own: Any = layer
    if x.requires_grad or any(p.requires_grad for p in own.parameters()):
        _warn()


def is_repacked_by_bitsandbytes(base: nn.Module) -> bool:
    """Return whether bitsandbytes has repacked a module's weight.

    Repacking changes the layout of the weight's codes in memory.
    """
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


class ProductWithRepackedCopy:
    """Repacked copy of a base weight, for matrix products in inference on a CPU.

    bitsandbytes computes the product of x and the copy from the repacked codes. The first product
    makes the copy, which takes 4 bits per weight and a bf16 value per block. The module is not
    changed.

    Args:
        base: A `Linear4bit` that `prevent_bitsandbytes_repacking` prevents from being repacked.
    """

    def __init__(self, base: nn.Module) -> None:
        module: Any = base
        self._module, self._few, self._k = (
            module,
            _max_rows_for_repacked_product(module),
            int(module.in_features),
        )
        self._dtype: torch.dtype | None = module.compute_dtype
        self._copied: tuple[Any, ...] | None = None

    def supports_and_is_faster(self, x: torch.Tensor) -> bool:
        """Return whether this object can multiply x, and can do so faster than the module."""
        return x.is_cpu and x.shape[-1] == self._k and 0 < x.numel() <= self._few * self._k

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output ``[..., N]`` for ``x [..., K]``, as the module does in inference.

        The result is a new tensor in x's dtype, without a gradient.
        """
        copied, bias, dtype = self._copied or self._copy(), self._module.bias, self._dtype
        inner = x if dtype is None or x.dtype is dtype else x.to(dtype)
        made: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit.default(inner, *copied)
        if bias is not None:
            made += bias.to(made.dtype)
        return made if made.dtype is x.dtype else made.to(x.dtype)

    def _copy(self) -> tuple[Any, ...]:
        weight = self._module.weight
        with torch.inference_mode(False), torch.no_grad():
            state = copy.copy(weight.quant_state)  # Fields are replaced, not written to.
            codes, state = _library()._convert_weight_packed_for_cpu(weight.data, state)
        self._copied = codes, list(state.shape), state.absmax, state.code, state.blocksize
        return self._copied


def _max_rows_for_repacked_product(base: nn.Module) -> int:
    """Return the maximum number of rows for which a `ProductWithRepackedCopy` is used.

    In bf16, it is faster to dequantize the weight and multiply, as the module does, if there are
    more rows. In other compute dtypes, there is no limit. The result is 0 if the product is not
    supported.
    """
    module: Any = base
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None or not module.compute_type_is_set or is_repacked_by_bitsandbytes(module):
        return 0
    if weight.is_inference():
        return 0  # Its writes are not counted.
    n, k = state.shape
    fits = (n, k) == (module.out_features, module.in_features) and state.absmax.is_cpu
    if not fits or n % _TILE or k % state.blocksize or state.blocksize not in _BLOCKS:
        return 0  # bitsandbytes would raise.
    library = _library()
    # A pickled module may come from another CPU.
    if not (library.has_avx512bf16() and hasattr(library, "_convert_weight_packed_for_cpu")):
        return 0
    return _FEW_BF16_ROWS if module.compute_dtype is torch.bfloat16 else sys.maxsize


@functools.cache
def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _warn() -> None:
    warn(
        "bitsandbytes repacked 4-bit weights during an evaluation on the CPU. Repacked layers "
        "pass no gradient to their input, so adapters below them do not train, and their scales "
        "are rounded to bf16. To train, load the base model again and, before evaluating it, add "
        "adapters (or load them with is_trainable=True, or patch the model)",
    )
