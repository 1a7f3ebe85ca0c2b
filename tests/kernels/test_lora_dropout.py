"""`lora_dropout`: the written mask exactly, the rescaling, strides; and the mask itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.ops.philox_reference import _philox_4x32, philox_keep_mask
from fastlora.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, choose
from fastlora.kernels.lora_dropout import launch_lora_dropout


def dropout(
    lab: Any, x: torch.Tensor, seed: int, p: float, config: KernelConfig | None = None
) -> torch.Tensor:
    """Launches on ``x`` and returns the result."""
    out = lab.poisoned(*x.shape, dtype=x.dtype)
    launch_lora_dropout(
        out,
        x,
        seed=torch.tensor([seed], device=x.device),
        dropout_p=p,
        config=config
        or choose(chip_of(x.device), "lora_dropout", x.dtype, m=x.shape[0], k=x.shape[1]),
    )
    return out


@pytest.mark.parametrize(
    ("m", "k", "p"),
    [
        *((1, 257, 0.5), (15, 40, 0.1), (16, 257, 0.1)),
        *((17, 40, 0.5), (127, 257, 0.5), (2000, 40, 0.1)),
    ],
)
def test_values(lab: Any, dtype: torch.dtype, m: int, k: int, p: float) -> None:
    x = lab.rand(m, k, dtype=dtype)
    out = dropout(lab, x, 1234, p)
    kept = torch.where(philox_keep_mask(1234, m, k, p).to(x.device), x, 0)
    assert_within_budget(out, kept / (1 - p), kept.double() / (1 - p), "out")
    assert torch.equal(out != 0, kept != 0)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x0123456789ABCDEF])
def test_every_bit_of_the_seed(lab: Any, seed: int) -> None:
    x = torch.ones(9, 50, device=lab.device)
    expected = philox_keep_mask(seed, 9, 50, 0.25)
    assert torch.equal((dropout(lab, x, seed, 0.25) != 0).cpu(), expected)


def test_mask_does_not_depend_on_the_tile(lab: Any) -> None:
    x = torch.ones(21, 100, device=lab.device)
    expected = philox_keep_mask(5, 21, 100, 0.5)
    for block_m, block_k in ((1, 8), (4, 32), (32, 128)):
        config = KernelConfig(block_m=block_m, block_k=block_k, num_warps=4)
        assert torch.equal((dropout(lab, x, 5, 0.5, config) != 0).cpu(), expected)


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_strided(lab: Any, layout: str) -> None:
    x = lab.rand(19, 45)
    kept = torch.where(philox_keep_mask(3, 19, 45, 0.5).to(x.device), x, 0)
    assert torch.equal(dropout(lab, lab.strided(x, layout), 3, 0.5), 2 * kept)


def test_nan_is_dropped_too(lab: Any) -> None:
    x = torch.full((9, 50), float("nan"), device=lab.device)
    assert torch.equal(dropout(lab, x, 5, 0.5).isnan().cpu(), philox_keep_mask(5, 9, 50, 0.5))


def test_probability_rounds_to_sixteen_bits(lab: Any) -> None:
    x = torch.ones(9, 50, device=lab.device)
    assert (dropout(lab, x, 5, 2**-20) != 0).all()
    assert (dropout(lab, x, 5, 1 - 2**-20) == 0).all()


def test_no_rows(lab: Any) -> None:
    assert dropout(lab, lab.rand(0, 64), 5, 0.5).shape == (0, 64)


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
