"""Layer replication: a deeper model out of the layers of a smaller one, which share their weights.

python examples/deeper.py
"""

from __future__ import annotations

from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, get_peft_model


def main() -> dict[str, object]:
    """Returns the layers, base parameters before and after, and losses."""
    ids = counting(step=4)
    base = tiny_llama()
    parameters = sum(p.numel() for p in base.parameters())
    config = LoraConfig(r=4, target_modules="all-linear", layer_replication=[[0, 2], [0, 2]])
    model = get_peft_model(base, config)  # layers 0, 1, 0, 1, each with LoRA of its own
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    before = loss_on(model, ids)
    train(model, ids)
    return {
        "layers": model.config.num_hidden_layers,
        "base parameters": (parameters, own),
        "before": before,
        "trained": loss_on(model, ids),
        "merged": loss_on(model.merge_and_unload(), ids),  # each copy has its own weights then
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
