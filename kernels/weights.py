"""How kernels read a quantized weight: one loader for each kind.

A loader is a jit function that returns a tile of W ``[N, K]`` in registers, dequantized and rounded
once to x's dtype::

    loader(codes_ptr, parts_ptr, tile, DTYPE, POLICY)

The result is ``[ROWS, COLUMNS]``, as the `Tile` says. Elements beyond W's last row or column can be
any finite number. ``parts_ptr`` points to the addresses of the tensors that decode the codes, such
as scales. POLICY is the cache hint of the codes, which are read once.

Codes are contiguous and begin at a multiple of 4 bytes. `register_weight_loader` makes a kind
available to every kernel that multiplies with a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """The part of a matrix to load. Constants stay constant only if it is passed as an argument.

    Attributes:
        first_row: int64.
        first_column: A multiple of COLUMNS.
        num_rows, num_columns: Dimensions of the matrix.
        ROWS, COLUMNS: Dimensions of the tile.
        BLOCK: Number of columns that share a scale. It divides ``num_columns``, and either BLOCK
            divides COLUMNS, or COLUMNS divides BLOCK.
        EVEN_ROWS, EVEN_COLUMNS: Whether no tile extends beyond the last row, or column.
    """

    first_row: Any
    first_column: Any
    num_rows: Any
    num_columns: Any
    ROWS: Any
    COLUMNS: Any
    BLOCK: Any
    EVEN_ROWS: Any
    EVEN_COLUMNS: Any


class WeightLoader(NamedTuple):
    """How a launch reads one kind of quantized weight.

    Attributes:
        function: A jit function, as the module describes.
        by_block: Whether the function reads BLOCK. If not, it receives 0, so that one kernel serves
            every K.
        fuses: Whether the compiler may round a product and a sum once (FMA).
    """

    function: Any
    by_block: bool = True
    fuses: bool = True


_LOADERS: dict[str, WeightLoader] = {}


def register_weight_loader(kind: str, loader: WeightLoader) -> None:
    """Register the loader of a kind, which `fastlora.quantized_tensor.QuantizedData.kind` names."""
    _LOADERS[kind] = loader


def weight_loader_of(kind: str) -> WeightLoader:
    """Return the loader of a kind; raise `KeyError` for a kind that is not registered."""
    return _LOADERS[kind]


@triton.jit
def part(parts_ptr, index, dtype: tl.constexpr):
    """Return a pointer to one of the parts."""
    return tl.load(parts_ptr + index).to(tl.pointer_type(dtype))


@triton.jit
def mask_of(tile):
    """Return which elements of a tile ``[ROWS, COLUMNS]`` exist; None for all."""
    mask = None
    if not tile.EVEN_ROWS:
        mask = (tl.arange(0, tile.ROWS) < tile.num_rows - tile.first_row)[:, None]
    if not tile.EVEN_COLUMNS:
        left = tile.num_columns - tile.first_column
        mask_columns = (tl.arange(0, tile.COLUMNS) < left)[None, :]
        mask = mask_columns if mask is None else mask & mask_columns
    return mask


@triton.jit
def load_there(ptrs, mask, POLICY: tl.constexpr):
    """Return the existing elements of a tile, and zeros for others."""
    if mask is None:
        loaded = tl.load(ptrs, eviction_policy=POLICY)
    else:  # `other` has no meaning without a mask
        loaded = tl.load(ptrs, mask=mask, other=0, eviction_policy=POLICY)
    return loaded


@triton.jit
def load_tile(ptr, tile, POLICY: tl.constexpr):
    """Return a tile of a matrix that is stored row by row, ``[ROWS, COLUMNS]``."""
    ptr += tile.first_row * tile.num_columns
    ptr += tile.first_column
    offs = tl.arange(0, tile.ROWS)[:, None] * tile.num_columns + tl.arange(0, tile.COLUMNS)[None, :]
    return load_there(ptr + offs, mask_of(tile), POLICY)


@triton.jit
def load_groups(ptr, tile, LOAD: tl.constexpr = load_tile):
    """Return the numbers of a tile that are shared by BLOCK columns, ``[ROWS, COLUMNS / BLOCK]``.

    They are stored in the order of W's elements. A tile with fewer columns has one per row.
    """
    GROUPS: tl.constexpr = tile.COLUMNS // tile.BLOCK if tile.COLUMNS > tile.BLOCK else 1
    EVEN: tl.constexpr = tile.EVEN_COLUMNS or GROUPS == 1
    group, groups = tile.first_column // tile.BLOCK, tile.num_columns // tile.BLOCK
    first, rows = tile.first_row, tile.num_rows
    return LOAD(
        ptr, Tile(first, group, rows, groups, tile.ROWS, GROUPS, 1, tile.EVEN_ROWS, EVEN), ""
    )


@triton.jit
def scaled(values, scales, DTYPE: tl.constexpr):
    """Return fp32 values ``[ROWS, COLUMNS]`` times scales ``[ROWS, groups]``, rounded once."""
    GROUP: tl.constexpr = values.shape[1] // scales.shape[1]
    grouped = tl.reshape(values, (values.shape[0], scales.shape[1], GROUP))
    product = (grouped * scales[:, :, None]).to(DTYPE)
    return tl.reshape(product, (values.shape[0], values.shape[1]))


# --------------------------------------------------------------------------- tables of 16 values


@triton.jit
def load_nibbles(codes_ptr, tile, POLICY: tl.constexpr):
    """Return a tile of 4-bit codes, int32 ``[ROWS, COLUMNS]``; the high half of a byte comes first.

    Codes are loaded as words of 8, so that shifts are constant.
    """
    # The compiler can see that BLOCK / 8 words divide a row, and makes loads as wide as possible.
    row_words = tile.num_columns // tile.BLOCK * (tile.BLOCK // 8)
    ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    first, rows, word = tile.first_row, tile.num_rows, tile.first_column // 8
    WORDS: tl.constexpr = tile.COLUMNS // 8
    # words: [ROWS, COLUMNS / 8]
    words = load_tile(
        ptr,
        Tile(first, word, rows, row_words, tile.ROWS, WORDS, 1, tile.EVEN_ROWS, tile.EVEN_COLUMNS),
        POLICY,
    )
    # Bytes are in memory order, the lowest first.
    even = tl.interleave(
        tl.interleave(words >> 4, words >> 20), tl.interleave(words >> 12, words >> 28)
    )
    odd = tl.interleave(tl.interleave(words, words >> 16), tl.interleave(words >> 8, words >> 24))
    return tl.interleave(even, odd) & 15


@triton.jit
def looked_up(table_ptr, codes, SIZE: tl.constexpr):
    """Return the value of each code ``[ROWS, COLUMNS]`` in a table of SIZE fp32 values.

    A gather is one read of shared memory per code, and different values are in different banks.
    SASS instructions of the whole K loop per weight (sm_90, tile 16 x 32 x 256, 8 warps, Triton
    3.9): 8.5. With selects, 28.1, of which 14 select. With loads from global memory, which the
    pipeline would copy to shared memory one by one, 15.8.
    """
    # table: [SIZE]
    table = tl.load(table_ptr + tl.arange(0, SIZE))
    flat = tl.reshape(codes, (codes.shape[0] * codes.shape[1],))
    return tl.reshape(tl.gather(table, flat, 0), (codes.shape[0], codes.shape[1]))


@triton.jit
def load_table4(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Load NF4 or FP4 of bitsandbytes: ``table[code] * absmax[block]``.

    Codes: element ``e = n * K + k`` is a half of byte ``e // 2``, the high one if e is even. Parts:
    absmax, fp32, one for each BLOCK elements along e; a table of 16 fp32 values.

    Bytes moved: ``N K / 2 + 4 N K / BLOCK``, and 64 per tile for the table, from the cache.
    """
    codes = load_nibbles(codes_ptr, tile, POLICY)
    absmax = load_groups(part(parts_ptr, 0, tl.float32), tile)
    return scaled(looked_up(part(parts_ptr, 1, tl.float32), codes, 16), absmax, DTYPE)


@triton.jit
def _load_nested_absmax(parts_ptr, groups, POLICY: tl.constexpr):
    """Return the absmax of `load_table4_nested` for a tile of groups, ``[ROWS, groups]``."""
    # The word that contains an absmax is loaded. A load of a byte would not be copied
    # asynchronously, and the dot's operands would not be read by ldmatrix after it (Triton takes 8
    # bits for the width of w).
    address = tl.load(parts_ptr)
    words_ptr = (address & -4).to(tl.pointer_type(tl.int32))
    first = groups.first_row * groups.num_columns + groups.first_column
    index = first + tl.arange(0, groups.ROWS)[:, None] * groups.num_columns
    index += tl.arange(0, groups.COLUMNS)[None, :]
    mask = mask_of(groups)
    place = index + (address & 3)
    absmax8 = load_there(words_ptr + place // 4, mask, POLICY)
    absmax8 = absmax8 >> (place % 4 * 8).to(tl.int32) & 255
    absmax2 = load_there(part(parts_ptr, 2, tl.float32) + index // 256, mask, POLICY)
    absmax = looked_up(part(parts_ptr, 3, tl.float32), absmax8, 256) * absmax2
    return absmax + tl.load(part(parts_ptr, 4, tl.float32))


@triton.jit
def load_table4_nested(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Load NF4 or FP4 with 8-bit absmax: ``table[code] * (table2[absmax] * absmax2 + offset)``.

    Codes are as in `load_table4`. Parts: absmax, uint8, one for each BLOCK elements, at any
    address; the table of 16 values; absmax2, fp32, one for each 256 absmax; a table of 256 fp32
    values; and offset, one fp32 value.

    Bytes moved: ``N K / 2 + N K / BLOCK + 4 N K / (256 BLOCK)``, and 1,092 per tile for the tables
    and the offset, from the cache.
    """
    codes = load_nibbles(codes_ptr, tile, POLICY)
    absmax = load_groups(parts_ptr, tile, _load_nested_absmax)
    return scaled(looked_up(part(parts_ptr, 1, tl.float32), codes, 16), absmax, DTYPE)


# ------------------------------------------------------------------------------ 8 bits an element


@triton.jit
def load_row_scales(parts_ptr, tile):
    """Return the first part, one fp32 value per row, ``[ROWS, 1]``."""
    offs = tl.arange(0, tile.ROWS)
    ptrs = part(parts_ptr, 0, tl.float32) + tile.first_row + offs
    mask = None if tile.EVEN_ROWS else offs < tile.num_rows - tile.first_row
    return load_there(ptrs, mask, "")[:, None]


@triton.jit
def load_int8(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Load symmetric int8 of torchao: ``code * scale[row]``.

    Codes: int8 ``[N, K]``. Parts: scale, fp32 ``[N]``.

    Bytes moved: ``N K``, and 4 per row of a tile for its scale.
    """
    codes = load_tile(codes_ptr, tile, POLICY)
    return scaled(codes.to(tl.float32), load_row_scales(parts_ptr, tile), DTYPE)


@triton.jit
def load_float8_e4m3(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Load float8 e4m3fn of torchao: ``code * scale[row]``.

    Codes: the bits, uint8 ``[N, K]``. Parts: scale, fp32 ``[N]``. Values are decoded with integer
    operations, which every chip supports: shifted left by 7 bits, the bits of e4m3 are an fp16
    number with an exponent that is too low by 8.

    Bytes moved: ``N K``, and 4 per row of a tile for its scale.
    """
    codes = load_tile(codes_ptr, tile, POLICY)
    scales = load_row_scales(parts_ptr, tile)
    # Sign extension copies the sign to bits 7 and 8, which the shift moves to bits 14 and 15. Bit
    # 14 is cleared.
    half = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
    values = half.to(tl.float16, bitcast=True).to(tl.float32)
    # 448 is the largest number, and the next bit pattern is NaN.
    values = tl.where(tl.abs(values) > 448.0 / 256.0, float("nan"), values)
    return scaled(values, scales * 256.0, DTYPE)


@triton.jit
def load_float8_e5m2(codes_ptr, parts_ptr, tile, DTYPE: tl.constexpr, POLICY: tl.constexpr):
    """Load float8 e5m2 of torchao: ``code * scale[row]``.

    Codes: the bits, uint8 ``[N, K]``, which are the upper bits of an fp16 number. Parts: scale,
    fp32 ``[N]``.

    Bytes moved: ``N K``, and 4 per row of a tile for its scale.
    """
    codes = load_tile(codes_ptr, tile, POLICY)
    values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return scaled(values, load_row_scales(parts_ptr, tile), DTYPE)


register_weight_loader("table4", WeightLoader(load_table4))
# If a product and a sum were rounded once, absmax would differ from bitsandbytes'.
register_weight_loader("table4_nested", WeightLoader(load_table4_nested, fuses=False))
register_weight_loader("int8", WeightLoader(load_int8, by_block=False))
register_weight_loader("float8_e4m3", WeightLoader(load_float8_e4m3, by_block=False))
register_weight_loader("float8_e5m2", WeightLoader(load_float8_e5m2, by_block=False))
