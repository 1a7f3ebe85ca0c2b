"""The checker of buffers finds writes to what a wgmma in flight reads, and nothing else.

The witnesses are IR of `lora_grad_b` as it was when Triton gave dy one buffer too few, for the
first config of sm_90. "clean" has no sums of dy's columns, and therefore enough buffers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.aot.buffers import refills

WITNESSES = Path(__file__).with_name("witnesses")
VERSIONS = ("3.6.0", "3.9.0")
BUFFERS = "!ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>"
ONE = "!ttg.memdesc<64x64xbf16, #shared, #smem, mutable>"
SUM = "tensor<64x64xf32, #mma>"
COPY = (
    "ttg.async_copy_global_to_local %p, {} : tensor<64x64x!tt.ptr<bf16>, #blocked> -> <64x64xbf16>"
)
DOT = f"ttng.warp_group_dot {{}}, {{}}, %zero {{{{isAsync = true}}}} : {ONE} * {ONE} -> {SUM}"
WAIT = f"%waited = ttng.warp_group_dot_wait %product {{{{pendings = {{}} : i32}}}} : {SUM}"


def ir(*lines: str) -> str:
    """A kernel with two buffers for A and one for B, `%first` and `%second` of A, and lines."""
    return "\n".join(
        [
            "#mma = #ttg.nvidia_mma<{versionMajor = 3}>",
            "module attributes {} {",
            "tt.func public @kernel(%p: !tt.ptr<bf16>, %n: i32, %is: i1) attributes {} {",
            "%c0 = arith.constant 0 : i32 loc(#loc1)",
            "%c1 = arith.constant 1 : i32",
            "%c2 = arith.constant 2 : i32",
            "%zero = arith.constant dense<0.000000e+00> : tensor<64x64xf32, #mma>",
            f"%a = ttg.local_alloc : () -> {BUFFERS}",
            f"%b = ttg.local_alloc : () -> {ONE}",
            f"%first = ttg.memdesc_index %a[%c0] : {BUFFERS} -> {ONE}",
            f"%second = ttg.memdesc_index %a[%c1] : {BUFFERS} -> {ONE}",
            *lines,
            "tt.return",
            "}",
            "}",
        ]
    )


def a_loop(buffers: int, pending: int | None = 0) -> str:
    """A loop that multiplies one buffer and then copies into the one after the next.

    Its wait stands in front of the product, so that a product is in flight around the loop.
    """
    waits = [] if pending is None else [WAIT.format(pending).replace("%product", "%carried")]
    return ir(
        f"%c3 = arith.constant {buffers} : i32",
        f"%end:3 = scf.for %i = %c0 to %n step %c1 iter_args(%carried = %zero, %at = %c0, "
        f"%to = %c1) -> ({SUM}, i32, i32) : i32 {{",
        *waits,
        f"%read = ttg.memdesc_index %a[%at] : {BUFFERS} -> {ONE}",
        f"%turned = ttg.memdesc_trans %read {{order = array<i32: 1, 0>}} : {ONE} -> {ONE}",
        "%product = " + DOT.format("%turned", "%b"),
        *next_index("%at", "%after"),
        *next_index("%to", "%then"),
        f"%written = ttg.memdesc_index %a[%then] : {BUFFERS} -> {ONE}",
        "%copied = " + COPY.format("%written"),
        f"scf.yield %product, %after, %then : {SUM}, i32, i32",
        "}",
    )


def next_index(index: str, name: str) -> list[str]:
    """Lines that count to the number of buffers and begin again."""
    return [
        f"{name}_sum = arith.addi {index}, %c1 : i32",
        f"{name}_over = arith.cmpi sge, {name}_sum, %c3 : i32",
        f"{name} = arith.select {name}_over, %c0, {name}_sum : i32",
    ]


@pytest.mark.parametrize("path", sorted(WITNESSES.glob("*.ttgir")), ids=lambda path: path.stem)
def test_witnesses(path: Path) -> None:
    found = refills(path.read_text())
    assert bool(found) == path.stem.startswith("flagged")
    for line in found:
        assert line.startswith("ttg.async_copy_global_to_local %dy"), line
        assert "is read by ttng.warp_group_dot %acc" in line


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clean_witness_with_one_buffer_less(version: str) -> None:
    """As many buffers as indices: both of the loop's counters begin again one step earlier."""
    clean = (WITNESSES / f"clean_{version}_lora_grad_b.ttgir").read_text()
    fewer = clean.replace(", %c3_i32 : i32", ", %c2_i32 : i32")
    assert fewer.count(", %c2_i32 : i32") - clean.count(", %c2_i32 : i32") == 2
    # Of dy and of s, which share the counters.
    assert len(refills(fewer)) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clean_witness_without_its_wait(version: str) -> None:
    """The wait for the first product covers the second one of the step before."""
    clean = (WITNESSES / f"clean_{version}_lora_grad_b.ttgir").read_text()
    inside, behind = (clean.find("pendings = 0", at) for at in (0, clean.find("scf.yield")))
    assert 0 < inside < behind
    assert refills(clean.replace("pendings = 0", "pendings = 8", 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("without_ds", ["", "_without_ds"])
def test_a_flagged_witness_with_a_wait(version: str, without_ds: str) -> None:
    path = WITNESSES / f"flagged_{version}_lora_grad_b_bias{without_ds}.ttgir"
    lines = path.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if "ttng.warp_group_dot %acc" in line]
    product = lines[at].split(" = ")[0].strip()
    wait = f"%own = ttng.warp_group_dot_wait {product} {{pendings = 0 : i32}} : {SUM}"
    assert not refills("\n".join([*lines[: at + 1], wait, *lines[at + 1 :]]))


def test_a_copy_behind_a_product() -> None:
    product = "%product = " + DOT.format("%first", "%b")
    copies = {name: "%copied = " + COPY.format(name) for name in ("%first", "%second", "%b")}
    for name, expected in (("%first", 1), ("%second", 0), ("%b", 1)):
        assert len(refills(ir(product, copies[name]))) == expected
        assert not refills(ir(copies[name], product))
        assert not refills(ir(product, WAIT.format(0), copies[name]))
    assert not refills(ir(product.replace("true", "false"), copies["%first"]))
    stored = "ttg.local_store %x, %first : tensor<64x64xbf16, #blocked> -> " + ONE
    assert len(refills(ir(product, stored))) == 1


def test_a_wait_that_leaves_the_newest_in_flight() -> None:
    older, newer = (f"%{name} = " + DOT.format(f"%{name}", "%b") for name in ("first", "second"))
    older, newer = older.replace("%first =", "%x ="), newer.replace("%second =", "%product =")
    first, second = ("%copied = " + COPY.format(name) for name in ("%first", "%second"))
    assert not refills(ir(older, newer, WAIT.format(1), first))
    assert len(refills(ir(older, newer, WAIT.format(1), second))) == 1
    assert len(refills(ir(older, newer, WAIT.format(2), first))) == 1
    many = (older, *[newer] * 15)
    assert not refills(ir(*many, WAIT.format(15), first))
    assert len(refills(ir(*many, WAIT.format(16), first))) == 1


@pytest.mark.parametrize(("buffers", "found"), [(2, 1), (3, 0), (4, 0)])
def test_around_a_loop(buffers: int, found: int) -> None:
    """The copy meets the product of its own step; a wait covers those of earlier steps."""
    assert len(refills(a_loop(buffers))) == found


def test_around_a_loop_without_a_wait() -> None:
    """The copy meets products of earlier steps, with however many buffers."""
    for buffers in (2, 3, 4, 5):
        assert len(refills(a_loop(buffers, pending=None))) == 1
        assert len(refills(a_loop(buffers, pending=2))) == int(buffers < 5)


def test_behind_a_loop() -> None:
    """A loop may end behind any step, and have none."""
    body = a_loop(3).replace("tt.return", "%late = " + COPY.format("%first") + "\ntt.return")
    assert len(refills(body)) == 1


def test_branches() -> None:
    """A product that one branch leaves in flight; an index that the branches do not agree in."""
    branch = ("scf.if %is {", "%product = " + DOT.format("%first", "%b"), "}")
    first, second = ("%copied = " + COPY.format(name) for name in ("%first", "%second"))
    assert len(refills(ir(*branch, first))) == 1
    assert not refills(ir(*branch, second))
    waits = (*branch[:2], WAIT.format(0), "} else {", "}")
    assert not refills(ir(*waits, first))
    chosen = (
        "%i = scf.if %is -> (i32) {",
        "scf.yield %c0 : i32",
        "} else {",
        "scf.yield {} : i32",
        "}",
    )
    either = f"%either = ttg.memdesc_index %a[%i] : {BUFFERS} -> {ONE}"
    product, copied = "%product = " + DOT.format("%either", "%b"), second
    for index, expected in (("%c0", 0), ("%c1", 1)):
        lines = [line.replace("{} :", f"{index} :") for line in chosen]
        assert len(refills(ir(*lines, either, product, copied))) == expected


def test_what_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="cf.br"):
        refills(ir("cf.br ^bb1"))
    with pytest.raises(ValueError, match="scf.while"):
        refills(ir("scf.while : () -> () {", "}"))
    with pytest.raises(ValueError, match="cannot tell what is read"):
        refills(ir("%product = " + DOT.format("%unknown", "%b")))
    with pytest.raises(ValueError, match="no function"):
        refills("module {\n}")
