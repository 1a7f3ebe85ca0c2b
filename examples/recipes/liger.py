"""Liger's kernels beside ours: they make norms, rotary embeddings, SwiGLU and the loss, we the
linears.

NOT RUN with Liger itself, which needs a GPU: tests/test_recipes.py runs it with a stand-in that
replaces what `apply_liger_kernel_to_llama` replaces. Liger patches the classes of transformers,
so it comes before the model is made; adapters come after that. A model that is there already takes
`model=`, before or after the adapters: Liger then replaces the forwards of its modules, which call
the same linears.

python examples/recipes/liger.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from shared import TARGETS, base_model, texts, tokenizer
from tiny import loss_on, parse_arguments, train

import fastlora


def apply_liger() -> None:
    """Replaces the classes of transformers' Llama; `liger_kernel` has one such function a model."""
    liger = importlib.import_module("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama()


def main(apply: Callable[[], object] = apply_liger) -> dict[str, object]:
    """Returns losses before and after training, and what the report says of the layers."""
    apply()  # first: classes are looked up when a model is made
    model = fastlora.get_peft_model(
        base_model(), fastlora.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    ids = torch.tensor(tokenizer()(texts()).input_ids)
    before = loss_on(model, ids)
    train(model, ids, steps=5)
    report = fastlora.fusion_report(model)
    return {
        "before": before,
        "trained": loss_on(model, ids),
        "eligible": report.fused,
        "layers": len(report.rows),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
