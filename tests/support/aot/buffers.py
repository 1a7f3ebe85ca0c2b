"""Finds buffers of shared memory that a wgmma in flight still reads when they are written again.

An asynchronous `ttng.warp_group_dot` returns before it has read its operands. Until a
`ttng.warp_group_dot_wait` covers it, nothing may write to the buffers that it reads. Triton's
pipeliner decides how many buffers a load gets, and may give it one too few for a product that it
leaves in flight. Then the copy for a later step overwrites what the product reads.

`refills` runs a kernel's IR: it follows the numbers that choose buffers, each branch, and each loop
for as many steps as it takes until nothing new happens. Buffers that share memory because they are
never live together are not compared. Triton places barriers between those.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_NAME = re.compile(r"%[\w-]+(?:#\d+)?")
_ASSIGNMENT = re.compile(r"(%[\w-]+)(?::(\d+))? = (.*)")
_LOOP = re.compile(r"scf\.for %[\w-]+ = .*? iter_args\((.*?)\) ->")
_CONSTANT = re.compile(r"(-?\d+) : i\d+|(true|false)")
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
}
# Views of a buffer, or of a part of it.
_VIEWS = ("ttg.memdesc_trans", "ttg.memdesc_reshape", "ttg.memdesc_reinterpret")
_VIEWS += ("ttg.memdesc_subslice",)
# What writes to shared memory, and which operand names the place.
_WRITES = {
    "ttg.async_copy_global_to_local": 1,
    "ttg.local_store": 1,
}
_NOT_FOLLOWED = ("scf.", "cf.", "tt.call", "ttg.warp_specialize", "ttng.async_tma_")
# A loop's indices repeat after as many steps as it has buffers.
_MOST_STEPS = 256
# Waits leave fewer products in flight than this.
_MOST_PENDING = 64


class _Buffer(NamedTuple):
    """One buffer of an allocation; None as index of one that is not known, or not indexed."""

    allocation: str
    index: int | None

    def may_be(self, other: _Buffer) -> bool:
        """Whether both may be the same memory."""
        known = self.index is not None and other.index is not None
        return self.allocation == other.allocation and (not known or self.index == other.index)


class _Product(NamedTuple):
    """A product in flight: its line, and the buffers that it reads."""

    line: str
    reads: tuple[_Buffer, ...]


@dataclass
class _Operation:
    """One operation; `regions` has the bodies of a loop, or of both branches."""

    results: list[str]
    text: str
    regions: list[list[_Operation]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The operation's name, such as `arith.addi`."""
        return self.text.split(" ", 1)[0].strip('"')

    @property
    def operands(self) -> list[str]:
        """The values that it takes, in order; those in an index or an attribute are among them."""
        return _NAME.findall(self.text)


# What is known of a value: a number or a buffer; a value that is not there is not known.
_Values = dict[str, int | _Buffer]
# Each product in flight, with how many newer ones there are at least.
_InFlight = dict[_Product, int]


def refills(ttgir: str) -> list[str]:
    """Returns each write to a buffer that a wgmma in flight may still read, once.

    Args:
        ttgir: A kernel's IR as Triton keeps it, of the stage "ttgir".

    Raises:
        ValueError: Control flow cannot be followed.
    """
    run = _Run()
    run.block(_parse(ttgir), {}, {})
    return list(run.found)


class _Run:
    """Runs operations; `found` has the writes that were found, in order."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def block(
        self, operations: list[_Operation], values: _Values, flight: _InFlight
    ) -> tuple[_InFlight, list[str]]:
        """Runs a block; returns what is in flight behind it, and the names that it yields."""
        for operation in operations:
            if operation.name == "scf.yield":
                return flight, _NAME.findall(operation.text)
            if operation.name == "scf.for":
                flight = self.loop(operation, values, flight)
            elif operation.name == "scf.if":
                flight = self.branches(operation, values, flight)
            elif operation.name.startswith(_NOT_FOLLOWED):
                raise ValueError(f"cannot follow {operation.text}")
            else:
                flight = self.step(operation, values, flight)
        return flight, []

    def loop(self, operation: _Operation, values: _Values, flight: _InFlight) -> _InFlight:
        """Runs a loop until a step begins as an earlier one did; it may end behind any step."""
        match = _LOOP.match(operation.text)
        pairs = re.findall(r"(%[\w-]+) = (%[\w#-]+)", match[1]) if match else []
        carried = [(name, values.get(given)) for name, given in pairs]
        ends = [(flight, [value for _, value in carried])]
        seen = []
        (body,) = operation.regions
        for _ in range(_MOST_STEPS):
            if (state := (carried, flight)) in seen:
                break
            seen.append(state)
            inner = values | {name: value for name, value in carried if value is not None}
            flight, yielded = self.block(body, inner, dict(flight))
            carried = [
                (name, inner.get(given)) for (name, _), given in zip(carried, yielded, strict=True)
            ]
            ends.append((flight, [value for _, value in carried]))
        else:
            raise ValueError(f"no two of {_MOST_STEPS} steps begin alike: {operation.text}")
        return _merge(operation, values, ends)

    def branches(self, operation: _Operation, values: _Values, flight: _InFlight) -> _InFlight:
        """Runs both branches, from the same start; one that is not there does nothing."""
        ends = []
        for body in [*operation.regions, []][:2]:
            inner = dict(values)
            after, yielded = self.block(body, inner, dict(flight))
            ends.append((after, [inner.get(name) for name in yielded]))
        return _merge(operation, values, ends)

    def step(self, operation: _Operation, values: _Values, flight: _InFlight) -> _InFlight:
        """Runs an operation without regions; returns what is in flight behind it."""
        name, operands = operation.name, operation.operands
        if name == "ttng.warp_group_dot":
            if "isAsync = true" not in operation.text:
                return {}  # it waits for itself, and so for all
            flight = {product: min(newer + 1, _MOST_PENDING) for product, newer in flight.items()}
            known = (values.get(operand) for operand in operands[:2])
            reads = tuple(value for value in known if isinstance(value, _Buffer))
            if len(reads) != operation.text.count("!ttg.memdesc<"):
                raise ValueError(f"cannot tell what is read by {operation.text}")
            return flight | {_Product(operation.text, reads): 0}
        if name == "ttng.warp_group_dot_wait":
            left = re.search(r"pendings = (\d+)", operation.text)
            if left is None:
                raise ValueError(f"cannot follow {operation.text}")
            flight = {product: newer for product, newer in flight.items() if newer < int(left[1])}
            for result, operand in zip(operation.results, operands, strict=False):
                _set(values, result, values.get(operand))
            return flight
        if name == "ttg.local_alloc":
            (result,) = operation.results
            values[result] = _Buffer(result, None)
            if operands:
                self.write(operation, values[result], flight)
        elif name in _WRITES:
            self.write(operation, values.get(operands[_WRITES[name]]), flight)
        elif operation.results:
            _set(values, operation.results[0], _value_of(operation, values))
        return flight

    def write(self, operation: _Operation, place: int | _Buffer | None, flight: _InFlight) -> None:
        """Notes a write to a buffer that a product in flight reads."""
        for product in flight:
            for buffer in product.reads:
                if not isinstance(place, _Buffer) or buffer.may_be(place):
                    self.found[f"{operation.text} writes to what is read by {product.line}"] = None


def _merge(
    operation: _Operation, values: _Values, ends: list[tuple[_InFlight, list[int | _Buffer | None]]]
) -> _InFlight:
    """Gives results the values in which all ends agree; returns what may be in flight."""
    merged: _InFlight = {}
    for flight, _ in ends:
        for product, newer in flight.items():
            merged[product] = min(newer, merged.get(product, newer))
    for at, result in enumerate(operation.results):
        found = {end[at] for _, end in ends}
        _set(values, result, found.pop() if len(found) == 1 else None)
    return merged


def _set(values: _Values, name: str, value: int | _Buffer | None) -> None:
    """Sets what is known of a value, or forgets what an earlier step knew."""
    if value is None:
        values.pop(name, None)
    else:
        values[name] = value


def _value_of(operation: _Operation, values: _Values) -> int | _Buffer | None:
    """Returns what is known of an operation's one result."""
    name, text = operation.name, operation.text
    if name == "arith.constant":
        found = _CONSTANT.match(text.split(" ", 1)[1])
        return None if found is None else int(found[1] or found[2] == "true")
    given = [values.get(operand) for operand in operation.operands]
    if name == "ttg.memdesc_index" and isinstance(given[0], _Buffer):
        index = given[1]
        return _Buffer(given[0].allocation, index if isinstance(index, int) else None)
    if name in _VIEWS:
        return given[0]
    if name == "arith.select" and isinstance(given[0], int):
        return given[1] if given[0] else given[2]
    if name.startswith("arith.") and len(given) == 2:
        left, right = given
        if isinstance(left, int) and isinstance(right, int):
            if name == "arith.cmpi":
                compare = _COMPARISONS.get(text.split()[1].strip(","))
                return None if compare is None else int(compare(left, right))
            if name in _ARITHMETIC:
                return _ARITHMETIC[name](left, right)
    return None


def _parse(ttgir: str) -> list[_Operation]:
    """Returns the operations of the kernel's body."""
    lines = _lines(ttgir)
    for line in lines:
        if line.startswith("tt.func"):
            body, _ = _block(lines)
            return body
    raise ValueError("the IR has no function")


def _lines(ttgir: str) -> Iterator[str]:
    """Yields the lines without the places in the source that they name."""
    for line in ttgir.splitlines():
        stripped = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
        if stripped and not stripped.startswith(("#", "//", "^")):
            yield stripped


def _block(lines: Iterator[str]) -> tuple[list[_Operation], str]:
    """Returns the operations up to the brace that closes a block, and the line of that brace."""
    operations: list[_Operation] = []
    for line in lines:
        if line.startswith("}"):
            return operations, line
        match = _ASSIGNMENT.match(line)
        results, text = [], line
        if match:
            name, count, text = match.groups()
            results = [f"{name}#{i}" for i in range(int(count))] if count else [name]
        operation = _Operation(results, text)
        operations.append(operation)
        closing = line
        while closing.endswith("{"):
            region, closing = _block(lines)
            operation.regions.append(region)
    raise ValueError("the IR ends inside a block")
