"""DistributedDataParallel; run by test_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.testing import assert_within_budget
from tests.support.distributed import steps


def check_steps(folder: Path) -> None:
    """Two processes with half of each batch train what one does with all of it."""
    model = DistributedDataParallel(steps.build())
    steps.train(model, half=True)
    steps.assert_as_one(model)
    if steps.rank() == 0:
        model.module.save_pretrained(folder / "ddp")
    torch.distributed.barrier()
    again = fastlora.LoraModel.from_pretrained(
        steps.tiny_llama(tie_word_embeddings=False), folder / "ddp"
    ).eval()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=steps.tokens(9)).logits
        assert torch.equal(again(input_ids=steps.tokens(9)).logits, expected)


def check_accumulation(folder: Path) -> None:
    """Two backwards a step, the first without communication, are one of the whole batch."""
    model = DistributedDataParallel(steps.build())

    def backward(model: Any, ids: torch.Tensor) -> None:
        first, second = ids.chunk(2)
        with model.no_sync():
            (steps.loss_of(model, first) / 2).backward()
        (steps.loss_of(model, second) / 2).backward()

    steps.train(model, half=True, backward=backward)
    steps.assert_as_one(model)


def check_scaler(folder: Path) -> None:
    """bf16 autocast under a loss scale: the gradients of one process in the same dtypes."""

    def gradients(model: Any, ids: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = steps.loss_of(model, ids)
        scaler.scale(loss).backward()
        bare = model.module if hasattr(model, "module") else model
        named = {n: p for n, p in bare.named_parameters() if p.requires_grad}
        scaler.unscale_(torch.optim.SGD(named.values(), lr=1.0))
        assert scaler._found_inf_per_device  # it looked
        return {n: p.grad for n, p in named.items()}

    ids = steps.tokens(0)
    found = gradients(DistributedDataParallel(steps.build()), steps.own_half(ids), True)
    same = gradients(steps.build(), ids, True)
    truth = gradients(steps.build(torch.float64), ids, False)
    for name, gradient in found.items():
        # What autocast rounds to decides the error, not the fp32 of the gradient.
        assert_within_budget(gradient.bfloat16(), same[name].bfloat16(), truth[name], name)
