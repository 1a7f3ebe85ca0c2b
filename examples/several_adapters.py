"""Several adapters on one model: trained in one batch, each as if alone, then run in one batch.

    python examples/several_adapters.py

`multi_adapter_trainer.py` does the same on transformers' Trainer, with checkpoints.
"""

from __future__ import annotations

import functools

import torch
from tiny import counting, loss_on, parse_arguments, tiny_llama

import fastlora
from fastlora import LoraConfig, get_peft_model
from fastlora.train import AdapterOptimizers, causal_lm_losses, train_adapters


def main() -> dict[str, float]:
    """Returns each adapter's loss on its own samples and on the other's."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"), "ones")
    # Another rank, other layers: adapters of one batch need not be alike.
    model.add_adapter("threes", LoraConfig(r=4, target_modules=["up_proj", "down_proj", "o_proj"]))
    ones, threes = counting(step=1), counting(step=3)
    ids = torch.cat((ones, threes))
    names = ["ones"] * len(ones) + ["threes"] * len(threes)  # an adapter for each sample

    train_adapters(model, ["ones", "threes"])
    adamw = functools.partial(torch.optim.AdamW, lr=2e-2)
    optimizers = AdapterOptimizers(model, {"ones": adamw, "threes": adamw}, max_grad_norm=1.0)
    model.train()
    for _ in range(40):
        with fastlora.adapters(model, names, seeds=optimizers.draw_seeds(names)):
            losses = causal_lm_losses(model(input_ids=ids).logits, ids, names)
        optimizers.backward(losses)
        optimizers.step()

    model.eval()
    return {
        "ones on ones": loss_on(model, ones, adapter_names=["ones"] * len(ones)),
        "threes on ones": loss_on(model, ones, adapter_names=["threes"] * len(ones)),
        "threes on threes": loss_on(model, threes, adapter_names=["threes"] * len(threes)),
        "base on threes": loss_on(model, threes, adapter_names=[None] * len(threes)),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
