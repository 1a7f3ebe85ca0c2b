"""Kernels of one adapter against float64: sizes, tiles, splits, masks, strides, one rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora.ops.philox_reference import _philox_4x32, philox_keep_mask

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.config_tables import KernelConfig
from fastlora.kernels.configs import choose
from fastlora.kernels.lora_shrink import launch_lora_shrink
from fastlora.kernels.plane_sums import launch_plane_sums
from tests.support.kernels.lab import Lab
from tests.support.kernels.one_adapter import SEED, Problem

EVERY_KERNEL = pytest.mark.parametrize("kernel", Problem.KERNELS)
SMALL = KernelConfig(block_m=16, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=2)
P = 0.3
# Taken pairwise: rows, outputs and inputs off the tile, ranks; ranks of siblings; dropout.
SHAPES = [
    (1, 128, 256, 8, (), P),
    (15, 33, 100, 3, (16, 1), 0.0),
    (16, 64, 576, 16, (16,), P),
    (17, 130, 72, 24, (4, 24), 0.0),
    (127, 300, 200, 64, (), P),
    (2000, 80, 65, 1, (8, 3, 16), 0.0),
    (16, 20, 264, 128, (64,), 0.0),
    (257, 257, 31, 4, (4, 4, 4), P),
    (5, 40, 96, 300, (), P),
]


def run(problem: Problem, kernel: str, **fields: Any) -> dict[str, torch.Tensor]:
    """Launches a kernel; with fields of a config, of small tiles."""
    if kernel == "dropout":
        problem.p = problem.ps[0] = problem.p or P
        fields = fields and {**fields, "input_precision": ""}  # it has no dot
    config = replace(SMALL, group_size=len(problem.all_ds), **fields) if fields else None
    found: dict[str, torch.Tensor] = getattr(problem, kernel)(config)
    return found


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY_KERNEL
def test_values(lab: Lab, dtype: torch.dtype, kernel: str, shape: tuple[Any, ...]) -> None:
    m, n, k, r, further_ranks, p = shape
    problem = Problem(lab, m, n, k, r, dtype, p, further_ranks)
    problem.check(run(problem, kernel))


@pytest.mark.parametrize(
    ("kernels", "fields"),
    [
        (("shrink",), {"splits": 1, "block_r": 32}),
        (("shrink", "linear", "grad_x", "grad_b", "grad_a"), {"splits": 2}),
        (("shrink",), {"splits": 4, "block_r": 32}),
        # Of 8 parts some are empty.
        (("shrink", "linear", "grad_x", "grad_b", "grad_a"), {"splits": 8}),
        (("grad_b", "grad_a"), {"splits": 1, "rank_rows_first": True}),
        (("grad_b", "grad_a"), {"splits": 2, "rank_rows_first": True}),
        (("grad_b", "grad_a"), {"splits": 8, "rank_rows_first": True}),
        (("linear",), {"group_m": 3}),
        (("linear",), {"group_m": 8}),
    ],
    ids=str,
)
def test_every_split_and_rank_block(lab: Lab, kernels: Any, fields: dict[str, Any]) -> None:
    """5 steps down the rows and K, 3 blocks of N, 4 of rank rows, 2 siblings of them."""
    for kernel in kernels:
        problem = Problem(lab, 75, 70, 150 if kernel == "shrink" else 70, 50, further_ranks=(5,))
        problem.check(run(problem, kernel, **fields))


@pytest.mark.parametrize(
    "blocks", [(16, 16, 16), (16, 32, 32), (64, 32, 32), (32, 64, 64)], ids=str
)
@EVERY_KERNEL
def test_every_chunk_and_masks_whatever_the_tile(
    lab: Lab, kernel: str, blocks: tuple[int, int, int]
) -> None:
    """Under dropout, where one wrong bit of a mask shows in the values; 4 chunks of rank rows."""
    problem = Problem(lab, 35, 40, 70, 50, p=0.5)
    fields: dict[str, Any] = dict(zip(("block_m", "block_n", "block_k"), blocks, strict=True))
    problem.check(run(problem, kernel, rank_rows_first=blocks[0] == 64, **fields))


@pytest.mark.parametrize("kernel", ["shrink", "grad_b", "grad_a"])
def test_runs_repeat_bit_for_bit(lab: Lab, dtype: torch.dtype, kernel: str) -> None:
    problem = Problem(lab, 75, 70, 70, 10, dtype, P, further_ranks=(8, 16, 1))
    found = run(problem, kernel, splits=4)
    problem.check(found)
    for name, again in run(problem, kernel, splits=4).items():
        assert torch.equal(again, found[name])


@EVERY_KERNEL
def test_fp32_factors_and_a_scaling_per_rank_row(lab: Lab, dtype: torch.dtype, kernel: str) -> None:
    problem = Problem(lab, 33, 48, 136, 24, dtype, P)
    problem.lora_a, problem.lora_b = lab.rand(24, 136), lab.rand(48, 24)
    problem.bias, problem.scaling = lab.rand(48), torch.linspace(0.1, 2.0, 24, device=lab.device)
    problem.check(run(problem, kernel))


@pytest.mark.parametrize(("kernel", "result"), [("grad_b", "d_lora_b"), ("grad_a", "d_lora_a_0")])
def test_masters_get_a_gradient_that_is_not_rounded_to_16_bits(
    lab: Lab, kernel: str, result: str
) -> None:
    problem = Problem(lab, 33, 48, 48, 8, torch.float16)
    problem.lora_a, problem.lora_b = problem.lora_a.float(), problem.lora_b.float()
    truth, found = problem.expected(result, torch.float64), run(problem, kernel)[result]
    # Products of fp16 are exact in fp32: only the sums of 33 round.
    assert (found.double() - truth).abs().max() <= 33 * 2**-23 * truth.abs().max()


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
@EVERY_KERNEL
def test_strided(lab: Lab, kernel: str, layout: str) -> None:
    problem = Problem(lab, 35, 45, 70, 6, p=P)
    for name in ("x", "weight", "s", "lora_a", "lora_b", "y", "dy", "ds"):
        setattr(problem, name, lab.strided(getattr(problem, name), layout))
    problem.bias = lab.rand(90)[::2]
    problem.check(run(problem, kernel, **({"splits": 2} if "grad_" in kernel else {})))


@pytest.mark.parametrize("shape", [(1, 1), (1, 45), (35, 1)])
@EVERY_KERNEL
def test_expanded(lab: Lab, kernel: str, shape: tuple[int, int]) -> None:
    """`y.sum().backward()` gives strides of 0 in both directions."""
    problem = Problem(lab, 35, 45, 70, 6, p=P)
    problem.dy = lab.rand(*shape).expand(35, 45)
    problem.x, problem.s = problem.x[:1].expand(35, 70), problem.s[:1].expand(35, 6)
    problem.bias = lab.rand(1).expand(45)
    problem.check(run(problem, kernel))


@EVERY_KERNEL
def test_no_rows(lab: Lab, kernel: str) -> None:
    """No rows of a result, zeros of a sum over rows."""
    for name, found in run(Problem(lab, 0, 48, 64, 8), kernel).items():
        shape = {"s": (0, 8), "ds": (0, 8), "dropped": (0, 64), "dx": (0, 64), "d_bias": (48,)}
        shape |= {"y": (0, 48), "y_added": (0, 48), "d_lora_b": (48, 8), "d_lora_a_0": (8, 64)}
        assert found.shape == shape[name] and not found.any()


@pytest.mark.parametrize("kernel", ["shrink", "dropout", "grad_a", "grad_x", "grad_x_add"])
def test_a_dropped_element_that_is_not_finite_does_not_pass(lab: Lab, kernel: str) -> None:
    problem = Problem(lab, 16, 20, 32, 4, p=P)
    keep = philox_keep_mask(SEED, 16, 32, P).to(lab.device)
    problem.x = torch.where(keep, problem.x, float("nan"))
    if "grad_x" not in kernel:
        problem.check(run(problem, kernel))
        return
    problem.lora_a[:, 5] = float("inf")
    dx, passes = run(problem, kernel)["dx"], keep[:, 5]
    assert passes.any() and not passes.all()
    assert torch.equal(dx[:, 5].isfinite(), ~passes)
    assert dx[:, :5].isfinite().all() and dx[:, 6:].isfinite().all()


@pytest.mark.parametrize("planes", [2, 8])
def test_partial_sums_of_s_are_added_and_stored(lab: Lab, dtype: torch.dtype, planes: int) -> None:
    problem = Problem(lab, 37, 70, 64, 50, dtype)
    problem.s, s_out = lab.rand(planes, 37, 50), lab.poisoned(37, 50, dtype=dtype)
    problem.check(problem.linear(SMALL, s_out))
    expected = problem.s[0].clone()
    for plane in problem.s[1:]:
        expected += plane
    assert torch.equal(s_out, expected.to(dtype))


def test_one_block_of_columns_writes_ds_itself(lab: Lab) -> None:
    problem = Problem(lab, 40, 30, 16, 5, torch.float16)
    problem.check(problem.grad_b(SMALL))
    assert problem.written["ds"].dtype == torch.float16


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rank_rows_first", [False, True])
def test_a_pass_without_ds(
    lab: Lab, dtype: torch.dtype, rank_rows_first: bool, splits: int
) -> None:
    """d_lora_b and the sums of dy's columns, as at large ranks; every rank row has its scaling."""
    problem = Problem(lab, 83, 70, 16, 20, dtype)
    problem.scaling = torch.linspace(0.5, 2.0, 20, device=lab.device)
    config = replace(SMALL, splits=splits, rank_rows_first=rank_rows_first)
    found = problem.grad_b(config, with_ds=False)
    assert found.keys() == {"d_lora_b", "d_bias"}
    problem.check(found)


@pytest.mark.parametrize("rank_rows_first", [False, True])
def test_inf_and_nan_stay_in_their_columns_sum(
    lab: Lab, dtype: torch.dtype, rank_rows_first: bool
) -> None:
    problem = Problem(lab, 40, 48, 16, 5, dtype)
    problem.dy[3, 7], problem.dy[20, 9] = float("inf"), float("nan")
    sums = problem.grad_b(replace(SMALL, rank_rows_first=rank_rows_first))["d_bias"]
    assert sums[7] == float("inf")
    assert sums.isnan().nonzero().flatten().tolist() == [9]


def test_without_bias(lab: Lab, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 64, 8, dtype)
    problem.bias = None
    problem.check(problem.linear())


def test_one_rounding(lab: Lab) -> None:
    """base + delta is rounded once: half an ulp of each would vanish if either were rounded first.

    In fp16, 2048 + 1 rounds to 2048, and 2048 + (1 + 1) is 2050.
    """
    problem = Problem(lab, 16, 16, 16, 16, torch.float16)
    for operand in (problem.x, problem.weight, problem.s, problem.lora_b):
        operand.zero_()
    problem.x[:, :2] = torch.tensor([2048.0, 1.0])
    problem.weight[:, :2] = 1.0
    problem.s[:, 0], problem.lora_b[:, 0] = 1.0, 1.0
    problem.bias, problem.scaling = None, torch.ones_like(problem.scaling)
    assert (problem.linear()["y"] == 2050).all()


def test_an_update_writes_nothing_but_y(lab: Lab) -> None:
    wide = lab.rand(19, 60)
    before, problem = wide.clone(), Problem(lab, 19, 45, 16, 6)
    problem.y = wide[:, 10:55]
    problem.check(problem.expand())
    assert torch.equal(wide[:, :10], before[:, :10])
    assert torch.equal(wide[:, 55:], before[:, 55:])


def test_zero_scaling_leaves_y_bit_for_bit(lab: Lab, dtype: torch.dtype) -> None:
    problem = Problem(lab, 17, 48, 16, 8, dtype)
    problem.scaling.zero_()
    assert torch.equal(problem.expand()["y_added"], problem.before)


def test_strided_output_of_a_shrink(lab: Lab) -> None:
    problem, wide = Problem(lab, 19, 8, 64, 6), lab.poisoned(19, 12, dtype=torch.float32)
    launch_lora_shrink(wide[:, ::2], problem.x, [problem.lora_a], **problem.drops(), config=SMALL)
    problem.check({"s": wide[:, ::2]})
    assert wide[:, 1::2].isnan().all()


def test_nan_in_a_row_stays_in_its_row_of_ds(lab: Lab) -> None:
    problem = Problem(lab, 20, 40, 16, 5)
    problem.dy[3, 7] = float("nan")
    found = problem.grad_b()
    assert found["ds"].isnan().any(1).nonzero().flatten().tolist() == [3]
    assert found["d_lora_b"].isnan().any(1).nonzero().flatten().tolist() == [7]


# ------------------------------------------------------------------------------ dropout's masks


def kept(lab: Lab, seed: int, p: float) -> torch.Tensor:
    """Which elements of nine rows of ones are kept."""
    problem = Problem(lab, 9, 8, 50, 4, p=p)
    problem.x = torch.ones(9, 50, device=lab.device)
    problem.seed.fill_(seed)
    return (problem.dropout()["dropped"] != 0).cpu()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x0123456789ABCDEF])
def test_every_bit_of_the_seed(lab: Lab, seed: int) -> None:
    assert torch.equal(kept(lab, seed, 0.25), philox_keep_mask(seed, 9, 50, 0.25))


def test_probability_rounds_to_sixteen_bits(lab: Lab) -> None:
    assert kept(lab, 5, 2**-20).all()
    assert not kept(lab, 5, 1 - 2**-20).any()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers of the authors' library (Random123, kat_vectors, philox4x32 10 rounds).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([value]) for value in counter)
    assert tuple(int(word) for word in _philox_4x32((c0, c1, c2, c3), key)) == words


def test_reference_drops_as_often_as_asked() -> None:
    # 2**20 draws: six standard deviations of the mean are 0.003.
    assert abs(philox_keep_mask(11, 1024, 1024, 0.3).double().mean().item() - 0.7) < 0.003
    assert not torch.equal(
        philox_keep_mask(11, 64, 64, 0.3), philox_keep_mask(11, 64, 64, 0.3, projection=1)
    )


# ------------------------------------------------------------------------------ sums of planes

# Outputs off the block and on it, one smaller than a block, one with nothing in it.
OUTPUTS = [((37, 29), 3), ((1024,), 1), ((5,), 9), ((0, 4), 2)]


def sum_planes(outs: list[torch.Tensor], planes: list[torch.Tensor]) -> None:
    """One launch for several outputs."""
    config = choose(chip_of(planes[0].device), "plane_sums", torch.float32)
    launch_plane_sums(outs, planes, config=config)


def in_order(planes: torch.Tensor) -> torch.Tensor:
    """The sum as the kernel makes it, plane after plane."""
    total = torch.zeros_like(planes[0])
    for plane in planes:
        total += plane
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sums(lab: Lab, dtype: torch.dtype, count: int) -> None:
    chosen = OUTPUTS[:count]
    planes = [lab.rand(p, *shape) for shape, p in chosen]
    outs = [lab.poisoned(*shape, dtype=dtype) for shape, _ in chosen]
    sum_planes(outs, planes)
    for out, stack in zip(outs, planes, strict=True):
        assert torch.equal(out, in_order(stack).to(dtype))


def test_each_output_has_its_dtype_and_nothing_else_is_written(lab: Lab) -> None:
    planes = [lab.rand(4, 2000), lab.rand(2, 1030)]
    room = lab.poisoned(2010, dtype=torch.float16)
    outs = [room[:2000], lab.poisoned(1030, dtype=torch.float32)]
    sum_planes(outs, planes)
    assert torch.equal(outs[0], in_order(planes[0]).half())
    assert torch.equal(outs[1], in_order(planes[1]))
    assert room[2000:].isnan().all()
