"""Which loads of a compiled kernel may run before the kernel that it depends on has finished.

A programmatic dependent starts early and waits by itself (``griddepcontrol.wait``). Whatever the
kernel before it writes, here s, must be loaded behind that wait, on every path. Values are followed
from the argument to the loads, through loops and branches, in Triton's IR and again in the PTX,
where a compiler might have moved a load in front of the wait.
"""

from __future__ import annotations

import re
from typing import Any

_WAIT = re.compile(r"\btt\.grid_dependency_wait\b|griddepcontrol\.wait")
_VALUE = re.compile(r"%[\w$]+")
_REGISTER = re.compile(r"%\w+")
# The function's body: one brace for the module, one for the function.
_BODY_DEPTH = 2


def early_loads(kernel: Any, argument: int) -> int:
    """Returns how many loads of what an argument points at may run before the one wait.

    Args:
        kernel: Compiled for NVIDIA.
        argument: Its number among those that are no constants.

    Raises:
        RuntimeError: Nothing is loaded from it: the analysis missed it, or the kernel is another.
    """
    ir, ptx = kernel.asm["ttir"], kernel.asm["ptx"]
    return max(_early_in_ir(ir, argument), _early_in_ptx(ptx, argument))


def _early_in_ir(text: str, argument: int) -> int:
    """By Triton's IR, where the wait is unconditional when it stands in the function's own body."""
    head = next(line for line in text.splitlines() if "tt.func public" in line)
    derived = {re.findall(r"(%[\w$]+): ", head)[argument]}
    lines = [_code(line) for line in text.splitlines() if not line.startswith("#")]
    size = 0
    while size != len(derived):
        size = len(derived)
        _follow_ir(lines, derived)
    waits = [(at, depth) for at, line, depth in _with_depth(lines) if _WAIT.search(line)]
    unconditional = len(waits) == 1 and waits[0][1] == _BODY_DEPTH
    loads = [
        at
        for at, line in enumerate(lines)
        if re.search(r"\btt\.(load|descriptor_load|atomic_rmw|atomic_cas)\b", line)
        and derived & set(_VALUE.findall(line.split("=", 1)[-1].split(",")[0]))
    ]
    return _count_early(loads, waits[0][0] if unconditional else None)


def _code(line: str) -> str:
    """Returns a line without its location; of the function's head, only that a body begins."""
    return "tt.func {" if "tt.func" in line else line.split(" loc(")[0]


def _with_depth(lines: list[str]) -> list[tuple[int, str, int]]:
    """Returns number, text and depth of braces of each line; braces within a line cancel out."""
    depth, result = 0, []
    for at, line in enumerate(lines):
        result.append((at, line, depth))
        depth += line.count("{") - line.count("}")
    return result


def _follow_ir(lines: list[str], derived: set[str]) -> None:
    """Adds what follows from derived values; what is loaded through one is a value of its own."""
    regions: list[set[str]] = []
    for line in lines:
        result, equals, rest = line.partition(" = ")
        made = set(_VALUE.findall(result)) if equals and result.lstrip().startswith("%") else set()
        operands = set(_VALUE.findall(rest if made else line))
        if "scf." in line or line.rstrip().endswith("({"):
            # The values of a region's loop are its results, and what its lines yield.
            made |= set(_VALUE.findall(" ".join(re.findall(r"(%[\w$]+) = ", rest))))
        if "tt.load" not in line and derived & operands:
            derived |= made
            if "yield" in line and regions:
                derived |= regions[-1]
        for _ in range(line.count("}") - line.count("{")):
            if regions:
                regions.pop()
        if "else {" not in line and line.count("{") > line.count("}"):
            regions.append(made)


def _early_in_ptx(text: str, argument: int) -> int:
    """By the PTX, where no branch may jump over the wait."""
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    derived: set[str] = set()
    size = -1
    while size != len(derived):
        size = len(derived)
        for line in lines:
            _follow_ptx(line, argument, derived)
    waits = [at for at, line in enumerate(lines) if _WAIT.search(line)]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    jumps = [
        (at, labels[name])
        for at, line in enumerate(lines)
        if (found := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line))
        for name in [found[1]]
    ]
    unconditional = (
        len(waits) == 1
        and not lines[waits[0]].startswith("@")
        and not any(at < waits[0] < to for at, to in jumps)
    )
    loads = [
        at
        for at, line in enumerate(lines)
        if re.search(r"\b(ld\.global|cp\.async|atom\.global|ld\.relaxed)", line)
        and derived & set(_REGISTER.findall(" ".join(re.findall(r"\[(.*?)\]", line))))
    ]
    return _count_early(loads, waits[0] if unconditional else None)


def _follow_ptx(line: str, argument: int, derived: set[str]) -> None:
    """Adds what one instruction writes, if it reads a derived register or the argument itself."""
    code = re.sub(r"^@!?%\w+\s+", "", line)
    if code.startswith("ld.param"):
        if re.search(rf"_param_{argument}\]", code):
            derived.add(_REGISTER.findall(code)[0])
        return
    if code.startswith(("ld.", "st.", "cp.", "atom.", "bra", ".reg")):
        return
    group = re.match(r"[\w.:]+\s+(\{[^}]*\}|%\w+)\s*,(.*)", code)
    if group and derived & set(_REGISTER.findall(group[2])):
        derived |= set(_REGISTER.findall(group[1]))


def _count_early(loads: list[int], wait: int | None) -> int:
    """Returns the loads in front of the wait; all of them where there is none on every path."""
    if not loads:
        raise RuntimeError("no load of the argument was found")
    return sum(wait is None or at < wait for at in loads)
