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
from tests.support.aot.compile_kernels import compile_launch
from tests.support.aot.launches import CHIPS, Case, record
from tests.support.aot.resources import Resources, resources_of
from tests.support.aot.shipped import all_shipped

pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="the interpreter compiles nothing")

(H100,) = (chip for chip in CHIPS if chip.arch == "sm_90")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(block_r: int, variant: str, tmp_path: Path) -> tuple[list[str], Resources]:
    """The instructions of the decode tile in bf16, without padding, and what it uses."""
    (shipped,) = (
        entry
        for entry in all_shipped(H100)
        if (entry.kernel, entry.dtype) == ("mixed_lora_expand", torch.bfloat16)
        and (entry.config.block_m, entry.config.block_r) == (16, block_r)
    )
    case = Case(H100.arch, shipped, variant)
    launch = record(case)
    kernel = compile_launch(launch, H100.arch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    sass = subprocess.run(
        [CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass)
    return [name for name in found if name != "NOP"], resources_of(case, launch, kernel, "")


def test_at_decode(tmp_path: Path) -> None:
    """16 rows by 128 columns, rank 16."""
    instructions, resources = compiled(16, "plain", tmp_path)
    assert (resources.block_m, resources.block_n) == (16, 128)
    assert 100 < len(instructions) <= 400
    assert 0 < instructions.count("BAR") <= 12
    assert resources.programs_per_sm >= 4
    assert resources.spilled_bytes == 0


@pytest.mark.parametrize("variant", ["plain", "heavy"])
def test_wider_ranks_and_factors(variant: str, tmp_path: Path) -> None:
    """fp32 factors, a lora_bias, and ranks to 64 and past it leave room for four programs too."""
    for block_r in (16, 32, 64):
        instructions, resources = compiled(block_r, variant, tmp_path)
        assert instructions.count("BAR") <= 14
        assert resources.programs_per_sm >= 4
        assert resources.spilled_bytes == 0
