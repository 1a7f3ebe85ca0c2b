"""TRL's SFTTrainer on a mixture of experts: attention and experts train, routers stay frozen.

python examples/recipes/experts_sft.py
"""

from __future__ import annotations

import tempfile

import peft
import torch
from datasets import Dataset
from shared import texts, tokenizer
from tiny import parse_arguments, tiny_moe
from trl import SFTConfig, SFTTrainer

import fastlora


def main() -> dict[str, object]:
    """Returns the logged losses, what trains, and the difference from PEFT.

    It is the largest difference between PEFT's logits and fastlora's.
    """
    base = tiny_moe()  # with a real model, `from_pretrained`
    # Experts get the rank 16 / 2, because two experts process each token.
    config = fastlora.recommend(base).config(r=16, lora_alpha=32, task_type="CAUSAL_LM")
    model = fastlora.get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                folder,
                max_steps=6,
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
        )
        trainer.train()
        model.save_pretrained(folder)  # PEFT's files
        theirs = peft.PeftModel.from_pretrained(tiny_moe(), folder).eval()
    ids = torch.tensor([tokenizer()(texts()[0]).input_ids])
    with torch.no_grad():
        far = theirs(input_ids=ids).logits - model.eval()(input_ids=ids).logits
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "factors of experts": sum(".experts." in name for name in trained),
        "factors of routers": sum(".gate." in name for name in trained),
        "PEFT's logits differ by": far.abs().max().item(),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
