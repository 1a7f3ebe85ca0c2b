"""Decodes the PTX of one kernel into the records that the C++ part executes.

An instruction, a type or a modifier that is not known raises `UnsupportedInstruction`: nothing is
guessed. `machine/types.h` describes the records, and the other headers each opcode's modifiers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.emulator.build import names

SHARED_BASE = 1024
RECORD = np.dtype(
    [(name, "i4") for name in ("opcode", "type", "a", "b", "c", "rounding", "flush", "guard")]
    + [(name, "i4") for name in ("destinations", "destination_count", "sources", "source_count")]
    + [("line", "i4"), ("file", "i4"), ("immediate", "i8")]
)
TYPES = {
    **{f"b{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"{sign}{bits}": f"{sign}{bits}".upper() for sign in "us" for bits in (8, 16, 32, 64)},
    **{name: name.upper() for name in ("pred", "f16", "bf16", "f32", "f64", "tf32")},
    **{name: name.upper() for name in ("f16x2", "bf16x2", "f32x2", "e4m3x2")},
    "e4m3": "E4M3X2",
}
BITS = {kind: int(re.sub(r"\D", "", kind) or 1) for kind in TYPES.values()}
BITS |= {"F16X2": 32, "BF16X2": 32, "F32X2": 64, "E4M3X2": 16}
WIDE = {"U16": "U32", "S16": "S32", "U32": "U64", "S32": "S64"}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPECIAL_REGISTERS = {
    **{"%cluster_ctarank": 1, "%cluster_ctaid.x": 1},  # 1 and 2 are zero
    **{
        f"%{name}": number
        for number, name in enumerate(
            _words(
                "tid.x tid.y tid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z "
                "ntid.x ntid.y ntid.z laneid warpid total_smem_size"
            )
        )
    },
}
COMPARISONS = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "num": 6, "nan": 7}
COMPARISONS |= {f"{name}u": 16 + COMPARISONS[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARISONS |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
ROUNDINGS = {"rn": 0, "rna": 0, "rz": 1, "rm": 2, "rp": 3}
INTEGRAL_ROUNDINGS = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
REDUCTIONS = ("add", "min", "max", "and", "or", "xor")
SIMPLE = _words(
    "add sub mul fma div rem min max abs neg and or xor not bfe popc clz prmt selp rcp sqrt rsqrt "
    "ex2 lg2 tanh shl shr"
)
SINGLE_PRECISION = ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh")
WITH_TWO_TYPES = ("cvt", "mma", "wgmma", "add", "sub", "fma")
SHIFTS = ("shl", "shr", "bfe")  # operands behind the first one have 32 bits
WITHOUT_EFFECT = ("membar", "fence", "nanosleep", "discard", "setmaxnreg", "prefetch")
# Modifiers without influence on what is computed here: caches, scopes, layouts that mma fixes.
NEUTRAL = _words(
    "approx full sync aligned uni to nc volatile relaxed acquire release acq_rel gpu cta sys "
    "global param shared shared::cta noftz row col lo hi wide cg ca async commit_group wait_group "
    "wait_all v2 v4 v8 x1 x2 x4 trans m8n8 relu mma_async proxy fence warp clamp wrap up "
    "down bfly idx cluster fractional arrive wait launch_dependents l r"
)
MODIFIERS = {*NEUTRAL, *COMPARISONS, *ROUNDINGS, *INTEGRAL_ROUNDINGS, *REDUCTIONS, *TYPES, "ftz"}


class UnsupportedInstruction(NotImplementedError):
    """The decoder does not know an instruction, or one of its modifiers."""


class Program:
    """A decoded kernel.

    Attributes:
        name: Of the kernel.
        text: Its PTX.
        parameters: Type and name of each.
        arguments: The kernel's names of them, once Triton launched it.
        parameter_offsets: Where each lies, by name; ``parameter_bytes`` is the sum.
        threads: Of a program; ``shared`` is its shared memory in bytes.
        code: Records, of type `RECORD`; ``operands`` is the list into which they point.
        constants: Values of the registers that hold constants.
        text_lines: The line of ``text`` from which each record came, counted from zero.
        reached: Of each record, in all launches, `REACHED` and `AT_EDGE` of `machine/machine.h`.
    """

    def __init__(self, text: str, shared: int = 0) -> None:
        self.text, self.shared = text, shared
        found = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\n?\{", text, re.S)
        threads = re.search(r"\.reqntid (\d+)", text)
        if found is None or threads is None:
            raise ValueError("the PTX has no .entry with .reqntid")
        self.name, self.threads = found[1], int(threads[1])
        files = re.findall(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text, re.M)
        self.files = {int(number): path.rsplit("/", 1)[-1] for number, path in files}
        words = [line.split() for line in found[2].split(",") if line.strip()]
        self.parameters = [(line[1].lstrip("."), line[-1]) for line in words]
        self.arguments: list[str] = []
        self.parameter_offsets: dict[str, int] = {}
        offset = 0
        for kind, name in self.parameters:
            size = int(re.sub(r"\D", "", kind)) // 8
            offset = -(-offset // size) * size
            self.parameter_offsets[name] = offset
            offset += size
        self.parameter_bytes = offset
        decoder = _Decoder(self.parameter_offsets, text[: found.end()].count("\n"))
        decoder.decode(_body(text[found.end() :]))
        self.code = np.array(decoder.records, dtype=RECORD)
        self.operands = np.array(decoder.operands or [0], dtype=np.int32)
        self.register_count = len(decoder.registers) + 1
        self.constants, self.text_lines = decoder.constants, decoder.text_lines
        self.reached = np.zeros(len(self.code) + 1, dtype=np.uint8)

    def reachable(self) -> list[int]:
        """Returns the records that a launch without a trap can execute.

        They are those to which a path of branches leads from the first record, and from which a
        path leads to the kernel's end. What stands behind an unconditional trap or return without
        a label is not counted, nor are blocks that end in a trap, as those of failed assertions.
        """
        opcodes, end = names("opcode"), len(self.code)
        following: list[set[int]] = []
        for number, record in enumerate(self.code):
            stops = record["opcode"] in (opcodes["RET"], opcodes["TRAP"], opcodes["BRA"])
            after = set() if stops and record["guard"] < 0 else {number + 1}
            if record["opcode"] == opcodes["BRA"]:
                after.add(int(record["immediate"]))
            if record["opcode"] == opcodes["RET"]:
                after.add(end)
            following.append(after)
        before: list[set[int]] = [set() for _ in range(end + 1)]
        for number, after in enumerate(following):
            for other in after:
                before[other].add(number)
        return sorted((_closure(0, [*following, set()]) & _closure(end, before)) - {end})

    def coverage(self) -> tuple[int, int]:
        """Returns how many of the records that `reachable` counts were executed, and their number.

        A record counts as executed when its guard held for a lane. A branch counts when a lane
        took it.
        """
        reachable = self.reachable()
        return int((self.reached[reachable] & 1).sum()), len(reachable)


def _closure(start: int, edges: list[set[int]]) -> set[int]:
    found, todo = {start}, [start]
    while todo:
        new = edges[todo.pop()] - found
        found |= new
        todo += new
    return found


def _body(text: str) -> str:
    """Returns what stands before the brace that closes the kernel."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise ValueError("the kernel has no closing brace")


def _split(text: str) -> list[str]:
    """Splits operands at commas outside of braces and brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


class _Statement(NamedTuple):
    """An instruction: ``kinds`` are the types among its modifiers, ``kind`` is the last one."""

    base: str
    modifiers: list[str]
    operands: list[str]
    kinds: list[str]
    kind: str

    @property
    def is_shared(self) -> bool:
        """Whether it accesses shared memory."""
        return any(modifier.startswith("shared") for modifier in self.modifiers)


class _Decoder:
    """What decoding collects: records, operands, registers by name, and constants."""

    def __init__(self, parameter_offsets: dict[str, int], first_line: int) -> None:
        self.opcodes, self.types = names("opcode"), names("type")
        self.parameter_offsets, self.text_line = parameter_offsets, first_line
        self.registers: dict[str, int] = {}
        self.constants: dict[int, int] = {}
        self.operands: list[int] = []
        self.records: list[tuple[int, ...]] = []
        self.text_lines: list[int] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.guard, self.line, self.file = -1, 0, 0
        self.rounding = self.flush = 0

    def decode(self, body: str) -> None:
        """Decodes the lines of a kernel; a statement of inline assembly may take several."""
        first, pending = self.text_line, ""
        for number, raw in enumerate(body.split("\n")):
            self.text_line = first + number
            line = raw.split("//", 1)[0].strip()
            if not pending and line.startswith(".loc"):
                _, file, place, *_ = line.split()
                self.file, self.line = int(file), int(place) or self.line
            elif pending or not line.startswith((".pragma", ".reg", ".file", ".loc")):
                pending = self.statements(f"{pending} {line}".strip())
        if pending:
            raise UnsupportedInstruction(pending)
        for index, label in self.jumps:
            self.records[index] = (*self.records[index][:-1], self.labels[label])

    def statements(self, text: str) -> str:
        """Decodes the statements that are complete, and returns the rest."""
        while text:
            if label := re.match(r"([\w$]+):(?!:)\s*", text):
                self.labels[label[1]] = len(self.records)
                text = text[label.end() :]
            elif text[0] in "{}" and not re.match(r"\{[^};]*\}\s*,", text):
                text = text[1:].strip()
            elif ";" in text:
                statement, text = (part.strip() for part in text.split(";", 1))
                if statement and not statement.startswith(".reg"):
                    self.statement(statement)
            else:
                break
        return text

    def register(self, name: str) -> int:
        """Returns a register's number."""
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: int) -> int:
        """Returns the number of a register that holds a constant."""
        number = self.register(f"constant {value}")
        self.constants[number] = value & (2**64 - 1)
        return number

    def operand(self, text: str, kind: str) -> int:
        """Returns the register of one operand, or -1 for the sink."""
        text = text.strip()
        if text == "_":
            return -1
        if text == "global_smem":
            return self.constant(SHARED_BASE)
        if text in self.parameter_offsets:
            return self.constant(self.parameter_offsets[text])
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return self.constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0) & ((1 << BITS[kind]) - 1))
        if text in SPECIAL_REGISTERS or not re.fullmatch(r"%?[\w$]+", text):
            raise UnsupportedInstruction(f"operand {text}")
        return self.register(text)

    def group(self, text: str, kind: str) -> list[int]:
        """Returns the registers of an operand, which may be several in braces."""
        parts = text[1:-1].split(",") if text.startswith("{") else [text]
        return [self.operand(part, kind) for part in parts]

    def address(self, text: str) -> tuple[int, int]:
        """Returns the register and the offset of an address in brackets."""
        found = re.fullmatch(r"\[\s*(.*?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise UnsupportedInstruction(f"address {text}")
        return self.operand(found[1], "U64"), int(found[2] or "0", 0)

    def emit(
        self,
        opcode: str,
        kind: str = "U32",
        to: Sequence[int] = (),
        of: Sequence[int] = (),
        a: int = 0,
        b: int = 0,
        c: int = 0,
        immediate: int = 0,
    ) -> None:
        """Adds a record."""
        destinations = len(self.operands)
        sources = destinations + len(to)
        self.operands += [*to, *of]
        self.text_lines.append(self.text_line)
        flags = (a, b, c, self.rounding, self.flush, self.guard)
        places = (destinations, len(to), sources, len(of), self.line, self.file)
        record = (self.opcodes[opcode], self.types[kind], *flags, *places, immediate)
        self.records.append(record)

    def statement(self, text: str) -> None:
        """Decodes one instruction."""
        plain, self.guard = text, -1
        if guard := re.match(r"@(!?)(%?\w+)\s+", text):
            self.guard = self.register(guard[2]) * 2 + (guard[1] == "!")
            text = text[guard.end() :]
        name, *rest = text.split(None, 1)
        base, *modifiers = name.split(".")
        kinds = [TYPES[m] for m in modifiers if m in TYPES]
        s = _Statement(base, modifiers, _split("".join(rest)), kinds, ["U32", *kinds][-1])
        known = all(m in MODIFIERS or re.match(r"L[12]::|m\d+n\d+k\d+$", m) for m in modifiers)
        self.rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), 0)
        self.flush = int("ftz" in modifiers)
        known &= not self.flush or s.kind in ("F32", "F32X2")
        known &= len(kinds) < 2 or base in WITH_TWO_TYPES
        handler: Callable[[_Statement], None] | None = getattr(self, f"_{base}", None)
        if base in SIMPLE:
            handler = self.simple
        elif base in WITHOUT_EFFECT and "async" not in modifiers:
            handler = self.without_effect
        if handler is None or not known:
            raise UnsupportedInstruction(plain)
        try:
            handler(s)
        except (AssertionError, IndexError, KeyError, StopIteration, ValueError) as error:
            raise UnsupportedInstruction(plain) from error

    def without_effect(self, s: _Statement) -> None:
        """Fences and hints: programs run one after the other on memory without caches."""
        self.emit("NO_EFFECT")

    def simple(self, s: _Statement) -> None:
        """One result, and operands of one type but for distances of shifts."""
        if s.base in ("mul", "mad") and s.kind[0] in "US":
            return self._mad(s)
        assert s.base not in SINGLE_PRECISION or s.kind == "F32"
        assert "relu" not in s.modifiers
        if len(s.kinds) > 1:
            return self.mixed(s)
        typed = 1 if s.base in SHIFTS else len(s.operands)
        of = [self.operand(o, s.kind if i < typed else "U32") for i, o in enumerate(s.operands[1:])]
        if s.base == "selp":
            of[2] = self.operand(s.operands[3], "PRED")
        return self.emit(s.base.upper(), s.kind, [self.operand(s.operands[0], s.kind)], of)

    def mixed(self, s: _Statement) -> None:
        """Decodes fp32 arithmetic with the first one or two operands in 16 bits."""
        single, half = s.kinds
        assert single == "F32" and half in ("F16", "BF16")
        to, *of = [self.operand(o, half) for o in s.operands]
        for i in range(len(of) - 1):
            wide = self.register(f"fp32 operand {i}")
            rounding, self.rounding = self.rounding, 0
            self.emit("CVT", "F32", [wide], [of[i]], a=self.types[half])
            of[i], self.rounding = wide, rounding
        self.emit(s.base.upper(), "F32", [to], of)

    def _mad(self, s: _Statement) -> None:
        mode = next((m for m in s.modifiers if m in ("lo", "hi", "wide")), "")
        if not mode:
            assert s.kind[0] == "F"
            opcode = "FMA"
        else:
            opcode = f"{s.base.upper()}{'' if mode == 'lo' else mode.upper()}"
        kinds = [s.kind, s.kind, WIDE[s.kind] if mode == "wide" else s.kind]
        of = [self.operand(o, kind) for o, kind in zip(s.operands[1:], kinds, strict=False)]
        self.emit(opcode, s.kind, [self.operand(s.operands[0], s.kind)], of)

    def _mov(self, s: _Statement) -> None:
        to, of = s.operands
        if of in SPECIAL_REGISTERS:
            number = SPECIAL_REGISTERS[of]
            return self.emit("SREG", s.kind, [self.operand(to, s.kind)], immediate=number)
        opcode = "PACK" if of[0] == "{" else "UNPACK" if to[0] == "{" else "MOV"
        return self.emit(opcode, s.kind, self.group(to, s.kind), self.group(of, s.kind))

    def _shf(self, s: _Statement) -> None:
        to, *of = [self.operand(o, "U32") for o in s.operands]
        opcode = "SHF_L" if s.modifiers[0] == "l" else "SHF_R"
        self.emit(opcode, s.kind, [to], of, a=int("clamp" in s.modifiers))

    def _setp(self, s: _Statement) -> None:
        to, *of = s.operands
        combine = next((m for m in s.modifiers if m in ("and", "or", "xor")), "")
        number = ("", "and", "or", "xor").index(combine)
        kinds = (s.kind, s.kind, "PRED")
        sources = [self.operand(o, kind) for o, kind in zip(of, kinds, strict=False)]
        assert len(sources) == 2 + bool(number)
        destinations = [self.operand(o, "PRED") for o in to.split("|")]
        self.emit("SETP", s.kind, destinations, sources, a=COMPARISONS[s.modifiers[0]], b=number)

    def _cvt(self, s: _Statement) -> None:
        to, of = s.kinds[-2:]
        integral = [INTEGRAL_ROUNDINGS[m] for m in s.modifiers if m in INTEGRAL_ROUNDINGS]
        self.rounding = integral[0] if integral else self.rounding
        destination = [self.operand(s.operands[0], to)]
        sources = [self.operand(o, of) for o in s.operands[1:]]
        # bf16 is rounded to nearest or to zero.
        assert self.rounding < 2 or integral or not to.startswith("BF16")
        if to in ("F16X2", "BF16X2") and of == "F32":
            return self.emit("CVT_PACK", to, destination, sources, c=int("relu" in s.modifiers))
        if (to, of) == ("F16X2", "E4M3X2"):
            return self.emit("CVT_E4M3", to, destination, sources)
        assert not {to, of} & {"F16X2", "BF16X2", "E4M3X2", "F32X2"} and "relu" not in s.modifiers
        assert to != "TF32" or "rna" in s.modifiers
        assert to != "S8" or (of[0] in "US" and s.operands[0].startswith("%rs"))
        return self.emit("CVT", to, destination, sources, a=self.types[of], c=len(integral))

    def _ld(self, s: _Statement) -> None:
        base, offset = self.address(s.operands[1])
        space = "PARAM" if "param" in s.modifiers else "SHARED" if s.is_shared else "GLOBAL"
        assert space != "GLOBAL" or "global" in s.modifiers
        to = self.group(s.operands[0], s.kind)
        self.emit(f"LD_{space}", s.kind, to, [base], immediate=offset)

    def _st(self, s: _Statement) -> None:
        base, offset = self.address(s.operands[0])
        assert s.is_shared or "global" in s.modifiers
        opcode = "ST_SHARED" if s.is_shared else "ST_GLOBAL"
        of = [base, *self.group(s.operands[1], s.kind)]
        self.emit(opcode, s.kind, (), of, immediate=offset)

    def _shfl(self, s: _Statement) -> None:
        mode = ("up", "down", "bfly", "idx").index(s.modifiers[1])
        to, *of = s.operands
        destinations = [self.operand(o, "U32") for o in to.split("|")]
        self.emit("SHFL", s.kind, destinations, [self.operand(o, "U32") for o in of], a=mode)

    def _redux(self, s: _Statement) -> None:
        to, *of = [self.operand(o, s.kind) for o in s.operands]
        self.emit("REDUX", s.kind, [to], of, a=REDUCTIONS.index(s.modifiers[1]))

    def _bar(self, s: _Statement) -> None:
        if "cluster" in s.modifiers:  # of one program
            return self.emit("NO_EFFECT")
        if "warp" in s.modifiers:
            return self.emit("BAR_WARP_SYNC")
        assert s.modifiers[0] == "sync"
        return self.emit("BAR_SYNC", of=[self.operand(o, "U32") for o in s.operands])

    _barrier = _bar

    def _cp(self, s: _Statement) -> None:
        assert s.modifiers[0] == "async"
        if s.modifiers[1] == "commit_group":
            return self.emit("CP_ASYNC_COMMIT")
        if s.modifiers[1] in ("wait_group", "wait_all"):
            groups = int(s.operands[0], 0) if s.operands else -1
            return self.emit("CP_ASYNC_WAIT", a=groups)
        assert s.modifiers[1] in ("ca", "cg")
        (to, offset), (of, of_offset) = map(self.address, s.operands[:2])
        has_hint = "L2::cache_hint" in s.modifiers
        more = [self.operand(o, "U32") for o in s.operands[3 : len(s.operands) - has_hint]]
        size = int(s.operands[2], 0)
        return self.emit("CP_ASYNC", of=[to, of, *more], a=size, c=of_offset, immediate=offset)

    def _ldmatrix(self, s: _Statement) -> None:
        base, offset = self.address(s.operands[1])
        assert "m8n8" in s.modifiers
        to, transposed = self.group(s.operands[0], "U32"), int("trans" in s.modifiers)
        self.emit("LDMATRIX", "U32", to, [base], a=transposed, immediate=offset)

    def _stmatrix(self, s: _Statement) -> None:
        base, offset = self.address(s.operands[0])
        assert "m8n8" in s.modifiers
        of, transposed = self.group(s.operands[1], "U32"), int("trans" in s.modifiers)
        self.emit("STMATRIX", "U32", (), [base, *of], a=transposed, immediate=offset)

    def _mma(self, s: _Statement) -> None:
        shape = next(re.fullmatch(r"m16n8k(\d+)", m) for m in s.modifiers if m.startswith("m16"))
        assert shape is not None
        to, a, b, c = (self.group(o, "U32") for o in s.operands)
        sums, kind = s.kinds[0], s.kinds[1]
        assert sums in ("F32", "F16") and kind in ("F16", "BF16", "TF32", "E4M3X2")
        counts = {"a": int(shape[1]), "b": len(a), "c": len(b)}
        self.emit("MMA", kind, to, [*a, *b, *c], **counts, immediate=int(sums == "F16"))

    def _wgmma(self, s: _Statement) -> None:
        match s.modifiers[0]:
            case "fence":
                return self.emit("WGMMA_FENCE")
            case "commit_group":
                return self.emit("WGMMA_COMMIT")
            case "wait_group":
                return self.emit("WGMMA_WAIT", a=int(s.operands[0], 0))
        shape = next(re.fullmatch(r"m64n(\d+)k(\d+)", m) for m in s.modifiers if m[:3] == "m64")
        assert shape is not None and s.kinds[0] == "F32" and s.kinds[1] in ("F16", "BF16", "TF32")
        to, a, b, accumulate, *more = s.operands
        negated, transposed = more[:2], [int(o) for o in more[2:]]
        assert negated == ["1", "1"]
        in_registers = a.startswith("{")
        transposed = [0, *transposed, 0, 0] if in_registers else [*transposed, 0, 0]
        flags = int(in_registers) | transposed[0] << 1 | transposed[1] << 2
        of = [*self.group(a, "U64"), self.operand(b, "U64"), self.operand(accumulate, "PRED")]
        self.emit(
            "WGMMA", s.kinds[1], self.group(to, "U32"), of, int(shape[1]), flags, int(shape[2])
        )

    def _fence(self, s: _Statement) -> None:
        assert s.modifiers[:2] == ["proxy", "async"]
        self.emit("PROXY_FENCE")

    def _griddepcontrol(self, s: _Statement) -> None:
        self.emit("GRID_WAIT" if s.modifiers == ["wait"] else "GRID_TRIGGER")

    def _createpolicy(self, s: _Statement) -> None:
        self.emit("CREATE_POLICY", "U64", [self.operand(s.operands[0], "U64")])

    def _bra(self, s: _Statement) -> None:
        self.jumps.append((len(self.records), s.operands[0]))
        self.emit("BRA")

    def _ret(self, s: _Statement) -> None:
        self.emit("RET")

    _exit = _ret

    def _trap(self, s: _Statement) -> None:
        self.emit("TRAP")
