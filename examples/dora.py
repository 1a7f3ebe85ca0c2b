"""DoRA: an adapter that also has a magnitude for each output.

python examples/dora.py
"""

from __future__ import annotations

from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, get_peft_model


def main() -> dict[str, float]:
    """Returns losses of the base model, of a new adapter, and of trained ones of a low rank."""
    ids = counting(step=5)
    losses = {"base": loss_on(tiny_llama(), ids)}
    for name, use_dora in (("lora", False), ("dora", True)):
        config = LoraConfig(r=2, target_modules="all-linear", use_dora=use_dora)
        model = get_peft_model(tiny_llama(), config)
        losses[f"new {name}"] = loss_on(model, ids)  # the base model's: magnitudes are its norms
        train(model, ids)
        losses[name] = loss_on(model, ids)
        losses[f"merged {name}"] = loss_on(model.merge_and_unload(), ids)
    return losses


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
