"""What a kernel's row follows from, as a short digest: Triton IR, options, chip, tools, readers.

A kernel whose digest stands in the published table is the one that the row was measured on, and
need not be compiled again to know the row. To make the IR takes a tenth of a compile.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

# What reads a row off the compiled code.
_READERS = ("resources.py", "dependent_launch.py", "specialisation.py")
# Of so many known kernels one is compiled all the same, chosen by its digest.
_EVERY = 10


def fingerprint(source: ASTSource, target: GPUTarget, options: Mapping[str, Any]) -> str:
    """Returns the digest of a kernel as it would be compiled for a chip; lines do not matter."""
    backend: Any = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        parsed,
        backend.get_codegen_implementation(parsed),
        backend.get_module_map(),
        context,
    )
    tools = (triton.__version__, backend.hash(), parsed.hash(), readers())
    parts = (*tools, module.str_nodebug())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def readers() -> str:
    """Returns the text of the measuring code."""
    return "\n".join(Path(__file__).with_name(name).read_text() for name in _READERS)


def is_sampled(digest: str) -> bool:
    """Whether a known kernel is compiled all the same, to check the table's row."""
    return int(digest[:8], 16) % _EVERY == 0
