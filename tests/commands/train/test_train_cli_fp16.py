"""`fastlora train` in fp16: what is skipped is said; a run that learns nothing is no success."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.commands import cli
from fastlora.train import checkpoint
from fastlora.train.run import NonFiniteError, Run, open_run
from fastlora.train.run_log import RunLogFile
from fastlora.train.settings import settings_from_dict
from tests.support import train_runs
from tests.support.train_runs import change, log


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A model whose gradients leave fp16's range at the first scales."""
    from transformers import AutoModelForCausalLM

    folder = train_runs.make_base(tmp_path_factory.mktemp("loud") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(300.0)
    model.save_pretrained(folder)
    return folder


def poisoned(run: Run, adapter: str, until: int) -> None:
    """Makes the gradients of an adapter infinite in the run's first steps."""
    weight = next(p for n, p in run.model.named_parameters() if f"lora_B.{adapter}." in n)
    weight.register_hook(lambda gradient: gradient * (math.inf if run.step < until else 1.0))


def test_the_first_scales(
    loud: Path, given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped until the scale fits, as GradScaler does; counted in log, bar and summary."""
    given |= {"model": str(loud), "dtype": "float16", "steps": 12}
    path = train_runs.write_config(tmp_path / "c.json", given)
    assert cli.main(["train", str(path)]) == 0
    printed, steps = capsys.readouterr(), log(tmp_path / "out")
    for name in "ab":
        skipped = [entry for entry in steps if name in entry.get("skipped", ())]
        assert 0 < len(skipped) < 12
        assert all(entry["grad_norm"][name] is None for entry in skipped)
        assert f"{len(skipped)} steps skipped (gradients not finite), saved in" in printed.out
        assert f"({len(skipped)} skipped)" in printed.err


def test_a_run_that_never_stepped(
    fails: Any, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the adapter, which is not written, and the checkpoint stays."""
    given |= {"dtype": "float16", "steps": 3}
    start = Run._make_model

    def with_poison(run: Run) -> Any:
        run.model = start(run)
        poisoned(run, "b", until=9)
        return run.model

    monkeypatch.setattr(Run, "_make_model", with_poison)
    error = fails(given, "--save-every", "2")
    assert (
        "step 3: adapter 'b' was never updated: its gradient was non-finite in each of its 3"
        in error
    )
    assert "(loss scale: 8192)" in error and "b.jsonl, line " in error
    last = tmp_path / "out" / "checkpoints" / "step-00000002"
    assert f"the last good checkpoint is {last}" in error
    assert checkpoint.list_checkpoints(last.parent) == [last]
    assert {key[0] for key in train_runs.saved(tmp_path / "out")} == {"a"}
    assert [entry["skipped"] for entry in log(tmp_path / "out")] == [["b"]] * 3


def test_a_scale_at_its_end(given: Any, tmp_path: Path) -> None:
    """No scale makes an infinite gradient finite: the run stops long before its last step."""
    given |= {"dtype": "float16", "steps": 50}
    with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
        poisoned(run, "a", until=99)
        run.optimizers._adapters["a"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)
        with pytest.raises(
            NonFiniteError, match="gradient of adapter 'a' is .* scale already reduced to 3.05"
        ) as caught:
            run.train()
    assert caught.value.adapter == "a" and caught.value.step == 3
    assert run.step == 2 and len(log(tmp_path / "out")) == 2


def test_the_log_is_json(tmp_path: Path) -> None:
    """What is not finite is null, at any depth."""
    written = RunLogFile(tmp_path, 0)
    written.write({"step": 1, "x": {"a": math.nan, "b": [math.inf, 2.5]}, "y": -math.inf})
    written.close()
    assert log(tmp_path, "step") == [{"step": 1, "x": {"a": None, "b": [None, 2.5]}, "y": None}]


def test_a_log_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Steps after it are taken again, and the last line of a killed run may be half a line."""
    written = RunLogFile(tmp_path, 0)
    for step in (1, 2, 3):
        written.write({"step": step, "x": 0})
    written.close()
    with written.path.open("a") as file:
        file.write('{"step": 4, "x')
    again = RunLogFile(tmp_path, 2)
    again.write({"step": 3, "x": 1})
    again.close()
    assert log(tmp_path, "x") == [{"step": step, "x": step // 3} for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("bias", "all", "adapter 'a' has bias='all', so it trains"),
        ("bias", "lora_only", "adapter 'a' has bias='lora_only', so it trains"),
        ("modules_to_save", ["lm_head"], r"adapter 'a' has modules_to_save=['lm_head'], so it"),
    ],
)
def test_what_cannot_be_unscaled(
    fails: Any, given: Any, base: Path, tmp_path: Path, path: str, value: Any, words: str
) -> None:
    """Parameters of an fp16 base: named before data or weights are read, by a dry run too."""
    change("adapters.b", None)(given)
    given["adapters"]["a"] |= {path: value, "data": "nowhere.jsonl"}
    for flags in ((), ("--dry-run",)):
        error = fails(given, "--dtype", "float16", *flags)
        assert words in error and "use dtype 'bfloat16' or 'float32'" in error
        assert "nowhere.jsonl: cannot read the file" in fails(given, "--dtype", "bfloat16", *flags)
    assert not (tmp_path / "out").exists()
