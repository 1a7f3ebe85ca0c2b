"""One adapter: add it, train it, save it, load it into another copy of the base model.

python examples/one_adapter.py
"""

from __future__ import annotations

import tempfile

from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, LoraModel, get_peft_model


def main() -> dict[str, float]:
    """Returns the loss before training, after it, and of the adapter that was loaded."""
    ids = counting(step=3)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.print_trainable_parameters()
    before = loss_on(model, ids)
    train(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # adapter_config.json and adapter_model.safetensors
        loaded = LoraModel.from_pretrained(tiny_llama(), folder)  # peft.PeftModel reads it too
    with model.disable_adapter():  # the base model, for as long as the block lasts
        plain = loss_on(model, ids)
    return {
        "before": before,
        "base": plain,
        "trained": loss_on(model, ids),
        "loaded": loss_on(loaded, ids),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
