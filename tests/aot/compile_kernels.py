"""Compiles every shipped config for every chip, without a GPU, and says what it uses.

``python tests/aot/compile_kernels.py --write`` writes the table `docs/kernel_resources.csv`;
``--arch sm_90`` (repeatable) prints the rows of one chip. The tests add ``--shared``: chips that
compile alike up to a stage share it (`shared_compiles.py`); and ``--known``: a kernel whose Triton
IR is what a row of the table was made from gives that row, but for every tenth, which is compiled
(`fingerprints.py`). What is compiled is what a GPU would be given: launches as their launchers make
them (`launches.py`), specialised by the rules of Triton's own launcher.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# This folder holds no package: a script finds its neighbours, a worker process that imports this
# file by its path does not.
sys.path.insert(0, str(Path(__file__).parent))
from dependent_launch import early_loads  # noqa: E402
from fingerprints import fingerprint, is_sampled  # noqa: E402
from launches import CHIPS, Case, Launch, cases, record  # noqa: E402
from shared_compiles import Compiled, compile_for, donor_of, groups_of  # noqa: E402

TABLE = Path(__file__).parents[2] / "docs" / "kernel_resources.csv"
_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
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
    ``fingerprint`` is that of `fingerprints.fingerprint`.
    """

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
    fingerprint: str


def target_of(arch: str) -> GPUTarget:
    """Returns Triton's name for the chip."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


class Specialisation(NamedTuple):
    """What Triton's launcher compiles a kernel for: launches that agree in it share one kernel."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


def specialise(launch: Launch, arch: str) -> Specialisation:
    """Returns what Triton's launcher would compile, for tensors at multiples of 16 bytes."""
    options = dict(launch.arguments)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = options.pop(parameter.name)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and _is_one(value)):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPE_NAMES[value.dtype]
            known = attributes.setdefault((index,), [])
            if not parameter.do_not_specialize_on_alignment:
                known.append(["tt.divisibility", 16])
            if arch.startswith("gfx"):  # a tensor below 2 GiB: buffer instructions
                known.append(["tt.pointer_range", 32])
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return Specialisation(signature, constants, attributes, options)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compiles a launch as Triton's launcher would specialise it; returns the compiled kernel."""
    *known, options = specialise(launch, arch)
    source = ASTSource(launch.kernel, *known)
    return triton.compile(source, target=target_of(arch), options=options)


def fingerprint_of(launch: Launch, arch: str) -> str:
    """Returns the fingerprint of what `compile_launch` would compile."""
    *known, options = specialise(launch, arch)
    return fingerprint(ASTSource(launch.kernel, *known), target_of(arch), options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def key_of(case: Case) -> dict[str, Any]:
    """Returns the columns of a row that say what is compiled, which no other row has."""
    config = case.shipped.config
    blocks = {f"block_{axis}": getattr(config, f"block_{axis}", 0) for axis in "mnkr"}
    return {
        "arch": case.arch,
        "kernel": case.shipped.kernel,
        "variant": case.variant,
        "dtype": _TYPE_NAMES[case.shipped.dtype],
        "precision": getattr(config, "input_precision", ""),
        **blocks,
        "rank": case.shipped.r,
        "warps": config.num_warps,
        "stages": getattr(config, "num_stages", 0),
    }


def measure_group(group: Sequence[Case], known: frozenset[str] = frozenset()) -> list[Resources]:
    """Compiles cases of one specialisation, each from what an earlier one's chip compiles alike.

    Where all fingerprints are known, and none is sampled, their rows are read from the table.
    """
    launches = [record(case) for case in group]
    prints = [
        fingerprint_of(launch, case.arch) for launch, case in zip(launches, group, strict=True)
    ]
    if known.issuperset(prints) and not is_sampled(prints[0]):
        table = read_table()
        return [
            replace(table[digest], **key_of(case))
            for digest, case in zip(prints, group, strict=True)
        ]
    made: dict[str, Compiled] = {}
    rows = []
    for case, launch, digest in zip(group, launches, prints, strict=True):
        found = donor_of(case.arch, made)
        if found is None:
            kernel = compile_launch(launch, case.arch)
            compiled = Compiled(kernel.asm, kernel.metadata.shared)
        else:
            options = specialise(launch, case.arch).options
            compiled = compile_for(target_of(case.arch), *found, options)
        made[case.arch] = compiled
        rows.append(_resources(case, launch, compiled, digest))
    return rows


def _resources(case: Case, launch: Launch, kernel: Compiled, digest: str) -> Resources:
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
    return Resources(
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
        fingerprint=digest,
    )


def early_loads_of_s(launch: Launch, kernel: Any, arch: str) -> int:
    """Returns what `dependent_launch.early_loads` says of s; 0 where nothing is launched early."""
    if not launch.arguments.get("launch_pdl"):
        return 0
    signature = specialise(launch, arch).signature
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    return early_loads(kernel, names.index("s_ptr"))


def _nvidia_registers(kernel: Any) -> tuple[int, int]:
    """Returns registers a thread, and bytes of stack and local memory (what spills live in)."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(match[1]), int(match[2]) + int(match[3])


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


def measure_all(
    selected: Sequence[Case], shared: bool = False, known: bool = False
) -> list[Resources]:
    """Returns the resources of each case, in order, from a pool with one worker a core."""
    measure = functools.partial(
        measure_group, known=frozenset(read_table()) if known else frozenset()
    )
    groups: Sequence[Sequence[Case]] = [[case] for case in selected]
    if shared:
        groups = groups_of(selected, lambda case: repr(specialise(record(case), case.arch)))
    # Torch and Triton, alive to the end, need not be looked through at every collection.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), initializer=gc.freeze) as pool:
        rows = dict(
            zip(
                (case for group in groups for case in group),
                (row for made in pool.map(measure, groups, chunksize=4) for row in made),
                strict=True,
            )
        )
    return [rows[case] for case in selected]


@functools.cache
def read_table(path: Path = TABLE) -> dict[str, Resources]:
    """Returns the rows of the published table by fingerprint; none of another Triton's."""
    with path.open(newline="") as file:
        if file.readline().split() != ["#", "triton", triton.__version__]:
            return {}
        rows = [row for row in csv.DictReader(file) if row.get("fingerprint")]
    kinds = {field.name: int if field.type == "int" else str for field in fields(Resources)}
    return {
        row["fingerprint"]: Resources(**{name: kinds[name](row[name]) for name in kinds})
        for row in rows
    }


def write_table(rows: Sequence[Resources], path: Path = TABLE) -> None:
    """Writes the rows as CSV, after one comment line with Triton's version."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(arguments: Sequence[str]) -> int:
    """Compiles, and prints the rows or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=[chip.arch for chip in CHIPS])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--shared", action="store_true", help="share stages between chips")
    parser.add_argument("--known", action="store_true", help="take what is known from the table")
    options = parser.parse_args(arguments)
    chips = [chip for chip in CHIPS if options.arch is None or chip.arch in options.arch]
    rows = measure_all(cases(chips), options.shared, options.known)
    if options.write:
        write_table(rows)
    else:
        writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
