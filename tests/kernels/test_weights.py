"""Loaders of coded weights: a tile is what the library that stored the weight makes of it.

`test_one_more_kind.py` adds a loader of its own.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

import triton
import triton.language as tl

from fastlora.kernels.config_tables import cdiv
from fastlora.kernels.weights import Tile, weight_loader_of
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor, dequantize
from tests.support.kernels.lab import Lab
from tests.support.kernels.quantized_weights import (
    EIGHT_BITS,
    FOUR_BITS,
    eight_bits,
    four_bits,
    make_quantized_weight,
)

# Rows and columns of a tile: less than a block, blocks, more than K; none of them divides N.
TILES = [(16, 32), (32, 256), (16, 512)]


@triton.jit
def _store(
    out_ptr,
    codes_ptr,
    parts_ptr,
    N,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    row, column = tl.cast(tl.program_id(0) * ROWS, tl.int64), tl.program_id(1) * COLUMNS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    w = WEIGHT(
        codes_ptr, parts_ptr, Tile(row, column, N, K, ROWS, COLUMNS, BLOCK, EVEN, EVEN), dtype, ""
    )
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    tl.store(out_ptr + rows[:, None] * K + columns[None, :], w, mask=mask)


def decoded(quantized: QuantizedData, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """What a loader makes of a weight, tile by tile."""
    n, k, loader = quantized.n, quantized.k, weight_loader_of(quantized.kind)
    out = torch.full((n, k), float("nan"), dtype=dtype, device=quantized.codes.device)
    _store[cdiv(n, rows), cdiv(k, columns)](
        *(out, quantized.codes, quantized.parts, n, k, rows, columns),
        BLOCK=quantized.block if loader.by_block else 0,
        EVEN=n % rows == 0 and k % columns == 0,
        WEIGHT=loader.function,
        enable_fp_fusion=loader.fuses,
    )
    return out


def check(weight: QuantizedTensor) -> None:
    dense = dequantize(weight)
    assert dense.isfinite().all() and dense.unique().numel() > 8
    for rows, columns in TILES:
        assert torch.equal(decoded(weight.quantized_data, weight.dtype, rows, columns), dense)


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(("kind", "nested", "block"), FOUR_BITS)
def test_4_bits(lab: Lab, dtype: torch.dtype, kind: str, nested: bool, block: int) -> None:
    check(four_bits(lab.rand(19, 3 * 256, dtype=dtype), kind, nested, block))


def test_4_bits_where_tiles_divide_the_weight(lab: Lab) -> None:
    check(four_bits(lab.rand(64, 512), "nf4", True, 64))


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_8_bits(lab: Lab, dtype: torch.dtype, kind: str) -> None:
    check(eight_bits(lab.rand(19, 200, dtype=dtype), kind))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float8_e4m3", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)],
)
def test_every_float8(lab: Lab, kind: str, dtype: torch.dtype) -> None:
    """All 256, NaN and infinity among them."""
    codes = torch.arange(256, device=lab.device).to(torch.uint8).view(16, 16)
    scale = torch.linspace(0.1, 2.0, 16, device=lab.device)
    parts = torch.tensor([scale.data_ptr()], device=lab.device)
    found = decoded(QuantizedData(kind, codes, parts, 16, 16, 16), torch.float32, 16, 16)
    expected = codes.view(dtype).float() * scale[:, None]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    negative = ~expected.isnan()
    assert torch.equal(found.signbit()[negative], expected.signbit()[negative])


def test_a_zero_of_absmax_and_blocks_of_zeros(lab: Lab) -> None:
    weight = lab.rand(20, 128)
    weight[:, :64] = 0.0
    for kind in ("nf4", "fp4", "nf4 nested"):
        quantized = make_quantized_weight(kind, weight)
        assert torch.equal(
            decoded(quantized.quantized_data, torch.float32, 16, 64), dequantize(quantized)
        )


@pytest.mark.parametrize("lead", [1, 2, 3])
def test_nested_scales_lie_at_any_address(lab: Lab, lead: int) -> None:
    """Kernels read them by words."""
    weight = four_bits(lab.rand(19, 320), "nf4", True, 64)
    quantized, (_, absmax, *_) = weight.quantized_data, weight.data_tensors
    room = torch.full((absmax.numel() + 8,), 255, dtype=torch.uint8, device=lab.device)
    moved = room[lead : lead + absmax.numel()].copy_(absmax)
    parts = quantized.parts.clone()
    parts[0] = moved.data_ptr()
    found = decoded(quantized._replace(parts=parts), torch.float32, 16, 64)
    assert torch.equal(found, dequantize(weight))
