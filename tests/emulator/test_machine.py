"""The emulator itself: what instructions compute, on small kernels in PTX."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.emulator.build import unavailable_reason
from tests.emulator.decode import Program, UnsupportedInstruction
from tests.emulator.driver import emulate
from tests.emulator.ptx import kernel, lanes, run, wgmma_kernel

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())

I16, I32, I64 = torch.int16, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
EDGES = [0, 1, -1, 2, 7, -7, 31, 32, 33, 2**31 - 1, -(2**31), 0x5A5A5A5A, -12345, 255, 256, 65535]


def integers(seed: int) -> torch.Tensor:
    """32 numbers of 32 bits, edges among them."""
    values = np.random.default_rng(seed).permutation([*EDGES, *EDGES])
    return torch.tensor(values, dtype=I32)


def _signed(value: int, bits: int = 32) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _field(a: int, b: int, signed: bool) -> int:
    position, length = b & 255, b >> 8 & 255
    bits = f"{a & (2**32 - 1):032b}"[::-1]
    sign = bits[min(position + length - 1, 31)] if signed and length else "0"
    found = [bits[position + i] if i < length and position + i < 32 else sign for i in range(32)]
    return int("".join(found[::-1]), 2)


SIGNED: dict[str, Callable[[int, int], int]] = {
    "add.s32 $d, $0, $1;": operator.add,
    "sub.s32 $d, $0, $1;": operator.sub,
    "mul.lo.s32 $d, $0, $1;": operator.mul,
    "mul.hi.s32 $d, $0, $1;": lambda a, b: a * b >> 32,
    "mad.lo.s32 $d, $0, $1, $0;": lambda a, b: a * b + a,
    "min.s32 $d, $0, $1;": min,
    "max.s32 $d, $0, $1;": max,
    "neg.s32 $d, $0;": lambda a, b: -a,
    "abs.s32 $d, $0;": lambda a, b: abs(a),
    "xor.b32 $d, $0, $1;": operator.xor,
    "shr.s32 $d, $0, $1;": lambda a, b: a >> min(b & (2**32 - 1), 31),
    "bfe.s32 $d, $0, 3, 7;": lambda a, b: _field(a, 0x703, True),
    "setp.lt.s32 %q, $0, $1; selp.b32 $d, 5, 9, %q;": lambda a, b: 5 if a < b else 9,
    "setp.ge.and.s32 %q, $0, $1, 1; @!%q mov.b32 $d, 3; @%q mov.b32 $d, 4;": lambda a, b: (
        4 if a >= b else 3
    ),
    "cvt.s16.s32 %h, $0; cvt.s32.s16 $d, %h;": lambda a, b: _signed(a, 16),
    "mul.wide.s16 $d, 300, -300;": lambda a, b: -90000,
    "shf.l.wrap.b32 $d, $0, $1, 5;": lambda a, b: (b << 5) | (a & 0xFFFFFFFF) >> 27,
    "{ .reg .b16 low, high; mov.b32 {low, high}, $0; mov.b32 $d, {high, low}; }": lambda a, b: (
        (a & 0xFFFF) << 16 | a >> 16 & 0xFFFF
    ),
}
UNSIGNED: dict[str, Callable[[int, int], int]] = {
    "mul.hi.u32 $d, $0, $1;": lambda a, b: a * b >> 32,
    "min.u32 $d, $0, $1;": min,
    "shl.b32 $d, $0, $1;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 $d, $0, $1;": lambda a, b: a >> b if b < 32 else 0,
    "bfe.u32 $d, $0, 30, 5;": lambda a, b: a >> 30,
    "popc.b32 $d, $0;": lambda a, b: a.bit_count(),
    "clz.b32 $d, $0;": lambda a, b: 32 - a.bit_length(),
    "not.b32 $d, $0;": lambda a, b: ~a,
    "setp.hi.u32 %q, $0, $1; selp.b32 $d, 5, 9, %q;": lambda a, b: 5 if a > b else 9,
}


@pytest.mark.parametrize("text", [*SIGNED, *UNSIGNED])
def test_integers(text: str) -> None:
    a, b = integers(1), integers(2)
    mask = -1 if text in SIGNED else 2**32 - 1
    truth = (SIGNED | UNSIGNED)[text]
    expected = [
        _signed(truth(x & mask, y & mask)) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert lanes(text, a, b, out=I32).tolist() == expected


def test_division_and_wide_products() -> None:
    a, b = integers(3), integers(4)
    b[b == 0] = 3
    b[b == -1] = 5  # INT_MIN / -1 has no result
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    quotients = lanes("div.s32 $d, $0, $1;", a, b, out=I32)
    assert quotients.tolist() == [_quotient(x, y) for x, y in pairs]
    rest = lanes("rem.s32 $d, $0, $1;", a, b, out=I32)
    assert rest.tolist() == [x - y * _quotient(x, y) for x, y in pairs]
    wide = lanes("mul.wide.s32 $d, $0, $1;", a, b, out=I64)
    assert wide.tolist() == [x * y for x, y in pairs]
    unsigned = lanes("mad.wide.u32 $d, $0, $1, 9;", a, b, out=I64)
    low = 2**32 - 1
    assert unsigned.tolist() == [_signed((x & low) * (y & low) + 9, 64) for x, y in pairs]


def rounded(exact: Fraction, mode: str) -> float:
    """An exact number as fp32 rounds it, by trying the neighbors of the nearest one."""
    near = np.float32(float(exact))
    found = [near, *(np.nextafter(near, np.float32(end)) for end in (np.inf, -np.inf))]
    exactly = [(Fraction(float(value)), float(value)) for value in found]
    below = max(pair for pair in exactly if pair[0] <= exact)
    above = min(pair for pair in exactly if pair[0] >= exact)
    if mode == "rn":
        even = [pair for pair in (below, above) if np.float32(pair[1]).view(np.int32) % 2 == 0]
        distances = exact - below[0], above[0] - exact
        nearer = below if distances[0] < distances[1] else above
        return even[0][1] if distances[0] == distances[1] > 0 else nearer[1]
    toward = {"rm": below, "rp": above, "rz": below if exact > 0 else above}
    return toward[mode][1]


FLOATS: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("packed", [False, True], ids=["f32", "f32x2"])
def test_fp32_rounding(name: str, mode: str, packed: bool) -> None:
    """Against exact sums and products, on numbers with exponents that differ."""
    chance = torch.Generator().manual_seed(1)
    numbers = [
        torch.randn(64, generator=chance) * 2.0 ** torch.randint(-9, 9, (64,), generator=chance)
        for _ in range(3)
    ]
    count = 3 if name == "fma" else 2
    operands = ", ".join(f"${i}" for i in range(count))
    inputs = [x.view(I64) if packed else x[:32] for x in numbers[:count]]
    text = f"{name}.{mode}.{'f32x2' if packed else 'f32'} $d, {operands};"
    found = lanes(text, *inputs, out=I64 if packed else F32).view(F32)
    for i, value in enumerate(found.tolist()):
        exact = FLOATS[name](*(Fraction(x[i].item()) for x in numbers))
        assert value == rounded(exact, mode)


def test_denormals_are_flushed_where_ftz_says_so() -> None:
    x = torch.tensor([1e-39, -1e-39, 1e-38, 3e-38] * 16)
    half = torch.full((64,), 0.5)
    plain = lanes("mul.f32 $d, $0, $1;", x[:32], half[:32], out=F32)
    assert torch.equal(plain, x[:32] * 0.5)
    flushed = lanes("mul.ftz.f32 $d, $0, $1;", x[:32], half[:32], out=F32)
    assert torch.equal(flushed, torch.tensor([0.0, -0.0, 0.0, 1.5e-38] * 8))
    assert flushed[1].signbit()
    pairs = lanes("mul.ftz.f32x2 $d, $0, $1;", x.view(I64), half.view(I64), out=I64)
    assert torch.equal(pairs.view(F32), torch.tensor([0.0, -0.0, 0.0, 1.5e-38] * 16))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_packed_halves(dtype: torch.dtype) -> None:
    a, b, c = (
        torch.randn(64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)
    )
    a[3], b[5] = float("nan"), float("inf")
    kind = {F16: "f16x2", BF16: "bf16x2"}[dtype]
    x, y, z = (t.view(I32) for t in (a, b, c))

    def check(text: str, truth: torch.Tensor) -> None:
        found = lanes(text, x, y, z, out=I32).view(dtype)
        torch.testing.assert_close(found, truth.to(dtype), rtol=0, atol=0, equal_nan=True)

    check(f"add.{kind} $d, $0, $1;", a.float() + b.float())
    check(f"mul.{kind} $d, $0, $1;", a.float() * b.float())
    check(f"fma.rn.{kind} $d, $0, $1, $2;", a.double() * b.double() + c.double())
    check(f"abs.{kind} $d, $0;", a.abs())
    select = f"setp.ne.{kind} %q|%s, $0, $1; selp.b32 %u, 0xFFFF, 0, %q; "
    select += "selp.b32 %v, 0xFFFF0000, 0, %s; or.b32 $d, %u, %v;"
    different = (a != b) & ~(a.isnan() | b.isnan())  # the comparison is an ordered one
    assert torch.equal(lanes(select, x, y, z, out=I32).view(I16) != 0, different)


def test_conversions() -> None:
    values = [0.5, 1.5, -1.5, 2.5, -0.7, 3e9, -3e9, float("nan"), 65504.0, 65519.0, 1e-7, 1 / 3]
    x = torch.tensor([*values, *torch.randn(20).tolist()])
    numbers = np.nan_to_num(x.double().numpy())
    for mode, rounding in (
        ("rni", np.rint),
        ("rzi", np.trunc),
        ("rmi", np.floor),
        ("rpi", np.ceil),
    ):
        found = lanes(f"cvt.{mode}.s32.f32 $d, $0;", x, out=I32)
        clamped = np.clip(rounding(numbers), -(2**31), 2**31 - 1)
        assert found.tolist() == clamped.astype(np.int64).tolist()
    pair = lanes("cvt.rn.bf16x2.f32 $d, $0, 0f3F800000;", x, out=I32).view(BF16).view(32, 2)
    assert torch.equal(pair[:, 1].isnan(), x.isnan())
    assert torch.equal(pair[:, 1].nan_to_num(), x.bfloat16().nan_to_num())
    assert torch.equal(pair[:, 0], torch.ones(32, dtype=BF16))
    half = lanes("cvt.rn.f16.f32 $d, $0;", x, out=F16)
    assert torch.equal(half.nan_to_num(), x.half().nan_to_num())
    cut = lanes("cvt.rz.f16.f32 $d, $0;", x, out=F16)[:1]
    third = lanes("cvt.rz.f16.f32 $d, $0;", torch.full((32,), 1 / 3 + 1e-4), out=F16)
    assert cut.item() == 0.5
    assert Fraction(third[0].item()) <= Fraction(1 / 3 + 1e-4)
    tf32 = lanes("cvt.rna.tf32.f32 $d, $0;", torch.full((32,), 1 + 2**-11), out=F32)
    assert tf32[0].item() == 1 + 2**-10
    signed = lanes("cvt.rn.f32.s32 $d, $0;", integers(5), out=F32)
    assert torch.equal(signed, integers(5).float())


def test_functions() -> None:
    x = torch.linspace(0.1, 4, 32)
    for name, truth in (
        ("ex2", torch.exp2),
        ("lg2", torch.log2),
        ("rcp", torch.reciprocal),
        ("sqrt", torch.sqrt),
        ("rsqrt", torch.rsqrt),
        ("tanh", torch.tanh),
    ):
        torch.testing.assert_close(lanes(f"{name}.approx.f32 $d, $0;", x, out=F32), truth(x))
    torch.testing.assert_close(lanes("div.full.f32 $d, $0, 0f40400000;", x, out=F32), x / 3)


def test_fp32_arithmetic_with_operands_of_16_bits() -> None:
    a, b = torch.randn(32).bfloat16(), torch.randn(32).bfloat16()
    c = torch.randn(32)
    for text, truth in (
        ("add.rn.f32.bf16 $d, $0, $2;", a.float() + c),
        ("sub.rn.f32.bf16 $d, $0, $2;", a.float() - c),
        ("fma.rn.f32.bf16 $d, $0, $1, $2;", (a.double() * b.double() + c.double()).float()),
    ):
        assert torch.equal(lanes(text, a, b, c, out=F32), truth)


def test_prmt() -> None:
    a, b = integers(6), integers(7)
    selectors = torch.randint(
        0, 2**16, (32,), generator=torch.Generator().manual_seed(2), dtype=I32
    )
    found = lanes("prmt.b32 $d, $0, $1, $2;", a, b, selectors, out=I32)
    for i in range(32):
        both = [*a[i : i + 1].view(torch.uint8).tolist(), *b[i : i + 1].view(torch.uint8).tolist()]
        for byte, value in enumerate(found[i : i + 1].view(torch.uint8).tolist()):
            selector = int(selectors[i]) >> 4 * byte & 15
            picked = both[selector & 7]
            assert value == (picked if selector < 8 else 255 * (picked >> 7))


def test_lanes_exchange_values() -> None:
    a = integers(8)
    at = torch.arange(32)

    def shuffled(mode: str, b: int, c: int) -> torch.Tensor:
        return lanes(f"shfl.sync.{mode}.b32 $d, $0, {b}, {c}, -1;", a, out=I32)

    assert torch.equal(shuffled("bfly", 4, 31), a[at ^ 4])
    assert torch.equal(shuffled("idx", 9, 31), a[torch.full_like(at, 9)])
    assert torch.equal(shuffled("up", 3, 0), torch.where(at < 3, a, a[at - 3]))
    assert torch.equal(shuffled("down", 3, 31), torch.where(at > 28, a, a[(at + 3) % 32]))
    # Segments of 8 lanes.
    assert torch.equal(shuffled("idx", 2, 31 | 24 << 8), a[at // 8 * 8 + 2])
    inside = "shfl.sync.down.b32 %x|%q, $0, 3, 31, -1; selp.b32 $d, 1, 0, %q;"
    assert torch.equal(lanes(inside, a, out=I32), (at < 29).int())
    total = lanes("redux.sync.add.s32 $d, $0, -1;", a, out=I32)
    assert set(total.tolist()) == {_signed(sum(a.tolist()))}
    largest = lanes("redux.sync.max.s32 $d, $0, -1;", a, out=I32)
    assert set(largest.tolist()) == {max(a.tolist())}


def test_lanes_diverge_and_meet_again() -> None:
    body = """and.b32 %b, $0, 1; setp.eq.s32 %q, %b, 0; mov.b32 $d, 0; @%q bra EVEN;
    add.s32 $d, $0, 100; bra END;
    EVEN: setp.gt.s32 %s, $0, 3; add.s32 $d, $d, $0; sub.s32 $0, $0, 2; @%s bra EVEN;
    END: shfl.sync.bfly.b32 $d, $d, 0, 31, -1;"""
    expected = [x + 100 if x % 2 else sum(range(2, x + 1, 2)) for x in range(32)]
    assert lanes(body, torch.arange(32, dtype=I32), out=I32).tolist() == expected


# Fragments of PTX ISA, "Matrix Fragments for mma.m16n8k": row and column of element i of a lane.
def _place_a(lane: int, i: int, per: int) -> tuple[int, int]:
    register, e = divmod(i, per)
    return lane // 4 + (8 if register % 2 else 0), lane % 4 * per + e + (register // 2) * 4 * per


def _place_b(lane: int, i: int, per: int) -> tuple[int, int]:
    register, e = divmod(i, per)
    return lane % 4 * per + e + register * 4 * per, lane // 4


@pytest.mark.parametrize("dtype, k", [(F16, 16), (BF16, 16), (BF16, 8), (F32, 8), (F32, 4)])
def test_mma(dtype: torch.dtype, k: int) -> None:
    """Each fragment against a matrix product in fp64."""
    chance = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(*s, generator=chance) for s in ((16, k), (k, 8), (16, 8)))
    if dtype == F32:  # tf32 drops 13 bits
        a, b = ((x.view(I32) & ~0x1FFF).view(F32) for x in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    per = 4 // dtype.itemsize
    counts = 16 * k // 32, k * 8 // 32
    fragments = [torch.zeros(32, n, dtype=dtype) for n in counts]
    sums = torch.zeros(32, 4)
    for lane in range(32):
        for i in range(counts[0]):
            fragments[0][lane, i] = a[_place_a(lane, i, per)]
        for i in range(counts[1]):
            fragments[1][lane, i] = b[_place_b(lane, i, per)]
        for i in range(4):
            sums[lane, i] = c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
    body, names = "", []
    for number, fragment in enumerate((*fragments, sums)):
        n = fragment.shape[1] * fragment.itemsize // 4
        body += (
            f"mul.lo.u32 %t, %tid, {4 * n}; cvt.u64.u32 %o, %t; add.s64 %a{number}, %p{number}, %o;"
        )
        names.append([f"%f{number}_{i}" for i in range(n)])
        for i, name in enumerate(names[-1]):
            body += f"ld.global.b32 {name}, [%a{number}+{4 * i}];"
    kind = {F16: "f16", BF16: "bf16", F32: "tf32"}[dtype]
    d, (x, y, z) = [f"%d{i}" for i in range(4)], ("{" + ", ".join(n) + "}" for n in names)
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 "
    body += f"{{{', '.join(d)}}}, {x}, {y}, {z};"
    body += "".join(f"st.global.b32 [%a2+{4 * i}], {name};" for i, name in enumerate(d))
    assert run(body, *fragments, sums).reports == []
    truth = a.double() @ b.double() + c.double()
    for lane, i in itertools.product(range(32), range(4)):
        expected = truth[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
        assert sums[lane, i] == expected.float()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed: bool) -> None:
    """Four matrices are loaded and stored again; each register holds two neighbors of a row."""
    source = torch.arange(256, dtype=I16)
    registers, stored = torch.zeros(4, 32, 2, dtype=I16), torch.zeros(256, dtype=I16)
    trans = ".trans" if transposed else ""
    body = f"""mul.wide.u32 %o, %tid, 16; add.s64 %a, %p0, %o;
    ld.global.v4.b32 {{%x, %y, %z, %w}}, [%a];
    mul.lo.u32 %t, %tid, 16; add.u32 %s, %t, global_smem; st.shared.v4.b32 [%s], {{%x, %y, %z, %w}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%b0, %b1, %b2, %b3}}, [%s];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%s+512], {{%b0, %b1, %b2, %b3}};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%x, %y, %z, %w}}, [%s+512];
    add.s64 %c, %p2, %o; st.global.v4.b32 [%c], {{%x, %y, %z, %w}}; add.s64 %a, %p1, %tid4;"""
    body += "".join(f"st.global.b32 [%a+{128 * i}], %b{i};" for i in range(4))
    assert run(body, source, registers, stored, shared=1024).reports == []
    matrices = source.view(4, 8, 8)
    expected = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(registers.view(4, 8, 8), expected)
    assert torch.equal(stored, source)


@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("major", ["K", "MN"])
@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_wgmma(width: int, major: str, in_registers: bool) -> None:
    body, tensors, truth = wgmma_kernel(width, major, in_registers)
    size = tensors[0].numel() * 2
    assert run(body, *tensors, warps=4, shared=size).reports == []
    torch.testing.assert_close(tensors[1], truth, rtol=1e-6, atol=1e-5)


def test_cp_async_copies_and_fills_with_zeros() -> None:
    source, found = torch.arange(128, dtype=I32), torch.zeros(128, dtype=I32)
    body = """mul.wide.u32 %o, %tid, 16; add.s64 %g, %p0, %o; mul.lo.u32 %t, %tid, 16;
    add.u32 %s, %t, global_smem; and.b32 %n, %tid, 1; shl.b32 %n, %n, 4;
    cp.async.cg.shared.global [%s+0], [%g+0], 0x10, %n;
    cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;
    ld.shared.v4.b32 {%x, %y, %z, %w}, [%s]; add.s64 %g, %p1, %o;
    st.global.v4.b32 [%g], {%x, %y, %z, %w};"""
    assert run(body, source, found, shared=512).reports == []
    odd = (torch.arange(128) // 4 % 2).int()
    assert torch.equal(found, source * odd)


def test_what_is_unknown_raises() -> None:
    for text in (
        "tcgen05.wait::ld.sync.aligned;",
        "add.sat.f32 %a, %b, %c;",
        "max.NaN.f32 %a, %b, %c;",
        "cvt.rp.bf16.f32 %a, %b;",
        "ld.local.b32 %a, [%b];",
        "bar.arrive 1, 64;",
        "red.global.add.f32 [%a], %b;",
        "fma.rn.relu.f16x2 %a, %b, %c, %d;",
    ):
        with pytest.raises(UnsupportedInstruction, match=re.escape(text.split()[0].rstrip(";"))):
            kernel(text)
    with pytest.raises(ValueError, match="sm_100"), emulate("sm_100"):
        pass


def test_reachable_instructions() -> None:
    """What only a trap follows is not counted; a branch that was not taken is not reached."""
    program: Program = kernel(
        "setp.ge.s32 %q, %tid, 64;\n@%q bra FAIL;\nmov.b32 %a, 1;\n@%q bra END;\n"
        "mov.b32 %b, 2;\nbra END;\nFAIL:\nmov.b32 %c, 3;\ntrap;\nmov.b32 %e, 4;\nEND:"
    )
    lines = program.text.split("\n")
    counted = [lines[program.text_lines[i]] for i in program.reachable()]
    assert not {"mov.b32 %c, 3;", "trap;", "mov.b32 %e, 4;"} & set(counted)
    assert len(counted) == len(program.code) - 3
    from tests.emulator.execute import execute

    execute(program, (1, 1, 1), [])
    reached, reachable = program.coverage()
    assert reachable - reached == 2  # the two guarded branches
