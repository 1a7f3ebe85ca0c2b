"""`plane_sums`: one launch for several outputs, in the order of the planes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import choose
from fastlora.kernels.plane_sums import launch_plane_sums

# Outputs off the block and on it, one smaller than a block, one with nothing in it.
OUTPUTS = [((37, 29), 3), ((1024,), 1), ((5,), 9), ((0, 4), 2)]


def in_order(planes: torch.Tensor) -> torch.Tensor:
    """The sum as the kernel makes it, plane after plane."""
    total = torch.zeros_like(planes[0])
    for plane in planes:
        total += plane
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sums(lab: Any, dtype: torch.dtype, count: int) -> None:
    chosen = OUTPUTS[:count]
    planes = [lab.rand(p, *shape) for shape, p in chosen]
    outs = [lab.poisoned(*shape, dtype=dtype) for shape, _ in chosen]
    launch_plane_sums(
        outs, planes, config=choose(chip_of(planes[0].device), "plane_sums", torch.float32)
    )
    for out, stack in zip(outs, planes, strict=True):
        assert torch.equal(out, in_order(stack).to(dtype))


def test_each_output_has_its_dtype_and_nothing_else_is_written(lab: Any) -> None:
    planes = [lab.rand(4, 2000), lab.rand(2, 1030)]
    room = lab.poisoned(2010, dtype=torch.float16)
    outs = [room[:2000], lab.poisoned(1030, dtype=torch.float32)]
    launch_plane_sums(
        outs, planes, config=choose(chip_of(planes[0].device), "plane_sums", torch.float32)
    )
    assert torch.equal(outs[0], in_order(planes[0]).half())
    assert torch.equal(outs[1], in_order(planes[1]))
    assert room[2000:].isnan().all()
