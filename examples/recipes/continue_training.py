"""Go on from an adapter: its factors and its config; the optimizer begins anew.

From the command line `init_from = "runs/first/ship"` in an adapter's table does this. Where the
optimizer is to go on too, as it does with a checkpoint: fastlora train run.toml --resume --steps N.

python examples/recipes/continue_training.py
"""

from __future__ import annotations

import tempfile

import torch
from shared import TARGETS, base_model, texts, tokenizer
from tiny import loss_on, parse_arguments, train

import fastlora


def main() -> dict[str, float]:
    """Returns losses: at first, when saved, when loaded, after more steps; and of a new adapter."""
    ids = torch.tensor(tokenizer()(texts()).input_ids)
    config = fastlora.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = fastlora.get_peft_model(base_model(), config)
    first = loss_on(model, ids)
    train(model, ids, steps=5)
    saved = loss_on(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = fastlora.LoraModel.from_pretrained(base_model(), folder, is_trainable=True)
    loaded = loss_on(again, ids)
    train(again, ids, steps=5)
    return {"first": first, "saved": saved, "loaded": loaded, "went on": loss_on(again, ids)}


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
