"""What a kernel's row follows from, as a short digest: Triton IR, options, chip, tools, readers.

A kernel whose digest stands in the published table is the one that the row was measured on, and
need not be compiled again to know the row. To make the IR takes a tenth of a compile.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

# What reads a row off the compiled code.
_READERS = ("resources.py", "buffers.py", "dependent_launch.py", "specialization.py", "wgmma.py")
# Options by which one vendor's chips differ, of which IR without fp8 shows nothing.
_OF_A_CHIP = {"arch", "max_num_imprecise_acc_default"}
_OF_A_CHIP |= {"supported_fp8_dtypes", "deprecated_fp8_dot_operand_dtypes"}
# Of so many known kernels one is compiled all the same, chosen by its digest.
_EVERY = 100


def fingerprint(source: ASTSource, target: GPUTarget, options: Mapping[str, Any]) -> str:
    """Returns the digest of a kernel as it would be compiled for a chip; lines do not matter."""
    backend: Any = make_backend(target)
    parsed = backend.parse_options(dict(options))
    own = {name: value for name, value in vars(parsed).items() if name not in _OF_A_CHIP}
    asked = _Asked(
        source.fn,
        target.backend,
        repr((source.signature, source.constants, source.attrs, own)),
        (source, target, backend, parsed),
    )
    parts = (triton.__version__, backend.hash(), parsed.hash(), readers(), _text_of(asked))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Asked:
    """A kernel whose IR is asked for: what tells it from others, and how to make it."""

    kernel: Any
    vendor: str
    known: str
    how: tuple[ASTSource, GPUTarget, Any, Any] = field(compare=False)


@functools.lru_cache(maxsize=1)
def _text_of(asked: _Asked) -> str:
    """Returns a kernel's Triton IR, once for chips that are asked for one after the other."""
    source, target, backend, parsed = asked.how
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
    return module.str_nodebug()


@functools.cache
def readers() -> str:
    """Returns the text of the measuring code, below the imports of each file."""
    return "\n".join(
        _below_imports(Path(__file__).with_name(name).read_text()) for name in _READERS
    )


def _below_imports(text: str) -> str:
    """Returns a module's text from its first statement that is no docstring and no import."""
    head = (ast.Expr, ast.Import, ast.ImportFrom)
    first = next(node for node in ast.parse(text).body if not isinstance(node, head))
    return "\n".join(text.splitlines()[first.lineno - 1 :])


def is_sampled(digest: str) -> bool:
    """Whether a known kernel is compiled all the same, to check the table's row."""
    return int(digest[:8], 16) % _EVERY == 0
