"""Merging: an adapter in the weights for a while, or for good.

python examples/merging.py
"""

from __future__ import annotations

import torch
from tiny import counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, get_peft_model


def main() -> dict[str, object]:
    """Returns losses unmerged and merged, and whether unmerging gives the weights back."""
    ids = counting(step=2)
    model = get_peft_model(
        tiny_llama().bfloat16(), LoraConfig(r=8, target_modules=["q_proj", "up_proj", "down_proj"])
    )
    train(model, ids)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    unmerged = loss_on(model, ids)
    model.merge_adapter()  # no adapter is computed now
    merged = loss_on(model, ids)
    model.unmerge_adapter()
    back = torch.equal(weight, before)  # in bf16 too: a copy is kept while merged
    plain = model.merge_and_unload(safe_merge=True)  # a transformers model without adapters
    return {
        "unmerged": unmerged,
        "merged": merged,
        "weights are back": back,
        "unloaded": loss_on(plain, ids),
        "class": type(plain).__name__,
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
