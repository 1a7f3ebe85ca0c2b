"""`mixed_dora_scale`: values against float64, in place, by the kernel and by address on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted
from fastlora.ops.rows import sort_rows

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.bytes.byte_counter import ByteCounter
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import draw_ids
from tests.support.kernels.scale_problem import ScaleProblem


@pytest.fixture(params=["triton", "eager"], ids=["kernel", "address"])
def impl(request: pytest.FixtureRequest, lab: Lab) -> str:
    """Who scales rows: the kernel, or PyTorch, which reads the memory of this process."""
    if request.param == "eager" and lab.device.type != "cpu":
        pytest.skip("addresses are those of a GPU")
    name: str = request.param
    return name


# Rows and outputs on and off the tiles; pieces of 16, 64 and 128 rows.
@pytest.mark.parametrize(
    ("m", "n", "bias"),
    [(1, 64, True), (15, 33, False), (17, 257, True), (130, 130, True), (2050, 5, False)],
)
def test_values(lab: Lab, impl: str, dtype: torch.dtype, m: int, n: int, bias: bool) -> None:
    """Some adapters have scales, some none, some rows no adapter."""
    problem = ScaleProblem(lab, draw_ids(m, 6), 6, n, dtype, scaled=(0, 2, 5), bias=bias)
    problem.check(problem.run(impl=impl))


def test_strides(lab: Lab, impl: str, dtype: torch.dtype) -> None:
    problem = ScaleProblem(lab, draw_ids(20, 4), 4, 36, dtype, scaled=(0, 3))
    for layout in ("rows", "transposed", "both"):
        problem.check(problem.run(lab.strided(problem.y.clone(), layout), impl))
    problem.bias = torch.stack([problem.bias, -problem.bias], 1)[:, 0]
    problem.check(problem.run(impl=impl))


def test_rows_of_a_sample(lab: Lab, impl: str) -> None:
    """An id may stand for several rows in sequence."""
    ids = [slot for slot in (2, -1, 0, 2) for _ in range(5)]
    problem = ScaleProblem(lab, ids, 3, 40, torch.float32, scaled=(0, 2))
    problem.groups = sort_rows(torch.tensor(ids[::5], device=lab.device), len(ids), 3)
    problem.check(problem.run(impl=impl))


def test_rows_stay_separate(lab: Lab, impl: str) -> None:
    """Neither NaN in another row, nor one among another's scales, reaches a row."""
    problem = ScaleProblem(lab, draw_ids(40, 3), 3, 50, torch.float32, scaled=(0, 1))
    clean = problem.run(impl=impl)
    problem.y[problem.rows_of(1)[0], 7] = float("nan")
    problem.scales[1][9] = float("nan")
    y, one = problem.run(impl=impl), problem.rows_of(1)
    spoilt = y.isnan()
    assert spoilt[one, 9].all() and spoilt[one[0], 7]
    assert spoilt.sum() == len(one) + 1
    assert torch.equal(y[~spoilt], clean[~spoilt])


def test_rows_that_are_wrong_stay_so(lab: Lab, impl: str, dtype: torch.dtype) -> None:
    """Invalid ids keep what they have; scales that are yet to be made give NaN."""
    ids = [0, 9, 1, -1, 2, -7, 1]
    problem = ScaleProblem(lab, ids, 3, 70, dtype, scaled=(0, 1), pending=(1,))
    problem.y[[1, 5]] = float("nan")
    y = problem.run(impl=impl)
    assert y[[1, 5]].isnan().all()
    problem.y[[1, 5]] = y[[1, 5]] = 1.0
    problem.check(y)


@pytest.mark.parametrize(("m", "n"), [(0, 24), (3, 0)])
def test_nothing_to_scale(lab: Lab, impl: str, m: int, n: int) -> None:
    assert ScaleProblem(lab, [0] * m, 2, n, torch.float32).run(impl=impl).shape == (m, n)


@pytest.mark.skipif(not triton_interpreted(), reason="counts in the interpreter")
def test_recorded_buffers_replay_any_mix_and_any_scales(lab: Lab) -> None:
    """The same buffers with changed contents: one launch, one grid, whatever is in the table."""
    problem = ScaleProblem(lab, [0] * 40, 4, 300, torch.float32, scaled=(0,))

    def run() -> Any:
        with ByteCounter() as counter:
            problem.check(problem.run())
        return {name: count.grids for name, count in counter.kernels.items()}

    first = [t.data_ptr() for t in (*problem.rows(), problem.address)]
    recorded = run()
    assert list(recorded) == ["_mixed_dora_scale_kernel"]
    assert len(recorded["_mixed_dora_scale_kernel"]) == 1
    for seed, scaled in enumerate(((), (1, 2), (0, 1, 2, 3))):
        problem.scaled = set(scaled)
        problem.scales[1] = problem.scales[1] * 2  # elsewhere
        problem.write()
        problem.regroup(draw_ids(40, 4, seed))
        assert [t.data_ptr() for t in (*problem.rows(), problem.address)] == first
        assert run() == recorded


def test_both_ways_are_the_eager_forward(lab: Lab) -> None:
    """By address bit for bit what PyTorch makes of the rows, the kernel with one rounding."""
    problem = ScaleProblem(lab, [0, 1, 1, 0], 2, 64, torch.float16)
    u = problem.y - problem.bias
    table = torch.stack(problem.scales)[[0, 1, 1, 0]]
    if lab.device.type == "cpu":
        assert torch.equal(problem.run(impl="eager"), (u * table).half() + problem.bias)
    exact = (problem.y.float() - problem.bias.float()) * table + problem.bias.float()
    torch.testing.assert_close(problem.run(), exact.half(), rtol=2**-10, atol=0)
