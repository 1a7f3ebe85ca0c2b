"""Decode over codes: bytes near the floor, codes and scales once, and programs enough."""

from __future__ import annotations

import csv

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from fastlora.kernels.chips import Chip
from fastlora.kernels.configs import cdiv, choose
from tests.support.chips import GPUS

SIZES = [(n, k) for n in (576, 1024, 4096, 14336) for k in (576, 1024, 4096, 14336)]


def programs(chip: Chip, launch: str, m: int, n: int, k: int, r: int) -> int:
    """How many programs a launch has."""
    config = choose(chip, launch, torch.bfloat16, m=m, n=n, k=k, r=r)
    columns = k if "grad_x" in launch else n
    return cdiv(m, config.block_m) * cdiv(columns, config.block_n) * config.splits


@pytest.mark.parametrize("launch", ["lora_linear", "lora_grad_x", "mixed_lora_linear"])
@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.arch)
def test_as_many_programs_as_over_a_matrix(chip: Chip, launch: str) -> None:
    for n, k in SIZES:
        for m in (1, 16, 17, 64):
            own = programs(chip, f"coded_{launch}", m, n, k, 16)
            # Over a matrix, bandwidths choose the tile. Over codes, it must fill the chip: three
            # quarters of the processors get a program.
            enough = min(programs(chip, launch, m, n, k, 16), cdiv(3 * chip.num_sms, 4))
            assert own >= enough, (m, n, k)


if triton_interpreted():
    from tests.support.bytes.count_bytes import TABLE, Step, rows_of_table
    from tests.support.bytes.count_quantized import STEPS, count_decode, floor_of_decode, moved

    @pytest.mark.drawn(1 / 3)
    @pytest.mark.parametrize("step", STEPS, ids=str)
    def test_decode_moves_at_most_a_fifth_above_the_floor(step: Step) -> None:
        """Codes and scales are asked for once; the table of `docs` holds what is counted."""
        counted, (m, k, n, *_) = count_decode(step), step
        (base,) = (found for name, found in counted.items() if "codes" in found.loads)
        assert base.loads["codes"] == (n * k // 2, n * k // 2)
        assert base.loads["absmax"] == (4 * n * k // 64, 4 * n * k // 64)
        assert moved(counted) <= 1.2 * floor_of_decode(step, 4 * n * k // 64)
        with TABLE.open() as file:
            written = [row for row in csv.DictReader(file) if row["kernel"].endswith("of nf4")]
        rows = rows_of_table(step, counted)
        assert [
            row for row in written if row["m"] == str(m) and row["adapters"] == str(step[4])
        ] == rows

    def test_nested_scales_are_a_byte_each() -> None:
        """A thread asks for the word that its byte is in."""
        step = Step(16, 1024, 1024, 16, 1)
        counted = count_decode(step, "nf4 nested")
        base = counted["lora_linear of nf4 nested"]
        assert base.loads["absmax"] == (1024 * 1024 // 64, 4 * 1024 * 1024 // 64)
        assert moved(counted) <= 1.2 * floor_of_decode(step, 1024 * 1024 // 64)
