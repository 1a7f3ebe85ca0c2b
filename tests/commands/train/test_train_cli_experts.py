"""`fastlora train` on a tiny Qwen3-MoE, with adapters on its experts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.testing import assert_within_budget
from fastlora.train import checkpoint
from tests.support import train_runs
from tests.support.train_runs import log, same

moe_models = pytest.importorskip("tests.support.moe_models", reason="needs transformers 5")


def experts_model() -> Any:
    """A random model of eight experts; the same one at every call."""
    return moe_models.moe_model(
        "qwen3_moe", vocab_size=97, num_experts=8, max_position_embeddings=64
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `experts_model`, which every test leaves as it was."""
    return train_runs.make_base(tmp_path_factory.mktemp("models") / "base", experts_model())


def config(base: Path, data: dict[str, Path], out: Path) -> dict[str, Any]:
    """Two adapters with dropout: one on all stacks, by names of linears, and one on a stack."""
    given = train_runs.config(base, data, out)
    given["adapters"]["a"] |= {"targets": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    given["adapters"]["b"] |= {"targets": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    return given


@pytest.fixture(scope="module")
def whole(base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    train_runs.train(folder / "c.json", config(base, data, folder / "whole"))
    return folder / "whole"


def test_every_factor_trains_and_peft_reads_it(whole: Path, base: Path) -> None:
    """Losses fall, and PEFT computes the logits of each adapter."""
    peft = pytest.importorskip("peft")
    for name in "ab":
        losses = [entry["loss"][name] for entry in log(whole) if name in entry["loss"]]
        assert losses[-1] < losses[0]
    tensors = train_runs.saved(whole)
    assert all(tensor.any() for tensor in tensors.values())
    shapes = {key.partition("layers.0.")[2]: tuple(t.shape) for key, t in tensors.items()}
    assert shapes["mlp.experts.base_layer.lora_A.weight"] == (8 * 2 * 2, 16)  # gate and up
    count = {name: sum("experts" in key for key in tensors if key[0] == name) for name in "ab"}
    assert count == {"a": 2 * 4, "b": 2 * 2}
    ids = torch.randint(0, 95, (2, 9))
    for name in "ab":
        ours = fastlora.LoraModel.from_pretrained(experts_model(), whole / name)
        settings = peft.LoraConfig.from_pretrained(str(whole / name))
        settings.lora_dropout = 0.0  # PEFT has no dropout on stacks, not even in evaluation
        twin = peft.PeftModel.from_pretrained(
            experts_model(), str(whole / name), config=settings
        ).eval()
        with torch.no_grad():
            found, theirs = ours(input_ids=ids).logits, twin(input_ids=ids).logits
            bare = experts_model()(input_ids=ids).logits
            twin.get_base_model().set_experts_implementation("eager")
            exact = twin.double()(input_ids=ids).logits.double()
        assert_within_budget(found, theirs, exact, name)
        assert (found - bare).abs().max() > 1e-3


def test_kill_and_resume(whole: Path, base: Path, data: Any, tmp_path: Path) -> None:
    """A run that is killed while it saves a checkpoint, and resumed, ends as the whole run."""
    from tests.support.forked_runs import ForkedRun, KillInState

    given = config(base, data, tmp_path / "out")
    path = train_runs.write_config(tmp_path / "c.json", given)
    run = ForkedRun(["train", path, "--quiet"], tmp_path / "printed.txt", KillInState(6))
    assert run.wait() == -9, run.printed()
    kept = checkpoint.list_checkpoints(tmp_path / "out" / "checkpoints")
    assert [folder.name for folder in kept] == ["step-00000003"]
    # The adapters of step 6 were saved before its checkpoint.
    assert train_runs.saved(tmp_path / "out").keys() == train_runs.saved(whole).keys()

    assert same(train_runs.train(path, given, "--resume"), whole)
    assert log(tmp_path / "out") == log(whole)


def test_two_processes_give_what_one_gives(
    whole: Path, base: Path, data: Any, tmp_path: Path
) -> None:
    """The experts of a process's tokens are not those of the other's; equal bit for bit."""
    from tests.support.forked_runs import processes

    path = train_runs.write_config(tmp_path / "c.json", config(base, data, tmp_path / "two"))
    for run in processes(2, ["train", path, "--quiet"], tmp_path):
        assert run.wait() == 0, run.printed()
    assert log(tmp_path / "two", "processes")[0]["processes"] == 2
    assert log(tmp_path / "two") == log(whole)
    assert same(tmp_path / "two", whole)


def test_gradient_checkpointing_changes_nothing(
    whole: Path, base: Path, data: Any, tmp_path: Path
) -> None:
    """The masks of dropout are drawn again as they were."""
    given = config(base, data, tmp_path / "out")
    assert same(train_runs.train(tmp_path / "c.json", given, "--gradient-checkpointing"), whole)


def test_dry_run(base: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The factors of every expert are counted, also those of targets that nobody chose."""
    given = config(base, data, tmp_path / "out")
    given["adapters"]["c"] = {"data": str(data["b"]), "r": 8}
    path = train_runs.write_config(tmp_path / "c.json", given)
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    # gate_up [8, 16, 16] at twice the rank, down [8, 16, 8], q_proj [16, 16]
    a = 2 * (8 * 4 * (16 + 16) + 8 * 2 * (16 + 8) + 2 * (16 + 16))
    b = 2 * (8 * 4 * (16 + 8) + 4 * (16 + 16))
    c = 2 * (8 * 4 * (16 + 16) + 8 * 4 * (16 + 8) + 4 * 8 * (16 + 16))  # 8 / 2 experts per token
    assert f"r 8, alpha 16, dropout 0.1; {c:,} parameters on 10 modules" in text
    assert f"r 2, alpha 4, dropout 0.1; {a:,} parameters on 4 modules" in text
    assert f"r 4, alpha 8, dropout 0.1; {b:,} parameters on 4 modules" in text
    assert re.search(r"AdamW\), activations [\d.]+ KiB \(2 samples of ", text)
    assert "replace experts_implementation='grouped_mm'" in text
