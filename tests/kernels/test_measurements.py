"""Measured tables: what a file may hold, and that candidates of the tuner reach their launches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastlora.kernels import config_files, configs, measurements
from fastlora.kernels.chips import Chip, ConfigRow, chip_of
from fastlora.kernels.config_files import FileRow
from fastlora.kernels.config_tables import MEASURED, candidates_of
from tests.support.aot.shipped import all_shipped
from tests.support.kernels.lab import Lab, cap_warps

H100, OTHER = Chip("sm_90", 132), Chip("sm_80", 108)
BF16 = torch.bfloat16
TILE = {"block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 8, "num_stages": 3}
TILE |= {"blocks_r": [16], "splits": 2}
SIZES = {"m": 8, "n": 4096, "k": 1024, "r": 16}
PIECES = {"launch": "mixed_lora_shrink", "block_n": 0, "splits": 0}
FINE = {"launch": "lora_linear", "kind": "half", **TILE, "max_m": 8, "n": 4096, "k": 1024}


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`choose` and `plan_of` remember nothing, and the tables are put back."""
    for name in ("choose", "plan_of"):
        monkeypatch.setattr(configs, name, getattr(configs, name).__wrapped__)
    with mock.patch.dict(MEASURED):
        yield


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    """A file of measured rows."""
    path = folder / "sm_90.json"
    path.write_text(json.dumps({"card": "a card", "rows": rows}))
    return path


@pytest.mark.usefixtures("no_memory")
def test_rows_of_a_file_go_first(tmp_path: Path) -> None:
    """On that chip only, in the file's order; what `columns_of` writes is read back."""
    plan = {"launch": "lora_linear", "kind": "half", "max_m": 8, "plan": "split"}
    later = {**FINE, "block_n": 32, "max_m": 64, "us": 1.5, "problem": "for readers"}
    path = written(tmp_path, FINE, plan, later)
    rows = config_files.read(path)[0]
    assert [config_files.columns_of(row) for row in rows[:2]] == [
        {**FINE, "blocks_r": (16,)},
        plan,
    ]
    before = configs.choose(OTHER, "lora_linear", BF16, **SIZES)
    measurements.put_first("sm_90", rows, path)
    config = configs.choose(H100, "lora_linear", BF16, **SIZES)
    assert {name: getattr(config, name) for name in TILE if name != "blocks_r"} == {
        name: value for name, value in TILE.items() if name != "blocks_r"
    }
    assert configs.choose(H100, "lora_linear", BF16, **{**SIZES, "m": 9}).block_n == 32
    found = [configs.plan_of(H100, "lora_linear", BF16, **{**SIZES, "m": m}) for m in (8, 9)]
    assert found == ["split", "fused"]
    assert configs.choose(OTHER, "lora_linear", BF16, **SIZES) == before
    shipped = {replace(e.config, splits=2) for e in all_shipped(H100)}
    assert config in shipped, "it is compiled ahead of time"


@pytest.mark.usefixtures("no_memory")
def test_rows_of_one_chip_are_not_those_of_its_family(tmp_path: Path) -> None:
    """Others that share its candidates keep theirs."""
    others = [Chip("sm_89", 142), Chip("sm_120", 170)]
    before = [configs.choose(chip, "lora_linear", BF16, **SIZES) for chip in others]
    path = written(tmp_path, {**FINE, "block_k": 64, "num_stages": 2})
    measurements.put_first("sm_86", config_files.read(path)[0], path)
    assert configs.choose(Chip("sm_86", 84), "lora_linear", BF16, **SIZES).num_stages == 2
    assert before == [configs.choose(chip, "lora_linear", BF16, **SIZES) for chip in others]
    assert {config.num_stages for config in before} != {2}


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"launch": "lora_lineer"}, "no launch 'lora_lineer'"),
        ({"kind": "int8"}, "of the kind 'int8'"),
        ({"block_n": 48}, "cannot run as"),
        ({"num_warps": 32}, "cannot run as"),
        ({"block_n": 256, "block_m": 128, "num_stages": 6}, "cannot run as"),
        ({"block_k": 0}, "other sides"),
        ({"blocks_r": []}, "blocks_r is"),
        ({"splits": 8}, "splits is 8, expected at most 4"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"num_warps": "4"}, "num_warps is '4', expected a whole number"),
        ({"warps": 4}, "unknown column 'warps'"),
        ({"max_m": None}, "max_m is None"),
        ({"plan": "fastest"}, "plan is 'fastest'"),
        ({"plan": "fused"}, "a tile as well"),
        (
            {"launch": "mixed_lora_shrink", "block_n": 0, "block_m": 32, "splits": 0},
            "block_m is 32",
        ),
    ],
)
def test_a_wrong_row_is_one_clear_error(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """It names the file, the row and what was expected, and nothing is taken over."""
    path = written(tmp_path, FINE, FINE | change)
    tables = dict(MEASURED)
    with pytest.raises(ValueError, match=r"sm_90\.json, row 1: .*") as raised:
        measurements.put_first("sm_90", config_files.read(path)[0], path)
    assert says in str(raised.value)
    assert tables == MEASURED


@pytest.mark.usefixtures("no_memory")
def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    for text in ("", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no file of measured rows"):
            config_files.read(path)
    endless = FileRow("lora_linear", "half", ConfigRow(16, 64, 128, 4, 3, (16,)))
    with pytest.raises(ValueError, match="it covers no problem"):
        measurements.put_first("sm_90", [endless], path)
    with pytest.raises(ValueError, match="no configs for 'sm_70'"):
        measurements.put_first("sm_70", [], path)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("mode", ["forward", "train", "mixed", "mixed_train"])
@pytest.mark.parametrize("plan", ["fused", "split"])
def test_candidates_reach_their_launches(lab: Lab, mode: str, plan: str) -> None:
    """Every launch that is tuned runs with its candidate, and plans decide what is launched."""
    from fastlora.bench import tune, tune_points
    from fastlora.bench.shapes import TINY, Point
    from fastlora.bench.shared_input import MODES

    adapters = 3 if mode.startswith("mixed") else 0
    ranks = "4" if adapters else ""
    problem = Point(mode, TINY, "a", 40, 32, 48, 4, adapters, ranks, outputs="32+16")
    device, dtype = torch.device(lab.device), torch.float32
    operands, chip = MODES[mode].draw(problem, dtype, device), chip_of(device)
    rows = tune_points.plan_rows(problem.m, plan, dtype)
    with tune_points.recorded_requests([]) as (asked, plans):
        tune.run_with(rows, operands, mode)
    named = [request for _, request, _ in asked if request.launch in tune_points.LAUNCHES]
    requests = {request for request in named if request.sizes}  # runs of rows depend on no size
    assert requests
    launched = {request.launch for request in requests}
    for request, found in plans:
        assert found == plan
        assert (request.launch in launched) == (plan == "fused")
    for request in requests:
        group = tune_points.Group(problem, request, plan, 0.0, 0)
        one = tune.candidates(chip, dtype, group, 1)[-1]
        with tune_points.recorded_requests([]) as (asked, _):
            tune.run_with([one, *rows], operands, mode)
        taken = {config for _, other, config in asked if other == request}
        assert taken, request
        for column in ("block_m", "block_n", "block_k", "num_warps", "num_stages"):
            assert {getattr(c, column) for c in taken} == {getattr(one.row, column)}, request
        assert not one.row.splits or {c.splits for c in taken} == {one.row.splits}


@pytest.mark.usefixtures("no_memory")
def test_a_measurement_covers_its_group_and_nearby_numbers_of_rows(tmp_path: Path) -> None:
    """Rows of older files have neither limit, and cover every group and all smaller numbers."""
    tile = {"block_m": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "blocks_r": [16]}
    old = {"launch": "lora_grad_a", "kind": "half", **tile, "max_m": 2048, "k": 1024}
    new = old | {"min_m": 1025, "group_size": 3, "num_stages": 3}
    path = written(tmp_path, new, old)
    rows = config_files.read(path)[0]
    assert [config_files.columns_of(row) for row in rows] == [
        entry | {"blocks_r": (16,)} for entry in (new, old)
    ]
    measurements.put_first("sm_90", rows, path)

    def stages(m: int, group_size: int) -> int:
        given = {"m": m, "k": 1024, "r": 16, "group_size": group_size}
        return configs.choose(H100, "lora_grad_a", BF16, **given).num_stages

    assert [stages(2048, size) for size in (1, 3)] == [2, 3]
    assert [stages(m, 3) for m in (1, 1024, 1025)] == [2, 2, 3]


@pytest.mark.usefixtures("no_memory")
def test_warps_can_be_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """For red tests on a GPU: every launch has fewer warps, and nothing else of it changes."""
    before = [configs.choose(H100, launch, BF16, **SIZES) for launch, _ in candidates_of("sm_90")]
    monkeypatch.setattr(configs, "config_of_row", configs.config_of_row)
    cap_warps(2)
    after = [configs.choose(H100, launch, BF16, **SIZES) for launch, _ in candidates_of("sm_90")]
    assert after == [replace(config, num_warps=min(config.num_warps, 2)) for config in before]
    assert max(config.num_warps for config in before) > 2
