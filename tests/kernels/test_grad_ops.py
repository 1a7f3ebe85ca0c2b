"""The operators of a backward over the kernels: plans, siblings, empty batches, opcheck."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from fastlora import env  # noqa: F401 - registers the operators
from fastlora.ops import backend as ops
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.one_adapter import Problem

NATIVE = torch.cuda.is_available() and not env.triton_interpreted()
DEVICE = "cuda" if NATIVE else "cpu"
if not ops.triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {ops.triton_status(DEVICE)[1]}", allow_module_level=True)

OPS = torch.ops.fastlora


def kept(seed: int, m: int, k: int, p: float) -> torch.Tensor:
    """The elements that dropout keeps, on the device."""
    mask = philox_keep_mask(seed, m, k, p) if m else torch.ones(0, k, dtype=torch.bool)
    return mask.to(DEVICE)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators allocate holds NaN until a kernel writes it."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        tensor = original(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


# Draws on which one running sum, as the interpreter adds rows up, is 1.4 to 1.8 budgets off; of
# random ones that is 1 in 220.
@pytest.mark.parametrize("draw", [12811, 1409, 2630])
def test_sums_of_rows_are_as_good_as_pytorchs(draw: int) -> None:
    torch.manual_seed(draw)
    dy, s, lora_b = rand(70, 40), torch.ones(70, 1).to(DEVICE), rand(40, 1)
    scaling = torch.tensor(1.0, device=DEVICE)
    _, _, d_bias = OPS.lora_grad_b(dy, s, [], 0, [lora_b], [True], scaling, True, "triton")
    assert_within_budget(d_bias, dy.sum(0), dy.double().sum(0), "d_bias")


@pytest.mark.parametrize(("m", "fused"), [(64, True), (65, False)])
def test_auto_is_fused_up_to_64_rows(m: int, fused: bool) -> None:
    """Above, the library's GEMM and an update in place."""
    from fastlora.kernels import lora_expand, lora_linear

    given = (rand(m, 8), rand(8, 16), rand(m, 4), [], [rand(4, 16)])
    with (
        mock.patch.object(lora_linear, "launch_lora_linear") as linear,
        mock.patch.object(lora_expand, "launch_lora_expand") as expand,
    ):
        OPS.lora_grad_x(*given, None, [0.0], "triton", "auto")
    assert (linear.call_count, expand.call_count) == ((1, 0) if fused else (0, 1))


def test_a_scaling_of_each_rank_row(lab: Lab) -> None:
    """ds and d_lora_b by each rank row's own, in fp32."""
    problem = Problem(lab, 70, 40, 16, 5)
    problem.scaling = torch.linspace(0.5, 2.0, 5).to(DEVICE)
    found = OPS.lora_grad_b(
        *(problem.dy, problem.s, [], 0, [problem.lora_b], [True], problem.scaling, True),
        "triton",
    )
    problem.check(dict(zip(("ds", "d_lora_b", "d_bias"), found, strict=True)))


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and dispatch of every operator agree with what it does."""
    monkeypatch.undo()
    seed = torch.tensor([7, 8], device=DEVICE)
    dy, s, lora_b, lora_a = rand(20, 40), rand(20, 3), rand(40, 3).half(), rand(3, 48)
    scaling = torch.tensor(0.5, device=DEVICE)
    ds, factors = [s, s + 1], [lora_a, lora_a]
    calls = [
        (OPS.lora_grad_b, (dy, s, [], 0, [lora_b], [True], scaling, True, "triton")),
        (OPS.lora_grad_b, (dy, s, [], 0, [lora_b], [False], scaling, True, "triton")),
        (OPS.lora_grad_x, (dy, None, s, [], [lora_a], seed[:1], [0.5], "triton", "fused")),
        (OPS.lora_grad_x, (dy, rand(40, 48), s, [], [lora_a], None, [0.0], "triton", "split")),
        (OPS.lora_grad_a, (rand(20, 48), ds, [], 0, factors, seed, [0.5, 0.1], "triton")),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)
