"""The tuner's launches are those of a layer, and a layer uses what the tuner has measured."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.bench import shapes, tune, tune_points  # noqa: E402
from fastlora.bench.contenders import Contender  # noqa: E402
from fastlora.bench.counted import (  # noqa: E402
    Case,
    run_last_of,
    skipped_products,
    uncompiled_launches,
)
from fastlora.bench.harness import Timing  # noqa: E402
from fastlora.bench.machine import ROOT  # noqa: E402
from fastlora.bench.shapes import DECODERS, LLAMA, RANKS, TUNE_DECODE, Point  # noqa: E402
from fastlora.bench.tune_points import Group, Request  # noqa: E402
from fastlora.kernels import chips, config_files  # noqa: E402
from fastlora.kernels.chips import Chip, ConfigRow  # noqa: E402

H100 = Chip("sm_90", 132)
LAYER = DECODERS[LLAMA]
KEY_VALUE = {"q_proj": LAYER["k_proj"], "k_proj": LAYER["v_proj"]}  # as one group
SIDES = ("block_m", "block_n", "block_k")


class StubTuner(tune.Tuner):
    """A tuner with times that depend on the launch and the candidate only."""

    def _measure(
        self,
        point: Point,
        contenders: Sequence[Contender],
        outcome: dict[str, Any],
        counts: dict[str, int],
    ) -> None:
        for contender in contenders:
            us = float(1 + zlib.crc32(f"{point} {contender.name}".encode()) % 100_000)
            outcome[contender.name] = Timing(us, us, us)


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """The tuner's groups, in order."""
    return tune_points.groups(shapes.tune_points(), H100)


@pytest.fixture(scope="module")
def swept(groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> StubTuner:
    """A finished sweep."""
    out = tmp_path_factory.mktemp("tuned") / "tune.csv"
    common = {"device": "cpu", "dtype": "bfloat16", "impl": "triton", "tests": "pass"}
    args = argparse.Namespace(**common, out=out, near=0, resume=False, checkout=ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "chip_of", lambda _: H100)
        tuner = StubTuner(args, groups)
        patch.setattr(tuner, "write_table", lambda: None)
        for point in tuner.groups:
            tuner.measure(point)
    tuner.write_table()
    tuner.file.close()
    return tuner


def fastest(tuner: StubTuner) -> dict[Request, ConfigRow]:
    """The row with the shortest time for each request, from the CSV."""
    times: dict[str, tuple[float, str]] = {}
    for row in tuner.file.rows:
        if row["contender"] not in ("base", "plain", "copy", "matmul"):
            key = " ".join(row[c] for c in ("mode", "layer", "M", "r", "adapters"))
            times[key] = min(times.get(key, (1e9, "")), (float(row["median_us"]), row["contender"]))
    found = {}
    for point, group in tuner.groups.items():
        words = point.mode, point.layer, point.m, point.ranks or point.r, point.adapters or ""
        found[group.request] = tuner.ones[point][times[" ".join(map(str, words))][1]].row
    return found


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize(
    ("linears", "case"),
    [
        *((LAYER, Case("decode", m, n)) for m in TUNE_DECODE for n in (0, 4, 64) if n <= m),
        *((LAYER, Case("prefill", 2048, n)) for n in (0, 4, 64)),
        *((LAYER, Case("training", m, n)) for m in (2048, 8192) for n in (0, 4)),
        (LAYER, Case("training", 2048, 0, 0.1)),
        *((KEY_VALUE, Case("decode", m, n)) for m in (1, 64) for n in (0, 4) if n <= m),
        *((KEY_VALUE, Case("training", 2048, n)) for n in (0, 4)),
    ],
)
def test_every_launch_of_a_layer_has_the_fastest_measured_tile(
    swept: StubTuner, linears: Any, case: Case, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch sorts the rows of a batch, because no kernel runs.
    monkeypatch.setattr("fastlora.kernels.mixed_rows_sort.can_sort", lambda *_: False)
    rows, expected = config_files.read(swept.table)[0], fastest(swept)
    with (
        tune_points.rows_first(rows, H100.arch),
        uncompiled_launches(*H100) as launches,
        skipped_products(),
        tune_points.recorded_requests(launches) as (asked, plans),
    ):
        run_last_of(3, linears, case, r, launches.clear, asked.clear, plans.clear)
        seen = list(tune_points.launches_of_requests(asked, launches))
    assert seen
    for request, launch in seen:
        if case.dropout and request.launch == "lora_grad_x_add":
            continue  # The sweep runs without dropout, where no layer computes its dx alone.
        row, given = expected[request], launch.arguments
        tile = tuple(given.get(side.upper(), 0) for side in SIDES)
        assert tile == tuple(getattr(row, side) for side in SIDES), request
        assert (launch.num_warps, launch.num_stages) == (row.num_warps, row.num_stages), request
    for request, plan in plans:
        if case.rows <= shapes.DECODE_MAX_ROWS:
            assert plan == expected[request].plan


def test_the_largest_decode_comes_first_and_the_slowest_before_others(groups: list[Group]) -> None:
    keys = [(group.problem.m != 64, group.stage, -group.us) for group in groups]
    assert keys == sorted(keys)
    assert len({group.point for group in groups}) == len(groups)
    assert len({group.request for group in groups}) == len(groups)
    # The three largest products of the layer, in one launch each.
    first = {group.request.n * group.request.k for group in groups[:7]}
    assert first == {28672 * 4096, 4096 * 14336}
