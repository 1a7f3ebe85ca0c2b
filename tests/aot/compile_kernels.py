"""Compiles every shipped config for every chip, without a GPU, and says what it uses.

``python tests/aot/compile_kernels.py --write`` writes the table `docs/kernel_resources.csv`;
``--arch sm_90`` (repeatable) prints the rows of one chip. A launch is recorded from the launcher
itself, so what is compiled here is what a GPU would be given: the same constants, strides and
options, specialised by the rules of Triton's own launcher.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlora.kernels import configs
from fastlora.kernels.configs import Chip, Shipped

TABLE = Path(__file__).parents[2] / "docs" / "kernel_resources.csv"
# Processors of a card with the arch; the configs compiled here do not depend on it.
CHIPS = (
    Chip("sm_80", 108),
    Chip("sm_86", 84),
    Chip("sm_89", 142),
    Chip("sm_90", 132),
    Chip("sm_100", 148),
    Chip("sm_120", 188),
    Chip("gfx942", 304),
    Chip("gfx950", 256),
)
_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
}
# Registers and resident threads of one processor, for the estimate of occupancy.
_REGISTERS = 65536
_MAX_WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48}
_SHARED_PER_SM = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228}


class Launch(NamedTuple):
    """One call of a kernel: the function and its keyword arguments, options included."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kernel to compile: a shipped config on a chip, in one variant of its operands."""

    arch: str
    shipped: Shipped
    variant: str


@dataclass(frozen=True)
class Resources:
    """A row of the table: what one compiled kernel uses. Counts are static instructions."""

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
    async_copies: int
    grid_dependency: int


def cases(chips: Sequence[Chip] = CHIPS) -> list[Case]:
    """Returns every case: each config in its heaviest variant, and some in others on sm_90.

    "heavy" is fp32 factors, planes, s_out, a bias and dropout, at a size that the tiles divide;
    "plain" has none of these; "ragged" is heavy at sizes that 16 divides but no tile does; "uneven"
    is heavy at odd sizes, where nothing can be vectorised.
    """
    result = []
    for chip in chips:
        for shipped in configs.all_shipped(chip):
            result.append(Case(chip.arch, shipped, "heavy"))
            if chip.arch == "sm_90" and shipped.dtype == torch.bfloat16 and shipped.r == 64:
                result.append(Case(chip.arch, shipped, "plain"))
                result.append(Case(chip.arch, shipped, "ragged"))
                if shipped.config.block_m == 16:
                    result.append(Case(chip.arch, shipped, "uneven"))
    return result


def record(case: Case) -> Launch:
    """Returns the launch that the case's launcher makes."""
    shipped, config = case.shipped, case.shipped.config
    heavy = case.variant != "plain"
    chip = next(chip for chip in CHIPS if chip.arch == case.arch)
    m, r = config.block_m, shipped.r - (case.variant == "uneven")
    n = k = {"ragged": 4112, "uneven": 4099}.get(case.variant, 4096)
    factor_dtype = torch.float32 if heavy else shipped.dtype

    def empty(*shape: int, dtype: torch.dtype = shipped.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def shrink(module: Any) -> None:
        out = empty(config.splits, m, r, dtype=torch.float32)
        module.launch_lora_shrink(
            out,
            empty(m, k),
            empty(r, k, dtype=factor_dtype),
            seed=empty(1, dtype=torch.int64),
            dropout_p=0.1 if heavy else 0.0,
            config=config,
        )

    def linear(module: Any) -> None:
        planes = empty(configs.MAX_SPLITS, m, r, dtype=torch.float32)
        module.launch_lora_linear(
            empty(m, n),
            empty(m, k),
            empty(n, k),
            planes if heavy else empty(m, r),
            empty(n, r, dtype=factor_dtype),
            empty(r, dtype=torch.float32),
            bias=empty(n) if heavy else None,
            s_out=empty(m, r) if heavy else None,
            config=config,
            pdl=chip.has_pdl,
        )

    def expand(module: Any) -> None:
        module.launch_lora_expand(
            empty(m, n),
            empty(m, r),
            empty(n, r, dtype=factor_dtype),
            empty(r, dtype=torch.float32),
            config=config,
        )

    def dropout(module: Any) -> None:
        module.launch_lora_dropout(
            empty(m, k),
            empty(m, k),
            seed=empty(1, dtype=torch.int64),
            dropout_p=0.1,
            config=config,
        )

    launch = {
        "lora_shrink": shrink,
        "lora_linear": linear,
        "lora_expand": expand,
        "lora_dropout": dropout,
    }[shipped.kernel]
    return _recorded(shipped.kernel, launch)


def _recorded(stem: str, launch: Callable[[Any], None]) -> Launch:
    """Runs a launcher with its kernel replaced by one that writes down its arguments."""
    module = importlib.import_module(f"fastlora.kernels.{stem}")
    name = f"_{stem}_kernel"
    kernel = getattr(module, name)
    calls: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: calls.append(arguments)

    setattr(module, name, Recorder())
    try:
        launch(module)
    finally:
        setattr(module, name, kernel)
    (arguments,) = calls
    return Launch(kernel, arguments)


def target_of(arch: str) -> GPUTarget:
    """Returns Triton's name for the chip."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compiles a launch as Triton's launcher would specialise it; returns the compiled kernel."""
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
            attributes[(index,)] = [["tt.divisibility", 16]]
            if arch.startswith("gfx"):  # a tensor below 2 GiB: buffer instructions
                attributes[(index,)].append(["tt.pointer_range", 32])
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target_of(arch), options=options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def measure(case: Case) -> Resources:
    """Compiles a case and returns what it uses."""
    launch = record(case)
    kernel = compile_launch(launch, case.arch)
    hip = case.arch.startswith("gfx")
    registers, spilled = _amd_registers(kernel) if hip else _nvidia_registers(kernel)
    text = kernel.asm["amdgcn"] if hip else kernel.asm["ptx"]
    patterns = (
        {"mfma": r"v_mfma_"}
        if hip
        else {
            "wgmma": r"wgmma\.mma_async",
            "tcgen05": r"tcgen05\.mma",
            "mma": r"mma\.sync",
        }
    )
    counts = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    tensor_core = max(counts, key=lambda name: counts[name])
    config = case.shipped.config
    return Resources(
        arch=case.arch,
        kernel=case.shipped.kernel,
        variant=case.variant,
        dtype=_TYPE_NAMES[case.shipped.dtype],
        precision=getattr(config, "input_precision", ""),
        block_m=config.block_m,
        block_n=getattr(config, "block_n", 0),
        block_k=getattr(config, "block_k", 0),
        block_r=getattr(config, "block_r", 0),
        rank=case.shipped.r,
        warps=config.num_warps,
        stages=getattr(config, "num_stages", 0),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        programs_per_sm=_programs_per_sm(
            case.arch, registers, config.num_warps, kernel.metadata.shared
        ),
        tensor_core=tensor_core if counts[tensor_core] else "",
        tensor_core_count=counts[tensor_core],
        async_copies=len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", text)),
        grid_dependency=len(re.findall(r"griddepcontrol", text)),
    )


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


def measure_all(selected: Sequence[Case]) -> Iterator[Resources]:
    """Yields the resources of each case, in order, from a pool with one worker a core."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(measure, selected, chunksize=4)


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
    options = parser.parse_args(arguments)
    chips = [chip for chip in CHIPS if options.arch is None or chip.arch in options.arch]
    rows = list(measure_all(cases(chips)))
    if options.write:
        write_table(rows)
    else:
        writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Resources)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
