"""Hugging Face's Trainer: adapter-only checkpoints, and a resumed run that equals a whole one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="runs Trainer")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("peft", reason="Trainer knows adapters by peft's class")

# Run as a program of its own, so that it can be killed like one.
PROGRAM = """
import os, signal, sys
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from fastlora import LoraConfig, get_peft_model
from tests.support.tiny import tiny_llama

out, kill_at, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

generator = torch.Generator().manual_seed(3)
rows = [torch.randint(0, 97, (12,), generator=generator) for _ in range(64)]
data = [{"input_ids": row, "labels": row} for row in rows]
model = tiny_llama()
torch.manual_seed(1)
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1,
                    modules_to_save=["lm_head"], task_type="CAUSAL_LM")
model = get_peft_model(model, config)
arguments = TrainingArguments(out, max_steps=20, save_steps=10, per_device_train_batch_size=4,
                              learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
                              seed=7, gradient_checkpointing=True)
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Kill()])
trainer.train(resume_from_checkpoint=resume)
model.save_pretrained(out + "/final")
"""


def run(out: Path, kill_at: int = -1, resume: str = "") -> int:
    """Trains for 20 steps, or until the process kills itself; returns the exit code."""
    command = [sys.executable, "-c", PROGRAM, str(out)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, str(kill_at), resume], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def test_checkpoint_kill_resume(tmp_path: Path) -> None:
    """Killed at step 13, resumed from the checkpoint of step 10: the adapter of a whole run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole) == 0
    assert run(broken, kill_at=13) == -signal.SIGKILL
    checkpoint = broken / "checkpoint-10"
    files = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not {name for name in files if name.startswith(("model", "pytorch_model"))}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all("lora_" in key or "lm_head" in key for key in saved)
    assert run(broken, resume=str(checkpoint)) == 0
    expected = load_file(whole / "final" / "adapter_model.safetensors")
    resumed = load_file(broken / "final" / "adapter_model.safetensors")
    assert list(expected) == list(resumed)
    for key, tensor in expected.items():
        assert torch.equal(resumed[key], tensor), key
        assert key not in saved or not torch.equal(saved[key], tensor)  # it went on training
