"""Every shipped config compiles for every chip, without a GPU, and keeps to the chip's means.

No register spills, shared memory within the limit, tensor cores in use, asynchronous copies where
the K loop is pipelined, and on Hopper no code that corrupts a product (`wgmma.py`). The compile
runs in a process of its own, where Triton is no interpreter. What an older Triton makes is in the
published table; it need not be installed here.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.chips import Chip  # noqa: E402
from tests.support.aot.compile_kernels import OLDER, OLDER_CHIPS, TABLE  # noqa: E402
from tests.support.aot.launches import (  # noqa: E402
    CHIPS,
    MIXED_K_LOOPS,
    QUANTIZED,
    SHARED_BY_GROUPS,
    cases,
)
from tests.support.aot.resources import Resources, key_of  # noqa: E402

ROOT = Path(__file__).parents[2]
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# The backward kernels that loop over a large dimension.
GRADIENTS = ("lora_grad_b", "lora_grad_a", "lora_grad_x")
OVER_CODES = ("coded_lora_linear", "coded_lora_grad_x", "coded_mixed_lora_linear")
# Row tiles of launches in 16 bits, and the variant that all of them are compiled in.
BUCKETS = {
    **dict.fromkeys(("lora_shrink", "lora_linear", "lora_expand"), ("heavy", {16, 32, 64, 128})),
    "mixed_lora_linear": ("heavy", {16, 32, 64, 128}),
    **dict.fromkeys(
        ("mixed_lora_shrink", "mixed_lora_expand", "mixed_dora_scale"), ("heavy", {16, 64, 128})
    ),
    "mixed_lora_grad_x": ("training", {64, 128}),
    "mixed_lora_grad_x_add": ("training", {64}),
    "mixed_lora_train_expand": ("training", {64}),
}
# Kernels that ptxas serializes on sm_90 (C7515), by variant and dtype. A of their products lies in
# registers: a tile under dropout, or one that was rounded to tf32. Triton makes several products of
# each, along K, and leaves them in flight around the loop. ptxas finds that other instructions
# define accumulators meanwhile, and waits for each product: at most 16 a step, beside hundreds of
# instructions that make the masks. Triton takes A from registers wherever it was computed there.
SERIALIZED = {
    *(("lora_grad_a", variant, "bf16") for variant in ("heavy", "ragged")),
    ("lora_grad_a", "heavy", "fp32"),
    ("lora_grad_x", "heavy", "bf16"),  # Triton 3.6, of one tile
    ("mixed_lora_grad_a", "training", "fp32"),
    ("mixed_lora_train_shrink", "light", "bf16"),  # Triton 3.6
    ("mixed_lora_train_shrink", "training", "fp32"),
}
Row = dict[str, str]


@pytest.fixture(scope="module")
def all_rows() -> list[Row]:
    """The table of `compile_kernels.py`: a row for each kernel, config, chip and Triton."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.aot.compile_kernels", "--known"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return list(csv.DictReader(done.stdout.splitlines()))


@pytest.fixture(scope="module")
def rows(all_rows: list[Row]) -> list[Row]:
    """The rows of the Triton that is installed; those of the older one are the published ones."""
    return of(all_rows, triton=triton.__version__)


def of(rows: list[Row], **values: str) -> list[Row]:
    """The rows with these values; fails where there is none, so that no test passes on nothing."""
    found = [row for row in rows if all(row[key] == value for key, value in values.items())]
    assert found, f"no kernel was compiled with {values}"
    return found


def is_fma(row: Row) -> bool:
    """Whether it is fp32 in full precision on NVIDIA, which no tensor core computes."""
    return row["dtype"] == "fp32" and row["precision"] == "ieee" and row["arch"].startswith("sm_")


def has_dot(row: Row) -> bool:
    without = ("lora_dropout", "plane_sums", "mixed_lora_grad_reduce", "mixed_dora_scale")
    without += ("mixed_rows_sort",)
    return row["kernel"] not in without


def has_loop(row: Row) -> bool:
    """Whether a K loop is there to be pipelined, over rows that a vector load can read."""
    looping = ("lora_shrink", "lora_linear", "mixed_lora_shrink", "mixed_lora_linear")
    looping += tuple(f"mixed_lora_grad_{name}" for name in "bax")
    looping += (
        "dropout_lora_shrink",
        "mixed_lora_train_shrink",
        "mixed_lora_train_linear",
        *OVER_CODES,
    )
    return row["variant"] != "uneven" and row["kernel"] in (*looping, *GRADIENTS)


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(all_rows: list[Row], arch: str) -> None:
    # At odd sizes every element is a load of its own: the compiler spills there, at no great loss.
    spilled = [
        row
        for row in of(all_rows, arch=arch)
        if int(row["spilled_bytes"]) and not is_fma(row) and row["variant"] != "uneven"
    ]
    assert not spilled, spilled


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_within_the_limit(all_rows: list[Row], arch: str) -> None:
    # Triton compiles a kernel that asks for more; only its launch would fail.
    limit = Chip(arch, 1).shared_limit
    over = [row for row in of(all_rows, arch=arch) if int(row["shared_bytes"]) > limit]
    assert not over, over


@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_cores_are_used(all_rows: list[Row], arch: str) -> None:
    for row in filter(has_dot, of(all_rows, arch=arch)):
        # Of the product's tile; d_lora_a is one of x's columns by rank rows.
        wide = int(row["block_k" if row["kernel"] == "lora_grad_a" else "block_m"]) >= 64
        if is_fma(row):
            expected = ""
        elif arch.startswith("gfx"):
            expected = "mfma"
        else:
            expected = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch, "mma") if wide else "mma"
        assert row["tensor_core"] == expected, row


@pytest.mark.parametrize("version", [triton.__version__, OLDER])
def test_nothing_writes_to_what_a_wgmma_in_flight_reads(all_rows: list[Row], version: str) -> None:
    """Of all kernels with A in registers: rank rows, dropout, and fp32 that is rounded to tf32."""
    found = [row for row in of(all_rows, arch="sm_90", triton=version) if row["register_a"] != "0"]
    assert {row["kernel"] for row in found} >= {
        *("dropout_lora_shrink", "lora_linear", "lora_expand"),
        *("lora_grad_a", "lora_grad_x", "lora_grad_x_add"),
        *("mixed_lora_train_shrink", "mixed_lora_train_linear", "mixed_lora_grad_a"),
    }
    assert {"heavy", "light", "plain", "training"} <= {row["variant"] for row in found}
    for row in found:
        assert row["overwrites"] == "0", row


@pytest.mark.parametrize("version", [triton.__version__, OLDER])
def test_no_wgmma_is_narrower_than_its_swizzle(all_rows: list[Row], version: str) -> None:
    """On 64 rows eight warps share a tile's columns: four, or twice the columns, are as good."""
    found = [row for row in of(all_rows, arch="sm_90", triton=version) if row["tensor_core"]]
    assert any(row["warps"] == "8" and row["block_m"] == "64" for row in found)
    for row in found:
        assert row["narrow_tiles"] == "0", row


@pytest.mark.parametrize("version", [triton.__version__, OLDER])
def test_no_buffer_is_refilled_under_a_product(all_rows: list[Row], version: str) -> None:
    """Of all kernels whose wgmmas read what asynchronous copies write (`buffers.py`)."""
    found = of(all_rows, arch="sm_90", triton=version, tensor_core="wgmma")
    copied = {(row["kernel"], row["variant"]) for row in found if row["async_copies"] != "0"}
    # With and without ds, and the sums of dy's columns in both.
    assert {("lora_grad_b", name) for name in ("heavy", "light", "without_ds")} <= copied
    for row in of(all_rows, triton=version):
        assert row["refills"] == "0", row


@pytest.mark.parametrize("version", [triton.__version__, OLDER])
def test_ptxas_serializes_few_products(all_rows: list[Row], version: str) -> None:
    """Only products with A in registers, which `SERIALIZED` lists with the reason."""
    found = [row for row in of(all_rows, triton=version) if row["serialized"] != "0"]
    for row in found:
        key = (row["kernel"], row["variant"], row["dtype"])
        assert key in SERIALIZED and row["register_a"] != "0", row


def test_the_serialized_products_are_in_the_table() -> None:
    """A kernel that no Triton of the table serializes any more leaves the list."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["serialized"] != "0"]
    assert {(row["kernel"], row["variant"], row["dtype"]) for row in rows} == SERIALIZED


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("sm_")])
def test_k_loops_copy_asynchronously(rows: list[Row], arch: str) -> None:
    for row in filter(has_loop, of(rows, arch=arch)):
        assert int(row["async_copies"]) > 0, row
        assert int(row["stages"]) >= (2 if is_fma(row) else 3), row


@pytest.mark.parametrize("arch", ARCHS)
def test_dependent_launch_where_the_chip_has_it(rows: list[Row], arch: str) -> None:
    expected = "1" if arch in ("sm_90", "sm_100", "sm_120") else "0"
    mixed = ("mixed_lora_shrink", "mixed_lora_linear", "mixed_lora_expand")
    single = ("lora_shrink", "dropout_lora_shrink", "lora_linear")
    for kernel in (*single, *mixed, *OVER_CODES):
        for row in of(rows, arch=arch, kernel=kernel):
            plain = kernel.endswith("mixed_lora_linear") and row["variant"] == "invariant"
            plain |= "grad" in kernel
            assert row["grid_dependency"] == ("0" if plain else expected), row
    for row in of(rows, arch=arch, kernel="plane_sums"):
        dependent = row["variant"] == "dependent"
        assert row["grid_dependency"] == (expected if dependent else "0"), row


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_dependents_wait_before_they_read(rows: list[Row], arch: str) -> None:
    """Every load of s, in Triton's IR and in the PTX, is behind the one unconditional wait."""
    mixed = ("mixed_lora_linear", "mixed_lora_expand")
    for kernel in ("lora_linear", "plane_sums", *mixed, *OVER_CODES):
        for row in of(rows, arch=arch, kernel=kernel):
            assert row["early_loads"] == "0", row


@pytest.mark.parametrize("arch", ARCHS)
def test_the_batch_invariant_mode_has_one_instruction(rows: list[Row], arch: str) -> None:
    """In each kernel, base loop and rank rows; the shrink's is the same with and without siblings.

    Of NVIDIA's in fp32 with full precision, FMAs, there is nothing to see.
    """
    shrinks = of(rows, arch=arch, kernel="mixed_lora_shrink", variant="unshared")
    for row in [*of(rows, arch=arch, variant="invariant"), *shrinks]:
        assert len(row["instructions"].split("+")) == 1, row
        assert bool(row["instructions"]) != is_fma(row), row
    for alone in shrinks:
        key = {name: alone[name] for name in ("arch", "kernel", "dtype", "precision")}
        (shared,) = of(rows, variant="invariant", **key)
        assert shared["instructions"] == alone["instructions"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_bucket_has_a_config(rows: list[Row], arch: str) -> None:
    for kernel, (variant, sizes) in BUCKETS.items():
        half = of(rows, arch=arch, kernel=kernel, dtype="bf16", variant=variant)
        assert {int(row["block_m"]) for row in half} == sizes, kernel
        if kernel in ("lora_shrink", "lora_linear", "lora_expand"):
            # Reading x takes most of a shrink's time, so one BLOCK_R serves all ranks up to 64.
            blocks_r = {"64"} if kernel == "lora_shrink" else {"16", "32"}
            for size in sizes:
                own = of(half, block_m=str(size))
                assert {row["block_r"] for row in own} >= blocks_r, kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_every_number_of_rows_has_a_config_for_its_gradients(rows: list[Row], arch: str) -> None:
    """Few rows take the 64-row tile, whose masked rows move nothing; many the wide one."""
    for kernel in (*GRADIENTS, "lora_grad_x_add"):
        half = of(rows, arch=arch, kernel=kernel, dtype="bf16", variant="heavy")
        blocks_m = {int(row["block_m"]) for row in half}
        assert blocks_m == ({64, 128} if "grad_x" in kernel else blocks_m & {32, 64}), blocks_m
        for block_m in blocks_m:
            blocks_r = {int(row["block_r"]) for row in half if int(row["block_m"]) == block_m}
            assert 16 in blocks_r and blocks_r & {32, 64}


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("sm_")])
def test_the_one_read_is_asynchronous_in_every_stage(rows: list[Row], arch: str) -> None:
    """dy and x, which meet a dot twice or transposed, come by copies of 16 bytes a thread."""
    for kernel, columns in (("lora_grad_b", "block_n"), ("lora_grad_a", "block_k")):
        for row in of(rows, arch=arch, kernel=kernel, dtype="bf16"):
            if row["variant"] != "uneven":
                tile = 2 * int(row["block_m"]) * int(row[columns])
                copies = tile // (16 * 32 * int(row["warps"])) * int(row["stages"])
                assert int(row["async_copies"]) - int(row["narrow_copies"]) >= copies, row


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_mixed_batches_have_configs(rows: list[Row], arch: str) -> None:
    """Narrow and wide ranks; where copies are asynchronous, 16 bytes a thread of dy and of x."""
    for kernel, columns in (("mixed_lora_grad_b", "block_n"), ("mixed_lora_grad_a", "block_k")):
        half = of(rows, arch=arch, kernel=kernel, dtype="bf16", variant="training")
        assert {row["block_r"] for row in half} == {"16", "64"}
        for row in half if arch.startswith("sm_") else ():
            tile = 2 * int(row["block_m"]) * int(row[columns])
            copies = tile // (16 * 32 * int(row["warps"]))
            assert int(row["async_copies"]) - int(row["narrow_copies"]) >= copies, row
    for kernel in SHARED_BY_GROUPS:
        own, shared = (
            {row["block_r"] for row in of(rows, arch=arch, kernel=kernel, dtype="bf16", variant=v)}
            for v in ("training", "siblings")
        )
        assert shared == own


@pytest.mark.parametrize("arch", ARCHS)
def test_mixed_batches_off_the_tiles_and_with_grouped_layers(rows: list[Row], arch: str) -> None:
    """All K loops in half precision where K is no multiple of theirs; narrow shrinks of decode."""
    for kernel in MIXED_K_LOOPS:
        heavy, ragged = (
            {(row["block_m"], row["block_n"], row["block_r"]) for row in found}
            for found in (
                of(rows, arch=arch, kernel=kernel, dtype="bf16", variant=variant)
                for variant in ("heavy", "ragged")
            )
        )
        assert ragged == heavy
    narrow = of(rows, arch=arch, kernel="mixed_lora_shrink", dtype="bf16", block_r="16")
    assert {row["block_m"] for row in narrow} == {"16"}
    assert {row["variant"] for row in narrow} >= {"heavy", "alone", "ragged"}


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.startswith("sm_")])
def test_tables_of_addresses_keep_their_alignment(rows: list[Row], arch: str) -> None:
    """Factors behind addresses move 16 bytes a thread, as s and y do, wherever a tile has them."""
    mixed = [
        row
        for row in of(rows, arch=arch)
        if row["kernel"].startswith("mixed_")
        and not row["kernel"].startswith(("mixed_lora_train", "mixed_lora_grad"))
        and row["variant"] != "uneven"
        and not is_fma(row)
    ]
    assert mixed
    for row in mixed:
        m, n, k, r = (int(row[f"block_{axis}"]) for axis in "mnkr")
        width = {"bf16": 2, "fp32": 4}[row["dtype"]]
        factor_width = width if row["variant"] in ("plain", "light") else 4
        # Bytes of one such access by all threads; a tile of fewer goes in a narrower one.
        whole = 16 * 32 * int(row["warps"])
        b, s, y = factor_width * r * n, 4 * m * r, width * m * n
        # s is one plane, or in the expand four, or in a loop over planes, unrolled twice, and in
        # what is left of it.
        light = row["variant"] == "light"
        planes, four = ((s,), (s,)) if light else ((s, s, s), (s, s, s, s))
        expected = {
            "mixed_lora_shrink": (),
            "mixed_lora_linear": (b, *planes),
            "mixed_lora_expand": (b, *four, y),
            "mixed_dora_scale": (y,),
            "mixed_rows_sort": (),
        }[row["kernel"]]
        assert int(row["vector_loads"]) >= sum(size // whole for size in expected), row
        narrow_r = max(16, r // 4) if row["kernel"] == "mixed_lora_shrink" else r
        if factor_width * narrow_r * k >= whole:
            assert row["narrow_copies"] == "0", row


@pytest.mark.parametrize("kernel", OVER_CODES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_of_codes_has_configs(rows: list[Row], arch: str, kernel: str) -> None:
    """Of few rows and of many; codes and x come 16 bytes a thread, copied in every stage.

    Stages in use: tcgen05 has one less on its way. Without wgmma and tcgen05 a dx loads codes of a
    byte into registers.
    """
    for variant in ("heavy",) if "mixed" in kernel else QUANTIZED:
        half = of(rows, arch=arch, kernel=kernel, dtype="bf16", variant=variant)
        blocks = {row["block_m"] for row in half}
        assert blocks >= ({"64"} if "grad" in kernel else {"16", "64"})
        for row in half if arch.startswith("sm_") else ():
            m, n, k, warps = (int(row[name]) for name in ("block_m", "block_n", "block_k", "warps"))
            whole = 16 * 32 * warps
            codes = n * k // (2 if variant in ("heavy", "table4") else 1)
            stages = int(row["stages"]) - (row["tensor_core"] == "tcgen05")
            wide = int(row["async_copies"]) - int(row["narrow_copies"])
            copied, loads = 2 * m * k // whole * stages, codes // whole * stages
            if "grad" in kernel and variant in ("int8", "e4m3") and row["tensor_core"] == "mma":
                assert wide >= copied and int(row["vector_loads"]) >= loads // stages, row
            else:
                assert wide >= copied + loads, row


@pytest.mark.parametrize("variant", ["plain", "ragged", "uneven"])
def test_other_operands_compile(rows: list[Row], variant: str) -> None:
    kernels = {row["kernel"] for row in of(rows, variant=variant)}
    single = {"lora_shrink", "lora_linear", "lora_expand"}
    mixed = {f"mixed_{stem}" for stem in single}
    dropout = {"dropout_lora_shrink"} if variant != "plain" else set()
    assert kernels == {*single, *mixed, *GRADIENTS, "lora_grad_x_add"} | dropout


def test_the_published_table_is_of_todays_kernels(all_rows: list[Row]) -> None:
    """It is what `compile_kernels.py --write --older` would give, but for digests.

    Its first rows are of one Triton; with another, columns and keys are compared. Those of an older
    one were made beside these: `--older` brings them up to date.
    """
    with TABLE.open(newline="") as file:
        table = csv.DictReader(file)
        assert table.fieldnames == [field.name for field in fields(Resources)]
        published = list(table)
    newest, archs = published[0]["triton"], {chip.arch for chip in OLDER_CHIPS}
    for version, chips in ((newest, CHIPS), (OLDER, OLDER_CHIPS)):
        keys = [{name: str(value) for name, value in key_of(case).items()} for case in cases(chips)]
        found = of(published, triton=version)
        assert [{name: row[name] for name in keys[0]} for row in found] == keys
    beside = [row for row in of(published, triton=newest) if row["arch"] in archs]
    assert [row["fingerprint"] for row in of(published, triton=OLDER)] == [
        row["fingerprint"] for row in beside
    ]
    if newest == triton.__version__:
        # Fingerprints only say what need not be compiled.
        for row, today in zip(published, all_rows, strict=True):
            assert row | {"fingerprint": ""} == today | {"fingerprint": ""}
