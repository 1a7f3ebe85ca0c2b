"""Hugging Face's Trainer and accelerate under torchrun; a program of test_trainer_processes.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

import fastlora
from tests.support.tiny import randomize, tiny_llama

SAMPLES, STEPS, LEARNING_RATE = 4, 4, 0.05
FSDP2 = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}


def build(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama with an adapter and a copy of its head to train."""
    model = tiny_llama(tie_word_embeddings=False).to(dtype)
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    torch.manual_seed(1)
    model = fastlora.get_peft_model(model, fastlora.LoraConfig(r=4, **config))
    randomize(model)
    return model


def data() -> list[dict[str, torch.Tensor]]:
    """Random token ids, all of one length."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 97, (12,), generator=generator) for _ in range(32)]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    out: Path,
    dtype: torch.dtype = torch.float32,
    processes: int = 1,
    resume: str | None = None,
    optim: str = "sgd",
    **arguments: Any,
) -> Trainer:
    """Four steps of four samples, however many processes share them."""
    settings = TrainingArguments(
        str(out),
        max_steps=STEPS,
        save_steps=2,
        per_device_train_batch_size=SAMPLES // processes,
        learning_rate=LEARNING_RATE,
        optim=optim,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **arguments,
    )
    trainer = Trainer(build(dtype), settings, train_dataset=data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def take_fsdp_on_a_cpu() -> None:
    """Makes accelerate take FSDP where it finds no accelerator and would take DDP instead."""
    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def loop(out: Path) -> None:
    """A training loop of one's own with accelerate, in micro-batches."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = torch.stack([row["input_ids"] for row in data()[: SAMPLES * STEPS]])
    own = rows.view(STEPS, 2, accelerator.num_processes, -1, 12)[:, :, accelerator.process_index]
    for micro_batch in own.flatten(0, 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=micro_batch, labels=micro_batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    bare = accelerator.unwrap_model(model)
    bare.save_pretrained(out, is_main_process=accelerator.is_main_process)


def main(folder: Path) -> None:
    """All of it, in each process."""
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    trainer = train(folder / "ddp", processes=processes)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    loop(folder / "loop")
    AcceleratorState._reset_state(reset_partial_state=True)
    take_fsdp_on_a_cpu()
    fsdp: dict[str, Any] = {"processes": processes, "fsdp": True, "fsdp_config": FSDP2}
    trainer = train(folder / "fsdp2", gradient_checkpointing=True, **fsdp)
    assert isinstance(trainer.model, torch.distributed.fsdp.FSDPModule)
    assert fastlora.fusion_report(trainer.model).fused == 6
    # torch cannot load the full state of an optimizer without any, such as plain SGD.
    fsdp["optim"] = "adamw_torch"
    for kind in ("FULL", "SHARDED"):
        fsdp["fsdp_config"] = {**FSDP2, "state_dict_type": f"{kind}_STATE_DICT"}
        halfway = folder / kind / "whole" / "checkpoint-2"
        for name, resume in (("whole", None), ("resumed", str(halfway))):
            AcceleratorState._reset_state(reset_partial_state=True)
            trainer = train(folder / kind / name, resume=resume, **fsdp)
            trainer.model.save_pretrained(folder / kind / name)
    torch.distributed.destroy_process_group()
    # Its threads stay while a wrapped model refers to it, and take an exiting interpreter down with
    # "terminate called without an active exception" now and then.
    sys.stdout.write("everything has run\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
