"""The benchmark without a GPU: the whole flow on tiny shapes, and its rules one by one."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.bench.machine import commit

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Any:
    """The modules of ``bench/``."""
    import fastlora.bench.linear
    import fastlora.bench.mixed_kernels
    import fastlora.bench.summary

    return fastlora.bench


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _by_contender(rows: list[dict[str, str]], layer: str, mode: str) -> dict[str, dict[str, str]]:
    return {r["contender"]: r for r in rows if r["layer"] == layer and r["mode"] == mode}


def test_dry_run(tmp_path: Path, bench: Any) -> None:
    """As on a machine that has what `gpu.sh` needs; PEFT's sides are timed in tests/bench."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all green" in result.stdout
    assert "3 problems in 1 processes" in result.stdout
    assert " 0 failed" in result.stdout
    assert "time over the base linear's:" in result.stdout
    assert "/site/fastlora/__init__.py" in result.stdout  # what pip installed, not the checkout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"host.csv", "results.csv", "interpreted.csv", "mixed.csv", "layer_r16.csv"}
    tables |= {"rules.csv", "beta_pdl.csv"}
    assert written == tables | {"measured", "tests.txt", "machine.txt", "log.txt"}
    steps = re.findall(r"^--- \[\d+ s\] (.*) \(at most (\d+) s\)$", result.stdout, re.MULTILINE)
    assert [name for name, _ in steps[:3]] == [
        "install",
        "tests of cached launches",
        "rules: reads of the L2 cache, tiles, partial sums",
    ]
    assert sum(int(limit) for _, limit in steps) <= 525
    for name, rules in (("rules", {"l2", "tiles", "planes"}), ("beta_pdl", {"beta", "pdl"})):
        found = _rows(tmp_path / "out" / f"{name}.csv")
        assert {row["rule"] for row in found} == rules
        assert {(row["status"], row["tests"]) for row in found} == {("ok", "pass")}
        cases = {(row["rule"], row["case"]) for row in found}
        assert all(sum((r["rule"], r["case"]) == case for r in found) > 1 for case in cases)
    measured = json.loads((tmp_path / "out" / "measured" / "interpreter.json").read_text())
    assert [row["launch"] for row in measured["rows"]] == ["lora_linear"]
    layers = {(row["case"], row["side"]) for row in _rows(tmp_path / "out" / "layer_r16.csv")}
    assert {(case, "fastlora") for case in ("forward", "mixed")} < layers
    assert {row["status"] for row in _rows(tmp_path / "out" / "layer_r16.csv")} == {"ok"}

    rows = _rows(tmp_path / "out" / "results.csv")
    assert tuple(rows[0]) == bench.harness.COLUMNS
    assert [row["contender"] for row in rows if row["mode"] == "roof"] == ["copy", "matmul"]
    forward = {contender.name for contender in bench.contenders.FORWARD}
    for layer in ("a", "b"):
        assert set(_by_contender(rows, layer, "forward")) == forward
    train = {contender.name for contender in bench.contenders.TRAIN}
    assert set(_by_contender(rows, "a", "train")) == train

    interpreted = _rows(tmp_path / "out" / "interpreted.csv")
    variants = {contender.name for contender in bench.contenders.FUSED_VARIANTS}
    assert set(_by_contender(interpreted, "a", "forward")) == forward | variants
    assert {row["impl"] for row in interpreted} == {"triton", "torch"}
    assert {row["impl"] for row in rows} == {"eager", "torch"}

    mixed = _rows(tmp_path / "out" / "mixed.csv")
    mixed_kernels = bench.mixed_kernels
    own = {contender.name for contender in (*mixed_kernels.OURS, mixed_kernels.DENSE)}
    by_hand = {contender.name for contender in mixed_kernels.BY_HAND}
    if mixed_kernels.has_grouped_mm("cpu", torch.float32):
        by_hand.add("grouped_mm")
    measured = _by_contender(mixed, "a", "mixed")
    assert set(measured) == own | by_hand
    assert {(row["r"], row["adapters"]) for row in measured.values()} == {("3+8", "3")}
    assert {name for name, row in measured.items() if row["impl"] == "triton"} == own
    training = _by_contender(mixed, "a", "mixed_train")
    assert {name: row["impl"] for name, row in training.items()} == {
        "base": "torch",
        "segments": "torch",
        "fused": "triton",
        "split": "triton",
    }
    tables = result.stdout.split("time over the base linear's:")[2]
    assert "mixed " in tables and "mixed_train" in tables

    for row in rows + interpreted + mixed:
        # "ok" says that the numbers were right: only then is a contender timed.
        assert (row["status"], row["tests"]) == ("ok", "pass")
        assert row["torch"] == torch.__version__
        assert row["commit"] == commit(ROOT)
        times = [float(row[name]) for name in ("p20_us", "median_us", "p80_us")]
        assert times == sorted(times)
        assert all(math.isfinite(value) and value > 0 for value in times)
        if row["mode"] != "roof":
            ratio = float(row["median_us"]) / float(row["floor_us"])
            assert float(row["ratio_to_floor"]) == pytest.approx(ratio, rel=0.05)
            assert float(row["ratio_to_base"]) > 0


# ------------------------------------------------------------------------------ the harness's rules


@pytest.mark.parametrize("bad", [lambda y: y * 1.01, torch.empty_like, lambda y: y[:, :1] * y])
def test_wrong_results_are_caught(bench: Any, bad: Any) -> None:
    point = bench.shapes.tiny_points()[0]
    problem = bench.contenders.Problem.random(point, torch.float32, CPU, "eager")
    contenders = bench.contenders.FORWARD
    truths, yardstick = bench.contenders.truths(point, problem), bench.contenders.YARDSTICK
    checker = bench.harness.Checker(problem, contenders, truths, yardstick)
    assert [checker.fault(contender) for contender in contenders] == [""] * len(contenders)
    fused = next(contender for contender in contenders if contender.name == "fused")
    broken = replace(fused, run=lambda p: tuple(bad(y) for y in fused.run(p)))
    assert checker.fault(broken).startswith("wrong: result 0")


def test_wrong_results_of_mixed_batches_are_caught(bench: Any) -> None:
    mixed = bench.mixed_kernels
    for point in bench.shapes.tiny_mixed_points():
        if point.mode != "mixed":
            continue
        problem = mixed.MixedProblem.random(point, torch.float32, CPU)
        checker = bench.harness.Checker(
            problem, mixed.BY_HAND, mixed.truths(problem), mixed.YARDSTICK
        )
        assert [checker.fault(contender) for contender in mixed.BY_HAND] == [""] * 3
        moved = replace(problem.rows, slots=problem.slots.roll(1))
        bmm = replace(
            mixed.BY_HAND[2], run=lambda p, m=moved: mixed.BY_HAND[2].run(replace(p, rows=m))
        )
        assert checker.fault(bmm).startswith("wrong: result 0")


@pytest.mark.parametrize("index", range(8))
def test_wrong_gradients_of_mixed_batches_are_caught(bench: Any, index: int) -> None:
    """y, dx, and both gradients of each of three adapters."""
    contenders, mixed = bench.mixed_train.CONTENDERS, bench.mixed_kernels
    point = next(p for p in bench.shapes.tiny_mixed_points() if p.mode == "mixed_train")
    problem = mixed.MixedProblem.random(point, torch.float32, CPU, "eager")
    checker = bench.harness.Checker(problem, contenders, mixed.truths(problem), mixed.YARDSTICK)
    assert [checker.fault(contender) for contender in contenders] == [""] * 4
    fused = contenders[2]

    def run(p: Any) -> tuple[torch.Tensor, ...]:
        results = list(fused.run(p))
        results[index] = results[index].roll(1, dims=0)
        return tuple(results)

    assert checker.fault(replace(fused, run=run)).startswith(f"wrong: result {index}")


def _main(bench: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    fixed = f"--out {out} --tests pass --device cpu --dtype float32 --impl eager --dry-run"
    monkeypatch.setattr(sys, "argv", ["linear.py", *fixed.split(), *arguments])
    return bench.linear.main()


def test_the_deadline_skips_and_says_so(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _main(bench, monkeypatch, tmp_path / "r.csv", "--seconds", "0") == 0
    assert "deadline: 3 of 3 points skipped" in capsys.readouterr().out
    assert {row["mode"] for row in _rows(tmp_path / "r.csv")} == {"roof"}


def test_a_run_resumes_without_what_crashed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "r.csv"
    assert _main(bench, monkeypatch, out, "--max-points", "1") == 0
    assert not out.with_suffix(".current").exists()
    first = _rows(out)
    crashed = bench.shapes.tiny_points()[1]
    out.with_suffix(".current").write_text(json.dumps([*crashed, "fused"]))
    assert _main(bench, monkeypatch, out, "--resume") == bench.linear.WRONG
    rows = _rows(out)
    assert rows[: len(first)] == first
    keys = [(row["mode"], row["layer"], row["contender"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {c.name for c in bench.contenders.FORWARD} == set(_by_contender(rows, "b", "forward"))
    bad = [row for row in rows if row["status"] != "ok"]
    assert [(row["layer"], row["contender"]) for row in bad] == [("b", "fused")]
    assert "crashed or hung" in bad[0]["status"]
    assert bad[0]["median_us"] == ""


def test_fused_variants_launch_without_their_feature(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from fastlora.kernels import chips, lora_linear, lora_shrink, plane_sums
    from fastlora.ops import execution_mode as ops

    seen: dict[str, Any] = {}
    chip = chips.Chip("sm_90", 132)
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)
    monkeypatch.setattr(ops, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(ops, "resolve_impl", lambda *_: "triton")
    monkeypatch.setattr(
        lora_shrink, "launch_lora_shrink", lambda *_, config, **__: seen.update(shrink=config)
    )
    monkeypatch.setattr(
        lora_linear,
        "launch_lora_linear",
        lambda *_, pdl, config, **__: seen.update(pdl=pdl, linear=config),
    )
    monkeypatch.setattr(plane_sums, "launch_plane_sums", lambda *_, **__: None)
    bench.contenders._without.cache_clear()
    point = bench.shapes.Point("forward", "", "", 1, 14336, 64, 16)
    problem = bench.contenders.Problem.random(point, torch.bfloat16, CPU, "triton")
    runs = {c.name: c.run for c in (*bench.contenders.FORWARD, *bench.contenders.FUSED_VARIANTS)}
    features = {}
    for name in ("fused", "fused_no_pdl", "fused_no_split_k"):
        runs[name](problem)
        config = seen["shrink"]
        splits = config.splits > 1, seen["linear"].splits > 1
        features[name] = (seen["pdl"], config.launch_dependents, *splits)
    bench.contenders._without.cache_clear()
    assert features == {
        "fused": (True, True, True, True),
        "fused_no_pdl": (False, False, True, True),
        "fused_no_split_k": (True, True, False, False),
    }


def test_replays_take_turns_and_give_the_time_of_a_call(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]  # milliseconds of a GPU that does one thing after the other
    replayed: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    class Graph:
        def __init__(self, name: str, milliseconds: float) -> None:
            self.name, self.milliseconds = name, milliseconds

        def replay(self) -> None:
            replayed.append(self.name)
            clock[0] += self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = {"base": Graph("base", 2.0), "fused": Graph("fused", 3.0), "slow": Graph("slow", 75.0)}
    times = bench.harness._replay(graphs, calls=4)
    # 80 ms a round: as many rounds as fit, none of them the first.
    rounds = int(bench.harness.POINT_US / 80e3)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(graphs, rounds)
    assert times["base"] == pytest.approx([500.0] * rounds)
    assert times["slow"] == pytest.approx([18750.0] * rounds)
    firsts = [replayed[index + 1] for index in range(0, len(replayed), 4)]  # behind the filler
    assert set(firsts) == set(graphs)


def test_calls_are_whole_turns_through_the_sets(bench: Any) -> None:
    assert bench.harness.count_calls(2, 1300.0) == 2
    assert bench.harness.count_calls(50, 4.0) == 500
    assert bench.harness.count_calls(128, 1.0) == 512
    for sets in (2, 3, 7, 48, 128):
        assert bench.harness.count_calls(sets, 5.0) % sets == 0


def test_floors(bench: Any) -> None:
    roofs = bench.shapes.Roofs(bytes_per_s=1e12, flop_per_s=1e15)
    decode = bench.shapes.Point("forward", "", "", 1, 4096, 4096, 16)
    assert bench.shapes.floor_us("base", decode, 2, roofs) == pytest.approx(33.57, rel=1e-3)
    # 2 * 16 * 8192 bytes of factors and 64 of s more, at a byte a picosecond
    more = bench.shapes.floor_us("full", decode, 2, roofs) - 33.570816
    assert more == pytest.approx(0.262208, rel=1e-3)
    prefill = decode._replace(m=8192)
    assert bench.shapes.floor_us("base", prefill, 2, roofs) == pytest.approx(274.88, rel=1e-3)
    assert bench.shapes.floor_us("full", prefill, 2, roofs) == pytest.approx(274.88, rel=1e-3)
    train = prefill._replace(mode="train")
    assert bench.shapes.floor_us("train", train, 2, roofs) == pytest.approx(549.76, rel=1e-3)


def test_summary_and_plot(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = {"mode": "forward", "model": "tiny", "M": "1", "r": "4", "card": "C", "tests": "pass"}
    common |= {"K": "8", "N": "8", "commit": "abc", "dtype": "float32", "torch": "2", "triton": "3"}
    rows = [
        {"layer": "a", "contender": "base", "ratio_to_base": "1.0", "status": "ok"},
        {"layer": "a", "contender": "fused", "ratio_to_base": "2.0", "status": "ok"},
        {"layer": "a", "contender": "peft", "ratio_to_base": "3.0", "status": "ok"},
        {"layer": "b", "contender": "base", "ratio_to_base": "1.0", "status": "ok"},
        {"layer": "b", "contender": "fused", "ratio_to_base": "8.0", "status": "ok"},
        {"layer": "b", "contender": "peft", "ratio_to_base": "", "status": "wrong: far off"},
    ]
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, bench.harness.COLUMNS)
        writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    monkeypatch.setattr(sys, "argv", ["summary.py", str(path)])
    assert bench.summary.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["forward", "r", "M", "shapes", "fused", "peft"]
    assert lines[2].split() == ["tiny", "4", "1", "2", "4.00", "3.00*"]
    assert "forward tiny b M=1 r=4 peft: wrong: far off" in lines

    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from fastlora.bench import plot

    monkeypatch.setattr(sys, "argv", ["plot.py", str(path)])
    assert plot.main() == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_points_are_distinct_and_their_adapters_take_ranks_in_turn(bench: Any) -> None:
    for points in (bench.shapes.all_points(), bench.shapes.mixed_points()):
        assert len(set(points)) == len(points)
    assert points[0].ranks_of_adapters == [16] * 64
    four = next(p for p in points if (p.mode, p.adapters, p.ranks) == ("mixed", 4, "8+16+64"))
    assert (four.ranks_of_adapters, four.r) == ([8, 16, 64, 8], 64)
    # Each adapter's factors once, whatever the rows; the base alone has none.
    roofs = bench.shapes.Roofs(bytes_per_s=1e12, flop_per_s=1e18)
    base, mixed = (bench.shapes.floor_us(kind, four, 2, roofs) for kind in ("base", "mixed"))
    expected = 2 * (96 * (four.k + four.n) + 2 * four.m * 24) * 1e-6
    assert mixed - base == pytest.approx(expected, rel=1e-6)
