"""Chips that Triton compiles alike up to a stage: that stage's result serves them all.

Until TTGIR, Triton asks for a chip's generation only (and for its name, in one attribute); from
there to PTX it tells sm_80 from the rest of its generation by a flag of LLVM's, and sm_86 from
sm_89 by the name in ``.target``. What is left is compiled for each chip: shared memory and spills
are its own. `test_shared_compiles.py` compares with compiles that share nothing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from tests.support.aot.launches import Case

# Of each chip, others to take a stage from, the latest stage first.
_DONORS = {
    "sm_86": (("sm_80", "ttgir"),),
    "sm_89": (("sm_86", "ptx"), ("sm_80", "ttgir")),
}


class Compiled(NamedTuple):
    """What is read of a compiled kernel: the text of its stages, its bytes of shared memory."""

    asm: Mapping[str, Any]
    shared: int


def groups_of(selected: Sequence[Case], specialised: Callable[[Case], str]) -> list[list[Case]]:
    """Returns the cases in groups that may share stages, donors first.

    Args:
        selected: In any order.
        specialised: Says what tells a case's kernel from others, but for its chip.
    """
    groups: dict[object, list[Case]] = {}
    for case in selected:
        shares = case.arch in _DONORS or case.arch == "sm_80"
        key = (case.shipped.kernel, case.variant, specialised(case)) if shares else case
        groups.setdefault(key, []).append(case)
    return [sorted(group, key=lambda case: case.arch) for group in groups.values()]


def donor_of(arch: str, made: Mapping[str, Compiled]) -> tuple[Compiled, str] | None:
    """Returns the compiled kernel to take a stage from, and that stage's name."""
    for donor, stage in _DONORS.get(arch, ()):
        if donor in made:
            return made[donor], stage
    return None


def compile_for(
    target: GPUTarget, donor: Compiled, stage: str, options: Mapping[str, Any]
) -> Compiled:
    """Compiles what is left after a stage that another chip's compile has been through.

    Args:
        target: The chip, of NVIDIA.
        donor: The other chip's compile.
        stage: "ttgir" or "ptx".
        options: Of the launch.
    """
    if stage == "ptx":
        ptx = re.sub(r"^\.target sm_\d+", f".target sm_{target.arch}", donor.asm["ptx"], flags=re.M)
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        cubin = backend.make_cubin(ptx, {}, parsed, target.arch)
        return Compiled({**donor.asm, "ptx": ptx, "cubin": cubin}, donor.shared)
    text = re.sub(r'"cuda:\d+"', f'"cuda:{target.arch}"', donor.asm["ttgir"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(text)
        kernel = triton.compile(str(path), target=target, options=dict(options))
    return Compiled(kernel.asm, kernel.metadata.shared)
