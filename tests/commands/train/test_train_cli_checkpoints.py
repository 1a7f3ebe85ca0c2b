"""Checkpoints of `fastlora train`: of another run, damaged, and on a disk that fills."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.train.run import Run, train
from fastlora.train.run_log import read_logged_losses
from fastlora.train.settings import settings_from_dict
from tests.support import train_runs
from tests.support.tiny import tiny_llama
from tests.support.train_runs import change, contents, same


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps with checkpoints at 2 and 4, its data beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    data = train_runs.make_data(folder / "data")
    given = train_runs.config(base, data, folder / "out", steps=4, save_every=2)
    train_runs.train(folder / "c.json", given)
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("adapters.a.lr", 3e-2), "adapters.a.learning_rate was 0.01, is 0.03"),
        (("adapters.b.r", 8), "b.config.r was 4, is 8; adapters.b.config.lora_alpha was 8, is 16"),
        (("adapters.b", None), "adapters.b was {"),
        (("seed", 9), "seed was 5, is 9"),
        (("micro_batch_size", 4), "micro_batch_size was 2, is 4"),
        (("dtype", "bfloat16"), 'was "float32 97x64 '),
        (("max_length", 20), "adapters.a.tokens was"),
    ],
)
def test_resume_of_another_config(
    fails: Any, given: Any, stopped: Path, tmp_path: Path, changed: Any, words: str
) -> None:
    """What differs is named, and the checkpoint is as it was."""
    out = tmp_path / "out"
    shutil.copytree(stopped / "out", out)
    before = contents(out)
    change(*changed)(given)
    error = fails(given, "--resume")
    assert f"{out / 'checkpoints' / 'step-00000004'} is from a different run: " in error
    assert words in error
    assert contents(out) == before


def test_resume_of_another_model_or_data(
    fails: Any, given: Any, stopped: Path, tmp_path: Path
) -> None:
    """The same architecture with other weights; one more line of data."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    other = train_runs.make_base(tmp_path / "other")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    model.save_pretrained(other)
    error = fails(given | {"model": str(other)}, "--resume")
    assert "is from a different run: model.model.layers.1.mlp.up_proj.weight was" in error
    assert error.count(" was ") == 1
    with (tmp_path / "data" / "a.jsonl").open("a") as file:
        file.write('{"prompt": "one", "completion": "more"}\n')
    assert "adapters.a.data was" in fails(given, "--resume")
    assert contents(tmp_path / "out") == before


def test_resume_with_adapters_in_another_order(given: Any, stopped: Path, tmp_path: Path) -> None:
    """The samples of each step are those of the first order."""
    root = tmp_path / "out" / "checkpoints"
    shutil.copytree(stopped / "out" / "checkpoints" / "step-00000002", root / "step-00000002")
    given["adapters"] = dict(reversed(given["adapters"].items()))
    train(settings_from_dict(given, {}, "test"), resume=True, progress=False)
    assert same(tmp_path / "out", stopped / "out")


def test_a_second_run_needs_resume(
    fails: Any, given: Any, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody's checkpoints are written over by accident."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    for flags in ((), ("--dry-run",)):
        assert "step-00000004 is a checkpoint of an earlier run; resume" in fails(given, *flags)
    path = train_runs.write_config(tmp_path / "c.json", given)
    assert cli.main(["train", str(path), "--dry-run", "--resume"]) == 0
    assert "2 per forward, 1 process; 4 steps already done" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("state.json", lambda b: b[:-9], "state.json is not a valid training state"),
        ("state.json", lambda b: b.replace(b'"format": 1', b'"format": 7'), "format is 7, expe"),
        ("state.json", lambda b: b'"x"', "state.json is not a valid training state"),
        ("optimizers.safetensors", lambda b: b[:-9], "optimizers.safetensors: truncated"),
        ("adapters/a/adapter_model.safetensors", lambda b: b[:-9], "safetensors: truncated"),
    ],
)
def test_a_damaged_checkpoint(
    fails: Any, given: Any, stopped: Path, tmp_path: Path, name: str, damage: Any, words: str
) -> None:
    """One typed error that names the file."""
    shutil.copytree(stopped / "out", tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "step-00000004" / name
    path.write_bytes(damage(path.read_bytes()))
    assert words in fails(given, "--resume")
    if "adapter_model" not in name:  # those are read when the weights are
        assert words in fails(given, "--resume", "--dry-run")


def test_a_copied_head_beside_defaults(given: Any, tmp_path: Path) -> None:
    """One adapter owns a head, the other takes all linear layers: both load alone, and resume."""
    given["adapters"]["a"]["modules_to_save"] = ["lm_head"]
    given["adapters"]["b"] = {"data": given["adapters"]["b"]["data"], "r": 3, "lr": 1e-2}
    whole = train(settings_from_dict(given, {}, "test"), progress=False)
    tensors = train_runs.saved(tmp_path / "out")
    assert "a:base_model.model.lm_head.weight" in tensors
    assert len([key for key in tensors if key.startswith("b:")]) == 2 * 14
    for name, folder in whole.adapters.items():
        model = fastlora.LoraModel.from_pretrained(tiny_llama(), folder, name)
        assert list(model.peft_config) == [name]
    root = tmp_path / "again" / "checkpoints"
    shutil.copytree(tmp_path / "out" / "checkpoints" / "step-00000002", root / "step-00000002")
    settings = settings_from_dict(given, {"out": str(tmp_path / "again")}, "test")
    assert train(settings, resume=True, progress=False).resumed_from == 2
    assert same(tmp_path / "again", tensors)


# ------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("limit", [200, 3_000, 20_000, 45_000])
def test_a_disk_that_fills(
    given: Any, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The system refuses to write on at any point: the old checkpoint is whole, and resumes."""
    settings = settings_from_dict(given, {}, "test")
    save, limits = Run.save_adapters_and_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)
    kept: dict[str, bytes] = {}

    def limited(run: Run) -> None:
        if run.step == 2:
            save(run)
            kept.update(contents(run.root))
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_adapters_and_checkpoint", limited)
        with pytest.raises(fastlora.FastLoraError, match="could not be written"):
            train(settings, progress=False)
    root = tmp_path / "out" / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000002"]
    assert contents(root) == kept and len(kept) == 6
    train(settings, resume=True, progress=False)
    assert same(tmp_path / "out", stopped / "out")


def test_message_about_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(fastlora.FastLoraError, match=r"log\.jsonl could not be read \("):
        read_logged_losses(tmp_path)
