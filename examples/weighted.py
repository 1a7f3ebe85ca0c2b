"""Weighted adapters: a sum of two that were trained apart.

python examples/weighted.py
"""

from __future__ import annotations

from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, get_peft_model


def main() -> dict[str, float]:
    """Returns losses on both tasks of each adapter and of their sum."""
    tasks = {"ones": counting(step=1), "threes": counting(step=3)}
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"), "ones")
    model.add_adapter("threes", LoraConfig(r=8, target_modules="all-linear"))
    for name, ids in tasks.items():
        model.set_adapter(name)
        train(model, ids)
    # "cat" adds the updates exactly, at the sum of the ranks; "svd" at a rank of yours.
    model.add_weighted_adapter(["ones", "threes"], [0.5, 0.5], "both", combination_type="cat")
    losses = {}
    for name in ("ones", "threes", "both"):
        model.set_adapter(name)
        losses |= {f"{name} on {task}": loss_on(model, ids) for task, ids in tasks.items()}
    return losses


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
