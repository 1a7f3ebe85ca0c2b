"""For what Triton's launcher compiles a launch: types, constants and alignment of its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget

from tests.support.aot.launches import Launch

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def target_of(arch: str) -> GPUTarget:
    """Returns Triton's name for the chip."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


class Specialization(NamedTuple):
    """What Triton's launcher compiles a kernel for: launches that agree in it share one kernel."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


def specialize(launch: Launch, arch: str) -> Specialization:
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
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
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
    return Specialization(signature, constants, attributes, options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1
