"""Two things that compiled code can get wrong about Hopper's wgmma, without a word of the compiler.

A of a wgmma may lie in registers. The instruction returns before it has read them, so nothing may
write to them until a wait covers its group; `overwrites` finds what does. Triton 3.6 leaves that to
ptxas, which may move a write of the loop's next step in front of the wait (triton#9433).

B in shared memory is swizzled over as many columns as one instruction should take; `narrow_tiles`
counts products in which several warp groups share a tile so narrow that it takes fewer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
_REGISTER = re.compile(r"R(\d+)")
_WGMMA = re.compile(r"[A-Z]GMMA\.64x(\d+)x\d+(\.F16\b)?")
# Their first register is read.
_READERS = ("BAR", "BRX", "CALL", "FCHK", "JMP", "JMX", "NANOSLEEP", "R2P", "RET", "WARPSYNC")
# A's rows of 32 bytes, over the 128 threads of a warp group.
_A_REGISTERS = 4
# Groups that a wait may leave in flight.
_MOST_GROUPS = 8


class _Instruction(NamedTuple):
    """One line of code; ``follow`` are the numbers of those that may come next."""

    address: int
    opcode: str
    operands: list[str]
    text: str
    follow: list[int]

    @property
    def registers_of_a(self) -> range:
        """The registers of a wgmma's A; none where A is in shared memory."""
        if _WGMMA.match(self.opcode) and (found := _REGISTER.match(self.operands[1])):
            return range(int(found[1]), int(found[1]) + _A_REGISTERS)
        return range(0)

    @property
    def written(self) -> range:
        """The registers that it writes."""
        if self.opcode.split(".")[0] in _READERS or "SETP" in self.opcode:
            return range(0)
        operands = (text for text in self.operands if not _PREDICATE.match(text))
        found = _REGISTER.match(next(operands, ""))
        first = int(found[1]) if found else 0
        return range(first, first + _width(self.opcode)) if found else range(0)


def register_a_count(sass: str) -> int:
    """Returns how many wgmmas of a kernel's code have A in registers."""
    return sum(len(instruction.registers_of_a) > 0 for instruction in _parse(sass))


def overwrites(sass: str) -> list[str]:
    """Returns each write to a register of A that a wgmma in flight may still read.

    A wgmma is followed from where it stands along every path, loops included, to the waits that
    cover its group. A wait covers all groups but the newest ones that it names.

    Args:
        sass: A kernel's code as ``cuobjdump -sass`` prints it.

    Raises:
        ValueError: Control flow cannot be followed.
    """
    code = _parse(sass)
    return [
        f"{code[at].text} writes to A of {wgmma.text}"
        for wgmma in code
        if (registers := set(wgmma.registers_of_a))
        for at in sorted(_in_flight(code, wgmma))
        if registers.intersection(code[at].written)
    ]


def _in_flight(code: list[_Instruction], wgmma: _Instruction) -> set[int]:
    """Returns the numbers of the instructions that may run while a wgmma is in flight."""
    # How many groups are newer; -1 while its own is not complete.
    pending = [(at, _commits(wgmma) - 1) for at in wgmma.follow]
    seen = set()
    while pending:
        if (state := pending.pop()) in seen:
            continue
        seen.add(state)
        at, newer = state
        left = _left_in_flight(code[at])
        if left is None or newer < left:
            newer = min(newer + _commits(code[at]), _MOST_GROUPS)
            pending += [(after, newer) for after in code[at].follow]
    return {at for at, _ in seen}


def _commits(instruction: _Instruction) -> int:
    """Returns 1 for the last wgmma of a group, else 0."""
    return int(_WGMMA.match(instruction.opcode) is not None and "gsb0" in instruction.operands)


def _left_in_flight(instruction: _Instruction) -> int | None:
    """Returns how many groups a wait leaves in flight; None for what is no wait."""
    if instruction.opcode != "WARPGROUP.DEPBAR.LE":
        return None
    return int(instruction.operands[1], 16)


def _width(opcode: str) -> int:
    """Returns how many neighboring registers an instruction writes."""
    if found := _WGMMA.match(opcode):
        return int(found[1]) // (4 if found[2] else 2)
    name, *kinds = opcode.split(".")
    if name in ("HMMA", "IMMA", "DMMA", "QMMA"):
        return 4
    if name == "LDSM":
        return int(kinds[-1]) if kinds[-1].isdecimal() else 1
    if "128" in kinds:
        return 4
    wide = name in ("DADD", "DFMA", "DMNMX", "DMUL", "LEPC") or (
        name == "CS2R" and "32" not in kinds
    )
    wide |= "WIDE" in kinds or "64" in kinds
    # Conversions name what they make first.
    wide |= name in ("F2F", "F2I", "I2F") and kinds[:1] in (["F64"], ["S64"], ["U64"])
    return 2 if wide else 1


def _parse(sass: str) -> list[_Instruction]:
    """Returns the instructions, each with those that may follow it."""
    lines = [
        (int(address, 16), bool(predicate), opcode, [text.strip() for text in rest.split(",")])
        for address, predicate, opcode, rest in _LINE.findall(sass)
    ]
    code = [
        _Instruction(
            address, opcode, operands, f"/*{address:04x}*/ {opcode} {', '.join(operands)}", []
        )
        for address, _, opcode, operands in lines
    ]
    number = {instruction.address: at for at, instruction in enumerate(code)}
    returns = [at + 1 for at, i in enumerate(code) if i.opcode.startswith("CALL")]
    meets: dict[str, list[int]] = {}
    for instruction in code:
        if instruction.opcode.startswith("BSSY"):
            meets.setdefault(instruction.operands[0], []).append(number[_target(instruction)])
    for at, (_, predicated, opcode, operands) in enumerate(lines):
        name = opcode.split(".")[0]
        falls_through = predicated or name not in ("BRA", "BSYNC", "CALL", "EXIT", "RET")
        if name in ("BRX", "JMP", "JMX"):
            raise ValueError(f"cannot follow {code[at].text}")
        if name == "BRA":
            falls_through |= len(operands) > 1
        if name in ("BRA", "CALL") or opcode == "WARPSYNC.COLLECTIVE":
            code[at].follow.append(number[_target(code[at])])
        elif name == "BSYNC":
            code[at].follow.extend(meets[operands[0]])
        elif name == "RET":
            code[at].follow.extend(returns)
        if falls_through and at + 1 < len(code):
            code[at].follow.append(at + 1)
    return code


def _target(instruction: _Instruction) -> int:
    """Returns the address that an instruction names last."""
    try:
        return int(instruction.operands[-1].split()[-1], 16)
    except (IndexError, ValueError):
        raise ValueError(f"cannot follow {instruction.text}") from None


def narrow_tiles(ttgir: str) -> int:
    """Returns how many products have a B ``[K, N]``, with N contiguous, that is swizzled too wide.

    The bytes that the swizzle spans should be no more than the columns of one instruction, which
    are a warp group's own; CUTLASS has no other layout.

    Args:
        ttgir: A kernel's IR as Triton keeps it.
    """
    columns = {
        name: int(shape)
        for name, shape in re.findall(
            r"^#(\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,.*instrShape = \[\d+, (\d+),",
            ttgir,
            re.M,
        )
    }
    swizzles = {
        name: 8 * int(swizzle) // int(bits)
        for name, swizzle, bits in re.findall(
            r"^#(\w+) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+), transposed = false, "
            r"elementBitWidth = (\d+)",
            ttgir,
            re.M,
        )
    }
    products = re.findall(
        r"warp_group_dot .* \* !ttg\.memdesc<\w+, #(\w+),.*> -> tensor<\w+, #(\w+)>", ttgir
    )
    return sum(columns[result] < swizzles.get(shared, 0) for shared, result in products)
