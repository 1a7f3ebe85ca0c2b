"""Hugging Face's Trainer: adapter-only checkpoints, and a resumed run that equals a whole one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="runs Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="Trainer knows adapters by peft's class")

# A process of its own, which imports once what the runs need; each of those is forked from it and
# killed like a program.
PROGRAM = """
import json, multiprocessing, os, signal, sys
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from fastlora import LoraConfig, get_peft_model
from tests.support.tiny import tiny_llama

torch.set_num_threads(1)

class Kill(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

def run(out, kill_at, resume):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 97, (12,), generator=generator) for _ in range(24)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = tiny_llama()
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1,
                        modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    arguments = TrainingArguments(out, max_steps=8, save_steps=4, per_device_train_batch_size=4,
                                  learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
                                  seed=7, gradient_checkpointing=True)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Kill(kill_at)])
    trainer.train(resume_from_checkpoint=resume)
    model.save_pretrained(out + "/final")

for arguments in json.loads(sys.argv[1]):
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join()
    print(process.exitcode)
"""


def run(*runs: tuple[str, int | None, str | None]) -> list[int]:
    """Trains for 8 steps, or until a process kills itself; returns the exit codes.

    Args:
        runs: The folder, the step to be killed at, the checkpoint to go on from.
    """
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(runs)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert len(codes) == len(runs), done.stdout + done.stderr[-2000:]
    return codes


def test_checkpoint_kill_resume(tmp_path: Path) -> None:
    """Killed at step 6, resumed from the checkpoint of step 4: the adapter of a whole run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    checkpoint = broken / "checkpoint-4"
    runs = (whole, None, None), (broken, 6, None), (broken, None, checkpoint)
    as_text = [(str(out), at, source and str(source)) for out, at, source in runs]
    assert run(*as_text) == [0, -signal.SIGKILL, 0]
    files = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not {name for name in files if name.startswith(("model", "pytorch_model"))}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all("lora_" in key or "lm_head" in key for key in saved)
    expected = load_file(whole / "final" / "adapter_model.safetensors")
    resumed = load_file(broken / "final" / "adapter_model.safetensors")
    assert list(expected) == list(resumed)
    for key, tensor in expected.items():
        assert torch.equal(resumed[key], tensor), key
        assert key not in saved or not torch.equal(saved[key], tensor)  # it went on training
