"""The Triton path up to its launches, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import fastlora
from fastlora.testing import Launch, stubbed_launches

pytest.importorskip("triton", reason="triton is not installed")

FORWARD = ["_lora_shrink_kernel", "_lora_linear_kernel"]
BACKWARD = ["_lora_grad_b_kernel", "_lora_linear_kernel", "_lora_grad_a_kernel"]


def names(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


@pytest.fixture
def layer() -> fastlora.FastLoraLinear:
    return fastlora.FastLoraLinear(256, 128, r=8, dtype=torch.float16)


@pytest.mark.parametrize(("chip", "processors"), [("sm_90", 132), ("sm_80", 108), ("gfx942", 304)])
def test_a_linear_is_two_launches(
    layer: fastlora.FastLoraLinear, chip: str, processors: int
) -> None:
    x = torch.randn(4, 256, dtype=torch.float16)
    with torch.no_grad(), stubbed_launches(chip, processors) as launches:
        y = layer(x)
        assert y.shape == (4, 128)
        assert names(launches) == FORWARD
        assert all(min(launch.grid) >= 1 and launch.num_warps >= 1 for launch in launches)
        layer(x)
        assert names(launches) == 2 * FORWARD


def test_a_training_step_is_five(layer: fastlora.FastLoraLinear) -> None:
    x = torch.randn(64, 256, dtype=torch.float16, requires_grad=True)
    with stubbed_launches() as launches:
        layer(x).sum().backward()
    assert names(launches) == FORWARD + BACKWARD
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_the_grid_follows_the_chip() -> None:
    """Tiles are chosen for the processors named, so a smaller chip gets fewer programs."""
    layer = fastlora.FastLoraLinear(512, 4096, r=8, dtype=torch.float16)
    x, programs = torch.randn(16, 512, dtype=torch.float16), []
    for processors in (132, 16):
        with torch.no_grad(), stubbed_launches("sm_90", processors) as launches:
            layer(x)
        programs.append(launches[-1].grid[0])
    assert programs[0] > programs[1]


def test_what_comes_after_is_as_before(layer: fastlora.FastLoraLinear) -> None:
    x = torch.randn(4, 256, dtype=torch.float16)
    with torch.no_grad():
        before = layer(x)
        with pytest.raises(KeyError), stubbed_launches() as launches:
            raise KeyError
        assert torch.equal(layer(x), before)
        assert not launches
        with pytest.raises(fastlora.FastLoraError, match="no Triton kernels for device type 'cpu'"):
            layer.impl = "triton"
            layer(x)


def test_an_unknown_chip_is_rejected() -> None:
    with pytest.raises(ValueError, match="no configs for 'sm_75'"), stubbed_launches("sm_75"):
        pass
