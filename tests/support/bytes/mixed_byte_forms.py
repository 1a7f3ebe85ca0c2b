"""The bytes and FLOPs of a mixed batch's forward in closed form, from shapes and tiles alone.

For adapters of one rank with as many rows each, none without. Each function returns what
`byte_counter.ByteCounter` must count of one launch but for the tables and the routing: a number for
each adapter, piece or row. ``e`` is the bytes of an element of activations, ``f`` of a factor;
``splits`` are those of s, which is fp32.
"""

from __future__ import annotations

from fastlora.kernels.configs import KernelConfig, cdiv
from tests.support.bytes.byte_forms import Form


def meetings(m: int, adapters: int, block_m: int) -> int:
    """How many pairs of a tile of sorted rows and an adapter with rows in it there are."""
    share = m // adapters
    return len({(row // block_m, row // share) for row in range(m)})


def shrink(
    m: int, k: int, r: int, adapters: int, e: int, f: int, splits: int, config: KernelConfig
) -> Form:
    """`launch_mixed_lora_shrink`: x once per block of rank rows, lora_a once per piece."""
    pieces = meetings(m, adapters, config.block_m)
    width = config.narrow_r if r <= config.narrow_r else config.block_r
    turns, depth = cdiv(r, width), cdiv(k, config.block_k) * config.block_k
    s = 4 * splits * m * r
    return Form(
        loads={
            "x": (e * m * k, e * m * k * turns),
            "lora_a": (f * adapters * r * k, f * pieces * r * k),
        },
        stores={"s": (s, s)},
        flops=2 * pieces * config.block_m * turns * width * depth,
    )


def linear(
    m: int,
    n: int,
    k: int,
    r: int,
    adapters: int,
    e: int,
    f: int,
    splits: int,
    config: KernelConfig,
) -> Form:
    """`launch_mixed_lora_linear` without bias: the base GEMM's bytes, and the rank rows'."""
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    loads, flops = _rank_rows(m, n, r, adapters, f, splits, config)
    depth = cdiv(k, config.block_k) * config.block_k
    return Form(
        loads={
            "x": (e * m * k, e * m * k * tiles_n),
            "weight": (e * n * k, e * n * k * tiles_m),
            **loads,
        },
        stores={"y": (e * m * n, e * m * n)},
        flops=flops + 2 * tiles_m * config.block_m * tiles_n * config.block_n * depth,
    )


def expand(
    m: int, n: int, r: int, adapters: int, e: int, f: int, splits: int, config: KernelConfig
) -> Form:
    """`launch_mixed_lora_expand`: y read and written, and the rank rows' bytes."""
    loads, flops = _rank_rows(m, n, r, adapters, f, splits, config)
    y = (e * m * n, e * m * n)
    return Form(loads={"y": y, **loads}, stores={"y": y}, flops=flops)


def add(
    m: int, n: int, k: int, r: int, adapters: int, e: int, f: int, config: KernelConfig
) -> Form:
    """`launch_mixed_lora_add`: every tile of N makes s anew, so x and lora_a are read for each."""
    pieces, tiles_n = meetings(m, adapters, config.block_m), cdiv(n, config.block_n)
    chunks, depth = cdiv(r, config.block_r), cdiv(k, config.block_k) * config.block_k
    y = (e * m * n, e * m * n)
    return Form(
        loads={
            "y": y,
            "x": (e * m * k, e * m * k * tiles_n * chunks),
            "lora_a": (f * adapters * r * k, f * pieces * r * k * tiles_n),
            "lora_b": (f * adapters * r * n, f * pieces * r * n),
        },
        stores={"y": y},
        flops=2 * pieces * tiles_n * chunks * config.block_m * config.block_r
        * (depth + config.block_n),
    )  # fmt: skip


def scale(m: int, n: int, adapters: int, e: int, config: KernelConfig) -> Form:
    """`launch_mixed_dora_scale` with a bias: y read and written, the rest once per piece."""
    pieces, y = meetings(m, adapters, config.block_m), (e * m * n, e * m * n)
    return Form(
        loads={
            "y": y,
            "scales": (4 * adapters * n, 4 * pieces * n),
            "bias": (e * n, e * pieces * n),
        },
        stores={"y": y},
        flops=0,
    )


def _rank_rows(
    m: int,
    n: int,
    r: int,
    adapters: int,
    f: int,
    splits: int,
    config: KernelConfig | KernelConfig,
) -> tuple[dict[str, tuple[int, int]], int]:
    """Loads and FLOPs of adding the rank rows: s once per tile of N, lora_b once per tile of M.

    An adapter's columns come in blocks of 16, those of a tile's adapters side by side.
    """
    share, tiles_n = m // adapters, cdiv(n, config.block_n)
    chunks = 0
    for first in range(0, m, config.block_m):
        held = {row // share for row in range(first, min(first + config.block_m, m))}
        chunks += cdiv(16 * cdiv(r, 16) * len(held), config.block_r)
    s, own = 4 * splits * m * r, f * r * n
    loads = {
        "s": (s, s * tiles_n),
        "lora_b": (adapters * own, meetings(m, adapters, config.block_m) * own),
    }
    return loads, 2 * chunks * tiles_n * config.block_m * config.block_n * config.block_r
