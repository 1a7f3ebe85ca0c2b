"""`fastlora bench mixed`: its sides compute the same, it sees one that does not, its refusals."""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")


from fastlora.bench import mixed_bench, mixed_contest, mixed_report
from fastlora.bench.float64 import Float64
from fastlora.bench.mixed_contest import (
    BASE,
    IN_TURN,
    OURS,
    PEFT,
    Contest,
    WrongResultError,
)
from fastlora.bench.mixed_strategies import STRATEGIES, by_hand
from fastlora.commands.options import parse_options
from fastlora.testing import assert_within_budget
from fastlora.validation import FastLoraError
from tests.support.tiny import tiny_llama

SIDES = (BASE, OURS, PEFT, IN_TURN)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


def options(*arguments: object) -> argparse.Namespace:
    return parse_options("mixed", None, mixed_bench.OPTIONS, [str(a) for a in arguments])


# ------------------------------------------------------------------------------------ the sides


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_sides_compute_the_same(dtype: torch.dtype, tokens: int) -> None:
    contest = Contest(tiny_llama().to(dtype), 3, 4)
    ids, mix = contest.random_ids(48, tokens), contest.random_mix(48, 3)
    assert set(mix) == set(contest.names)
    sides = contest.sides(mix, ids)
    assert tuple(sides) == SIDES
    with torch.no_grad():
        truth, plain = contest.plain(mix, ids, exact=True), contest.plain(mix, ids)
        for name in SIDES[1:]:
            assert_within_budget(sides[name](), plain, truth, name)
        # The adapters matter, and each row has its own.
        budget = contest.check(sides, mix, ids)[OURS].budget
        others = contest.plain(mix[1:] + mix[:1], ids, exact=True)
        moved = [a != b for a, b in zip(mix, mix[1:] + mix[:1], strict=True)]
        for wrong in (sides[BASE]().double(), others[moved]):
            right = truth[moved] if len(wrong) < len(truth) else truth
            assert (wrong - right).abs().amax(1).min() > budget


@pytest.mark.parametrize("sorted_before", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_strategies_by_hand_compute_the_same(tokens: int, sorted_before: bool) -> None:
    contest = Contest(tiny_llama(), 3, 4, peft=False)
    ids, mix = contest.random_ids(48, tokens), contest.random_mix(48, 3)
    with torch.no_grad():
        truth, plain = contest.plain(mix, ids, exact=True), contest.plain(mix, ids)
        for name, strategy in STRATEGIES.items():
            side = by_hand(contest, strategy, mix, ids, sorted_before=sorted_before)
            assert_within_budget(side(), plain, truth, name)


def test_the_truth_is_the_model_in_float64() -> None:
    contest = Contest(tiny_llama().to(torch.bfloat16), 1, 4, peft=False)
    ids, mix = contest.random_ids(4, 5), contest.random_mix(4, 1)
    # PEFT-free and hook-free: the adapters merged by hand, in float64.
    merged: Any = copy.deepcopy(contest.base).double()
    for target in contest.targets:
        layer, module = contest.layer(target), merged.get_submodule(target)
        a, b = (layer.lora_A[mix[0]].weight.double(), layer.lora_B[mix[0]].weight.double())
        module.weight.data += contest.scaling * (b @ a)
    with torch.no_grad():
        truth = contest.plain(mix, ids, exact=True)
        expected = mixed_contest.last_output(merged, ids)
        single = mixed_contest.last_output(merged.float(), ids)
    assert truth.dtype == torch.float64
    # transformers computes the norms of a float64 Llama in fp32, `Float64` does not.
    assert_within_budget(expected, single, truth)
    assert next(contest.base.parameters()).dtype == torch.bfloat16


def test_float64_widens_weights_casts_and_dtypes() -> None:
    x = torch.tensor([1.0, 1e-9])
    with Float64():
        assert (x.sum() - 1.0).item() == pytest.approx(1e-9, rel=1e-6)
        assert x.half().dtype == x.to(torch.bfloat16).dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.int64).dtype == torch.int64
    assert x.sum().dtype == torch.float32


def test_all_sides_share_weights_and_factors() -> None:
    base = tiny_llama()
    contest = Contest(base, 2, 4)
    weights = {p.data_ptr() for p in base.parameters()}
    for model in (contest.ours, contest.theirs):
        found = {n: p.data_ptr() for n, p in model.named_parameters()}
        assert {p for n, p in found.items() if "lora_" not in n} <= weights
    factors = [
        {p.data_ptr() for n, p in model.named_parameters() if "lora_" in n}
        for model in (contest.ours, contest.theirs)
    ]
    assert factors[0] == factors[1] and len(factors[0]) == 2 * 2 * len(contest.targets)
    assert not any(p.requires_grad for p in contest.ours.parameters())


@pytest.mark.parametrize("side", SIDES[1:])
def test_a_wrong_side_is_not_timed(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Contest.sides

    def sides(self: Contest, mix: Any, ids: torch.Tensor) -> Any:
        found = real(self, mix, ids)
        return found | {side: lambda: real(self, mix[1:] + mix[:1], ids)[side]()}

    monkeypatch.setattr(Contest, "sides", sides)
    monkeypatch.setattr(mixed_contest, "interleaved_seconds", None)
    with pytest.raises(WrongResultError, match=f"{side} is wrong with 2 adapters"):
        mixed_bench.compare(tiny_llama(), [2], 4, 2, 1, 1)


@pytest.mark.parametrize(
    ("drawn", "found", "draws", "message"),
    [
        ([(0.1, 0.1)] * 20 + [(0.1, 3.0)], (0.1, 5.0), 21, ""),
        ([(0.1, 0.1)], (0.1, 5.0), 32, "its outputs differ from float64 by 3.54e.00"),
        (
            [(0.1, 9.0)],
            (5.0, 5.0),
            16,
            "its best sequence's outputs differ from float64 by 5.00e.00",
        ),
    ],
    ids=["as_far_in_another_draw", "far_in_none", "far_everywhere"],
)
def test_roundings_that_a_model_carries_far(
    drawn: Any, found: Any, draws: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The textbook's errors in two sequences are drawn until they cover a side's, or 32 times."""
    contest = Contest(tiny_llama(), 1, 4, peft=False)
    ids, mix = contest.random_ids(2, 1), contest.random_mix(2, 1)
    real, errors, made = Contest.plain, itertools.cycle(drawn), []

    def plain(self: Contest, *given: Any, exact: bool = False, **_: Any) -> torch.Tensor:
        right = real(self, *given, exact=True)
        if exact:
            return right
        made.append(next(errors))
        return (right + torch.tensor(made[-1])[:, None]).float()

    with torch.no_grad():
        right = contest.plain(mix, ids, exact=True)
    monkeypatch.setattr(Contest, "plain", plain)
    sides = {OURS: lambda: right + torch.tensor(found)[:, None]}
    if message:
        with pytest.raises(WrongResultError, match=message):
            contest.check(sides, mix, ids)
    else:
        assert 4.24 < contest.check(sides, mix, ids)[OURS].budget < 4.25  # twice 3 / sqrt(2)
    assert len(made) == draws


def test_a_side_with_nan_is_wrong() -> None:
    contest = Contest(tiny_llama(), 1, 4, peft=False)
    ids, mix = contest.random_ids(2, 1), contest.random_mix(2, 1)
    sides = {OURS: lambda: torch.full((2, 97), float("nan"))}
    with pytest.raises(WrongResultError, match="by nan"):
        contest.check(sides, mix, ids)


# ---------------------------------------------------------------------------------- the command


def test_the_command(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--adapters", "4,1", "--sequences", 5, "--tokens", 2, "--rounds", 2, "--rank", 3]
    out = tmp_path / "new" / "out"
    arguments += ["--model", model_dir, "--dtype", "bfloat16", "--out", out]
    assert mixed_bench.run(options(*arguments)) == 0
    printed = capsys.readouterr().out
    assert (
        "tiny, bfloat16, " in printed and "5 sequences of 2 tokens, adapters of rank 3" in printed
    )
    with (out / "mixed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["adapters"], r["side"]) for r in rows] == [(n, s) for n in "14" for s in SIDES]
    for row in rows:
        assert (row["dtype"], row["rank"], row["rounds"]) == ("bfloat16", "3", "2")
        assert float(row["median_ms"]) > 0
        assert (row["error"] == "") == (row["side"] == BASE)
    lines = [line for line in printed.splitlines() if re.match(r" +[14] ", line)]
    for line, count in zip(lines, "14", strict=True):
        shown = [f"{float(r['ratio_to_base']):.2f}" for r in rows if r["adapters"] == count][1:]
        assert line.split()[3:] == shown
    assert {path.name for path in out.iterdir()} <= {"mixed.csv", "mixed.png"}


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [mixed_report.Row(n, s, 1.0, n + 0.5, 1, None, None) for n in (1, 4) for s in SIDES]
    mixed_report.plot(tmp_path / "mixed.png", "title", rows)
    assert (tmp_path / "mixed.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--adapters", 1, "--sequences", 1, "--rounds", 1, "--out", tmp_path]
    assert mixed_bench.run(options("--model", model_dir, *arguments)) == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.csv"]


def test_a_csv_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    row = mixed_report.Row(1, BASE, 1.0, 1.0, 1, None, None)
    mixed_report.write_csv(tmp_path / "mixed.csv", {}, [row])
    before = (tmp_path / "mixed.csv").read_text()
    with pytest.raises(TypeError):
        mixed_report.write_csv(tmp_path / "mixed.csv", {}, [row, None])  # type: ignore[list-item]
    assert (tmp_path / "mixed.csv").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 0], "--rank must be at least 1, got 0"),
        (["--sequences", 0], "--sequences must be at least 1, got 0"),
        (["--tokens", -1], "--tokens must be at least 1, got -1"),
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--rounds", 0], "--rounds must be at least 1, got 0"),
        (["--sequences", 16], "64 different adapters in a batch of 16 sequences"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--model", Path(__file__)], "no such folder"),
        (["--out", Path(__file__)], "not a folder"),
        (["--model", Path(__file__).parent], "transformers cannot load its config"),
        (["--tokens", 100_000], "at most the model's 2048"),
        (["--rank", 10**8], "needs some .* GiB, and .* are free: .* for 64 adapters"),
    ],
)
def test_bad_input_is_rejected_before_any_work(
    arguments: list[Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    given = ["--model", model_dir, "--out", tmp_path / "out", *arguments]
    with pytest.raises(FastLoraError, match=message):
        mixed_bench.main([*map(str, given)])
    assert not (tmp_path / "out").exists()


def test_other_models_are_named(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, T5Config, ViTConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    cases = [
        (T5Config(), "an encoder with a decoder"),
        (ViTConfig(**sizes), "takes no token ids"),
    ]
    for index, (config, message) in enumerate(cases):
        config.save_pretrained(tmp_path / str(index))
        with pytest.raises(mixed_bench.BenchError, match=message):
            mixed_bench.plan_for(options("--model", tmp_path / str(index)))
    # One without a language head is fine.
    config = BertConfig(**sizes, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path / "bert")
    arguments = ["--adapters", "1,2", "--sequences", 2, "--rounds", 1, "--out", tmp_path / "out"]
    assert mixed_bench.run(options("--model", tmp_path / "bert", *arguments)) == 0


def test_memory_is_estimated_from_shapes(model_dir: Path) -> None:
    args = options("--model", model_dir, "--adapters", "2,5", "--rank", 4)
    plan = mixed_bench.plan_for(args)
    contest = Contest(plan.load(), 1, 4, peft=False)
    assert plan.weights == sum(p.nbytes for p in contest.base.parameters())
    own = [p for n, p in contest.ours.named_parameters() if "lora_" in n]
    assert plan.adapter == sum(p.nbytes for p in own)
    needed = plan.weights + plan.outputs + (5 + 5 + 2) * plan.adapter
    mixed_bench.check_memory(plan, args, needed)
    mixed_bench.check_memory(plan, args, None)
    with pytest.raises(mixed_bench.BenchError, match="copies of 2 and 5"):
        mixed_bench.check_memory(plan, args, needed - 1)
