"""The tuner without a GPU: made-up times, a table that the library reads, and bad candidates."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.programs import run

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels import configs  # noqa: E402
from fastlora.kernels.chips import Chip  # noqa: E402

# The tuner, with bad candidates among those of three launches.
DRIVER = """
import multiprocessing, os, signal, sys, time
from fastlora.bench import tune

plain = tune.run_with
tune.TRY_SECONDS = 4.0

def run_with(ones, problem, mode):
    in_pool = multiprocessing.parent_process() is not None
    name = ones[0].launch, ones[0].row.block_m, bool(ones[0].row.plan)
    if name == ("lora_linear", 64, False) or name == ("lora_shrink", 16, False) and not in_pool:
        os.kill(os.getpid(), signal.SIGKILL)
    while name == ("lora_linear", 32, False):
        time.sleep(1)
    result = plain(ones, problem, mode)
    return tuple(1.1 * r for r in result) if name == ("lora_expand", 32, False) else result

tune.run_with = run_with
if __name__ == "__main__":
    sys.exit(tune.main())
"""
COLUMNS = ("block_m", "block_n", "num_warps", "num_stages")
READ = """
import torch
from fastlora.kernels import configs
from fastlora.kernels.chips import chip_of
chip, sizes = chip_of(torch.device("cpu")), dict(m=40, n=48, k=32, r=4)
config = configs.choose(chip, "lora_linear", torch.float32, **sizes)
print(config.block_m, config.block_n, config.num_warps, config.num_stages)
print(configs.plan_of(chip, "lora_linear", torch.float32, **sizes))
"""


def tuned(folder: Path, *arguments: str) -> tuple[Any, Any, Any]:
    """A dry run with bad candidates; the process, the table, and statuses by launch."""
    (folder / "driver.py").write_text(DRIVER)
    fixed = ["--out", "out", "--tests", "pass", "--dry-run", "--near", "0"]
    done = run("driver.py", *fixed, *arguments, cwd=folder)
    table = json.loads((folder / "out" / "interpreter.json").read_text())
    statuses: dict[str, dict[str, str]] = {}
    with (folder / "out" / "tune.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["mode"] != "roof":
                launch = row["layer"].partition(" ")[2].partition(" N=")[0]
                statuses.setdefault(launch, {})[row["contender"].split(" ")[0]] = row["status"]
    return done, table, statuses


def test_a_dry_run_writes_a_table_that_the_library_reads(tmp_path: Path) -> None:
    """Bad candidates are named and skipped; a fresh process takes the row; a rerun adds nothing."""
    done, table, statuses = tuned(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended with code -9" in done.stdout
    good = {"base": "ok", "plain": "ok"}
    assert statuses == {
        "lora_shrink": {
            **good,
            "64x0x32": "ok",
            "32x0x32": "ok",
            "16x0x64": "error: the process crashed or hung here",
        },
        "lora_linear": {
            **good,
            "64x64x32": "error: no answer, its process died",
            "32x32x64": "error: no answer after 4 s",
            "16x32x64": "ok",
        },
        "lora_expand": {
            **good,
            "64x64x0": "ok",
            "32x64x0": statuses["lora_expand"]["32x64x0"],
            "16x64x0": "ok",
        },
        "lora_linear plan": {**good, "fused": "ok", "split": "ok"},
    }
    assert statuses["lora_expand"]["32x64x0"].startswith("wrong: result 0 has error")

    assert (table["arch"], table["card"], table["tests"]) == ("interpreter", "cpu", "pass")
    assert table["triton"] and table["commit"] and "mean nothing" in table["made_up"]
    rows = table["rows"]
    assert [(row["launch"], "plan" in row) for row in rows] == [
        ("lora_expand", False),
        ("lora_linear", False),
        ("lora_linear", True),
        ("lora_shrink", False),
    ]
    _, linear, plan, _ = rows
    assert [linear[limit] for limit in ("max_m", "n", "k", "max_r")] == [40, 48, 32, 4]
    assert all(row["us"] > 0 for row in rows)

    # The rules choose another tile; which plan is the faster one here nobody knows.
    tables = {"TRITON_INTERPRET": "1", "FASTLORA_MEASURED": str(tmp_path / "out")}
    found = run("-c", READ, **tables).stdout.split("\n")
    rules = configs.choose(
        Chip("interpreter", 1), "lora_linear", torch.float32, m=40, n=48, k=32, r=4
    )
    assert found[0].split() == [str(linear[column]) for column in COLUMNS]
    assert (found[1], linear["block_m"], rules.block_m) == (plan["plan"], 16, 64)

    before = (tmp_path / "out" / "tune.csv").read_text()
    done, again, _ = tuned(tmp_path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "tune.csv").read_text() == before
    assert again == table


def test_a_wrong_row_is_one_error_at_the_first_launch(tmp_path: Path) -> None:
    rows = [{"launch": "lora_linear", "kind": "ieee", "plan": "fastest", "max_m": 8}]
    (tmp_path / "interpreter.json").write_text(json.dumps({"rows": rows}))
    done = run("-c", READ, TRITON_INTERPRET="1", FASTLORA_MEASURED=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().split("\n")[-1]
    assert last == (
        f"ValueError: {tmp_path}/interpreter.json, row 0: plan is 'fastest', "
        "expected 'fused' or 'split'"
    )
