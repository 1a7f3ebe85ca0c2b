"""A mixed batch's forward kernels against float64: sizes, tiles, strides, rows kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.config_tables import KernelConfig
from fastlora.ops.rows import sort_rows
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import RANKS, THREE, MixedProblem, draw_ids

EVERY_KERNEL = pytest.mark.parametrize("kernel", ["linear", "expand"])
# Rows, outputs, columns of x.
SHAPES = [(1, 128, 256), (15, 33, 100), (16, 64, 72), (17, 130, 65), (64, 96, 200), (150, 70, 31)]


def tile(block_m: int, block_r: int, **fields: Any) -> KernelConfig:
    """A small one."""
    fields = {"block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2, **fields}
    return KernelConfig(block_m=block_m, block_r=block_r, **fields)


@EVERY_KERNEL
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_values(lab: Lab, dtype: torch.dtype, kernel: str, m: int, n: int, k: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], k, [n], dtype, biased=(1, 3, 7))
    problem.check(problem.run(kernel))


@EVERY_KERNEL
def test_first_rows_of_a_larger_batch(lab: Lab, kernel: str) -> None:
    """Batches of several sizes from one sort, whose last piece reaches beyond each of them."""
    for m in (1, 16, 40, 130):
        ids = draw_ids(m - m // 4, 8, seed=m) + [-1] * (m // 4)
        problem = MixedProblem(lab, ids, [RANKS], 24, [40], torch.float32, biased=(1, 3))
        whole = sort_rows(torch.tensor([*ids, *[-1] * 70], device=lab.device), m + 70, 8)
        for block_m in (16, 64, 128):
            whole.piece_starts(block_m)
        problem.groups = whole.first_rows(m)
        problem.check(problem.run(kernel))


@EVERY_KERNEL
@pytest.mark.parametrize("slots", [1, 2, 64])
def test_number_of_adapters(lab: Lab, kernel: str, slots: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    problem = MixedProblem(lab, draw_ids(64, slots), ranks, 40, [48], torch.float32)
    problem.check(problem.run(kernel))


@pytest.mark.parametrize(
    ("kernel", "block_r", "splits"),
    [
        *(("linear", block_r, splits) for block_r in (16, 32, 64) for splits in (1, 3, 4)),
        *(("expand", block_r, splits) for block_r in (16, 64) for splits in (1, 4)),
    ],
)
def test_every_chunk_and_partial_sum(lab: Lab, kernel: str, block_r: int, splits: int) -> None:
    slots = 64 if kernel == "expand" else 8
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    ids, biased = draw_ids(40, slots), range(0, 8, 2)
    problem = MixedProblem(lab, ids, ranks, 50, [50], torch.float32, biased=biased)
    problem.check(problem.run(kernel, tile(32, block_r), splits=splits))


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("ids", [[6] * 70, [*range(8)] * 9, [-1] * 30 + [5] * 33 + [2] * 9])
def test_every_piece(lab: Lab, block_m: int, ids: list[int]) -> None:
    """One adapter over many tiles of rows, many in each, and runs that end within one."""
    problem = MixedProblem(lab, ids, [RANKS], 30, [50], torch.float32, biased=(2, 7))
    problem.check(problem.run("expand", tile(block_m, 16), splits=3))


@EVERY_KERNEL
def test_a_row_for_each_adapter(lab: Lab, dtype: torch.dtype, kernel: str) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(64)]]
    problem = MixedProblem(lab, [*range(64)], ranks, 40, [130], dtype, biased=range(0, 64, 3))
    problem.check(problem.run(kernel))


@pytest.mark.parametrize("group_m", [1, 3])
def test_program_order_covers_every_tile(lab: Lab, group_m: int) -> None:
    problem = MixedProblem(lab, draw_ids(75, 8), [RANKS], 16, [100], torch.float32)
    problem.check(problem.run("linear", tile(16, 16, group_m=group_m)))


@EVERY_KERNEL
@pytest.mark.parametrize("ids", [[-1] * 20, [7] * 20, [6] * 20, [0, -1] * 10])
def test_plain_batches(lab: Lab, dtype: torch.dtype, kernel: str, ids: list[int]) -> None:
    """No adapter at all, one without a part in the module, one for all rows, every other row."""
    problem = MixedProblem(lab, ids, [RANKS], 40, [36], dtype, biased=(1,))
    problem.check(problem.run(kernel))


@EVERY_KERNEL
def test_grouped_layers_of_different_widths(lab: Lab, dtype: torch.dtype, kernel: str) -> None:
    problem = MixedProblem(lab, draw_ids(33, 8), THREE, 40, [64, 24, 33], dtype, biased=(2, 5))
    for g in range(3):
        problem.check(problem.run(kernel, g=g, splits=2), g)


@EVERY_KERNEL
def test_strides_and_fp32_factors(lab: Lab, dtype: torch.dtype, kernel: str) -> None:
    ids = draw_ids(19, 8)
    problem = MixedProblem(lab, ids, [RANKS], 70, [45], dtype, torch.float32, biased=(0, 4))
    x, weight = problem.x, problem.weights[0]
    for layout in ("rows", "transposed", "both"):
        problem.x, problem.weights[0] = lab.strided(x, layout), lab.strided(weight, layout)
        problem.biases[0] = lab.rand(90, dtype=dtype)[::2]
        y = lab.poisoned(19, 45, dtype=dtype)
        if kernel != "linear":
            y = torch.nn.functional.linear(x, weight, problem.biases[0])
        problem.check(problem.run(kernel, y=lab.strided(y, layout)))


def test_without_a_bias(lab: Lab) -> None:
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 40, [36], torch.float32)
    biases, problem.biases = problem.biases, [None]
    y = problem.run("linear")
    problem.biases = [torch.zeros_like(biases[0])]
    problem.check(y)


def test_one_rounding(lab: Lab) -> None:
    """base + delta is rounded once: fp16 makes 2048 + 1 a 2048, and 2048 + (1 + 1) a 2050."""
    problem = MixedProblem(lab, [0] * 16, [[1]], 16, [16], torch.float16)
    problem.x.zero_()
    problem.x[:, 0] = 1.0
    problem.weights[0].zero_()
    problem.weights[0][:, 0] = 2048.0
    problem.biases[0].fill_(1.0)
    problem.factors[0][0].lora_a.fill_(1.0)
    problem.factors[0][0].lora_b.fill_(1.0)
    problem.scaling.fill_(1.0)
    assert (problem.run("linear") == 2050).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@EVERY_KERNEL
def test_rows_stay_separate(lab: Lab, kernel: str) -> None:
    """Whatever is not finite in one adapter's factors or in one row stays in its own rows."""
    ranks, ids = [(3, 8, 24, 16, 1)], draw_ids(40, 5)
    problem = MixedProblem(lab, ids, ranks, 24, [40], torch.float32, biased=(1, 2))
    factors = problem.factors[0][1]
    for spoilt in (
        factors.lora_b[5, 3:4],
        factors.lora_b[0, 39:],
        factors.lora_a[7, 2:3],
        factors.lora_bias[11:12],
        problem.scaling[0, 3:4],
        problem.x[problem.rows_of(2)[0], 4:5],
    ):
        problem.check_apart(lambda: problem.run(kernel), spoilt)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_factor_past_the_range_of_fp16_stays_in_its_own_rows(lab: Lab) -> None:
    problem = MixedProblem(lab, draw_ids(20, 3), [(3, 8, 16)], 24, [40], torch.float16)
    clean = problem.run("linear")
    problem.scaling[0, 1] = 1e6
    y, others = problem.run("linear"), problem.rows_of(-1, 0, 2)
    assert torch.equal(y[others], clean[others])
    assert not y[problem.rows_of(1)].isfinite().any()


def test_rows_without_a_part_are_not_touched(lab: Lab) -> None:
    """Neither rows without an adapter, nor those whose adapter leaves the module alone."""
    problem = MixedProblem(lab, draw_ids(40, 3), [(4, 0, 0)], 24, [40], torch.float32, biased=(2,))
    y = torch.zeros(40, 40, device=lab.device)
    negative_zero = torch.full_like(y, -0.0)
    problem.run("expand", y=negative_zero)
    # A row that went through arithmetic would have lost the sign: -0 + 0 = 0.
    assert negative_zero[problem.rows_of(-1, 1)].signbit().all()
    problem.run("expand", y=y)
    assert (y[problem.rows_of(0, 2)] != 0).all()


@EVERY_KERNEL
def test_rows_of_an_invalid_id_are_nan(lab: Lab, kernel: str) -> None:
    ids, bad = draw_ids(20, 8), [5, 21]
    problem = MixedProblem(lab, [*ids[:5], 8, *ids[5:], -2], [RANKS], 40, [36], torch.float32)
    assert problem.groups.invalid
    y = problem.run(kernel)
    assert y[bad].isnan().all()
    y[bad] = problem.expected(0, torch.float32)[bad]
    problem.check(y)


@EVERY_KERNEL
def test_no_rows(lab: Lab, kernel: str) -> None:
    problem = MixedProblem(lab, [], [RANKS], 40, [36], torch.float32)
    assert problem.run(kernel).shape == (0, 36)


# ---------------------------------------------------------------------------------- shrink


def shrink(
    problem: MixedProblem, splits: int = 1, config: KernelConfig | None = None
) -> torch.Tensor:
    """Returns s ``[splits, G, M, R]`` over NaN."""
    columns = -(-problem.max_rank // 16) * 16
    s = problem.lab.poisoned(splits, len(problem.ns), problem.m, columns, dtype=torch.float32)
    problem.shrink_into(s, config)
    return s


@pytest.mark.parametrize(
    ("m", "k", "modules"), [(1, 256, 1), (15, 100, 3), (17, 72, 1), (64, 65, 3), (150, 200, 3)]
)
def test_values_of_a_shrink(lab: Lab, dtype: torch.dtype, m: int, k: int, modules: int) -> None:
    problem = MixedProblem(lab, draw_ids(m, 8), THREE[:modules], k, [8] * modules, dtype)
    problem.check_shrunk(shrink(problem))


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("block_r", [16, 64])
def test_every_split_and_rank_block_of_a_shrink(lab: Lab, splits: int, block_r: int) -> None:
    # 3 blocks of K: with 2 splits one is short, with 4 one is empty.
    problem = MixedProblem(lab, draw_ids(40, 8), THREE, 90, [8] * 3, torch.float32)
    config = tile(16, block_r, block_k=32, narrow_r=16)
    problem.check_shrunk(shrink(problem, splits, config))


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_a_shrink_of_strided_x_by_fp32_factors(lab: Lab, dtype: torch.dtype, layout: str) -> None:
    """They are rounded to the dtype of x."""
    problem = MixedProblem(lab, draw_ids(20, 8), [RANKS], 72, [8], dtype, torch.float32)
    problem.x = lab.strided(problem.x, layout)
    for image in problem.images:
        image += 1e-5 * torch.randn_like(image)
    problem.check_shrunk(shrink(problem))


@pytest.mark.parametrize("slots", [1, 64])
def test_number_of_adapters_of_a_shrink(lab: Lab, slots: int) -> None:
    ranks = [[RANKS[slot % 8] for slot in range(slots)]]
    problem = MixedProblem(lab, draw_ids(70, slots), ranks, 40, [8], torch.float32)
    problem.check_shrunk(shrink(problem))


def test_a_spoilt_factor_stays_in_its_own_columns(lab: Lab) -> None:
    """NaN in one rank row of one adapter's lora_a reaches that column of its own rows alone."""
    problem = MixedProblem(lab, draw_ids(40, 8), THREE, 72, [8] * 3, torch.float32)
    clean = shrink(problem)
    problem.factors[1][2].lora_a[5, 3] = float("nan")
    s, own = shrink(problem), problem.positions_of(2)
    changed = s.isnan() & ~clean.isnan()
    assert changed[0, 1, own, 5].all()
    assert int(changed.sum()) == len(own)
    written = ~s.isnan()
    assert torch.equal(s[written], clean[written])


@pytest.mark.parametrize("block_r", [16, 64])
def test_a_rank_larger_than_s_stays_within_it(lab: Lab, block_r: int) -> None:
    """As under a graph captured before a larger adapter came: its first columns, nothing beyond."""
    ranks = ((8, 40, 3), (64, 4, 24))
    problem = MixedProblem(lab, draw_ids(40, 3), ranks, 72, [8] * 2, torch.float32)
    config, width = tile(16, block_r, block_k=32, narrow_r=16), 16
    whole = shrink(problem, 1, config)
    around = lab.poisoned(1, 2, problem.m, 80, dtype=torch.float32)
    problem.shrink_into(around[..., :width], config)
    assert around[..., width:].isnan().all()
    assert torch.equal(around[..., :width].nan_to_num(7.0), whole[..., :width].nan_to_num(7.0))


def test_a_shrink_of_no_rows(lab: Lab) -> None:
    problem = MixedProblem(lab, [], [RANKS], 72, [8], torch.float32)
    assert shrink(problem).shape == (1, 1, 0, 128)
