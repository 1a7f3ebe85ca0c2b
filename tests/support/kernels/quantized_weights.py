"""Weights as bitsandbytes and torchao store them, as kernels read them, and as they decode them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.quantized_tensor import QuantizedData, QuantizedTensor

# Of bitsandbytes the type, whether absmax is nested, and elements of a block.
FOUR_BITS = [
    (kind, nested, block)
    for kind in ("nf4", "fp4")
    for nested in (False, True)
    for block in (64, 128, 256)
]
EIGHT_BITS = ("int8", "e4m3", "e4m3 by tensor", "e5m2", "e5m2 by tensor")


def make_quantized_weight(kind: str, weight: torch.Tensor, block: int = 64) -> QuantizedTensor:
    """Returns a weight ``[N, K]``, stored.

    Args:
        kind: "nf4" or "fp4", also with " nested" behind it, or one of `EIGHT_BITS`.
        weight: The matrix, in x's dtype.
        block: Elements that share a scale, of 4 bits.
    """
    if kind.partition(" ")[0] in ("nf4", "fp4"):
        return four_bits(weight, kind.partition(" ")[0], "nested" in kind, block)
    return eight_bits(weight, kind)


def four_bits(weight: torch.Tensor, kind: str, nested: bool, block: int) -> QuantizedTensor:
    """Returns a weight that bitsandbytes has quantized."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        weight, blocksize=block, quant_type=kind, compress_statistics=nested
    )
    parts = [state.absmax, state.code]
    if nested:
        parts += [state.state2.absmax, state.state2.code, state.offset.reshape(1)]
    name = "table4_nested" if nested else "table4"
    dense = dequantize_4bit(codes, state)
    return made(name, codes.view(-1), parts, block, dense)


def eight_bits(weight: torch.Tensor, kind: str) -> QuantizedTensor:
    """Returns a weight that torchao has quantized."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerTensor
    from torchao.quantization.quantize_.workflows import Float8Tensor

    n, k = weight.shape
    if kind == "int8":
        linear = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        stored, name = linear.weight, "int8"
    elif kind == "e4m3":
        linear = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(linear, Float8WeightOnlyConfig())
        stored, name = linear.weight, "float8_e4m3"
    else:
        dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
        dtype = dtypes[kind.partition(" ")[0]]
        options = {"granularity": PerTensor()} if "tensor" in kind else {}
        stored = Float8Tensor.from_hp(weight, dtype, **options)
        name = f"float8_{kind.partition(' ')[0]}"
    codes, scale = stored.qdata, stored.scale.float().reshape(-1).expand(n).contiguous()
    codes = codes if name == "int8" else codes.view(torch.uint8)
    return made(name, codes, [scale], k, stored.dequantize())


def made(
    kind: str, codes: torch.Tensor, parts: Sequence[torch.Tensor], block: int, dense: torch.Tensor
) -> QuantizedTensor:
    """Returns the weight of codes and what decodes them."""
    addresses = torch.tensor([part.data_ptr() for part in parts], device=codes.device)
    quantized = QuantizedData(kind, codes, addresses, *dense.shape, block)
    return QuantizedTensor(quantized, lambda: dense, dense.dtype, (codes, *parts))
