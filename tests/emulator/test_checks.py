"""Each check of the emulator: a kernel that it reports, and the same kernel without the fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.emulator import execute as execution
from tests.emulator.build import unavailable_reason
from tests.emulator.decode import Program
from tests.emulator.driver import COPY_FENCE, Emulation, emulate
from tests.emulator.ptx import kernel, run, wgmma_kernel

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())

# Addresses of a thread's words in the two arguments and in shared memory.
ADDRESSES = """add.s64 %a, %p0, %tid4; add.s64 %b, %p1, %tid4;
mul.lo.u32 %t, %tid, 4; add.u32 %s, %t, global_smem; xor.b32 %o, %s, 4; xor.b32 %far, %s, 128;
"""
COPY = "and.b32 %t, %tid, 31; mul.lo.u32 %t, %t, 16; add.u32 %s, %t, global_smem; "
COPY += "cp.async.cg.shared.global [%s], [%p0], 16; cp.async.commit_group; "


class Fault(NamedTuple):
    """A kernel with a fault, the kernel without it, and how the report begins."""

    faulty: str
    repaired: str
    report: str
    warps: int = 1
    programs: int = 1
    shared: int = 256


FAULTS = {
    "read out of bounds": Fault(
        "ld.global.b32 %x, [%a+4];", "ld.global.b32 %x, [%a];", "OOB global read"
    ),
    "write out of bounds": Fault(
        "st.global.b32 [%a+4], 1;", "st.global.b32 [%a], 1;", "OOB global write"
    ),
    "misaligned read": Fault(
        "ld.global.v2.b32 {%x, %y}, [%p0+4];",
        "ld.global.v2.b32 {%x, %y}, [%p0+8];",
        "MISALIGNED global",
    ),
    "two programs write one word": Fault(
        "mov.u32 %c, %ctaid.x; st.global.b32 [%a], %c;",
        "mov.u32 %c, %ctaid.x; setp.eq.s32 %q, %c, 0; @%q st.global.b32 [%a], %c;",
        "RACE global write/write of two programs",
        programs=2,
    ),
    "one program reads what another one writes": Fault(
        "mov.u32 %c, %ctaid.x; setp.eq.s32 %q, %c, 0; @%q st.global.b32 [%a], %c; "
        "@!%q ld.global.b32 %x, [%a];",
        "ld.global.b32 %x, [%a];",
        "RACE global write/read of two programs",
        programs=2,
    ),
    "shared memory out of bounds": Fault(
        "st.shared.b32 [%s+132], 1;", "st.shared.b32 [%s+128], 1;", "OOB shared"
    ),
    "misaligned shared write": Fault(
        "st.shared.b64 [%s], 1;",
        "shl.b32 %t, %tid, 3; add.u32 %t, %t, global_smem; st.shared.b64 [%t], 1;",
        "MISALIGNED shared",
        shared=512,
    ),
    "uninitialized shared read": Fault(
        "ld.shared.b32 %x, [%s];", "st.shared.b32 [%s], 1; ld.shared.b32 %x, [%s];", "UNINIT shared"
    ),
    "read of another warp's write": Fault(
        "st.shared.b32 [%s], %tid; ld.shared.b32 %x, [%far];",
        "st.shared.b32 [%s], %tid; bar.sync 0; ld.shared.b32 %x, [%far];",
        "RACE shared read after write",
        warps=2,
    ),
    "write of what another warp reads": Fault(
        "st.shared.b32 [%s], %tid; bar.sync 0; ld.shared.b32 %x, [%s]; st.shared.b32 [%far], 9;",
        "st.shared.b32 [%s], %tid; bar.sync 0; ld.shared.b32 %x, [%s]; bar.sync 0; "
        "st.shared.b32 [%far], 9;",
        "RACE shared write after read",
        warps=2,
    ),
    "write of the value that another warp read": Fault(
        "st.shared.b32 [%s], 7; bar.sync 0; ld.shared.b32 %x, [%s]; st.shared.b32 [%far], 7;",
        "st.shared.b32 [%s], 7; bar.sync 0; ld.shared.b32 %x, [%s]; bar.sync 0; "
        "st.shared.b32 [%far], 7;",
        "RACE shared write after read",
        warps=2,
    ),
    "two warps write one word": Fault(
        "and.b32 %t, %s, 1148; st.shared.b32 [%t], %tid;",
        "and.b32 %t, %s, 1148; st.shared.b32 [%t], 7;",
        "RACE shared write after write",
        warps=2,
    ),
    "read of another lane's write": Fault(
        "st.shared.b32 [%s], %tid; ld.shared.b32 %x, [%o];",
        "st.shared.b32 [%s], %tid; bar.warp.sync -1; ld.shared.b32 %x, [%o];",
        "WARP shared read after write",
    ),
    "write of what another lane reads": Fault(
        "st.shared.b32 [%s], %tid; bar.warp.sync -1; ld.shared.b32 %x, [%o]; "
        "st.shared.b32 [%s], 9;",
        "st.shared.b32 [%s], %tid; bar.warp.sync -1; ld.shared.b32 %x, [%o]; bar.warp.sync -1; "
        "st.shared.b32 [%s], 9;",
        "WARP shared write after read",
    ),
    "read of a pending cp.async": Fault(
        f"{COPY} cp.async.wait_group 1; ld.shared.b32 %x, [%s];",
        f"{COPY} cp.async.wait_group 0; ld.shared.b32 %x, [%s];",
        "RACE shared read of a pending cp.async",
        shared=512,
    ),
    "write onto a pending cp.async": Fault(
        f"{COPY} st.shared.b32 [%s], 12345; cp.async.wait_group 0;",
        f"{COPY} cp.async.wait_group 0; st.shared.b32 [%s], 12345;",
        "RACE shared write onto a pending cp.async",
        shared=512,
    ),
    "a cp.async that nothing waits for": Fault(
        f"{COPY}", f"{COPY} cp.async.wait_group 0;", "PENDING cp.async at the end", shared=512
    ),
    "cp.async onto a pending cp.async": Fault(
        f"{COPY} {COPY} cp.async.wait_group 0;",
        f"{COPY} cp.async.wait_group 0; bar.sync 0; {COPY} cp.async.wait_group 0;",
        "RACE shared write onto a pending cp.async",
        shared=512,
    ),
    "not all threads reach a barrier": Fault(
        "setp.lt.s32 %q, %tid, 40; @%q bar.sync 0;", "bar.sync 0;", "DIVERGENT bar.sync", warps=2
    ),
    "a warp ends while another one waits": Fault(
        "setp.lt.s32 %q, %tid, 32; @%q bra END; bar.sync 0; END:",
        "setp.lt.s32 %q, %tid, 0; @%q bra END; bar.sync 0; END:",
        "BARRIER some warps have exited",
        warps=2,
    ),
    "warps wait at different barriers": Fault(
        "setp.lt.s32 %q, %tid, 32; @%q bra ONE; bar.sync 0; bra END; ONE: bar.sync 0; END:",
        "setp.lt.s32 %q, %tid, 0; @%q bra ONE; bar.sync 0; bra END; ONE: bar.sync 0; END:",
        "BARRIER warps wait at different ones",
        warps=2,
    ),
    "a shuffle of some lanes": Fault(
        "setp.lt.s32 %q, %tid, 3; @%q shfl.sync.bfly.b32 %x, %tid, 1, 31, -1;",
        "shfl.sync.bfly.b32 %x, %tid, 1, 31, -1;",
        "DIVERGENT shfl.sync",
    ),
    "a trap": Fault(
        "setp.lt.s32 %q, %tid, 3; @%q trap;", "setp.lt.s32 %q, %tid, 0; @%q trap;", "TRAP"
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_check(fault: Fault) -> None:
    tensors = torch.arange(32 * fault.warps).int(), torch.zeros(32 * fault.warps).int()

    def reports(body: str) -> list[str]:
        text = ADDRESSES + body
        warps, shared, programs = fault.warps, fault.shared, fault.programs
        return run(text, *tensors, warps=warps, shared=shared, programs=programs).reports

    assert any(report.startswith(fault.report) for report in reports(fault.faulty))
    assert reports(fault.repaired) == []


WGMMA_FAULTS = {
    "shared write in flight": (
        "BEFORE:",
        "st.shared.b32 [%s+8192], 5;",  # in B, behind A
        "RACE shared write while a wgmma in flight reads",
    ),
    "result read in flight": (
        "BEFORE:",
        "add.f32 %y, %d3, %d3;",
        "REGISTER of a wgmma's result is read",
    ),
    "result written in flight": (
        "BEFORE:",
        "mov.b32 %d3, 0;",
        "REGISTER of a wgmma's result is written",
    ),
    "input written in flight": (
        "BEFORE:",
        "mov.b32 %a0_0, 0;",
        "REGISTER of a wgmma's A is written",
    ),
}


@pytest.mark.parametrize("name", WGMMA_FAULTS)
def test_wgmma_in_flight(name: str) -> None:
    """Each access is reported in front of the wait, and not behind it."""
    place, text, report = WGMMA_FAULTS[name]
    body, tensors, _ = wgmma_kernel(128, "K", in_registers=True)
    size = 2 * tensors[0].numel()
    faulty = run(body.replace(place, text), *tensors, warps=4, shared=size)
    assert any(found.startswith(report) for found in faulty.reports)
    behind = text if "shared" not in text else f"bar.sync 0; {text}"
    repaired = run(body.replace("AFTER:", behind), *tensors, warps=4, shared=size)
    assert repaired.reports == []


def test_wgmma_needs_a_proxy_fence() -> None:
    body, tensors, _ = wgmma_kernel(64, "K", in_registers=False)
    size = 2 * tensors[0].numel()
    fence = "FENCE: fence.proxy.async.shared::cta; bar.sync 0;"
    behind = "bar.sync 0; fence.proxy.async.shared::cta;"
    assert run(body.replace(fence, behind), *tensors, warps=4, shared=size).reports == []
    without = run(body.replace(fence, "bar.sync 0;"), *tensors, warps=4, shared=size)
    assert without.reports
    assert all(found.startswith("PROXY wgmma reads what generic") for found in without.reports)


def test_wgmma_must_end_before_its_warp() -> None:
    body, tensors, _ = wgmma_kernel(128, "K", in_registers=True)
    body = re.sub("BEFORE: wgmma.wait_group.*", "", body)
    outcome = run(body, *tensors, warps=4, shared=2 * tensors[0].numel())
    assert any(report.startswith("PENDING wgmma at the end") for report in outcome.reports)


def test_wgmma_needs_its_fence() -> None:
    """At first, and behind each access to its registers but a move."""
    body, tensors, _ = wgmma_kernel(128, "K", in_registers=True)
    size = 2 * tensors[0].numel()
    fence, report = "wgmma.fence.sync.aligned;", "REGISTER of a wgmma, no wgmma.fence"
    for place, text in ((fence, ""), (fence, fence + "add.f32 %d3, %d3, 0f3F800000;")):
        faulty = run(body.replace(place, text), *tensors, warps=4, shared=size)
        assert any(found.startswith(report) for found in faulty.reports)
    moved = run(body.replace(fence, fence + "mov.b32 %d3, 0;"), *tensors, warps=4, shared=size)
    assert not any(found.startswith(report) for found in moved.reports)


def test_the_exempt_report_alone_is_dropped() -> None:
    """Triton 3.6 leaves out one fence: its report is dropped, and that of other writes is not."""
    body, tensors, _ = wgmma_kernel(64, "K", in_registers=False)
    stores = body.replace("FENCE: fence.proxy.async.shared::cta;", "")
    pair = r"ld.global.v4.b32 {[^}]*}, \[%g\+(\d+)\];st.shared.v4.b32 [^;]*;"
    copies = re.sub(pair, r"cp.async.cg.shared.global [%s+\1], [%g+\1], 16;", stores)
    copies = copies.replace("bar.sync 0;", "cp.async.wait_all; bar.sync 0;")
    for text, report in ((stores, "PROXY wgmma reads what generic"), (copies, COPY_FENCE)):
        program = kernel(text, pointers=3, warps=4, shared=2 * tensors[0].numel())
        strict, lenient = Emulation("sm_90", 4), Emulation("sm_90", 4, exempt=COPY_FENCE)
        for emulation in (strict, lenient):
            emulation.launch(program, (1, 1, 1), *tensors, dependent=False)
        assert strict.reports
        assert all(found.startswith(report) for found in strict.reports)
        assert lenient.reports == ([] if report == COPY_FENCE else strict.reports)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_memory_that_nothing_points_to_is_out_of_bounds() -> None:
    """Another tensor may be read where an argument has its address, directly or in a table."""
    body = "ld.global.b64 %q, [%p0]; ld.global.b32 %x, [%q]; st.global.b32 [%p1], %x;"
    other, out = torch.tensor([5, 6, 7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    table = torch.tensor([other.data_ptr()])
    traced = torch._to_functional_tensor(torch.zeros(3))  # a tracer's, which has no memory
    assert run(body, table, out).reports == []
    assert int(out) == 5 and traced.numel() == 3
    lost = f"mov.b64 %q, {other.data_ptr()}; ld.global.b32 %x, [%q];"
    assert run(lost, out).reports[0].startswith("OOB global read")


def test_the_end_of_the_address_space_is_out_of_bounds() -> None:
    x = torch.zeros(1, dtype=torch.int32)
    for body in (
        "mov.b64 %q, -4; ld.global.b32 %x, [%q];",
        "mov.b64 %q, -4; st.global.b32 [%q], 1;",
    ):
        assert run(f"ld.global.b32 %x, [%p0]; {body}", x).reports[0].startswith("OOB global")


def test_a_word_that_holds_a_byte_of_a_tensor_may_be_read() -> None:
    x = torch.arange(6, dtype=torch.uint8)
    assert run("ld.global.b32 %x, [%p0+4];", x).reports == []
    assert run("ld.global.b16 %x, [%p0+6];", x).reports[0].startswith("OOB global read")
    assert run("st.global.b32 [%p0+4], 0;", x).reports[0].startswith("OOB global write")


def test_such_words_leave_a_launch_its_search_for_storages() -> None:
    """A launch looks for storages a few times without success; then it looks no more."""
    x, other = torch.arange(6, dtype=torch.uint8), torch.tensor([5], dtype=torch.int32)
    table = torch.tensor([other.data_ptr()])
    words = "ld.global.b32 %x, [%p0+4]; " * 4
    assert run(f"{words} ld.global.b64 %q, [%p1]; ld.global.b32 %x, [%q];", x, table).reports == []


def test_an_endless_kernel_is_given_up() -> None:
    assert run("LOOP: bra LOOP;", limit=1000).fatal[0].startswith("LIMIT")


def test_orders() -> None:
    """The last program's value remains of a race; without one all orders agree."""
    race = "mov.u32 %c, %ctaid.x; st.global.b32 [%a], %c;"
    last = {}
    for order in execution.ORDERS:
        x = torch.zeros(32).int()
        run(ADDRESSES.replace("%p1", "%p0") + race, x, programs=8, order=order)
        last[order] = int(x[0])
    assert last[execution.FORWARD] == 7
    assert last[execution.BACKWARD] == 0


PRIMARY = "griddepcontrol.launch_dependents; ld.global.b32 %x, [%b]; st.global.b32 [%a], %x;"
WAIT = "griddepcontrol.wait; "
READ, WRITE = "ld.global.b32 %x, [%a]; ", "st.global.b32 [%b], 3; "
DEPENDENTS = {
    "waits": (f"{WAIT}{READ}{WRITE}", None),
    "reads before its wait": (f"{READ}{WAIT}{WRITE}", "PDL read"),
    "never waits": (READ, "PDL read"),
    "writes what the primary reads": (f"{WRITE}{WAIT}{READ}", "PDL write"),
    "writes what the primary writes": (f"st.global.b32 [%a], 3; {WAIT}{READ}", "PDL write"),
}


@pytest.mark.parametrize("name", DEPENDENTS)
def test_dependent_launch(name: str) -> None:
    """A dependent sees the memory from before the primary until it waits."""
    body, report = DEPENDENTS[name]
    s, x, out = torch.full((64,), -1).int(), torch.arange(64).int(), torch.zeros(64).int()
    execution.clear_last_launch()
    assert run(ADDRESSES + PRIMARY, s, x, warps=2).reports == []
    assert torch.equal(s, x)
    body = ADDRESSES + body + "add.s64 %c, %p2, %tid4; st.global.b32 [%c], %x;"
    outcome = run(body, s, x, out, warps=2, dependent=True)
    assert torch.equal(out, torch.full_like(out, -1) if report == "PDL read" else s)
    assert torch.equal(s, torch.arange(64).int())
    if report is None:
        assert outcome.reports == []
    else:
        assert outcome.reports[0].startswith(report)
        assert "primary kernel" in outcome.reports[0]
        assert "PTX line" in outcome.reports[0]
    # A launch without the attribute starts behind the others, and may do all of that.
    assert run(body, s, x, out, warps=2).reports == []


def test_launch_by_triton(tmp_path: Path) -> None:
    """Triton compiles, binds and launches; the values are right, and the launch is logged."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlora import functional
    from fastlora.testing import assert_within_budget

    torch.manual_seed(0)
    x, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(48, 64, dtype=torch.bfloat16)
    a, b = torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(48, 8, dtype=torch.bfloat16)
    log = tmp_path / "launches.jsonl"
    with emulate("sm_90", 4, log=str(log)) as emulation, torch.no_grad():
        found = functional.lora_linear(x, weight, a, b, 0.5)
        assert emulation.reports == []
        # The launches are kept now. Without its wait, the second kernel reads s too early.
        first, second = emulation.programs
        text = re.sub(r"griddepcontrol\.wait\s*;", "", second.text)
        assert text != second.text
        emulation.replacements = {second: Program(text, second.shared)}
        early = functional.lora_linear(x, weight, a, b, 0.5)
    assert not torch.equal(early, found)
    assert emulation.reports
    assert all(report.startswith("PDL read") for report in emulation.reports)
    assert f"primary {first.name}" in emulation.reports[0]
    plain = x @ weight.T + 0.5 * (x @ a.T) @ b.T
    truth = x.double() @ weight.double().T + 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert_within_budget(found, plain, truth)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kernel"] for line in lines] == [launch.kernel for launch in emulation.launches]
    assert lines[0]["chip"] == "sm_90"
    assert all(program.coverage()[0] > 0 for program in emulation.programs)


def test_a_report_names_the_instruction() -> None:
    outcome = run("ld.global.b32 %x,  [%p0+128];", torch.zeros(32))
    lines = kernel("ld.global.b32 %x,  [%p0+128];", pointers=1).text.split("\n")
    number = next(i for i, line in enumerate(lines) if line.startswith("ld.global")) + 1
    assert f"PTX line {number} (ld.global.b32 %x, [%p0+128];)" in outcome.reports[0]
