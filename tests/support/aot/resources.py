"""What a compiled kernel uses, read off its code: a row of `docs/kernel_resources.csv`.

With `buffers.py`, `dependent_launch.py`, `specialization.py` and `wgmma.py` this is all that makes
a row of a kernel; a change of these files makes every row unknown (`fingerprints.py`).
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler.compiler import make_backend

from tests.support.aot.buffers import refills
from tests.support.aot.dependent_launch import early_loads
from tests.support.aot.launches import Case, Compiled, Launch
from tests.support.aot.specialization import TYPE_NAMES, specialize, target_of
from tests.support.aot.wgmma import narrow_tiles, overwrites, register_a_count

# Registers and resident threads of one processor, for the estimate of occupancy.
_REGISTERS = 65536
_MAX_WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48}
_SHARED_PER_SM = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228}


@dataclass(frozen=True)
class Resources:
    """A row of the table: what one compiled kernel uses. Counts are static instructions.

    Of the copies and loads, those of NVIDIA; ``narrow_copies`` move less than 16 bytes a thread,
    ``vector_loads`` are the loads of 16; ``instructions`` are the shapes of the tensor cores' ones;
    ``early_loads`` are those of s that a dependent launch may run before the shrink has written it;
    ``register_a``, ``overwrites`` and ``narrow_tiles`` are counts of `wgmma`, and ``refills`` is
    that of `buffers`; ``serialized`` is 1 where ptxas waits for each wgmma before the next;
    ``fingerprint`` is that of `fingerprints.fingerprint`, by the Triton that wrote the table.
    """

    triton: str
    arch: str
    kernel: str
    variant: str
    dtype: str
    precision: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    rank: int
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs_per_sm: int
    tensor_core: str
    tensor_core_count: int
    instructions: str
    async_copies: int
    narrow_copies: int
    vector_loads: int
    grid_dependency: int
    early_loads: int
    register_a: int
    overwrites: int
    narrow_tiles: int
    refills: int
    serialized: int
    fingerprint: str


def key_of(case: Case) -> dict[str, Any]:
    """Returns the columns of a row that say what is compiled, which no other row has."""
    config = case.shipped.config
    blocks = {f"block_{axis}": getattr(config, f"block_{axis}", 0) for axis in "mnkr"}
    return {
        "arch": case.arch,
        "kernel": case.shipped.kernel,
        "variant": case.variant,
        "dtype": TYPE_NAMES[case.shipped.dtype],
        "precision": getattr(config, "input_precision", ""),
        **blocks,
        "rank": case.shipped.r,
        "warps": config.num_warps,
        "stages": getattr(config, "num_stages", 0),
    }


def resources_of(case: Case, launch: Launch, kernel: Compiled, digest: str) -> Resources:
    """Returns the row of a compiled kernel whose fingerprint is ``digest``."""
    hip = case.arch.startswith("gfx")
    registers, spilled = _amd_registers(kernel) if hip else _nvidia_registers(kernel)
    text = kernel.asm["amdgcn"] if hip else kernel.asm["ptx"]
    patterns = (
        {"mfma": r"v_mfma_(\w+)"}
        if hip
        else {
            "wgmma": r"wgmma\.mma_async[.a-z]*\.(m\d+n\d+k\d+)",
            "tcgen05": r"tcgen05\.mma[.:\w]*\.(kind::\w+)",
            "mma": r"mma\.sync[.a-z]*\.(m\d+n\d+k\d+)",
        }
    )
    found = {name: re.findall(pattern, text) for name, pattern in patterns.items()}
    counts = {name: len(shapes) for name, shapes in found.items()}
    tensor_core = max(counts, key=lambda name: counts[name])
    config = case.shipped.config
    has_wgmma = counts.get("wgmma", 0) > 0
    sass = cuobjdump(kernel, "-sass") if has_wgmma else ""
    return Resources(
        triton=triton.__version__,
        **key_of(case),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.shared,
        programs_per_sm=_programs_per_sm(case.arch, registers, config.num_warps, kernel.shared),
        tensor_core=tensor_core if counts[tensor_core] else "",
        tensor_core_count=counts[tensor_core],
        instructions="+".join(sorted({shape for shapes in found.values() for shape in shapes})),
        async_copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", text)),
        # Copies and loads that move 16 bytes a thread, and copies that do not.
        narrow_copies=len(re.findall(r"cp\.async\.c[ag][^;]*\], 0x[48],", text)),
        vector_loads=len(re.findall(r"ld\.global[^ ]*\.v4\.b32", text)),
        grid_dependency=len(re.findall(r"griddepcontrol", text)),
        early_loads=early_loads_of_s(launch, kernel, case.arch),
        register_a=register_a_count(sass),
        overwrites=len(overwrites(sass)),
        narrow_tiles=narrow_tiles(kernel.asm["ttgir"]),
        refills=len(refills(kernel.asm["ttgir"])) if has_wgmma else 0,
        serialized=serialized_products(launch, kernel, case.arch) if has_wgmma else 0,
        fingerprint=digest,
    )


def early_loads_of_s(launch: Launch, kernel: Any, arch: str) -> int:
    """Returns what `dependent_launch.early_loads` says of s, or of the partial sums of s.

    The result is 0 where nothing is launched early.
    """
    if not launch.arguments.get("launch_pdl"):
        return 0
    signature = specialize(launch, arch).signature
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    read = "s_ptr" if "s_ptr" in names else "partials_ptr"
    return early_loads(kernel, names.index(read))


def serialized_products(launch: Launch, kernel: Compiled, arch: str) -> int:
    """Returns how often ptxas says that it serializes a kernel's wgmmas, such as by C7515.

    Triton's own last stage runs once more, on the same PTX and with the same options, since Triton
    keeps nothing that ptxas says.
    """
    target, log = target_of(arch), io.StringIO()
    backend: Any = make_backend(target)
    options = backend.parse_options(specialize(launch, arch).options)
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, target.arch)
    if "Compiling entry function" not in log.getvalue():
        raise RuntimeError(f"ptxas said nothing of a kernel:\n{log.getvalue()}")
    return len(re.findall(r"wgmma\.mma_async instructions are serialized", log.getvalue()))


def _nvidia_registers(kernel: Any) -> tuple[int, int]:
    """Returns registers a thread, and bytes of stack and local memory (what spills live in)."""
    usage = cuobjdump(kernel, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(match[1]), int(match[2]) + int(match[3])


def cuobjdump(kernel: Any, option: str) -> str:
    """Returns what Triton's cuobjdump prints of a kernel that is compiled for NVIDIA."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [program, option, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_registers(kernel: Any) -> tuple[int, int]:
    """Returns vector registers a lane, and bytes of scratch."""

    def value(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])
        if match is None:
            raise RuntimeError(f"the AMDGCN metadata has no {key}")
        return int(match[1])

    return value("vgpr_count"), value("private_segment_fixed_size")


def _programs_per_sm(arch: str, registers: int, warps: int, shared: int) -> int:
    """Estimates how many programs one processor holds (NVIDIA; 0 where it is not estimated)."""
    if arch.startswith("gfx"):
        return 0
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_warps = _MAX_WARPS.get(arch, 64) // warps
    by_shared = _SHARED_PER_SM.get(arch, 100) * 1024 // (shared + 1024)
    return min(by_registers, by_warps, by_shared)
