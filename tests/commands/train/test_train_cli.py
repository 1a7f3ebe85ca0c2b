"""`fastlora train` on a tiny Llama: what it writes, kills and resumes, several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.testing import assert_within_budget
from fastlora.train import checkpoint
from tests.support import programs, train_runs
from tests.support.tiny import tiny_llama
from tests.support.train_runs import log, same


@pytest.fixture
def start(base: Path, data: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``start(out, *flags, **config changes)`` runs the command here: the run's folder."""

    def run(out: str, *flags: object, **changes: Any) -> Path:
        given = train_runs.config(base, data, tmp_path / out, **changes)
        train_runs.train(tmp_path / f"{out}.json", given, *flags)
        return tmp_path / out

    return run


@pytest.fixture(scope="module")
def whole(base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    train_runs.train(folder / "c.json", train_runs.config(base, data, folder / "whole"))
    return folder / "whole"


# ------------------------------------------------------------------------------------ a whole run


def test_what_a_run_writes(whole: Path) -> None:
    """Adapters, the last checkpoints, and a log in which every adapter's loss falls."""
    pytest.importorskip("matplotlib", reason="draws the losses")
    written = {"a", "b", "checkpoints", "log.jsonl", "losses.csv", "losses.png"}
    assert {path.name for path in whole.iterdir()} == written
    kept = [path.name for path in checkpoint.list_checkpoints(whole / "checkpoints")]
    assert kept == ["step-00000006", "step-00000008"]
    steps = log(whole)
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    for name in "ab":
        seen = [entry["loss"][name] for entry in steps if name in entry["loss"]]
        assert seen[-1] < seen[0]
    # Warm-up over 3 of its 8 steps, then down to 0; entries have the next step's rate.
    rates = [entry["next_lr"]["a"] for entry in steps]
    expected = [2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]
    assert rates == pytest.approx([1e-2 * share for share in expected])
    tensors = train_runs.saved(whole)
    b = [key for key in tensors if key.startswith("b:")]
    assert len(b) == 2 * 4 and all("q_proj" in key or "down_proj" in key for key in b)
    assert all(tensor.any() for tensor in tensors.values())
    config = json.loads((whole / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert config["lora_dropout"] == 0.1 and config["task_type"] == "CAUSAL_LM"


def test_peft_reads_the_result(whole: Path, base: Path) -> None:
    """Logits in PEFT are those of the adapter in fastlora."""
    peft = pytest.importorskip("peft")
    import fastlora

    ids = torch.randint(0, 95, (2, 9))
    for name in "ab":
        ours = fastlora.LoraModel.from_pretrained(tiny_llama(), whole / name)
        twin = peft.PeftModel.from_pretrained(tiny_llama(), str(whole / name)).eval()
        with torch.no_grad():
            found, theirs = ours(input_ids=ids).logits, twin(input_ids=ids).logits
            bare = tiny_llama().eval()(input_ids=ids).logits
            exact = twin.double()(input_ids=ids).logits.double()
        assert_within_budget(found, theirs, exact, name)
        assert (found - bare).abs().max() > 1e-3


# ----------------------------------------------------------------------------- killed and resumed


def test_kill_and_resume(whole: Path, start: Any, base: Path, data: Any, tmp_path: Path) -> None:
    """A run that is killed while it saves a checkpoint, and resumed, ends as the whole run."""
    from tests.support.forked_runs import ForkedRun, KillInState

    out = tmp_path / "killed"
    config = train_runs.write_config(tmp_path / "killed.json", train_runs.config(base, data, out))
    run = ForkedRun(["train", config, "--quiet"], tmp_path / "printed.txt", KillInState(6))
    assert run.wait() == -9, run.printed()
    root = out / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000003"]
    leftovers = list(root.glob(".step-*.tmp"))
    assert len(leftovers) == 1 and (leftovers[0] / "new" / "adapters" / "a").is_dir()
    # The adapters of step 6 were saved before its checkpoint.
    assert {key[0] for key in train_runs.saved(out)} == {"a", "b"}

    assert same(start("killed", "--resume"), whole)
    assert not list(root.glob(".step-*.tmp"))
    assert [entry["step"] for entry in log(out)] == list(range(1, 9))
    assert log(out) == log(whole)
    state = checkpoint.read_checkpoint_state(root / "step-00000008")
    assert state.optimizers["a"]["counts"]["steps"] == 8


def test_resume_of_a_run_that_has_ended(
    start: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left to do; the adapters come again."""
    shutil.copytree(whole / "checkpoints", tmp_path / "again" / "checkpoints")
    assert same(start("again", "--resume"), whole)
    assert "resumed after step 8 of 8" in capsys.readouterr().out


def test_resume_without_a_checkpoint_starts(start: Any, whole: Path) -> None:
    """A run killed before its first checkpoint starts again."""
    assert same(start("fresh", "--resume"), whole)


def test_the_base_models_own_dropout_is_resumed_too(start: Any, data: Any, tmp_path: Path) -> None:
    """OPT drops activations in training; the masks of a resumed run are the whole run's."""
    transformers = pytest.importorskip("transformers")
    folder = train_runs.make_base(tmp_path / "llama")
    config = transformers.OPTConfig(
        **{"vocab_size": 97, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "word_embed_proj_dim": 32, "dropout": 0.3},
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    model = {"model": str(folder), "defaults": {"targets": ["q_proj", "fc1"]}}
    adapters = {"a": {"data": str(data["a"]), "r": 2, "lr": 1e-2}}
    given = {**model, "adapters": adapters, "max_length": 48, "steps": 4, "save_every": 2}
    out = start("opt", **given)
    again = tmp_path / "resumed" / "checkpoints"
    shutil.copytree(out / "checkpoints" / "step-00000002", again / "step-00000002")
    assert same(out, start("resumed", "--resume", **given))


# ------------------------------------------------------------------------------- several processes


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_give_what_one_gives(
    whole: Path, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """torchrun on gloo, dropout on: two addends have one sum, so equal bit for bit."""
    path = train_runs.write_config(
        tmp_path / "c.json", train_runs.config(base, data, tmp_path / "two")
    )
    done = programs.run(*TWO_PROCESSES, "-m", "fastlora", "train", path, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved in") == 2
    assert log(tmp_path / "two", "processes")[0]["processes"] == 2
    assert log(whole, "processes")[0]["processes"] == 1
    assert log(tmp_path / "two") == log(whole)
    assert same(tmp_path / "two", whole)


def test_processes_end_the_threads_of_their_group(tmp_path: Path) -> None:
    """Gloo aborts a process in which its threads still run at the exit."""
    script = tmp_path / "group.py"
    script.write_text(
        "import weakref\n"
        "import torch.distributed as dist\n"
        "from fastlora.train.processes import RunProcesses\n"
        "processes = RunProcesses(cpu=True)\n"
        "group = weakref.ref(dist.group.WORLD)\n"
        "import torch.distributed.nn\n"
        "processes.close_trackers_and_leave_group()\n"
        "assert group() is None\n"
    )
    done = programs.run(*TWO_PROCESSES, str(script))
    assert done.returncode == 0, done.stderr[-3000:]
