"""Plants faults in decoded kernels: where each kind fits, and what it changes.

A fault is planted only in an instruction that a launch executed, and where it changes what some
lane does: a mask must have met its bound, and a guard must have excluded a lane.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np

from tests.emulator.build import names
from tests.emulator.decode import COMPARISONS, Program

# Bits of `Program.reached`; `machine/machine.h` says when the second one is set.
REACHED, AT_EDGE = 1, 2
KINDS = (
    "barrier removed",
    "fence removed",
    "wait removed",
    "wait one group short",
    "dependent's wait removed",
    "mask off by one",
    "predicate dropped",
    "stride swapped",
    "wrong slot",
)
# Comparisons that differ where both operands are equal.
OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
# What computes one mask from others, and addresses from pointers.
COMBINES = ("AND", "OR", "XOR", "NOT", "SELP", "MOV")
OFFSETS = ("ADD", "SUB", "SELP", "MOV", "MADWIDE")
# Strides of tensors that have no other dimension.
ONE_DIMENSION = ("stride_table", "stride_bias", "stride_scaling")
# Tables that have an entry for each slot, module or segment.
TABLES = ("address", "rank", "scaling", "slot_start", "seed", "seeds", "threshold", "inv_keep")
TABLES = tuple(f"{name}_ptr" for name in (*TABLES, "segment_slot"))


def places(program: Program) -> dict[str, list[int]]:
    """Returns the records in which a fault of each kind can be planted."""
    reader = _Reader(program)
    number = {
        "barrier removed": reader.of("BAR_SYNC", "BAR_WARP_SYNC"),
        "fence removed": reader.of("PROXY_FENCE", "WGMMA_FENCE"),
        "wait removed": reader.waits(),
        "wait one group short": reader.waits(),
        "dependent's wait removed": reader.of("GRID_WAIT", at_edge=True),
        "mask off by one": reader.bounds(),
        "predicate dropped": reader.guarded(),
        "stride swapped": [i for i in reader.of("LD_PARAM") if reader.stride(i)],
        "wrong slot": [*reader.table_reads(), *reader.ring_indices()],
    }
    assert tuple(number) == KINDS
    return {kind: sorted(found) for kind, found in number.items()}


def plant(program: Program, kind: str, record: int) -> Program:
    """Returns the program with a fault in one record, which `places` named."""
    reader = _Reader(program)
    faulty = copy.copy(program)
    faulty.code, faulty.operands = program.code.copy(), program.operands.copy()
    faulty.constants = dict(program.constants)
    faulty.reached = np.zeros_like(program.reached)
    changed = faulty.code[record]

    def constant(value: int) -> int:
        faulty.constants[faulty.register_count] = value
        faulty.register_count += 1
        return faulty.register_count - 1

    if kind in ("barrier removed", "fence removed", "wait removed", "dependent's wait removed"):
        changed["opcode"] = reader.opcodes["NO_EFFECT"]
        changed["source_count"] = 0
    elif kind == "wait one group short":
        changed["a"] = max(changed["a"], 0) + 1
    elif kind == "mask off by one":
        changed["a"] = reader.opposite[int(changed["a"])]
    elif kind == "predicate dropped" and reader.name(record) == "CP_ASYNC":
        changed["source_count"] = 2  # the last one is the number of bytes
    elif kind == "predicate dropped":
        changed["guard"] = -1
    elif kind == "stride swapped":
        own, other = reader.stride(record), reader.partner(record)
        for i in reader.all_of(["LD_PARAM"]):
            name = reader.stride(i)
            if name not in (own, other) or not name:
                continue
            source = faulty.code[i]["sources"]
            if not other:  # a constant of the compiled kernel
                faulty.code[i]["opcode"] = reader.opcodes["MOV"]
                faulty.operands[source] = constant(1)
            else:
                offset = reader.offset_of[other if name == own else own]
                faulty.operands[source] = constant(offset - int(faulty.code[i]["immediate"]))
    elif reader.name(record) == "LD_GLOBAL":
        changed["immediate"] += reader.size(record)
    else:  # the index of a ring's buffer begins with 1 instead of 0
        faulty.operands[changed["sources"]] = constant(1)
    return faulty


class _Reader:
    """Finds records of a program by what they do."""

    def __init__(self, program: Program) -> None:
        self.program, self.opcodes = program, names("opcode")
        self.of_number = {number: name for name, number in self.opcodes.items()}
        self.types = {number: name for name, number in names("type").items()}
        self.opposite = {COMPARISONS[a]: COMPARISONS[b] for a, b in OFF_BY_ONE.items()}
        offsets = [program.parameter_offsets[name] for _, name in program.parameters]
        self.offset_of = dict(zip(program.arguments, offsets, strict=False))
        self.argument_at = {offset: name for name, offset in self.offset_of.items()}

    def name(self, record: int) -> str:
        """Returns the opcode of a record."""
        return self.of_number[int(self.program.code[record]["opcode"])]

    def size(self, record: int) -> int:
        """Returns the bytes of one element that a record loads."""
        return int(self.types[int(self.program.code[record]["type"])][1:]) // 8

    def of(self, *opcodes: str, at_edge: bool = False) -> list[int]:
        """Returns the records of some opcodes that were executed, at an edge where it is asked."""
        numbers = [self.opcodes[name] for name in opcodes]
        reached = self.program.reached[:-1]
        wanted = np.isin(self.program.code["opcode"], numbers) & ((reached & REACHED) != 0)
        if at_edge:
            wanted &= (reached & AT_EDGE) != 0
        return [int(i) for i in np.flatnonzero(wanted)]

    def all_of(self, opcodes: Iterable[str]) -> list[int]:
        """Returns the records of some opcodes, executed or not."""
        numbers = [self.opcodes[name] for name in opcodes]
        return [int(i) for i in np.flatnonzero(np.isin(self.program.code["opcode"], numbers))]

    def destinations(self, record: int) -> list[int]:
        """Returns the registers that a record writes."""
        at = self.program.code[record]
        return self._operands(at["destinations"], at["destination_count"])

    def sources(self, record: int) -> list[int]:
        """Returns the registers that a record reads, but for its guard."""
        at = self.program.code[record]
        return self._operands(at["sources"], at["source_count"])

    def _operands(self, first: int, count: int) -> list[int]:
        return [int(number) for number in self.program.operands[first : first + count]]

    def waits(self) -> list[int]:
        """Returns waits that waited; of the same wait twice in a row the last one."""
        code = self.program.code
        return [
            i
            for i in self.of("CP_ASYNC_WAIT", "WGMMA_WAIT", at_edge=True)
            if any(code[i][name] != code[i + 1][name] for name in ("opcode", "a"))
        ]

    def guarded(self) -> list[int]:
        """Returns accesses to memory whose guard excluded a lane, or copies that were cut."""
        accesses = self.of("LD_GLOBAL", "ST_GLOBAL", "ST_SHARED", at_edge=True)
        copies = self.of("CP_ASYNC", at_edge=True)
        accesses = [i for i in accesses if self.program.code[i]["guard"] >= 0]
        return accesses + [i for i in copies if len(self.sources(i)) > 2]

    def bounds(self) -> list[int]:
        """Returns comparisons of integers from which masks of global memory are made."""
        masks = {
            int(self.program.code[i]["guard"]) >> 1 for i in self.all_of(("LD_GLOBAL", "ST_GLOBAL"))
        }
        masks |= {self.sources(i)[2] for i in self.of("CP_ASYNC") if len(self.sources(i)) > 2}
        before = 0
        while before != len(masks):
            before = len(masks)
            for i in self.all_of(COMBINES):
                if masks.intersection(self.destinations(i)):
                    masks.update(self.sources(i))
        return [
            i
            for i in self.of("SETP", at_edge=True)
            if masks.intersection(self.destinations(i))
            and int(self.program.code[i]["a"]) in self.opposite
            and self.types[int(self.program.code[i]["type"])][0] in "US"
        ]

    def stride(self, record: int) -> str:
        """Returns the name of the stride that a record loads; empty for another one."""
        at = self.program.code[record]
        offset = self.program.constants.get(self.sources(record)[0], -1) + int(at["immediate"])
        name = self.argument_at.get(offset, "")
        swappable = name.startswith("stride_") and name not in ONE_DIMENSION
        return name if swappable and at["destination_count"] == 1 else ""

    def partner(self, record: int) -> str:
        """Returns another stride of the tensor; empty where all others are constants."""
        own = self.stride(record)
        others = [name for name in self.offset_of if name[:-1] == own[:-1] and name != own]
        return others[-1] if others else ""

    def table_reads(self) -> list[int]:
        """Returns loads of one entry of a table of slots."""
        pointers: set[int] = set()
        for i in self.all_of(["LD_PARAM"]):
            offset = self.program.constants.get(self.sources(i)[0], -1)
            offset += int(self.program.code[i]["immediate"])
            if self.argument_at.get(offset, "").endswith(TABLES):
                pointers.update(self.destinations(i))
        before = -1
        while before != len(pointers):
            before = len(pointers)
            for i in self.all_of(OFFSETS):
                if pointers.intersection(self.sources(i)):
                    pointers.update(self.destinations(i))
        used = {number for i in range(len(self.program.code)) for number in self.sources(i)}
        reads = [i for i in self.of("LD_GLOBAL") if used.intersection(self.destinations(i))]
        return [
            i for i in reads if self.sources(i)[0] in pointers and len(self.destinations(i)) == 1
        ]

    def ring_indices(self) -> list[int]:
        """Returns where the index of a pipeline's buffer returned to 0."""
        zeros = {number for number, value in self.program.constants.items() if value == 0}
        compared = {
            (self.destinations(i)[0], self.sources(i)[0])
            for i in self.all_of(["SETP"])
            if self.sources(i)[1] in self.program.constants
        }
        found = []
        for i in self.of("SELP", at_edge=True):
            first, second, chosen = self.sources(i)
            if first in zeros and (chosen, second) in compared:
                found.append(i)
        return found
