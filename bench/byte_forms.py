"""Bytes and FLOPs of every launch in closed form, from shapes and tile sizes alone.

Each function returns the traffic of one launch. The tests of the kernels count the same traffic in
Triton's interpreter. In a mixed batch, the functions leave out the tables and the routing, which
are a few numbers per adapter, piece, or row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastlora.kernels.config_tables import KernelConfig, cdiv

Bytes = dict[str, tuple[int, int]]
# Key for memory that an operator allocates internally.
ELSEWHERE = "elsewhere"
SCALING = 4  # bytes of one fp32
SEED = 8  # bytes of one int64


class Form(NamedTuple):
    """Traffic and work of one launch: (distinct, issued) bytes by tensor, and FLOPs."""

    loads: Bytes
    stores: Bytes
    flops: int = 0

    @property
    def distinct(self) -> int:
        """Bytes that are touched at least once, which must come from memory."""
        return sum(d for side in (self.loads, self.stores) for d, _ in side.values())

    @property
    def issued(self) -> int:
        """Bytes of all loads and stores, which the L2 cache must serve."""
        return sum(i for side in (self.loads, self.stores) for _, i in side.values())


class Sizes(NamedTuple):
    """Rows, outputs, columns of x, and rank; bytes per element of activations and of factors."""

    m: int
    n: int
    k: int
    r: int
    e: int = 2
    f: int = 4


def often(size: int, times: int = 1) -> tuple[int, int]:
    """Return (distinct, issued) bytes of data that is loaded or stored ``times`` times."""
    return size, size * times


def summed(elements: int, parts: int, width: int) -> tuple[int, int]:
    """Return the bytes of an output that is written once, or as several fp32 partial sums."""
    return often(width * elements if parts == 1 else 4 * parts * elements)


def whole(size: int, block: int) -> int:
    """Return the size rounded up to a multiple of the block."""
    return cdiv(size, block) * block


# ----------------------------------------------------------------------------- one adapter


def shrink(sizes: Sizes, config: KernelConfig) -> Form:
    """Return the traffic of `launch_lora_shrink` without dropout: x once per block of rank rows."""
    m, _, k, r, e, f = sizes
    return Form(
        loads={
            "x": often(e * m * k, cdiv(r, config.block_r)),
            "lora_a": often(f * r * k, cdiv(m, config.block_m)),
        },
        stores={"s": summed(m * r, config.splits, e)},
        flops=2 * whole(m, config.block_m) * whole(r, config.block_r) * whole(k, config.block_k),
    )


def _tiles(sizes: Sizes, config: KernelConfig, depth: int, columns: int) -> tuple[int, int, int]:
    """Return the tiles of rows, tiles of columns, and FLOPs of a product with a LoRA term."""
    depth = whole(depth, config.block_k) if depth else 0
    flops = 2 * whole(sizes.m, config.block_m) * whole(columns, config.block_n)
    flops *= depth + whole(sizes.r, config.block_r)
    return cdiv(sizes.m, config.block_m), cdiv(columns, config.block_n), flops


def linear(sizes: Sizes, config: KernelConfig, partials: int = 1, with_bias: bool = False) -> Form:
    """Return the traffic of `launch_lora_linear` in a forward pass.

    With several ``partials``, which are split-K partial sums, s is also written. All programs that
    share a sum over K load lora_b, scaling, and bias, and the first of them loads s.
    """
    m, n, k, r, e, f = sizes
    tiles_m, tiles_n, flops = _tiles(sizes, config, k, n)
    loads = {
        "x": often(e * m * k, tiles_n),
        "weight": often(e * n * k, tiles_m),
        "s": often(summed(m * r, partials, e)[0], tiles_n),
        "lora_b": often(f * n * r, tiles_m * config.splits),
        "scaling": (SCALING, SCALING * r * tiles_m * tiles_n * config.splits),
    }
    stores = {"y": summed(m * n, config.splits, e)}
    if with_bias:
        loads["bias"] = often(e * n, tiles_m * config.splits)
    if partials > 1:
        stores["s"] = often(e * m * r)
    return Form(loads, stores, flops)


def expand(
    sizes: Sizes,
    config: KernelConfig,
    scalings: int = 1,
    partials: int = 1,
    reads_y: bool = True,
) -> Form:
    """Return the traffic of `launch_lora_expand`: y written, and s read once per tile of N.

    With ``reads_y``, y holds a product already and is also read.
    """
    m, n, _, r, e, f = sizes
    tiles_m, tiles_n, flops = _tiles(sizes, config, 0, n)
    loads = {
        **({"y": often(e * m * n)} if reads_y else {}),
        "s": often(summed(m * r, partials, e)[0], tiles_n),
        "lora_b": often(f * n * r, tiles_m),
        "scaling": (SCALING * scalings, SCALING * r * tiles_m * tiles_n),
    }
    return Form(loads, {"y": often(e * m * n)}, flops)


def summed_expand(sizes: Sizes, config: KernelConfig, ranks: Sequence[int]) -> Form:
    """Return the traffic of `launch_summed_lora_expand` for modules of these ranks.

    y is written, each s is read once per tile of N, and each lora_b once per tile of M.
    """
    m, n, _, _, e, f = sizes
    loads: Bytes = {}
    flops = 0
    for i, r in enumerate(ranks):
        tiles_m, tiles_n, own = _tiles(sizes._replace(r=r), config, 0, n)
        loads[f"s_{i}"] = often(e * m * r, tiles_n)
        loads[f"lora_b_{i}"] = often(f * n * r, tiles_m)
        flops += own
    return Form(loads, {"y": often(e * m * n)}, flops)


def dropout(sizes: Sizes, config: KernelConfig) -> Form:
    """Return the traffic of `launch_lora_dropout`: x and the result once, the seed per program."""
    m, _, k, _, e, _ = sizes
    programs = cdiv(m, config.block_m) * cdiv(k, config.block_k)
    return Form({"x": often(e * m * k), "seed": often(SEED, programs)}, {"out": often(e * m * k)})


def grad_b(
    sizes: Sizes,
    config: KernelConfig,
    scalings: int = 1,
    with_bias: bool = False,
    with_ds: bool = True,
) -> Form:
    """Return the traffic of `launch_lora_grad_b`.

    dy is read once per block of rank rows, and s and lora_b once per program.
    """
    m, n, _, r, e, f = sizes
    columns, splits = cdiv(n, config.block_n), config.splits
    stores = {"ds": summed(m * r, columns, e)} if with_ds else {}
    stores["d_lora_b"] = summed(n * r, splits, f)
    if with_bias:
        stores["d_bias"] = often(4 * splits * n)
    tiles = whole(m, config.block_m) * whole(n, config.block_n) * whole(r, config.block_r)
    loads = {
        "dy": often(e * m * n, cdiv(r, config.block_r)),
        "s": often(e * m * r, columns),
        "scaling": (SCALING * scalings, SCALING * r * columns * splits),
    }
    if with_ds:
        loads["lora_b"] = often(f * n * r, splits)
    flops = 2 * (1 + with_ds) * tiles
    if with_bias and e < 4 and not config.rank_rows_first:
        # The column sums of dy are computed as a product with 16 columns of ones.
        flops += 2 * tiles // config.block_r * 16
    return Form(loads, stores, flops)


def grad_a(
    sizes: Sizes, config: KernelConfig, ranks: Sequence[int] = (), drops: bool = False
) -> Form:
    """Return the traffic of `launch_lora_grad_a`.

    x is read once per block of rank rows, and ds once per block of columns.
    """
    m, _, k, r, e, f = sizes
    ranks = ranks or [r]
    columns, splits, blocks_r = cdiv(k, config.block_k), config.splits, cdiv(r, config.block_r)
    loads, stores = {"x": often(e * m * k, blocks_r)}, {}
    for i, own in enumerate(ranks):
        loads[f"ds_{i}"] = often(e * m * own, columns)
        stores[f"d_lora_a_{i}"] = summed(own * k, splits, f)
    if drops:
        loads["seeds"] = often(SEED * len(ranks), columns * blocks_r * splits)
    tiles = whole(m, config.block_m) * whole(k, config.block_k) * whole(r, config.block_r)
    return Form(loads, stores, 2 * tiles * len(ranks))


def grad_x(sizes: Sizes, config: KernelConfig, drops: bool = False) -> Form:
    """Return the traffic of `launch_lora_linear` that computes dx ``[m, k]`` from dy ``[m, n]``."""
    m, n, k, r, e, f = sizes
    tiles_m, tiles_k, flops = _tiles(sizes, config, n, k)
    loads = {
        "dy": often(e * m * n, tiles_k),
        "weight": often(e * n * k, tiles_m),
        "ds": often(e * m * r, tiles_k),
        "lora_a": often(f * r * k, tiles_m),
    }
    if drops:
        loads["seed"] = often(SEED, tiles_m * tiles_k)
    return Form(loads, {"dx": often(e * m * k)}, flops)


def plane_sums(outs: Iterable[tuple[int, int, int]]) -> Form:
    """Return the traffic of `launch_plane_sums` for (elements, partial sums, element bytes)."""
    outs = list(outs)
    read = sum(4 * elements * partials for elements, partials, _ in outs)
    written = sum(elements * width for elements, _, width in outs)
    return Form({"partials": often(read)}, {"outs": often(written)})


# ----------------------------------------------------------------------------- a mixed batch


class Batch(NamedTuple):
    """The operands of a linear layer in a mixed batch.

    Attributes:
        ids: Slot of each row, or -1 for no adapter.
        ranks: Rank of each slot.
        n, k: Number of outputs, and number of columns of x.
        e, f: Bytes per element of activations, and per element of factors.
    """

    ids: Sequence[int]
    ranks: Sequence[int]
    n: int
    k: int
    e: int = 2
    f: int = 4

    @property
    def m(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def held(self) -> list[int]:
        """The rank of each row that has an adapter."""
        return [self.ranks[slot] for slot in self.ids if slot >= 0]

    @property
    def own(self) -> int:
        """Total number of rank rows of the adapters that have rows."""
        return sum(self.ranks[slot] for slot in {*self.ids} - {-1})

    def tiles(self, block_m: int) -> list[list[int]]:
        """Return the ranks of the adapters with rows in each tile of sorted positions.

        Rows without an adapter come last.
        """
        positions = sorted(self.ids, key=lambda slot: (slot < 0, slot))
        starts = range(0, self.m, block_m)
        slots = [{*positions[start : start + block_m]} - {-1} for start in starts]
        return [[self.ranks[slot] for slot in tile] for tile in slots]

    def pieces(self, block_m: int) -> list[int]:
        """Return the rank of each piece."""
        return [rank for tile in self.tiles(block_m) for rank in tile]


def mixed_shrink(batch: Batch, config: KernelConfig, splits: int) -> Form:
    """Return the traffic of `launch_mixed_lora_shrink`.

    x is read once per block of rank rows, and lora_a once per piece.
    """

    def width(rank: int) -> int:
        return config.narrow_r if rank <= config.narrow_r else config.block_r

    row, pieces, held = batch.e * batch.k, batch.pieces(config.block_m), batch.held
    columns = sum(whole(rank, width(rank)) for rank in pieces)
    return Form(
        loads={
            "x": (row * len(held), row * sum(cdiv(rank, width(rank)) for rank in held)),
            "lora_a": (batch.f * batch.k * batch.own, batch.f * batch.k * sum(pieces)),
        },
        stores={"s": often(4 * splits * sum(held))},
        flops=2 * config.block_m * columns * whole(batch.k, config.block_k),
    )


def _rank_rows(
    batch: Batch, ranks: Sequence[int], tiles_n: int, splits: int, s_width: int = 4
) -> Bytes:
    """Return the loads of the LoRA term: s once per tile of N, lora_b once per entry of ranks."""
    width = batch.f * batch.n
    return {
        "s": often(s_width * splits * sum(batch.held), tiles_n),
        "lora_b": (width * batch.own, width * sum(ranks)),
    }


def mixed_linear(batch: Batch, config: KernelConfig, splits: int, with_bias: bool) -> Form:
    """Return the traffic of `launch_mixed_lora_linear`: the base GEMM, and the LoRA term.

    Each adapter has its columns in blocks of 16. The blocks of all adapters of a tile are side by
    side.
    """
    m, n, k, e = batch.m, batch.n, batch.k, batch.e
    tiles, tiles_m = batch.tiles(config.block_m), cdiv(m, config.block_m)
    tiles_n, block_r = cdiv(n, config.block_n), config.block_r
    loads = _rank_rows(batch, batch.pieces(config.block_m), tiles_n, splits)
    if with_bias:
        loads["bias"] = often(e * n, tiles_m)
    columns = sum(whole(sum(whole(rank, 16) for rank in tile), block_r) for tile in tiles)
    flops = 2 * columns * tiles_n * config.block_m * config.block_n
    flops += 2 * whole(m, config.block_m) * whole(n, config.block_n) * whole(k, config.block_k)
    base = {"x": often(e * m * k, tiles_n), "weight": often(e * n * k, tiles_m)}
    return Form({**base, **loads}, {"y": often(e * m * n)}, flops)


def mixed_expand(batch: Batch, config: KernelConfig, splits: int, s_width: int = 4) -> Form:
    """Return the traffic of `launch_mixed_lora_expand`.

    y is read and written, s is read once per tile of N, and lora_b once per piece. ``s_width`` is
    the number of bytes per element of s.
    """
    ranks, tiles_n = batch.pieces(config.block_m), cdiv(batch.n, config.block_n)
    y = often(batch.e * len(batch.held) * batch.n)
    loads = _rank_rows(batch, ranks, tiles_n, splits, s_width)
    columns = sum(whole(rank, config.block_r) for rank in ranks)
    return Form(
        {"y": y, **loads}, {"y": y}, 2 * columns * tiles_n * config.block_m * config.block_n
    )


def mixed_scale(batch: Batch, config: KernelConfig) -> Form:
    """Return the traffic of `launch_mixed_dora_scale` with a bias.

    y is read and written, and the other tensors are read once per piece.
    """
    pieces, adapters = len(batch.pieces(config.block_m)), len({*batch.ids} - {-1})
    n, y = batch.n, often(batch.e * len(batch.held) * batch.n)
    loads = {"y": y, "scales": (4 * adapters * n, 4 * pieces * n)}
    return Form({**loads, "bias": often(batch.e * n, pieces)}, {"y": y})


def mixed_grad_b(batch: Batch, config: KernelConfig, run: int) -> Form:
    """Return the traffic of `launch_mixed_lora_grad_b`.

    dy is read once. There is a partial sum of ds per block of N, and one of d_lora_b per run.
    """
    n, e, f, columns = batch.n, batch.e, batch.f, cdiv(batch.n, config.block_n)
    ds, pieces = sum(batch.held), sum(batch.pieces(run))
    return Form(
        loads={
            "dy": often(e * len(batch.held) * n),
            "s": often(e * ds, columns),
            "lora_b": (f * batch.own * n, f * pieces * n),
        },
        stores={ELSEWHERE: often(4 * columns * ds + 4 * pieces * n)},
    )


def mixed_grad_a(batch: Batch, config: KernelConfig, run: int) -> Form:
    """Return the traffic of `launch_mixed_lora_grad_a`: x once, and a partial sum per run."""
    k, e = batch.k, batch.e
    return Form(
        loads={
            "x": often(e * len(batch.held) * k),
            "ds": often(e * sum(batch.held), cdiv(k, config.block_k)),
        },
        stores={ELSEWHERE: often(4 * sum(batch.pieces(run)) * k)},
    )


def mixed_grad_x(batch: Batch, config: KernelConfig) -> Form:
    """Return the traffic of `launch_mixed_lora_linear` that computes dx."""
    m, n, k, e, f = batch.m, batch.n, batch.k, batch.e, batch.f
    tiles_m, tiles_k = cdiv(m, config.block_m), cdiv(k, config.block_n)
    return Form(
        loads={
            "dy": often(e * m * n, tiles_k),
            "weight": often(e * n * k, tiles_m),
            "ds": often(e * sum(batch.held), tiles_k),
            "lora_a": (f * batch.own * k, f * sum(batch.pieces(config.block_m)) * k),
        },
        stores={"dx": often(e * m * k)},
    )


def mixed_grad_b_reduce(batch: Batch, config: KernelConfig, run: int) -> Form:
    """Return the traffic of `launch_mixed_lora_grad_reduce` after `mixed_grad_b`.

    Each byte of the partial sums is read once, and each result is written once.
    """
    ds, d_lora_b = batch.e * sum(batch.held), batch.f * batch.own * batch.n
    partials = mixed_grad_b(batch, config, run).stores
    return Form(loads=partials, stores={"ds": often(ds), "d_lora_b": often(d_lora_b)})


def mixed_grad_a_reduce(batch: Batch, run: int) -> Form:
    """Return the traffic of `launch_mixed_lora_grad_reduce` after `mixed_grad_a`."""
    partials = often(4 * sum(batch.pieces(run)) * batch.k)
    d_lora_a = often(batch.f * batch.own * batch.k)
    return Form(loads={ELSEWHERE: partials}, stores={"d_lora_a": d_lora_a})
