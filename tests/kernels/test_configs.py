"""The configs: valid on their chips, compiled ahead of time, and picked as the sizes ask."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.kernels import configs
from fastlora.kernels.chips import Chip, ConfigRow
from fastlora.kernels.config_tables import (
    MAX_GROUP_SIZE,
    MAX_SPLITS,
    KernelConfig,
    candidates_of,
    cdiv,
    is_valid,
)
from fastlora.kernels.configs import TRAIN_PIECE_ROWS, choose, piece_rows, run_rows
from tests.support.aot.shipped import all_shipped
from tests.support.chips import CHIPS, H100
from tests.support.kernels.lab import put_rows

BF16 = torch.bfloat16
LAUNCHES = dict.fromkeys(launch for launch, _ in candidates_of("sm_90"))
KINDS = ((BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
EVERY_CHIP = pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
ROWS = (0, 16, 17, 64, 65, 129, 2000, 16384)
WIDTHS = (16, 576, 4096, 14336)
RANKS = (1, 17, 64, 100, 512)
TRAINING_BY_PIECES = (
    "mixed_lora_train_shrink",
    "mixed_lora_train_expand",
    "mixed_lora_grad_x_add",
)
# Sums of fp32 planes read no x, nor does what sorts rows.
SUMS = ("plane_sums", "mixed_lora_grad_reduce", "mixed_rows_sort")


def chosen(launch: str, **sizes: Any) -> KernelConfig:
    """The config on an H100 in bf16."""
    return choose(H100, launch, BF16, **sizes)


@pytest.mark.drawn(1 / 2)
@EVERY_CHIP
def test_every_choice_is_shipped_and_valid(chip: Chip) -> None:
    """Whatever the problem, the config is one that the ahead-of-time test compiled."""
    for launch in LAUNCHES:
        found = [entry for entry in all_shipped(chip) if entry.kernel == launch]
        # Splits change the grid only, and the most siblings stand for fewer.
        shipped = {(e.dtype, replace(e.config, splits=1, group_size=1)) for e in found}
        most = {(e.dtype, replace(e.config, splits=1, group_size=1)): e.config for e in found}
        counts = range(1, MAX_GROUP_SIZE + 1) if launch == "lora_grad_a" else (1,)
        taken = set()
        for dtype, precision in KINDS:
            options: dict[str, Any] = {"input_precision": precision}
            for m, n, r, group_size in itertools.product(ROWS, WIDTHS, RANKS, counts):
                for k in (16, n):
                    config = choose(
                        chip, launch, dtype, m=m, n=n, k=k, r=r, group_size=group_size, **options
                    )
                    assert config.group_size == group_size
                    key = (dtype, replace(config, splits=1, group_size=1))
                    if launch in SUMS:
                        key = (BF16, key[1])
                    assert key in shipped, (launch, key)
                    assert group_size <= most[key].group_size
                    taken.add(key)
        for entry in found:
            assert is_valid(chip, launch, entry.config, entry.dtype.itemsize), entry
        # The rest of the table is for chips of other sizes; most of it is in use on this one.
        least = 0.75 if chip.arch != "interpreter" else 0.65
        if launch.startswith(("mixed_lora_train", "mixed_lora_grad")):
            least = 1
        assert len(taken) >= least * len(shipped), shipped - taken


@EVERY_CHIP
def test_row_tiles_that_the_host_knows(chip: Chip) -> None:
    """Pieces and runs of a mixed batch are made before the launch, from the same row tile."""
    for (dtype, precision), m in itertools.product(KINDS, ROWS):
        for launch in ("mixed_lora_shrink", "mixed_lora_expand", "mixed_dora_scale"):
            config = choose(chip, launch, dtype, m=m, r=48, input_precision=precision)
            assert config.block_m == piece_rows(m)
    for (launch, _), rows in candidates_of(chip.family).items():
        if launch in TRAINING_BY_PIECES:
            assert {row.block_m for row in rows} == {TRAIN_PIECE_ROWS}
        if launch in ("mixed_lora_grad_b", "mixed_lora_grad_a"):
            assert len({row.block_m for row in rows}) == 1


def test_half_types_share_their_configs() -> None:
    sizes = {"m": 1, "n": 4096, "k": 4096, "r": 16}
    for launch in LAUNCHES:
        assert choose(H100, launch, torch.float16, **sizes) == chosen(launch, **sizes)


def test_fp32_is_exact_where_tf32_has_no_rows() -> None:
    sizes = {"m": 64, "n": 4096, "k": 4096, "r": 16, "input_precision": "tf32"}
    assert choose(H100, "lora_linear", torch.float32, **sizes).input_precision == "tf32"
    gfx950 = choose(Chip("gfx950", 256), "lora_linear", torch.float32, **sizes)
    assert gfx950.input_precision == "ieee"


def test_decode_tiles_without_an_l2_figure() -> None:
    """Where bandwidths are unknown or do not count, tiles are those of a frozen table."""
    with (Path(__file__).parent / "decode_tiles.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    unlisted = {chip for chip in CHIPS if chip.bandwidths is None}
    assert {Chip(row["chip"], int(row["processors"])) for row in table} == set(CHIPS)
    assert {row["chip"] for row in table if row["launch"] == "lora_linear"} >= {
        chip.arch for chip in unlisted
    }
    for row in table:
        chip, dtype = Chip(row["chip"], int(row["processors"])), getattr(torch, row["dtype"])
        for shape in (column for column in row if "x" in column and column[0].isdigit()):
            n, k = map(int, shape.split("x"))
            for m, r in itertools.product((int(row["M"]) // 2 + 1, int(row["M"])), (8, 64)):
                sizes = {"m": m, "n": n, "k": k, "r": r}
                config = choose(
                    chip, row["launch"], dtype, **sizes, input_precision=row["precision"]
                )
                tile = f"{config.block_m}x{config.block_n}x{config.block_k}/{config.splits}"
                assert tile == row[shape], (row, shape, m, r)


@pytest.mark.parametrize(("m", "block_m"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_one_tile_covers_a_small_batch(m: int, block_m: int) -> None:
    launches = ("lora_shrink", "lora_linear", "lora_expand")
    for launch in (*launches, "mixed_lora_linear"):
        assert chosen(launch, m=m, n=4096, k=4096, r=16).block_m == block_m


def test_large_batches_take_large_tiles() -> None:
    config = chosen("lora_linear", m=8192, n=4096, k=4096, r=16)
    assert (config.block_m, config.block_n) == (128, 256)
    assert chosen("lora_shrink", m=2048, k=4096, r=16).block_m == 128
    assert chosen("lora_shrink", m=16384, k=4096, r=16).block_m == 128


# Weights of a decoder layer, siblings side by side: N and K of q|k|v, o, gate|up and down.
LAYERS = {
    "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
}


@pytest.mark.parametrize("model", LAYERS)
def test_a_decode_keeps_the_memory_busy(model: str) -> None:
    """100 programs, or 2.7 MB of the weight on their way, or all of a weight that is smaller.

    A weight of less than 6 MB loads faster than a launch starts, so that its programs may be few.
    """
    for m, (n, k), r in itertools.product((1, 8, 16, 17, 32, 33, 48, 64), LAYERS[model], (16, 64)):
        config = chosen("lora_linear", m=m, n=n, k=k, r=r)
        programs = cdiv(m, config.block_m) * cdiv(n, config.block_n) * config.splits
        loads = 2 * config.block_n * config.block_k * (config.num_stages - 1) * programs
        assert programs >= 100 or loads >= min(2_700_000, 2 * n * k) or 2 * n * k < 6e6, (m, n, k)
        # Programs that share out K have steps to do.
        assert k // config.block_k >= 2 * config.splits


def seconds_of(
    block_n: int, splits: int, n: int, k: int, l2: float = 5.5e12, program: float = 98e9
) -> float:
    """The estimated time of 64 rows at rank 16 with a tile of 64 x block_n x 128, in bf16."""
    row = ConfigRow(64, block_n, 128, 4, 4, (16,))
    own = 3e12, l2, program
    return configs._decode_seconds(own, H100.bytes_in_flight, row, splits, n, k, 16, 2)


def test_the_cost_of_a_decode_tile() -> None:
    """Each term is computed by hand where it is the longest."""
    n = k = 4096
    x, weight, lora_b, s, y = 2 * 64 * k, 2 * n * k, 2 * n * 16, 4 * 8 * 64 * 16, 2 * 64 * n
    unlimited = {"l2": 1e30, "program": 1e30}
    # 64 programs of three stages: 6.3 MB are more than the 2.7 MB that keep the memory busy.
    bytes_in_all = x + weight + lora_b + s + y
    assert seconds_of(64, 1, n, k, **unlimited) == pytest.approx(2e-6 + bytes_in_all / 3e12)
    # 4 programs have 393 KB in flight, an eighth of what keeps the memory busy.
    loads = x + (weight + lora_b) // 16 + s
    share = 4 * 3 * 128 * (64 + 64) * 2 / (20_400 * 132)
    found = seconds_of(64, 1, n // 16, k, **unlimited)
    assert found == pytest.approx(2e-6 + loads / (share * 3e12) + y / 16 / 3e12)
    # Each of 64 or 128 tiles loads x and the eight partial sums of s.
    for block_n, tiles in ((64, 64), (32, 128)):
        issued = tiles * (x + s) + weight + lora_b + y
        assert seconds_of(block_n, 1, n, k, l2=1e12) == pytest.approx(2e-6 + issued / 1e12)
    # One program loads 1.5 MiB, or half of it with two splits.
    alone = 1.8e-6 + 2 * (64 + 128) * k / 1e9
    assert seconds_of(128, 1, n, k, program=1e9) == pytest.approx(2e-6 + alone)
    # A split costs one more launch. Both partial sums are written and read, and y is written.
    split = 4e-6 + (alone + 1.8e-6) / 2 + (4 * y + y) / 3e12
    assert seconds_of(128, 2, n, k, program=1e9) == pytest.approx(split)


def test_decode_tiles_follow_memory_and_l2() -> None:
    """Wide tiles load x less often; narrow tiles and splits of K keep the memory busy."""

    def tile(m: int, n: int, k: int, **options: Any) -> tuple[int, int]:
        config = chosen("lora_linear", m=m, n=n, k=k, r=16, **options)
        return config.block_n, config.splits

    layers = LAYERS["Llama-3.1-8B"]
    assert [tile(1, n, k) for n, k in layers] == 4 * [(64, 1)]
    assert [tile(24, n, k) for n, k in layers] == 4 * [(64, 1)]
    assert [tile(64, n, k) for n, k in layers] == [(128, 1), (64, 1), (128, 1), (128, 2)]
    # 16 tiles of 64 columns have too little in flight.
    assert tile(1, 1024, 4096) == (16, 1)
    # The mode adds no partial sums, and a gradient is no decode.
    assert tile(64, 4096, 14336, batch_invariant=True) == (64, 1)
    assert chosen("lora_grad_x", m=64, n=4096, k=14336, r=16).splits == 1


@EVERY_CHIP
@pytest.mark.parametrize("mode", [False, True])
def test_batches_of_a_row_tile_share_a_decode_kernel(chip: Chip, mode: bool) -> None:
    """Neighboring numbers of rows change no config, and no number does in the mode."""
    for (n, k), r in itertools.product(itertools.chain(*LAYERS.values()), (16, 64)):
        found = [
            choose(chip, "lora_linear", BF16, m=m, n=n, k=k, r=r, batch_invariant=mode)
            for m in range(1, 65)
        ]
        buckets = ((0, 64),) if mode else ((0, 16), (16, 32), (32, 64))
        assert all(len(set(found[first:last])) == 1 for first, last in buckets)
        assert not mode or found[0].splits == 1


@pytest.mark.parametrize(
    ("narrow", "split", "expected"),
    [(0.995, 0.995, (64, 1)), (0.98, 0.99, (32, 1)), (0.98, 0.98, (64, 2)), (0.9, 1, (32, 1))],
)
def test_a_gain_below_one_percent_is_no_reason_for_another_tile(
    narrow: float, split: float, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest tile, and its fewest splits, within one percent of the fastest."""
    times = {(64, 1): 1.0, (64, 2): split, (32, 1): narrow, (32, 2): 2.0}

    def seconds(_: object, bytes_in_flight: int, row: ConfigRow, splits: int, *own: Any) -> float:
        return times[row.block_n, splits]

    monkeypatch.setattr(configs, "_decode_seconds", seconds)
    rows = [ConfigRow(16, block_n, 128, 4, 4, (16,)) for block_n in (64, 32)]
    row, splits = configs._of_decode(H100, H100.bandwidths, rows, (1, 512, 4096, 16), 2, 2)
    assert (row.block_n, splits) == expected


def test_large_ranks_read_dy_twice() -> None:
    def twice(r: int, n: int = 14336) -> bool:
        config = chosen("lora_grad_b", m=8192, n=n, r=r)
        return configs.reads_twice(config, 8192, n, r, 2)

    assert [twice(r) for r in (16, 32, 64, 128)] == [False, False, True, True]
    assert not twice(64, 64)


def test_the_fewest_splits_that_fill_the_chip() -> None:
    def splits(launch: str, **sizes: int) -> int:
        return chosen(launch, r=16, **sizes).splits

    assert splits("lora_shrink", m=1, k=4096) == MAX_SPLITS
    assert splits("lora_shrink", m=2048, k=4096) == 8
    assert splits("lora_shrink", m=4096, k=4096) == 4
    # Twice as many tiles of 64 rows need no partial sums.
    assert splits("lora_shrink", m=8192, k=4096) == 1
    assert splits("lora_shrink", m=65536, k=4096) == 1
    # 256 columns are two steps of the K loop: nothing to split.
    assert splits("lora_shrink", m=1, k=256) == 1
    # 16 KiB on their way in each of 128 programs would keep three quarters of the memory busy.
    assert splits("lora_grad_a", m=2048, k=2048) == 8
    assert splits("lora_grad_a", m=2048, k=14336) == 1
    # 64 rows are two steps.
    assert splits("lora_grad_a", m=64, k=2048) == 1
    assert splits("lora_grad_b", m=64, n=4096) == 1


def test_a_shrink_with_more_rank_rows_than_a_narrow_tile_has_keeps_the_wide_one() -> None:
    """With tiles of 64 rows, x would be read twice."""
    config = chosen("lora_shrink", m=8192, k=4096, r=128)
    assert (config.block_m, config.block_r, config.splits) == (128, 128, 2)


def test_a_shrink_with_dropout_has_many_warps_per_row_tile() -> None:
    """They share the instructions of the masks, and enough row tiles need no partial sums."""

    def config(m: int, r: int = 16) -> KernelConfig:
        return chosen("dropout_lora_shrink", m=m, k=4096, r=r)

    assert {(c.block_m, c.num_warps) for c in map(config, (16, 2048, 8192, 65536))} == {(64, 16)}
    assert [config(m).splits for m in (2048, 4096, 8192, 65536)] == [4, 2, 1, 1]
    # One column tile, so that no mask is computed twice.
    assert config(8192, r=128).block_r == 128


def test_an_expand_has_wide_tiles_where_one_product_has_the_whole_rank() -> None:
    """Smaller ranks would leave half of the product empty, and chunks of larger ones spill."""

    def block_n(r: int, m: int = 2048) -> int:
        return chosen("lora_expand", m=m, n=4096, r=r).block_n

    assert [block_n(r) for r in (16, 32, 33, 64, 65, 128)] == [128, 128, 256, 256, 128, 128]
    # 16 programs would leave most of the chip idle.
    assert block_n(64, m=128) == 64


def expand_tiles(m: int, n: int, r: int) -> int:
    """Column tiles of an expand on an H100."""
    return cdiv(n, chosen("lora_expand", m=m, n=n, r=r).block_n)


def test_s_is_summed_once_where_its_partial_sums_cost_more_than_a_launch() -> None:
    """0.7 us of H100's L2 at 5.5 TB/s are 3.85 MB, and 1 us of A100's at 5.4 TB/s are 5.4 MB."""
    for chip, even in ((H100, 3.85e6), (Chip("sm_80", 108), 5.4e6)):
        for tiles, splits, r in ((8, 8, 16), (32, 8, 16), (3, 2, 64), (1, 4, 200)):
            below = int(even / (tiles * splits * 4 * r))
            assert below > 64
            found = [configs.sums_s_once(chip, m, r, splits, tiles) for m in (below, below + 1)]
            assert found == [False, True], (chip, tiles, splits, r)
    # While an expand waits for 3 MB of y, 5.5 MB come through the L2 cache. It starts early itself.
    y_bytes, below = 3_000_000, int((5.5e6 + 5.5e6) / (32 * 8 * 4 * 16))
    given = [configs.sums_s_once(H100, m, 16, 8, 32, y_bytes) for m in (below, below + 1)]
    assert given == [False, True]
    # Never at decode, and never of one partial sum.
    assert not configs.sums_s_once(H100, 64, 512, 8, 1000)
    assert configs.sums_s_once(H100, 65, 512, 8, 1000)
    assert not configs.sums_s_once(H100, 8192, 512, 1, 1000)


@pytest.mark.parametrize("r", [16, 64, 128])
@pytest.mark.parametrize("m", [128, 512, 2048, 4096])
def test_prefill_of_a_layer_sums_s_once(m: int, r: int) -> None:
    """Every group of a Llama-8B layer that splits K."""
    for n, k in LAYERS["Llama-3.1-8B"]:
        splits = chosen("lora_shrink", m=m, k=k, r=r).splits
        assert splits > 1
        assert configs.sums_s_once(H100, m, r, splits, expand_tiles(m, n, r))


def test_long_ranks_go_in_short_chunks() -> None:
    assert chosen("lora_linear", m=1, n=4096, k=4096, r=128).block_r == 128
    assert chosen("lora_linear", m=1, n=4096, k=4096, r=129).block_r == 32


def test_dx_has_the_columns_of_x() -> None:
    """N and K are the layer's: tiles of dx are as many as K needs."""
    sizes = {"m": 2048, "r": 16}
    assert chosen("lora_grad_x", n=16, k=4096, **sizes).block_m == 128
    assert chosen("lora_grad_x", n=4096, k=16, **sizes).block_m == 64


@pytest.mark.parametrize(
    ("m", "n"), [(2048, 2048), (1024, 1024), (1024, 4096), (8192, 4096), (8192, 1024), (512, 14336)]
)
def test_grad_b_fills_the_chip_with_few_partial_sums(m: int, n: int) -> None:
    """Planes of both kinds take at most half more than the fewest bytes of any filling grid."""
    config = chosen("lora_grad_b", m=m, n=n, r=16)
    columns, splits = cdiv(n, config.block_n), config.splits
    assert 4 * columns * splits >= 3 * H100.num_sms
    fewest = min(
        q * m + p * n for q in range(1, 133) for p in range(1, 133) if 4 * q * p >= 3 * 132
    )
    assert columns * m + splits * n <= 1.5 * fewest, (columns, splits)


def test_grad_b_takes_wide_tiles_where_rows_abound() -> None:
    config = chosen("lora_grad_b", m=16384, n=4096, r=16)
    assert (config.block_n, config.splits) == (256, 8)


@pytest.mark.parametrize(("group_size", "r", "block_r"), [(1, 64, 64), (3, 64, 64), (4, 64, 32)])
def test_grouped_layers_share_the_rank_rows_of_a_tile(
    group_size: int, r: int, block_r: int
) -> None:
    config = chosen("lora_grad_a", m=2048, k=2048, r=r, group_size=group_size)
    assert config.block_r == block_r
    assert group_size * block_r <= 192


def test_few_columns_take_a_narrow_block() -> None:
    """16 columns have a kernel of their own in decode. In prefill, they are a path of a kernel."""
    assert chosen("mixed_lora_shrink", m=16, r=16).block_r == 16
    for m, r in ((16, 48), (200, 16), (200, 48)):
        config = chosen("mixed_lora_shrink", m=m, r=r)
        assert (config.block_r, config.narrow_r) == (64, 16)


def test_pieces_are_small_against_the_batch() -> None:
    rows = [piece_rows(m) for m in (1, 64, 128, 129, 2048, 2049)]
    assert rows == [16, 16, 16, 64, 64, 128]
    assert {piece_rows(m, batch_invariant=True) for m in ROWS} == {16}


@pytest.mark.parametrize("columns", [192, 576, 4096, 14336])
@pytest.mark.parametrize("m", [0, 1, 63, 130, 2048, 8192])
def test_runs_are_the_fewest_that_fill_the_chip(m: int, columns: int) -> None:
    """Whole tiles of rows; one run fewer would leave more than a quarter of the chip idle."""
    config = chosen("mixed_lora_grad_b", r=16)
    tiles = cdiv(columns, config.block_n)
    rows = run_rows(H100, m, tiles, config.block_m)
    runs = max(cdiv(m, rows), 1)
    assert rows % config.block_m == 0
    assert runs == 1 or 4 * (runs - 1) * tiles < 3 * H100.num_sms
    # It fills the chip to a run, or none of its runs could be two of two steps each.
    assert 4 * (runs + 1) * tiles >= 3 * H100.num_sms or rows < 4 * config.block_m


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> ConfigRow:
    """A row that a tuner wrote in front of others: up to 8 rows of one layer, to rank 16."""
    row = ConfigRow(32, 64, 64, 8, 3, (16, 32), max_m=8, n=4096, k=1024, max_r=16)
    rows = row, ConfigRow(max_m=64, n=64, plan="split")
    put_rows(monkeypatch, H100, ("lora_linear", "half"), rows)
    return row


def test_a_measurement_goes_first(measured: ConfigRow) -> None:
    """Where all its limits hold; not in the batch-invariant mode, nor for another launch."""
    sizes = {"m": 8, "n": 4096, "k": 1024, "r": 16}

    def block_m(launch: str = "lora_linear", **others: Any) -> int:
        return configs.choose(H100, launch, BF16, **{**sizes, **others}).block_m

    config = configs.choose(H100, "lora_linear", BF16, **sizes)
    assert (config.block_m, config.block_n, config.block_k) == (32, 64, 64)
    assert (config.num_warps, config.num_stages, config.block_r) == (8, 3, 16)
    assert block_m(m=1, r=1) == 32
    assert [block_m(m=9), block_m(n=4095), block_m(k=1025), block_m(r=17)] == [16] * 4
    assert block_m("lora_grad_x") == 64
    assert block_m(batch_invariant=True) == configs.INVARIANT_ROWS
    taken = {e.r for e in all_shipped(H100) if e.config == config}
    assert taken == {16}, "it is compiled ahead of time"


def test_a_measured_plan_says_nothing_of_tiles(measured: ConfigRow) -> None:
    sizes = {"m": 64, "k": 1024, "r": 16}
    found = [configs.plan_of(H100, "lora_linear", BF16, n=n, **sizes) for n in (64, 65)]
    assert found == ["split", "fused"]
    assert configs.choose(H100, "lora_linear", BF16, n=64, **sizes).block_m == 64
    assert all(e.config.num_warps for e in all_shipped(H100))


def test_unknown_chip_and_dtype_are_named() -> None:
    for launch in ("lora_linear", "lora_grad_b", "mixed_lora_linear", "plane_sums"):
        with pytest.raises(ValueError, match="sm_70"):
            choose(Chip("sm_70", 80), launch, BF16, m=1, n=64, k=64, r=8)
    for launch in ("lora_linear", "lora_grad_a", "mixed_lora_shrink"):
        with pytest.raises(TypeError, match="float64"):
            choose(H100, launch, torch.float64, m=1, n=64, k=64, r=8)


def test_predicate_rejects() -> None:
    fine = KernelConfig(block_m=128, block_n=128, block_k=64, block_r=16, num_warps=8, num_stages=4)
    grad = KernelConfig(block_m=64, block_n=256, block_r=64, num_warps=8, num_stages=3)
    for launch, config in (("lora_linear", fine), ("lora_grad_b", grad)):
        assert is_valid(H100, launch, config, 2)
        assert not is_valid(H100, launch, replace(config, block_n=96), 2)
        assert not is_valid(H100, launch, replace(config, block_r=8), 2)
        assert not is_valid(H100, launch, replace(config, num_warps=3), 2)
    # 96 KiB of buffers, 64 KiB of LDS.
    assert not is_valid(Chip("gfx942", 304), "lora_linear", fine, 2)
    assert not is_valid(Chip("sm_86", 84), "lora_grad_b", replace(grad, num_stages=4), 2)
