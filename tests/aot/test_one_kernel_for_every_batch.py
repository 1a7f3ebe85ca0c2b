"""In the batch-invariant mode one compiled kernel serves every batch, on every chip.

Launches are recorded from the operators, and compared by what Triton's launcher compiles a kernel
for: constants, options, and what it concludes from the values of sizes, strides and addresses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora import env
from fastlora.kernels import chips, configs
from fastlora.kernels.chips import Chip
from fastlora.kernels.config_tables import MAX_SPLITS
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from tests.support.aot.launches import CHIPS, Launch, recording
from tests.support.aot.shipped import all_invariant_shipped, all_shipped
from tests.support.aot.specialization import specialize

pytestmark = pytest.mark.skipif(env.triton_interpreted(), reason="the interpreter compiles nothing")

OPS = torch.ops.fastlora
CHIP_IDS = [chip.arch for chip in CHIPS]
DTYPES = (torch.bfloat16, torch.float32)
# N and K on the tiles and off them, large and small.
SIZES = ((4096, 512), (1000, 600), (14336, 64))
ROWS = (
    *range(1, 18),
    31,
    32,
    33,
    48,
    *range(63, 67),
    127,
    128,
    129,
    256,
    257,
    1000,
    2048,
    2049,
    8192,
)
FEW_ROWS = (1, 15, 64, 65, 2048, 8192)


@pytest.fixture(params=CHIPS, ids=CHIP_IDS)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chip:
    """The chip that launches are for."""
    monkeypatch.setattr(chips, "chip_of", lambda device: request.param)
    return request.param


def kernel_of(launch: Launch, arch: str) -> str:
    """Returns what tells the launch's compiled kernel from others."""
    # `specialize` takes every tensor to lie at a multiple of 16 bytes.
    apart = [
        parameter.name
        for parameter in launch.kernel.params
        if isinstance(value := launch.arguments[parameter.name], torch.Tensor)
        and not parameter.do_not_specialize_on_alignment
        and value.data_ptr() % 16
    ]
    return f"{launch.kernel.__name__}: {specialize(launch, arch)}, {apart}"


def inputs(m: int, k: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yields x ``[m, k]``: as it comes out of a layer, and in layouts that it can have."""
    room = torch.empty((m + 1) * (k + 1), dtype=dtype)
    yield room[: m * k].view(m, k)
    yield room[1 : m * k + 1].view(m, k)
    yield room[: m * (k + 1)].view(m, k + 1)[:, 1:]
    yield room[: m * k].view(k, m).t()


def single(plan: str, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    weight, lora_a, lora_b = (torch.empty(s, dtype=dtype) for s in ((n, k), (r, k), (n, r)))
    scaling = torch.empty(())
    for x in inputs(m, k, dtype):
        factors = [lora_a, lora_b, None]
        OPS.lora_linear(x, weight, None, [], None, factors, scaling, None, [0.0], "triton", plan)


def mixed(
    plan: str, m: int, n: int, k: int, max_rank: int, dtype: torch.dtype, modules: int
) -> None:
    """One module's linear, after a shrink of its own or of its siblings."""
    slots, invariant = 1 + max_rank, plan == "invariant"
    rows = rows_argument_for_address_tables(
        sort_rows(torch.zeros(m, dtype=torch.int64), m, slots), invariant
    )
    address = torch.empty(modules, slots, dtype=torch.int64)
    tables = [address, address, address.int(), address.float(), address]
    weight = torch.empty(n, k, dtype=dtype)
    for x in inputs(m, k, dtype):
        s, layer_range = [], [0, modules] if modules > 1 else None
        for index in sorted({0, modules - 1}):
            given = x, weight, None, rows, s[0] if s else None, tables, index, max_rank, dtype
            _, *made = OPS.lora_linear_at(*given, plan, layer_range)
            s = s or made


def kernels(chip: Chip, operation: Callable[..., None], *arguments: Any) -> set[str]:
    """Returns the kernels that an operation launches."""
    stems = ("mixed_lora_shrink", "mixed_lora_linear")
    if operation is single:  # which may split K where the mode does not
        stems = ("lora_shrink", "lora_linear", "plane_sums")
    with recording(*stems) as launches:
        operation(*arguments)
    return {kernel_of(launch, chip.arch) for launch in launches}


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_one_adapter(chip: Chip, n: int, k: int) -> None:
    """A shrink and a linear for any number of rows; more than these outside of the mode."""
    for dtype, r in itertools.product(DTYPES, (1, 16, 24, 200)):
        found: dict[str, set[str]] = {"invariant": set(), "fused": set()}
        rows = ROWS if r == 16 else FEW_ROWS
        for plan, m in (*(("invariant", m) for m in rows), *(("fused", m) for m in FEW_ROWS)):
            found[plan] |= kernels(chip, single, plan, m, n, k, r, dtype)
        assert len(found["invariant"]) == 2
        assert len(found["fused"]) > 2


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_mixed_batch(chip: Chip, n: int, k: int) -> None:
    """A linear and a shrink for any rows, ranks, slots, and modules up to three.

    In fp32, whose shrink has a BLOCK_R of 16, one module of a rank above 8 has its own shrink.
    """
    for dtype in DTYPES:
        found: dict[str, set[str]] = {"invariant": set(), "fused": set()}
        for max_rank, modules, plan in itertools.product((1, 16, 200), (1, 3), found):
            for m in ROWS if (plan, max_rank) == ("invariant", 16) else FEW_ROWS:
                found[plan] |= kernels(chip, mixed, plan, m, n, k, max_rank, dtype, modules)
        assert len(found["invariant"]) == (3 if dtype == torch.float32 else 2)
        assert len(found["fused"]) > 3


def test_configs_are_compiled_ahead_of_time(chip: Chip) -> None:
    """Those of the mode, or, for one adapter of another rank, all but their cache hint."""
    shipped = {entry.config for entry in all_invariant_shipped(chip)}
    usual = {entry.config for entry in all_shipped(chip)}
    for dtype, precision in (*((d, "ieee") for d in DTYPES), (torch.float32, "tf32")):
        options: Any = {"input_precision": precision, "batch_invariant": True}
        assert configs.choose(chip, "mixed_lora_shrink", dtype, r=16, **options) in shipped
        for n in (16, 576, 1000, 4096, 14336, 151936):
            mixed_config = configs.choose(chip, "mixed_lora_linear", dtype, n=n, **options)
            assert mixed_config in shipped
            assert mixed_config.block_m == configs.INVARIANT_ROWS
            for r in (1, 16, 17, 64, 100, 512):
                one = configs.choose(chip, "lora_linear", dtype, n=n, k=576, r=r, **options)
                assert one.block_m == configs.INVARIANT_ROWS
                assert replace(one, batch_invariant=False) in usual
                shrink = configs.choose(chip, "lora_shrink", dtype, k=576, r=r, **options)
                assert replace(shrink, splits=MAX_SPLITS) in usual
