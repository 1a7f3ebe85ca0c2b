"""Properties of compiled kernels: registers, programs per processor, instructions, and loops."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from fastlora.bench.ceilings import Ceilings
from fastlora.testing import Launch

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Code(NamedTuple):
    """The compiled code of one kernel.

    Attributes:
        registers: Registers per thread.
        spilled: Bytes of stack and local memory per thread.
        instructions: Number of instructions, not counting NOP.
        inner: Number of instructions of each innermost loop, in the order of addresses.
        largest: Number of instructions of the largest loop after the first loop.
    """

    registers: int
    spilled: int
    instructions: int
    inner: tuple[int, ...]
    largest: int


@functools.lru_cache(maxsize=256)
def read_code(binary: bytes) -> Code:
    """Parse what Triton's cuobjdump prints about a kernel that was compiled for NVIDIA."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage.stdout!r}")
    lines = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(sass.stdout)]
    code = [line for line in lines if line[1] != "NOP"]
    places = [at for at, _, _ in code]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))

    def size(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= at <= loop[1] for at in places)

    inner = [o for o in loops if not any(o != i and o[0] <= i[0] and i[1] <= o[1] for i in loops)]
    behind = [loop for loop in loops if loop[0] > loops[0][1]]
    return Code(
        int(found[1]),
        int(found[2]) + int(found[3]),
        len(code),
        tuple(size(loop) for loop in inner),
        max(map(size, behind), default=0),
    )


def programs_per_processor(launch: Launch, ceilings: Ceilings) -> int:
    """Return how many programs of a launch can reside on a processor at a time."""
    # A warp's registers are allocated in blocks of 256. The driver reserves 1 KiB of shared memory
    # per program.
    warp = -(-read_code(launch.binary).registers * 32 // 256) * 256
    return min(
        ceilings.registers // (warp * launch.num_warps),
        ceilings.shared // (launch.shared + 1024),
        ceilings.warps // launch.num_warps,
        ceilings.programs,
    )
