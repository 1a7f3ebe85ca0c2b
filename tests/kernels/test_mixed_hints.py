"""What the kernels for mixed batches tell the compiler of their values is true of every value.

A false hint changes nothing in the interpreter, and on a GPU what a load or store touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("hints are checked with TRITON_INTERPRET=1", allow_module_level=True)

from tests.support.kernels.mixed_problem import OPS, THREE, MixedProblem, draw_ids
from tests.support.kernels.scale_problem import ScaleProblem

HINTS = ("tt.divisibility", "tt.contiguity", "tt.constancy")


def holds(kind: str, values: np.ndarray, counts: Sequence[int]) -> bool:
    """Whether a hint is true: along each dimension, of every group of so many values."""
    if values.ndim == 0:
        return kind != "tt.divisibility" or int(values) % counts[0] == 0
    for axis, size in enumerate(counts):
        if size == 1:
            continue
        if values.shape[axis] % size:
            # Divisible, each value for itself: nothing is said of a run shorter than that.
            if kind != "tt.divisibility" or (values % size).any():
                return False
            continue
        groups = np.moveaxis(values, axis, -1)
        groups = groups.reshape(*groups.shape[:-1], -1, size)
        if kind == "tt.constancy":
            true = (groups == groups[..., :1]).all()
        elif kind == "tt.contiguity":
            true = (np.diff(groups, axis=-1) == 1).all()
        else:  # of the first of each run of consecutive values, or of each value
            true = (groups[..., 0] % size == 0).all() or (values % size == 0).all()
        if not true:
            return False
    return True


@pytest.fixture
def hints() -> Any:
    """Collects (kind, counts, whether it holds) of every hint that a kernel gives meanwhile."""
    from triton.runtime import interpreter

    found: list[tuple[str, tuple[int, ...], bool]] = []

    def set_attr(self: Any, key: str, value: Any) -> None:
        items = value if isinstance(value, (list, tuple)) else [value]
        counts = tuple(int(getattr(item, "value", item)) for item in items)
        if key in HINTS:
            values = np.asarray(self.data)
            values = values.reshape(()) if values.size == 1 else values
            found.append((key, counts, holds(key, values.astype(np.int64), counts)))

    with mock.patch.object(interpreter.TensorHandle, "set_attr", set_attr):
        yield found


@pytest.mark.parametrize("m", [20, 150])
def test_every_hint_holds(lab: Any, hints: Any, m: int) -> None:
    """One shrink for three modules, then each other kernel for one; ids in random order."""
    problem = MixedProblem(lab, draw_ids(m, 8), THREE, 40, [24] * 3, torch.float16, biased=(1,))
    y, s = OPS.lora_linear_at(*problem.group_arguments("fused"))
    problem.check(y)
    for plan in ("fused", "split"):
        problem.check(OPS.lora_linear_at(*problem.linear_arguments(0, s, plan))[0])
    added = torch.nn.functional.linear(problem.x, problem.weights[0], problem.biases[0])
    OPS.lora_add_at_(*problem.add_arguments(added))
    problem.check(added)
    scaled = ScaleProblem(lab, problem.ids, 8, 24, torch.float16, scaled=(1, 2), pending=(3,))
    scaled.check(scaled.run())
    assert {kind for kind, _, _ in hints} == set(HINTS)
    assert not [hint for hint in hints if not hint[2]]
