"""The bytes and FLOPs of one adapter's launches in closed form, from shapes and tiles alone.

Each function returns what `byte_counter.ByteCounter` must count of one launch: loads and stores by
tensor as (distinct, issued), and FLOPs. ``e`` is the bytes of an element of activations, ``f`` of a
factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastlora.kernels.configs import KernelConfig, cdiv

Bytes = dict[str, tuple[int, int]]
SCALING = 4  # bytes of one fp32
SEED = 8  # bytes of one int64


class Form(NamedTuple):
    """What one launch moves and multiplies."""

    loads: Bytes
    stores: Bytes
    flops: int

    @property
    def distinct(self) -> int:
        """Bytes touched at least once: what must come from memory."""
        return sum(d for side in (self.loads, self.stores) for d, _ in side.values())

    @property
    def issued(self) -> int:
        """Bytes of every load and store: what the L2 cache must serve."""
        return sum(i for side in (self.loads, self.stores) for _, i in side.values())


def shrink(m: int, k: int, r: int, e: int, f: int, config: KernelConfig) -> Form:
    """`launch_lora_shrink` without dropout: x once per block of rank rows."""
    tiles_m, blocks_r = cdiv(m, config.block_m), cdiv(r, config.block_r)
    written = e * m * r if config.splits == 1 else 4 * config.splits * m * r
    depth = cdiv(k, config.block_k) * config.block_k
    return Form(
        loads={
            "x": (e * m * k, e * m * k * blocks_r),
            "lora_a": (f * r * k, f * r * k * tiles_m),
        },
        stores={"s": (written, written)},
        flops=2 * tiles_m * config.block_m * blocks_r * config.block_r * depth,
    )


def shrink_reduce(m: int, r: int, e: int, planes: int) -> Form:
    """`launch_lora_shrink_reduce`: every plane read once, s written once."""
    read = 4 * planes * m * r
    return Form({"planes": (read, read)}, {"s": (e * m * r, e * m * r)}, 0)


def linear(
    m: int, n: int, k: int, r: int, e: int, f: int, planes: int, config: KernelConfig
) -> Form:
    """`launch_lora_linear` as a forward without bias; s is written besides where it is planes."""
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    s = e * m * r if planes == 1 else 4 * planes * m * r
    stores = {"y": (e * m * n, e * m * n)}
    if planes > 1:
        stores["s"] = (e * m * r, e * m * r)
    tile = 2 * tiles_m * config.block_m * tiles_n * config.block_n
    depth = cdiv(k, config.block_k) * config.block_k + cdiv(r, config.block_r) * config.block_r
    return Form(
        loads={
            "x": (e * m * k, e * m * k * tiles_n),
            "weight": (e * n * k, e * n * k * tiles_m),
            "s": (s, s * tiles_n),
            "lora_b": (f * n * r, f * n * r * tiles_m),
            "scaling": (SCALING, SCALING * r * tiles_m * tiles_n),
        },
        stores=stores,
        flops=tile * depth,
    )


def expand(m: int, n: int, r: int, e: int, f: int, config: KernelConfig) -> Form:
    """`launch_lora_expand` with one scaling: y read and written, s once per tile of N."""
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    depth = cdiv(r, config.block_r) * config.block_r
    return Form(
        loads={
            "y": (e * m * n, e * m * n),
            "s": (e * m * r, e * m * r * tiles_n),
            "lora_b": (f * n * r, f * n * r * tiles_m),
            "scaling": (SCALING, SCALING * r * tiles_m * tiles_n),
        },
        stores={"y": (e * m * n, e * m * n)},
        flops=2 * tiles_m * config.block_m * tiles_n * config.block_n * depth,
    )


def dropout(m: int, k: int, e: int, config: KernelConfig) -> Form:
    """`launch_lora_dropout`: x once, what is kept once, and the seed in every program."""
    programs = cdiv(m, config.block_m) * cdiv(k, config.block_k)
    return Form(
        loads={"x": (e * m * k, e * m * k), "seed": (SEED, SEED * programs)},
        stores={"out": (e * m * k, e * m * k)},
        flops=0,
    )


def grad_b(
    m: int, n: int, r: int, e: int, f: int, scalings: int, with_bias: bool, config: KernelConfig
) -> Form:
    """`launch_lora_grad_b`: dy once per block of rank rows, s and lora_b once per program."""
    columns, splits = cdiv(n, config.block_n), config.splits
    blocks_r, steps = cdiv(r, config.block_r), cdiv(m, config.block_m)
    ds = e * m * r if columns == 1 else 4 * columns * m * r
    d_lora_b = f * n * r if splits == 1 else 4 * splits * n * r
    stores = {"ds": (ds, ds), "d_lora_b": (d_lora_b, d_lora_b)}
    if with_bias:
        stores["d_bias"] = (4 * splits * n, 4 * splits * n)
    product = 2 * config.block_m * config.block_n * config.block_r
    return Form(
        loads={
            "dy": (e * m * n, e * m * n * blocks_r),
            "s": (e * m * r, e * m * r * columns),
            "lora_b": (f * n * r, f * n * r * splits),
            "scaling": (SCALING * scalings, SCALING * r * columns * splits),
        },
        stores=stores,
        flops=2 * product * steps * columns * blocks_r,
    )


def grad_a(
    m: int, k: int, ranks: Sequence[int], e: int, f: int, dropout: bool, config: KernelConfig
) -> Form:
    """`launch_lora_grad_a`: x once per block of rank rows, ds once per block of columns."""
    columns, splits, count = cdiv(k, config.block_k), config.splits, len(ranks)
    blocks_r, steps = cdiv(max(ranks), config.block_r), cdiv(m, config.block_m)
    loads = {"x": (e * m * k, e * m * k * blocks_r)}
    stores = {}
    for i, r in enumerate(ranks):
        loads[f"ds_{i}"] = (e * m * r, e * m * r * columns)
        written = f * r * k if splits == 1 else 4 * splits * r * k
        stores[f"d_lora_a_{i}"] = (written, written)
    if dropout:
        loads["seeds"] = (SEED * count, SEED * count * columns * blocks_r * splits)
    product = 2 * config.block_m * config.block_k * config.block_r
    return Form(loads, stores, product * steps * columns * blocks_r * count)


def grad_x(
    m: int, n: int, k: int, r: int, e: int, f: int, dropout: bool, config: KernelConfig
) -> Form:
    """`launch_lora_linear` as the gradient of x: dy ``[m, n]``, dx ``[m, k]``."""
    tiles_m, tiles_k = cdiv(m, config.block_m), cdiv(k, config.block_n)
    loads = {
        "dy": (e * m * n, e * m * n * tiles_k),
        "weight": (e * n * k, e * n * k * tiles_m),
        "ds": (e * m * r, e * m * r * tiles_k),
        "lora_a": (f * r * k, f * r * k * tiles_m),
    }
    if dropout:
        loads["seed"] = (SEED, SEED * tiles_m * tiles_k)
    tile = 2 * tiles_m * config.block_m * tiles_k * config.block_n
    depth = cdiv(n, config.block_k) * config.block_k + cdiv(r, config.block_r) * config.block_r
    return Form(loads, {"dx": (e * m * k, e * m * k)}, tile * depth)


def plane_sums(sizes: Sequence[int], planes: Sequence[int], widths: Sequence[int]) -> Form:
    """`launch_plane_sums`: every plane read once, every output of ``width`` bytes written once."""
    read = sum(4 * size * count for size, count in zip(sizes, planes, strict=True))
    written = sum(size * width for size, width in zip(sizes, widths, strict=True))
    return Form({"planes": (read, read)}, {"outs": (written, written)}, 0)
