"""The mixed expand is a small program: many fit a processor, each with few barriers to wait at."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from fastlora import env
from fastlora.kernels.mixed_lora_expand import launch_mixed_lora_expand
from fastlora.ops.layout import shrink_partials_shape
from tests.support.aot.compile_kernels import compile_launch
from tests.support.aot.launches import CHIPS, Case, Launch, operands, record, recording
from tests.support.aot.resources import Resources, resources_of
from tests.support.aot.shipped import Shipped, all_shipped

pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="the interpreter compiles nothing")

(H100,) = (chip for chip in CHIPS if chip.arch == "sm_90")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def decode_tile(block_r: int) -> Shipped:
    """The decode tile in bf16."""
    (shipped,) = (
        entry
        for entry in all_shipped(H100)
        if (entry.kernel, entry.dtype) == ("mixed_lora_expand", torch.bfloat16)
        and (entry.config.block_m, entry.config.block_r) == (16, block_r)
    )
    return shipped


def compiled(case: Case, launch: Launch, tmp_path: Path) -> tuple[list[str], Resources]:
    """The instructions of a launch, without padding, and what it uses."""
    kernel = compile_launch(launch, H100.arch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    sass = subprocess.run(
        [CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass)
    return [name for name in found if name != "NOP"], resources_of(case, launch, kernel, "")


def launch_at_decode(case: Case, modules: int) -> Launch:
    """An expand of rank 16 for modules that share x, with the partial sums of 64 rows."""
    given = operands(case)
    rows, config, slots = given["rows"], given["config"], given["up"].rank.shape[-1]
    planes, *_ = shape = shrink_partials_shape(64, 4096, modules, 16)
    assert planes == 4

    def table(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((modules, slots), dtype=dtype, device="meta").squeeze(0)

    s = torch.empty(shape, dtype=torch.float32, device="meta")
    up = given["up"]._replace(
        address=table(torch.int64), rank=table(torch.int32), scaling=table(torch.float32)
    )
    ys = [given["y"]] * modules
    with recording("mixed_lora_expand") as made:
        launch_mixed_lora_expand(
            ys, s if modules > 1 else s[:, 0], rows, up, config=config, pdl=True
        )
    return made[0]


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_at_decode(modules: int, tmp_path: Path) -> None:
    """16 rows by 128 columns, rank 16, four partial sums, and up to three modules in one grid.

    Fewer partial sums would leave the shrink of a few rows with too few programs, and a launch that
    adds them would take longer than the loads.
    """
    case = Case(H100.arch, decode_tile(16), "plain")
    instructions, resources = compiled(case, launch_at_decode(case, modules), tmp_path)
    assert (resources.block_m, resources.block_n) == (16, 128)
    assert 100 < len(instructions) <= 450
    assert 0 < instructions.count("BAR") <= 12
    assert resources.programs_per_sm >= 4
    assert resources.spilled_bytes == 0


@pytest.mark.parametrize("variant", ["plain", "heavy"])
def test_wider_ranks_and_factors(variant: str, tmp_path: Path) -> None:
    """fp32 factors, a lora_bias, and ranks to 64 and past it leave room for four programs too."""
    for block_r in (16, 32, 64):
        case = Case(H100.arch, decode_tile(block_r), variant)
        instructions, resources = compiled(case, record(case), tmp_path)
        assert instructions.count("BAR") <= 14
        assert resources.programs_per_sm >= 4
        assert resources.spilled_bytes == 0
