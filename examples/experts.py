"""Experts: adapters on the stacked weights of a mixture of experts, two of them in one batch.

python examples/experts.py
"""

from __future__ import annotations

import functools
import tempfile

import torch
from tiny import counting, loss_on, parse_arguments, tiny_moe

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.train import AdapterOptimizers, causal_lm_losses, train_adapters


def main() -> dict[str, object]:
    """Returns the rank on experts, and the losses of both adapters before and after training."""
    # Attention with rank 16, experts with rank 16 / 2, because two experts process each token.
    advice = fastlora.recommend(tiny_moe())
    model = get_peft_model(tiny_moe(), advice.config(r=16, lora_alpha=32), "ones")
    # Adapters of one batch may be on different parameters.
    stack = LoraConfig(r=4, target_parameters=["experts.down_proj"], lora_dropout=0.1)
    model.add_adapter("threes", stack)
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
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # PEFT loads "ones"; "threes" has dropout on experts
        loaded = LoraModel.from_pretrained(tiny_moe(), f"{folder}/ones")
    layer = model.get_base_model().model.layers[0].mlp.experts
    return {
        "ranks on experts": {name: one.r for name, one in layer.inner_layers().items()},
        "base": loss_on(tiny_moe(), ids),
        "ones": loss_on(model, ones, adapter_names=["ones"] * len(ones)),
        "threes": loss_on(model, threes, adapter_names=["threes"] * len(threes)),
        "loaded": loss_on(loaded, ones),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
