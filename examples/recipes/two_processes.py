"""accelerate on two processes: each has half of a batch, and both hold the same adapter.

torchrun --nproc-per-node 2 examples/recipes/two_processes.py
accelerate launch --multi_gpu --num_processes 2 examples/recipes/two_processes.py  # on two GPUs
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from shared import TARGETS, base_model, texts, tokenizer
from tiny import parse_arguments

import fastlora


def main(steps: int = 4) -> dict[str, object]:
    """Returns the mean losses over all processes, and a sum over the adapter in each of them."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
    torch.manual_seed(0)  # the same factors everywhere; DDP sends those of the first anyway
    model = fastlora.get_peft_model(
        base_model(), fastlora.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor(tokenizer()(texts()).input_ids, device=accelerator.device)
    own = ids[accelerator.process_index :: accelerator.num_processes]
    losses = []
    for _ in range(steps):
        loss = model(input_ids=own, labels=own).loss
        accelerator.backward(loss)  # DDP takes the mean of the gradients
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    total = sum(p.detach().double().sum() for p in model.parameters() if p.requires_grad)
    sums = accelerator.gather(total.reshape(1)).tolist()
    accelerator.end_training()
    return {"losses": losses, "sums": sums, "main": accelerator.is_main_process}


if __name__ == "__main__":
    parse_arguments(__doc__)
    found = main()
    if found.pop("main"):
        print(found)
