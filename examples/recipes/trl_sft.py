"""TRL's SFTTrainer: with `peft_config=` of ours, and with a model of ours.

python examples/recipes/trl_sft.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from shared import TARGETS, base_model, texts, tokenizer
from tiny import parse_arguments
from trl import SFTConfig, SFTTrainer

import fastlora


def train(model: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, list[float]]:
    """Returns the trained model and the losses that TRL logs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                folder,
                max_steps=4,
                logging_steps=1,
                per_device_train_batch_size=4,
                learning_rate=2e-2,
                bf16=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": texts()}),
            processing_class=tokenizer(),
            **options,
        )
        trainer.train()
    return trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> dict[str, object]:
    """Returns the losses of both ways, and how many layers of the model are eligible for ours."""
    config = fastlora.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    # TRL has PEFT make the model; the config is ours, so its layers compute as ours do.
    model, losses = train(base_model(), peft_config=config)
    # Or the model is made before. Nothing of PEFT's is in it.
    ours, again = train(fastlora.get_peft_model(base_model(), config))
    return {
        "peft_config": losses,
        "our model": again,
        "eligible": fastlora.fusion_report(model).fused,
        "class": type(ours).__name__,
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
