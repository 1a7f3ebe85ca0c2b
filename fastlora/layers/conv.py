"""`FastLoraConv`: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with adapters.

``y = conv(x, weight) + bias + scaling * lora_B(lora_A(dropout(x)))``. lora_A convolves as the base
layer does (kernel, stride, padding, dilation and padding mode), into R channels with one group.
lora_B is a pointwise convolution with the groups of the base layer.

With one group, the sum is a convolution with ``weight + scaling * lora_B @ lora_A``, with flattened
kernels, and the adapter can be merged. As a matrix ``[N, K]``, the weight has K = channels times
kernel size. With more groups, every output of the adapter depends on all input channels, which the
base weight cannot represent.

Shapes and file names follow PEFT 0.21.2, ``tuners/lora/layer.py``, `_ConvNd`. DoRA follows
``tuners/lora/dora.py``, `_DoraConvNdLayer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.init import find_init_method
from fastlora.layers import parts
from fastlora.layers.adapter_init import AdapterInitializer
from fastlora.layers.dora_norms import dora_magnitude_of
from fastlora.layers.layer_kinds import (
    PEFT_LAYER_ALTERNATIVE,
    LayerAdapterSettings,
    LayerKind,
    TensorShapes,
    register_layer_kind,
)
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.unfused import BaseAdditiveLoraLayer
from fastlora.ops.execution_mode import ExecutionMode
from fastlora.validation import UnsupportedLayerError

# The convolution class by the number of dimensions of its weight.
_CLASSES: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


class FastLoraConv(BaseAdditiveLoraLayer):
    """LoRA layer for a convolution.

    The convolution, which may be an instance of a subclass, is called unchanged.

    Args:
        base_layer: The convolution.

    Attributes:
        lora_A: Maps an adapter name to a convolution with weight ``[R, C, ...]`` and the base
            layer's kernel size.
        lora_B: Maps an adapter name to a convolution with weight ``[N, R / groups, 1, ...]``.
        lora_magnitude_vector: Maps an adapter name to a module with weight ``[1, N, 1, ...]``.
    """

    fallback_reason = "the adapter runs as two separate PyTorch convolutions"

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base_layer, base_layer.in_channels, base_layer.out_channels)

    def _create_factors(
        self, r: int, lora_bias: bool, start: AdapterInitializer
    ) -> dict[str, parts.Factor]:
        base = self.base_layer
        conv: Any = _CLASSES[base.weight.dim()]
        like = {
            "stride": base.stride,
            "padding": base.padding,
            "dilation": base.dilation,
            "padding_mode": base.padding_mode,
        }
        lora_a = conv(self.in_features, r, base.kernel_size, bias=False, **like)
        lora_b = conv(r, self.out_features, 1, groups=base.groups, bias=lora_bias)
        start.initialize_weights(lora_a, lora_b)
        return {"lora_A": lora_a, "lora_B": lora_b}

    def _reshape_to_magnitude(self, norms: torch.Tensor) -> torch.Tensor:
        return self._align_with_channel_dimension(norms).unsqueeze(0)

    def _align_with_channel_dimension(self, numbers: torch.Tensor) -> torch.Tensor:
        """Reshape per-channel values so that they align with the channel dimension.

        Values ``[N]`` are reshaped to ``[N, 1, ...]``, which broadcasts over the other dimensions
        of y.
        """
        return numbers.view(-1, *(1,) * len(self.base_layer.kernel_size))

    def _local_magnitude(self, name: str) -> torch.Tensor:
        return dora_magnitude_of(self, name).flatten()

    # ------------------------------------------------------------------------------------ forward

    def _count_samples_and_batch_dims(self, x: torch.Tensor) -> tuple[int, int]:
        return (x.shape[0], 1) if x.dim() == self.weight.dim() else (1, 0)

    def _add_update(
        self,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
        conditions: ExecutionMode,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        base, dropout = self.base_layer, self.lora_dropout[name]
        down, up = self.lora_A[name], self.lora_B[name]
        inner = x.to(down.weight.dtype) if conditions.autocast is None else x
        dropped = self._apply_dropout(dropout, inner, seed)
        update = up(down(dropped))
        update = update * self._scaling_on_device_of(name, update)
        g = self._dora_scale(name, conditions)
        if g is None:
            return y + update
        # As in PEFT, with dropout the base weight is applied to the dropped input a second time.
        if dropped is not inner:
            scaled = base._conv_forward(dropped.to(base.weight.dtype), base.weight, None)
        else:
            scaled = y if base.bias is None else y - self._align_with_channel_dimension(base.bias)
        g = self._align_with_channel_dimension(g)
        return y + (g - 1.0) * scaled + g * update

    # ------------------------------------------------------------------------ weight and factors

    def _flatten_kernels(self, kernels: torch.Tensor) -> torch.Tensor:
        """Flatten convolution kernels ``[N, C, ...]`` into a matrix ``[N, K]``.

        The elements are in the memory order of the base weight, so the result for the base weight
        is a view of it.
        """
        return (kernels if self.weight.is_contiguous() else kernels.movedim(1, -1)).flatten(1)

    def _unflatten_kernels(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Reshape a matrix into convolution kernels of the given shape.

        The matrix has the layout of a result of `_flatten_kernels`.
        """
        if self.weight.is_contiguous():
            return matrix.view(shape)
        n, c, *kernel = shape
        return matrix.view(n, *kernel, c).movedim(-1, 1)

    def _reshape_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return self._unflatten_kernels(delta, self.weight.shape)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return an adapter's factors and bias.

        The result is a tuple (lora_a, lora_b, lora_bias). The bias is optional, so lora_bias may be
        None. The factors are matrices. If the convolution has groups, lora_b is
        ``[N, R / groups]``.
        """
        down, up = self.lora_A[name], self.lora_B[name]
        return self._flatten_kernels(down.weight), up.weight.flatten(1), up.bias

    def _write_factors(
        self, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        down, up = self.lora_A[name], self.lora_B[name]
        down.weight.copy_(self._unflatten_kernels(lora_a, down.weight.shape))
        up.weight.copy_(lora_b.view(up.weight.shape))
        if bias is not None:
            up.bias.copy_(bias)

    def _factors_for_dora_norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an adapter's factors in the form needed to compute its DoRA norms.

        The result is a pair of matrices. The norms are those of PEFT. With one group, the matrices
        are the adapter's own factors. With groups, PEFT multiplies the flattened ``lora_B`` and
        ``lora_A`` and reshapes the product to ``[N, C / groups, ...]``. Row n of the reshaped
        product is row ``n//groups`` of lora_B times share ``n%groups`` of lora_A's input channels.
        The product of the returned matrices has the same rows, with the columns in the order of
        `_flatten_kernels`.
        """
        down, up = self.lora_A[name], self.lora_B[name]
        groups = self.base_layer.groups
        if groups == 1:
            return super()._factors_for_dora_norm(name)
        r = down.weight.shape[0]
        shares = [self._flatten_kernels(share) for share in down.weight.chunk(groups, dim=1)]
        rows = up.weight.reshape(-1, 1, 1, r)
        own = torch.eye(groups, dtype=rows.dtype, device=rows.device).view(1, groups, groups, 1)
        return torch.cat(shares), (rows * own).reshape(-1, groups * r)

    def _local_weight(self) -> torch.Tensor:
        return self._flatten_kernels(self.weight)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return an adapter's delta weight ``scaling * B @ A`` in the shape of the base weight.

        A convolution with groups is not supported and raises an error.
        """
        self._raise_if_grouped("cannot compute a weight update for")
        return super().get_delta_weight(adapter_name)

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        self._raise_if_grouped("cannot merge into")
        weight = self.weight
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
        if not plain or self._flatten_kernels(weight).data_ptr() != weight.data_ptr():
            raise UnsupportedLayerError(
                f"cannot merge into {type(self.base_layer).__name__}: its weight is not a plain "
                "floating-point tensor in contiguous or channels-last format"
            )
        return DenseMergeTarget(weight, self._flatten_kernels), self.bias

    def _raise_if_grouped(self, action: str) -> None:
        base = self.base_layer
        if base.groups > 1:
            raise UnsupportedLayerError(
                f"{action} a {type(base).__name__} with groups={base.groups}: as in PEFT, its "
                "adapter mixes channels across groups, which the base weight cannot represent; "
                "leave the adapter unmerged"
            )


def _shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
    base: Any = module
    n, ones = base.out_channels, (1,) * len(base.kernel_size)
    shapes: TensorShapes = {
        "lora_A.weight": (settings.r, base.in_channels, *base.kernel_size),
        "lora_B.weight": (n, settings.r // base.groups, *ones),
    }
    if settings.lora_bias:
        shapes["lora_B.bias"] = (n,)
    if settings.use_dora:
        shapes["lora_magnitude_vector"] = (1, n, *ones)
    return shapes


def _check(module: nn.Module, settings: LayerAdapterSettings) -> None:
    base: Any = module
    if type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
        raise UnsupportedLayerError(
            f"its weight is a {type(base.weight).__name__} with dtype {base.weight.dtype}, but a "
            f"floating-point parameter is expected; for other weights, {PEFT_LAYER_ALTERNATIVE}"
        )
    if settings.r % base.groups:
        raise UnsupportedLayerError(
            f"rank {settings.r} is not divisible by the module's groups={base.groups}; use "
            "rank_pattern to set a rank for this module that is divisible by groups, or choose "
            "other target modules"
        )
    init = settings.init_lora_weights
    if init != "lora_ga" and not find_init_method(init).supports_convolutions:
        raise UnsupportedLayerError(
            f"init_lora_weights={init!r} is supported only for linear layers, as in PEFT; for this "
            "layer, use True, False, or 'gaussian', or exclude it with exclude_modules"
        )


_ALL = tuple(_CLASSES.values())
register_layer_kind(
    LayerKind("convolutions", lambda m: isinstance(m, _ALL), FastLoraConv, _shapes, _check),
)
