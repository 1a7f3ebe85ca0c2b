"""Mixed batches in tensors of more than 2**31 elements: rows by order, planes and modules of s.

Their memory is mapped when it is touched, and there is as much in front of each tensor: an offset
that wraps around reads or writes the wrong place, and the result shows it.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("needs memory of the host, mapped on demand", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("needs Linux's mmap flags", allow_module_level=True)

from tests.support.kernels.mixed_problem import THREE, MixedProblem, draw_ids
from tests.support.kernels.scale_problem import ScaleProblem

M = 20
# Each stride fits 32 bits; rows from the 17th on, the third module and the third plane lie past.
ROW_STRIDE = 2**27 + 16
MODULE_STRIDE = 2**30 + 64
PLANE_STRIDE = MODULE_STRIDE + M * 128
_NORESERVE = 0x4000


def far(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values at other strides, 2**31 elements of zeros in front of them."""
    last = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    assert last > 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        memory = mmap.mmap(-1, (2**31 + last + 1) * values.element_size(), flags=flags)
    except (OSError, OverflowError, MemoryError) as error:
        pytest.skip(f"cannot map the memory: {error}")
    whole = torch.frombuffer(memory, dtype=values.dtype)
    return whole.as_strided(values.shape, strides, 2**31).copy_(values)


@pytest.fixture
def problem(lab: Any) -> MixedProblem:
    """Eight adapters of all ranks and one with a lora_bias, three modules."""
    return MixedProblem(lab, draw_ids(M, 8), THREE, 40, [36, 8, 8], torch.float16, biased=(1,))


def test_rows_of_x_and_y(lab: Any, problem: MixedProblem) -> None:
    near = problem.x
    problem.x = far(near, (ROW_STRIDE, 1))
    s = lab.poisoned(1, 3, M, 128, dtype=torch.float32)
    problem.shrink_into(s)
    problem.check_shrunk(s)
    y = far(lab.poisoned(M, 36, dtype=torch.float16), (ROW_STRIDE, 1))
    problem.check(problem.run("linear", y=y))
    base = F.linear(near, problem.weights[0], problem.biases[0])
    problem.check(problem.run("expand", y=y.copy_(base)))
    scaled = ScaleProblem(lab, problem.ids, 8, 36, torch.float16)
    scaled.check(scaled.run(y.copy_(scaled.y)))


def test_partial_sums_and_modules_of_s(
    lab: Any, problem: MixedProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides = (PLANE_STRIDE, MODULE_STRIDE, 128, 1)
    s = far(lab.poisoned(3, 3, M, 128, dtype=torch.float32), strides)
    problem.shrink_into(s)
    problem.check_shrunk(s)
    s.copy_(problem.shrunk(3))  # of so small a K, the shrink's last planes are zeros
    monkeypatch.setattr(problem, "shrunk", lambda splits: s)
    for g in range(3):
        for kernel in ("linear", "expand"):
            problem.check(problem.run(kernel, g=g), g)
