"""Hot swap: another adapter's weights in a compiled model, and nothing is compiled anew.

python examples/hot_swap.py
"""

from __future__ import annotations

import tempfile

import torch
import torch._dynamo
from tiny import counting, loss_on, parse_arguments, tiny_llama, train

import fastlora
from fastlora import LoraConfig, get_peft_model


def main() -> dict[str, float]:
    """Returns the losses of two adapters in the compiled model, and of the second one alone."""
    ids = counting(step=1)
    other = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
    train(other, ids)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)  # the largest to come
    compiled = torch.compile(model, backend="eager")  # on a GPU, leave the backend out
    losses = {"first": loss_on(compiled, ids)}
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        fastlora.hotswap_adapter(compiled, folder, "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses["swapped"] = loss_on(compiled, ids)
    return {**losses, "second alone": loss_on(other, ids)}


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
