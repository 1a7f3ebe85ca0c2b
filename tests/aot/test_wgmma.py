"""The checkers of wgmma find what Triton and ptxas have got wrong, and nothing else.

The witnesses are code of Triton 3.6.0, which the Triton of the tests no longer makes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.aot.wgmma import narrow_tiles, overwrites, register_a_count

WITNESSES = Path(__file__).with_name("witnesses")
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WGMMA = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0"


def code(*lines: str) -> str:
    """Instructions at addresses from 0x0000 on, in steps of 0x10."""
    return "".join(f"        /*{16 * at:04x}*/    {line} ;\n" for at, line in enumerate(lines))


@pytest.mark.parametrize("path", sorted(WITNESSES.glob("*.sass")), ids=lambda path: path.stem)
def test_witnesses(path: Path) -> None:
    sass = path.read_text()
    assert register_a_count(sass) > 0
    assert bool(overwrites(sass)) == path.stem.startswith("flagged")


def test_a_write_in_front_of_the_wait() -> None:
    found = overwrites(code(WGMMA, "MOV R5, R9", WAIT, "EXIT"))
    assert found == ["/*0010*/ MOV R5, R9 writes to A of /*0000*/ " + WGMMA]


def test_a_write_behind_the_wait() -> None:
    assert not overwrites(code(WGMMA, WAIT, "MOV R5, R9", "EXIT"))


def test_a_write_in_the_loops_next_step() -> None:
    loop = ("MOV R5, R9", WGMMA, "@P0 BRA 0x0", WAIT, "EXIT")
    assert len(overwrites(code(*loop))) == 1
    assert not overwrites(code(*loop[:2], WAIT, *loop[2:]))


def test_a_wait_that_leaves_the_newest_group_in_flight() -> None:
    one_left = WAIT.replace("0x0", "0x1")
    other = WGMMA.replace("R4", "R8")
    assert overwrites(code(WGMMA, one_left, "MOV R5, R9", "EXIT"))
    assert not overwrites(code(WGMMA, other, one_left, "MOV R5, R9", "EXIT"))
    assert overwrites(code(WGMMA, other, one_left, "MOV R11, R9", "EXIT"))
    # Two of one group: the second completes it.
    both = WGMMA.replace(", gsb0", ""), other
    assert overwrites(code(*both, one_left, "MOV R5, R9", "EXIT"))


def test_two_that_take_turns() -> None:
    """Each may be written to while the other is in flight, also around the loop."""
    other, one_left = WGMMA.replace("R4", "R8"), WAIT.replace("0x0", "0x1")
    ends = ("@P0 BRA 0x0", WAIT, "EXIT")
    first, second = "MOV R4, R20", "MOV R8, R20"
    assert not overwrites(code(WGMMA, one_left, second, other, one_left, first, *ends))
    assert len(overwrites(code(WGMMA, one_left, first, other, one_left, second, *ends))) == 2


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("LDS.128 R0, [R20]", False),
        ("LDS.128 R4, [R20]", True),
        ("LDSM.16.M88.4 R4, [R20]", True),
        ("LDSM.16.M88.2 R2, [R20]", False),
        ("LDG.E.64 R3, desc[UR4][R20.64]", True),
        ("@!P2 IMAD.WIDE R3, R20, 0x2, R22", True),
        ("IMAD R3, R20, 0x2, R22", False),
        ("STS.128 [R4], R4", False),
        ("STG.E.128 desc[UR4][R4.64], R4", False),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", False),
        ("LOP3.LUT P0, R7, R4, 0x1, RZ, 0xc0, !PT", True),
        ("SHFL.BFLY PT, R6, R20, 0x1, 0x1f", True),
        ("R2UR UR4, R4", False),
        ("BAR.SYNC.DEFER_BLOCK 0x0", False),
        ("HGMMA.64x16x16.F32.BF16 R0, gdesc[UR4], R0, gsb0", True),
        ("HGMMA.64x8x16.F32.BF16 R0, gdesc[UR4], R0, gsb0", False),
    ],
)
def test_what_an_instruction_writes(line: str, writes: bool) -> None:
    assert bool(overwrites(code(WGMMA, line, WAIT, "EXIT"))) == writes


def test_control_flow() -> None:
    """Through a call and back, to where threads meet again, and never past what ends a path."""
    write = "MOV R4, R9"
    assert overwrites(code(WGMMA, "BRA 0x40", WAIT, "EXIT", write, "BRA 0x20"))
    assert not overwrites(code(WGMMA, "BRA 0x30", write, WAIT, "EXIT"))
    assert not overwrites(code(WGMMA, "EXIT", write))
    called = (WGMMA, "CALL.REL.NOINC 0x40", WAIT, "EXIT")
    assert overwrites(code(*called, write, "RET.REL.NODEC R20 0x0"))
    assert not overwrites(code(*called, "NOP", "RET.REL.NODEC R20 0x0", write))
    meets = (WGMMA, "BSSY B0, 0x40", "BSYNC B0", WAIT)
    assert overwrites(code(*meets, write, "EXIT"))
    with pytest.raises(ValueError, match="BRX"):
        overwrites(code(WGMMA, "BRX R20 0x10", "EXIT"))


@pytest.mark.parametrize(
    ("warps", "columns", "swizzle", "transposed", "narrow"),
    [
        ("4, 2", 8, 32, "false", 1),  # 16 columns of 2 bytes for two warp groups
        ("4, 1", 16, 32, "false", 0),
        ("4, 2", 32, 128, "false", 1),
        ("4, 2", 64, 128, "false", 0),
        ("4, 2", 32, 128, "true", 0),  # K is contiguous
    ],
)
def test_narrow_tiles(warps: str, columns: int, swizzle: int, transposed: str, narrow: int) -> None:
    """As Triton 3.6 and 3.9 write `lora_grad_b`; A is shared memory or registers."""
    mma = f"versionMajor = 3, versionMinor = 0, warpsPerCTA = [{warps}]"
    shared = f"swizzlingByteWidth = {swizzle}, transposed = {transposed}, elementBitWidth = 16"
    rest = "!ttg.memdesc<64x64xbf16, #shared, #smem, mutable> -> tensor<64x64xf32, #mma> loc(#loc)"
    ir = f"""
#mma = #ttg.nvidia_mma<{{{mma}, instrShape = [16, {columns}, 16]}}>
#shared = #ttg.nvmma_shared<{{{shared}}}>
%1 = ttng.warp_group_dot %x, %b, %c {{isAsync = true}} : !ttg.memdesc<64x64xbf16, #shared> * {rest}
%2 = ttng.warp_group_dot %y, %b, %c : tensor<64x64xbf16, #ttg.dot_op<{{parent = #mma}}>> * {rest}
%3:2 = ttng.warp_group_dot_wait %2, %b {{pendings = 1 : i32}} : tensor<64x64xf32, #mma>
"""
    assert narrow_tiles(ir) == 2 * narrow
