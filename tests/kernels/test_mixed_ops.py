"""The operators for mixed batches: both plans, siblings, launches, replay, compile.

Those over tables of addresses; configs are chosen as a layer's are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels import mixed_lora_expand, mixed_lora_linear
from tests.support.bytes.byte_counter import ByteCounter
from tests.support.bytes.count_bytes import H100, on
from tests.support.kernels.mixed_problem import OPS, RANKS, THREE, MixedProblem, draw_ids

interpreted = pytest.mark.skipif(not triton_interpreted(), reason="counts in the interpreter")


def base(problem: MixedProblem) -> torch.Tensor:
    """Module 0's, without adapters."""
    return F.linear(problem.x, problem.weights[0], problem.biases[0])


def linear(
    problem: MixedProblem, g: int = 0, s: torch.Tensor | None = None, plan: str = "auto"
) -> torch.Tensor:
    """One module's y."""
    return OPS.lora_linear_at(*problem.linear_arguments(g, s, plan))[0]


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_grouped_layers_share_one_shrink(lab: Any, plan: str) -> None:
    problem = MixedProblem(lab, draw_ids(33, 8), THREE, 600, [64, 24, 33], torch.float32)
    y, s = OPS.lora_linear_at(*problem.group_arguments(plan))
    problem.check(y)
    for g in range(3):
        problem.check(linear(problem, g, s, plan), g)
        problem.check(linear(problem, g, plan=plan), g)


@pytest.mark.parametrize("m", [40, 150])
def test_add(lab: Any, dtype: torch.dtype, m: int) -> None:
    """By pieces of 16 rows, and of 64."""
    problem = MixedProblem(lab, draw_ids(m, 8), [RANKS], 100, [50], dtype, biased=(0,))
    y = base(problem)
    OPS.lora_add_at_(*problem.add_arguments(y))
    problem.check(y)


@pytest.mark.usefixtures("poisoned")
def test_poisoned_outputs(lab: Any) -> None:
    """What the operators allocate and do not write is never read."""
    problem = MixedProblem(lab, draw_ids(70, 8), [RANKS], 1100, [50], torch.float32, biased=(1,))
    for plan in ("fused", "split"):
        problem.check(linear(problem, plan=plan))


def launches(problem: MixedProblem) -> dict[str, list[tuple[int, ...]]]:
    """Grids of every kernel that one linear, fused and split, and one add launch."""
    with ByteCounter() as counter:
        linear(problem, plan="fused")
        linear(problem, plan="split")
        OPS.lora_add_at_(*problem.add_arguments(base(problem)))
    return {name: count.grids for name, count in counter.kernels.items()}


@interpreted
def test_recorded_buffers_replay_any_mix(lab: Any) -> None:
    """One set of routing buffers with changed contents: same addresses, launches and grids."""
    m = slots = 64
    ranks = [[RANKS[slot % 6] for slot in range(slots)]]
    problem = MixedProblem(lab, [0] * m, ranks, 24, [36], torch.float32, biased=(3,))
    first = [tensor.data_ptr() for tensor in problem.rows()]
    recorded = launches(problem)
    assert {name: len(grids) for name, grids in recorded.items()} == {
        "_mixed_lora_shrink_kernel": 3,
        "_mixed_lora_linear_kernel": 1,
        "_mixed_lora_expand_kernel": 2,
    }
    for ids in ([-1] * m, [*range(m)], draw_ids(m, slots)):
        problem.regroup(ids)
        assert [tensor.data_ptr() for tensor in problem.rows()] == first
        assert launches(problem) == recorded
        problem.check(linear(problem))


@interpreted
def test_what_follows_its_shrink_is_launched_as_its_dependent(lab: Any, calls_of: Any) -> None:
    """With both plans, the first sibling too; nothing that takes an s made before."""
    seen: list[bool] = []
    for module, stem in ((mixed_lora_linear, "linear"), (mixed_lora_expand, "expand")):
        calls_of(module, f"launch_mixed_lora_{stem}", lambda *_, pdl, **__: pdl, seen)
    problem = MixedProblem(lab, draw_ids(20, 8), THREE, 40, [16, 24, 33], torch.float16)
    with on(H100):
        for plan in ("fused", "split"):
            _, s = OPS.lora_linear_at(*problem.group_arguments(plan))
            linear(problem, 1, s, plan)
            linear(problem, 2, plan=plan)
            assert seen == [True, False, True], plan
            seen.clear()
        OPS.lora_add_at_(*problem.add_arguments(base(problem)))
    assert seen == [True]


def test_opcheck(lab: Any) -> None:
    """Schema and fake of the form of an operator that conformance reaches no kernel by."""
    problem = MixedProblem(lab, draw_ids(20, 8), THREE, 520, [64, 24, 33], torch.float32)
    # What a shrink leaves unwritten may hold anything, so two runs are not compared.
    checks = ["test_schema", "test_faketensor"]
    arguments = problem.group_arguments()
    torch.library.opcheck(OPS.lora_linear_at.default, arguments, test_utils=checks)


def test_compile(lab: Any) -> None:
    """Traced once for any number of rows, without a break."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def grouped_linears(
        first: tuple[Any, ...], others: list[tuple[Any, ...]]
    ) -> list[torch.Tensor]:
        y, s = OPS.lora_linear_at(*first)
        return [y, *(OPS.lora_linear_at(*a[:4], s, *a[5:-1], [0, 3])[0] for a in others)]

    for m in (20, 24, 40):
        problem = MixedProblem(lab, draw_ids(m, 8), THREE, 72, [64, 24, 33], torch.float32)
        others = [problem.linear_arguments(g) for g in (1, 2)]
        for g, y in enumerate(grouped_linears(problem.group_arguments(), others)):
            problem.check(y, g)


@pytest.mark.skipif(triton_interpreted(), reason="needs a GPU")
def test_cuda_graph(lab: Any) -> None:
    """A captured forward replays other mixes, other inputs and a swapped adapter."""
    problem = MixedProblem(lab, [0] * 24, [RANKS], 128, [64], torch.float16, biased=(2,))
    linear(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(problem)
    for seed in range(3):
        problem.regroup(draw_ids(24, 8, seed))
        problem.x.copy_(torch.randn_like(problem.x))
        problem.scaling.uniform_()
        graph.replay()
        problem.check(y)


def test_factors_of_an_unknown_dtype_are_named(lab: Any) -> None:
    problem = MixedProblem(lab, [0], [[4]], 16, [16], torch.float32)
    problem.factor_dtype = torch.float64
    with pytest.raises(TypeError, match="torch.float64, expected float16, bfloat16 or float32"):
        linear(problem)
