"""Trainer and accelerate in two processes under torchrun, with DDP and FSDP2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastlora.testing import assert_within_budget
from tests.support.distributed.processes import environment

pytest.importorskip("transformers", reason="runs Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="Trainer knows adapters by peft's class")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program wrote in two processes."""
    path = tmp_path_factory.mktemp("trainer")
    program = "tests.support.distributed.trainer_program"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--module", program, str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    return path


def test_trainer(folder: Path, tmp_path: Path) -> None:
    """Under DDP and under FSDP2 the adapter of one process, to rounding."""
    from tests.support.distributed import trainer_program

    truth = trainer_program.train(tmp_path / "truth", torch.float64).model
    same = trainer_program.train(tmp_path / "same").model
    for name, model in (("truth", truth), ("same", same)):
        model.save_pretrained(tmp_path / name / "final")
    exact, rounded = (adapter(tmp_path / name / "final") for name in ("truth", "same"))
    start = adapter_of_start(tmp_path)
    for name in ("ddp", "fsdp2"):
        found = adapter(folder / name / "checkpoint-4")
        assert found.keys() == exact.keys()
        for key, tensor in found.items():
            assert_within_budget(tensor, rounded[key], exact[key], f"{name}: {key}")
            assert not torch.equal(tensor, start[key]), key


def adapter_of_start(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The adapter before its first step."""
    from tests.support.distributed import trainer_program

    trainer_program.build().save_pretrained(tmp_path / "start")
    return adapter(tmp_path / "start")


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_fsdp2_resumes(folder: Path, kind: str) -> None:
    """Resumed behind step 2 from either kind of checkpoint, the adapter of the whole run."""
    expected, found = (adapter(folder / kind / name) for name in ("whole", "resumed"))
    halfway = adapter(folder / "FULL" / "whole" / "checkpoint-2")
    assert expected.keys() == found.keys() == halfway.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
        assert not torch.equal(halfway[key], tensor), key


def test_accelerate_loop(folder: Path) -> None:
    """accelerate's loop with micro-batches: what plain steps over whole batches give."""
    from tests.support.distributed import trainer_program

    results = {}
    for dtype in (torch.float64, torch.float32):
        model = trainer_program.build(dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, trainer_program.LEARNING_RATE)
        rows = [row["input_ids"] for row in trainer_program.data()]
        for step in range(trainer_program.STEPS):
            ids = torch.stack(rows[4 * step : 4 * step + 4])
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / str(dtype))
        results[dtype] = adapter(folder / str(dtype))
    for key, tensor in adapter(folder / "loop").items():
        assert_within_budget(tensor, results[torch.float32][key], results[torch.float64][key], key)
