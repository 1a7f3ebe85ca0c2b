"""Quantized base weights that kernels read directly, without a dequantized copy.

`QuantizedTensor` is a tensor subclass that stands for a dense weight. Autograd, routing,
shared-input groups, and mixed batches can pass it on and save it like any other tensor. Kernels
read its `QuantizedData`. Any other PyTorch operation dequantizes the weight and runs on the dense
matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class QuantizedData(NamedTuple):
    """The data of a quantized weight.

    It consists of the values of the weight ``[N, K]`` and of what is needed to decode them. The
    layout is the one that kernels read.

    Attributes:
        kind: Name of the function in `fastlora.kernels.weights` that loads this format.
        codes: The quantized values, in the layout that the loader defines.
        parts: Addresses (int64) of the tensors that are needed to decode the values, such as
            scales, in the order that the loader defines.
        n, k: Dimensions of the weight.
        block: Number of elements along K that share a scale. It divides K.
        transposed: Whether the data represents the transpose of the weight, ``[K, N]``.
    """

    kind: str
    codes: torch.Tensor
    parts: torch.Tensor
    n: int
    k: int
    block: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that the quantized data represents."""
        return (self.k, self.n) if self.transposed else (self.n, self.k)

    def t(self) -> QuantizedData:
        """Return the transpose of the quantized data.

        The result represents the transpose of the matrix. As with `torch.Tensor.t`, the result
        shares the memory of this object, and no data is copied.
        """
        return self._replace(transposed=not self.transposed)


class QuantizedTensor(torch.Tensor):
    """A tensor subclass for a quantized weight, which is dequantized when necessary.

    The weight has the shape ``[N, K]`` and is stored as quantized data, such as codes and scales.
    Kernels read the quantized data directly. Most PyTorch operations dequantize the weight first.

    Args:
        quantized_data: The quantized data that kernels read.
        dense: Function that dequantizes the weight and returns the dense matrix ``[N, K]``.
        dtype: Dtype of this tensor, in which the base layer computes.
        data_tensors: The tensors that the addresses in ``quantized_data`` point to. This tensor
            keeps them alive.
    """

    dense: Callable[[], torch.Tensor]
    data_tensors: tuple[torch.Tensor, ...]
    _quantized_data: QuantizedData
    _versions: tuple[int, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        quantized_data: QuantizedData,
        dense: Callable[[], torch.Tensor],
        dtype: torch.dtype,
        data_tensors: tuple[torch.Tensor, ...],
    ) -> QuantizedTensor:
        """Create a wrapper tensor with the shape of the weight and without storage."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: QuantizedTensor = make(
            cls, quantized_data.shape, dtype=dtype, device=quantized_data.codes.device
        )
        made._quantized_data, made.dense, made.data_tensors = quantized_data, dense, data_tensors
        made._versions = _versions(data_tensors)
        return made

    @property
    def is_unmodified(self) -> bool:
        """Whether the quantized data is unmodified.

        The value is False if the quantized data has changed since this tensor was created. Changes
        are detected by the version counters of the data's tensors. Inference tensors have no
        version counters, so changes to them are not detected.
        """
        return _versions(self.data_tensors) == self._versions

    @property
    def quantized_data(self) -> QuantizedData:
        """The quantized data of the tensor, which kernels read.

        Raises:
            RuntimeError: The quantized data has been modified since this tensor was created.
        """
        if not self.is_unmodified:
            raise RuntimeError(
                "a quantized base weight was modified (by a merge or a loaded state dict) "
                "between a forward pass and its backward pass, which needs the original values; "
                "modify the weight after the backward pass"
            )
        return self._quantized_data

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dense matrix.

        Transposing and detaching do not dequantize the weight; they return a new `QuantizedTensor`.
        """
        if func is torch.ops.aten.t.default:
            return _with_data(args[0], args[0]._quantized_data.t())
        if func is torch.ops.aten.detach.default:
            return _with_data(args[0], args[0]._quantized_data)
        dense = tree_map_only(QuantizedTensor, dequantize, (args, kwargs or {}))
        return func(*dense[0], **dense[1])

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Return a string with the quantization format, the shape, and the dtype."""
        return f"QuantizedTensor({self._quantized_data.kind}, {tuple(self.shape)}, {self.dtype})"


def _versions(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple([tensor._version for tensor in tensors if not tensor.is_inference()])


def dequantize_if_quantized(weight: torch.Tensor) -> torch.Tensor:
    """Dequantize a weight if it is a `QuantizedTensor`.

    Any other weight is returned unchanged. With the dense matrix, several matrix products need
    only one dequantization.
    """
    return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight


def dequantize(weight: QuantizedTensor) -> torch.Tensor:
    """Dequantize a weight, and return the dense matrix in the weight's shape and dtype."""
    made = weight.dense().detach()
    made = made if made.dtype is weight.dtype else made.to(weight.dtype)
    return made.t() if weight.quantized_data.transposed else made


def _with_data(weight: QuantizedTensor, quantized_data: QuantizedData) -> QuantizedTensor:
    made = QuantizedTensor(quantized_data, weight.dense, weight.dtype, weight.data_tensors)
    made._versions = weight._versions
    return made
