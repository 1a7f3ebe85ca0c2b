"""PiSSA: an adapter that starts with the main directions of the weights, saved as a plain one.

python examples/pissa.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, LoraModel, get_peft_model


def main() -> dict[str, float]:
    """Returns the loss of the base model, at the start, trained, and loaded as plain LoRA."""
    ids = counting(step=7)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    model = get_peft_model(tiny_llama(), config)
    losses = {"base": loss_on(tiny_llama(), ids), "start": loss_on(model, ids)}
    with tempfile.TemporaryDirectory() as name:
        untrained, plain = Path(name) / "untrained", Path(name) / "plain"
        model.save_pretrained(untrained)
        train(model, ids)
        losses["trained"] = loss_on(model, ids)
        # What PiSSA took out of the weights goes into the adapter, at twice the rank, so that it
        # fits the base model as it was.
        model.save_pretrained(plain, path_initial_model_for_weight_conversion=untrained)
        losses["loaded"] = loss_on(LoraModel.from_pretrained(tiny_llama(), plain), ids)
    return losses


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
