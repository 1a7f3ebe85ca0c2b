"""transformers' Trainer: a model of ours is trained, saved, and read by PEFT.

python examples/recipes/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import peft
import torch
from shared import TARGETS, base_model, texts, tokenizer
from tiny import parse_arguments
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import fastlora


def main() -> dict[str, object]:
    """Returns the logged losses, and how far PEFT's logits are from ours."""
    config = fastlora.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = fastlora.get_peft_model(base_model(), config)
    words = tokenizer()
    rows = [words(text + words.eos_token) for text in texts()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=6,
                logging_steps=1,
                per_device_train_batch_size=4,
                learning_rate=2e-2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        )
        trainer.train()
        trainer.save_model(folder)  # PEFT's files
        theirs = peft.PeftModel.from_pretrained(base_model(), folder).eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        far = theirs(input_ids=ids).logits - model.eval()(input_ids=ids).logits
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "PEFT's logits differ by": far.abs().max().item()}


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
