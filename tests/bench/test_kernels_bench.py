"""`fastlora bench kernels`: what it times, what it predicts, and its errors."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fastlora.bench import kernels_bench
from fastlora.commands import cli
from fastlora.commands.options import parse_options

MINE = """
import torch.nn.functional as F

def right(x, weight, bias, lora_a, lora_b, scaling):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)

def wrong(x, weight, bias, lora_a, lora_b, scaling):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b)
"""


def run(*words: str) -> int:
    return cli.main(["bench", "kernels", *words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with functions of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_a_function_of_yours_is_checked_then_timed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "16,96,64,8", "--device", "cpu", "--dtype", "float32"]
    chosen = ["--contender", "mine.py:right", "--contender", "mine.py:wrong"]
    assert run(*words, *chosen) == 1
    out = capsys.readouterr().out
    assert "mine.py:wrong: wrong: result 0 has error" in out
    assert "GB/s" in next(line for line in out.splitlines() if "mine.py:right" in line)
    with (here / "kernels.csv").open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file) if row["mode"] == "forward"}
    assert set(rows) == {"base", "peft", "mine.py:right", "mine.py:wrong"}
    assert rows["mine.py:right"]["status"] == "ok"
    assert float(rows["mine.py:right"]["median_us"]) > 0
    assert rows["mine.py:wrong"]["median_us"] == ""


def test_mixed_batches_are_timed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--shape", "8,64,48,4", "--adapters", "2", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "r=4 of 2 adapters" in out
    assert "gathered_bmm: " in out


def test_without_a_gpu_it_says_what_the_code_says_and_predicts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    words = ["--shape", "16,256,128,8", "--adapters", "4", "--contender", "fastlora"]
    assert run(*words, "--out", "predicted.csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("prediction: ") for line in lines)
    shrink = next(line for line in lines if "mixed_lora_shrink" in line)
    assert all(word in shrink for word in ("registers", "shared", "programs", "waves", "MB"))
    with (here / "predicted.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["measured"] == "no"
    assert float(row["predicted_us"]) > float(row["floor_us"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--shape M,K,N,r is missing"),
        (["--contender", "nobody"], "--contender nobody: unknown; expected FILE.py:FUNCTION or"),
        (["--contender", "mine.py:right"], "without a GPU a function is not predicted"),
        (["--contender", "none.py:fn", "--device", "cpu"], "there is no file none.py"),
        (["--contender", "mine.py:fn", "--device", "cpu"], "mine.py has no function 'fn'"),
        (["--contender", "bad.py:fn", "--device", "cpu"], "ZeroDivisionError: division by zero"),
        (["--adapters", "9"], "--adapters 9: expected 0 to M = 4"),
        (["--adapters", "2", "--contender", "mine.py:right", "--device", "cpu"], "one adapter"),
        (["--chip", "sm_1"], "--chip sm_1: unknown; expected one of sm_90"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
        (["--out", "nowhere/x.csv"], "there is no folder nowhere"),
    ],
)
def test_errors_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (here / "bad.py").write_text("1 / 0")
    shape = ["--shape", "4,32,32,4"] if words else []
    assert run(*shape, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlora: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["16,32,32", "a,b,c,d", "0,32,32,4"])
def test_a_bad_shape_is_wrong_usage(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--shape", text)
    assert f"such as 16,4096,4096,16, got '{text}'" in capsys.readouterr().err


def test_the_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    assert {"base", "fastlora", "addmm"} <= set(capsys.readouterr().out.split())
    assert run("--list", "--device", "cpu") == 0
    assert {"base", "fused", "split", "peft", "addmm"} <= set(capsys.readouterr().out.split())
    names = kernels_bench.names_of(parse_options("", None, kernels_bench.OPTIONS, []), "cuda")
    assert "fused_no_pdl" in names
