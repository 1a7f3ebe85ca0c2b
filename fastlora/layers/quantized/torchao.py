"""Weights quantized by torchao: int8 and float8 (by row, group, or tensor), int4, and others."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fastlora.layers.quantized.base_weight import (
    PIECES,
    BaseQuantizedWeight,
    KernelsCannotReadError,
    address_tensor,
    check_decoded_values,
    check_weight_tensor,
    register_quantized_weight,
)
from fastlora.quantized_tensor import QuantizedData
from fastlora.validation import UnsupportedLayerError

# The kernel loader for each dtype in which weights are stored.
_LOADERS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3",
    torch.float8_e5m2: "float8_e5m2",
}


@register_quantized_weight
class TorchaoWeight(BaseQuantizedWeight):
    """Base weight that torchao has quantized.

    The class recognizes such a weight, and has methods that dequantize the weight and write to it.
    Examples of such weights are int8 or float8 weights with one scale per row or per tensor.
    """

    backend = "torchao"
    peft_layer = ("peft.tuners.lora.torchao", "TorchaoLoraLinear")
    fresh_output = True
    modules = ("torch.nn.modules.linear.Linear",)

    @classmethod
    def matches(cls, module: object) -> bool:
        return type(getattr(module, "weight", None)).__module__.startswith("torchao.")

    def read_for_kernels(
        self, dtype: torch.dtype
    ) -> tuple[QuantizedData, tuple[torch.Tensor, ...]]:
        """Return the weight in the format that the kernels expect.

        The result is a tuple of the quantized data and the tensors that it refers to. A dequantized
        value is ``code * scale``, with the scale of its row. A single scale for the weight is
        expanded to all rows. If the weight has zero points, all of them must be 0.
        """
        weight, (n, k), name = self.weight, self.shape, type(self.weight).__name__
        if name not in _TORCHAO:
            raise KernelsCannotReadError(
                f"its base weight is a torchao {name}, which the kernels do not support"
            )
        if weight.act_quant_kwargs is not None:
            raise KernelsCannotReadError(
                "torchao also rounds x, so the base layer's own forward pass is used"
            )
        for field in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point"):
            if getattr(weight, field, None) is not None:
                raise KernelsCannotReadError(
                    f"its base weight is a torchao {name} that has an {field}, which the kernels "
                    "do not support"
                )
        block = [int(size) for size in weight.block_size]
        if block not in ([1, k], [n, k]):
            raise KernelsCannotReadError(
                f"its base weight is a torchao {name} that has one scale per block of shape "
                f"{block}, but the kernels expect one scale per row or one for the whole weight"
            )
        library, codes = self.library_and_version(), weight.qdata
        if codes.dtype not in _LOADERS or codes.shape != (n, k):
            raise KernelsCannotReadError(
                f"{library}: qdata has dtype {codes.dtype} and shape {tuple(codes.shape)}, which "
                "the kernels do not support"
            )
        own = functools.partial(check_weight_tensor, like=codes, library=library)
        own("qdata", codes, dtypes=codes.dtype, count=n * k)
        count = 1 if block == [n, k] else n
        scale = own("scale", weight.scale, dtypes=torch.float32, count=count).view(-1)
        zero = getattr(weight, "zero_point", None)
        if zero is not None and bool(zero.any()):
            raise KernelsCannotReadError(
                f"its base weight is a torchao {name} that has nonzero zero points, which the "
                "kernels do not support"
            )
        if count < n:
            scale = scale.expand(n).contiguous()
        rows = slice(16)
        decoded = codes[rows].float() * scale[rows, None]
        check_decoded_values(decoded, weight[rows].dequantize(torch.float32), library, name)
        bits = codes.view(torch.uint8) if codes.dtype is not torch.int8 else codes
        quantized_data = QuantizedData(_LOADERS[codes.dtype], bits, address_tensor(scale), n, k, k)
        return quantized_data, (codes, scale)

    @property
    def quantization_name(self) -> str:
        return f"torchao {self.weight.qdata.dtype}".replace("torch.", "")

    def make_dequantizer(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Return a function that dequantizes the weight to ``dtype``.

        The function rounds once.
        """
        weight = self.weight
        return lambda: weight.dequantize(dtype)

    def stored_tensors(self) -> list[torch.Tensor]:
        return _stored_tensors(self.weight)

    def dense(self) -> torch.Tensor:
        return self.weight.dequantize()

    def dequantized_pieces(self, approximate_count: int = PIECES) -> Iterator[torch.Tensor]:
        """Yield the dequantized weight in pieces.

        There are about ``approximate_count`` pieces, so that the whole dequantized weight need not
        be in memory at once. A piece contains consecutive rows of the weight, flattened and in
        fp32. A weight of an unsupported torchao class is one piece.
        """
        if type(self.weight).__name__ not in _TORCHAO:
            yield from super().dequantized_pieces()
            return
        for rows in self.row_slices(approximate_count):
            yield self.weight[rows].dequantize(torch.float32).reshape(-1)

    def check_writable(self) -> None:
        """Raise `UnsupportedLayerError` if the weight cannot be written.

        A torchao weight cannot be written if fastlora does not support requantization for its
        class.
        """
        if type(self.weight).__name__ not in _TORCHAO:
            raise UnsupportedLayerError(
                f"cannot merge into a torchao {type(self.weight).__name__}, expected one of "
                f"{', '.join(_TORCHAO)}; dequantize the base model first"
            )

    def write(self, dense: torch.Tensor) -> None:
        self.check_writable()
        make, granularity = _TORCHAO[type(self.weight).__name__], _granularity(self.weight, dense)
        by_row = int(self.weight.block_size[0]) == 1
        # Quantize everything before writing anything, so that a failure changes nothing.
        made = [
            (rows, _stored_tensors(make(self.weight, dense[rows], granularity)))
            for rows in (self.row_slices() if by_row else [slice(None)])
        ]
        for rows, values in made:
            for part, value in zip(self.stored_tensors(), values, strict=True):
                (part[rows] if by_row else part).copy_(value)


class _TorchaoWeightAttributes(Protocol):
    """Protocol with the attributes that fastlora reads from a torchao weight.

    The class is used only in annotations.
    """

    tensor_data_names: Sequence[str]
    block_size: Sequence[int]
    qdata: torch.Tensor
    act_quant_kwargs: object
    mm_config: object
    kernel_preference: object


def _stored_tensors(weight: _TorchaoWeightAttributes | torch.Tensor) -> list[torch.Tensor]:
    """Return a list of the tensors that store a torchao weight."""
    own: Any = weight
    optional = getattr(own, "optional_tensor_data_names", None) or ()
    found = [getattr(own, name) for name in (*own.tensor_data_names, *optional)]
    return [part for part in found if part is not None]


def _quantize_int8(
    weight: _TorchaoWeightAttributes, dense: torch.Tensor, granularity: object
) -> torch.Tensor:
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    zero = getattr(weight, "zero_point", None)  # torchao 0.15 has only symmetric weights
    shifted = zero is not None and bool(zero.any())
    kind: Any = type(weight)
    # The attributes of the weight are named like the parameters of `from_hp`. Older versions of
    # torchao have only some of them.
    names = (
        *("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point"),
        *("act_pre_scale", "reduce_range"),
    )
    return kind.from_hp(
        dense,
        granularity,
        mapping_type=mapping.ASYMMETRIC if shifted else mapping.SYMMETRIC,
        **{name: getattr(weight, name) for name in names if hasattr(weight, name)},
    )


def _quantize_float8(
    weight: _TorchaoWeightAttributes, dense: torch.Tensor, granularity: object
) -> torch.Tensor:
    kind: Any = type(weight)
    return kind.from_hp(
        dense,
        float8_dtype=weight.qdata.dtype,
        granularity=granularity,
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _granularity(weight: _TorchaoWeightAttributes, dense: torch.Tensor) -> Any:
    """Return the torchao granularity of a weight's scales.

    A scale applies to a row, to the whole tensor, or to a group.
    """
    library = importlib.import_module("torchao.quantization")
    block = [int(size) for size in weight.block_size]
    if block == [1, dense.shape[1]]:
        return library.PerRow()
    if block == list(dense.shape):
        return library.PerTensor()
    if block[0] == 1:
        return library.PerGroup(block[1])
    raise UnsupportedLayerError(
        f"cannot merge into a {type(weight).__name__} with one scale per block of {block}; "
        "expected one scale per row, group, or tensor; dequantize the base model first"
    )


_TORCHAO = {"Int8Tensor": _quantize_int8, "Float8Tensor": _quantize_float8}
