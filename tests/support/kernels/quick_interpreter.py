"""Makes Triton's interpreter do what it does in half of its time, and nothing else.

Most of that is work that nobody reads, or that gives the same every time. Where a part of the
interpreter has another name it is left alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Changes the interpreter, for all of this process."""
    _patch_the_language_once()
    _leave_out_overflow_checks_that_nobody_reads()
    _remember_numpys_types()
    _remember_shapes()
    _leave_equal_shapes_alone()


def _patch_the_language_once() -> None:
    """Makes a launch patch Triton's language module once, not in every call of a device function.

    The interpreter looks through all of the module for what it has already patched.
    """
    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return

    @functools.cache
    def used_by(fn: Any) -> list[Any]:
        found = list(fn.__globals__.values())
        return [module for module in (tl, tl.core) if any(value is module for value in found)]

    def patch_once(fn: Any) -> Any:
        used = used_by(fn)
        is_patched = bool(used) and not any(tl.core.is_builtin(module.load) for module in used)
        return scope() if is_patched else patch(fn)

    interpreter._patch_lang = patch_once


def _leave_out_overflow_checks_that_nobody_reads() -> None:
    """Spares every sum and product of integers a second one in 64 bits.

    The interpreter compares the two and then asserts nothing, as long as its debug option is off.
    """
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "debug", True) or not hasattr(options, "sanitize_overflow"):
        return
    builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _remember_numpys_types() -> None:
    """Spares every operation a dictionary of all types, made to look up one."""
    find = getattr(interpreter, "_get_np_dtype", None)
    if find is None:
        return
    known: dict[str, Any] = {}

    def find_once(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = find_once


def _remember_shapes() -> None:
    """Spares every tensor's type its checks and its name, and every tensor its shape."""
    block_type, tensor = tl.core.block_type, tl.core.tensor
    make_type, make_tensor = block_type.__init__, tensor.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape)
        if element_ty.is_ptr() or any(type(size) is not int for size in sizes):
            make_type(self, element_ty, shape)
            return
        key = (element_ty.name, *sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if not type.is_block():
            make_tensor(self, handle, type)
            return
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    block_type.__init__, tensor.__init__ = init_type, init_tensor


def _leave_equal_shapes_alone() -> None:
    """Spares operands of one shape the search for a shape that holds both: most operations."""
    semantic = getattr(interpreter, "interpreter_semantic", None)
    plain = getattr(semantic, "broadcast_impl_value", None)
    if plain is None:
        return

    def broadcast(lhs: Any, rhs: Any) -> Any:
        alike = lhs.type.is_block() == rhs.type.is_block()
        if alike and lhs.handle.data.shape == rhs.handle.data.shape:
            return lhs, rhs
        return plain(lhs, rhs)

    semantic.broadcast_impl_value = broadcast
