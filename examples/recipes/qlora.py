"""QLoRA: adapters on a base model in NF4, as a model of ours and as PEFT's, patched.

From the command line: fastlora train run.toml --load-in 4bit. Needs bitsandbytes.

python examples/recipes/qlora.py
"""

from __future__ import annotations

import tempfile

import peft
import torch
from shared import TARGETS, base_model, texts, tokenizer
from tiny import parse_arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastlora

CONFIG = {"r": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}


def in_nf4(folder: str) -> torch.nn.Module:
    """Returns a model from its folder, quantized while it is read."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # torch.bfloat16 on a GPU
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, device_map="cpu")


def train(model: torch.nn.Module, steps: int = 8) -> list[float]:
    """Returns the losses of some steps over all texts."""
    ids = torch.tensor(tokenizer()(texts()).input_ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, object]:
    """Returns the losses of both ways, and how the layers of each would run."""
    with tempfile.TemporaryDirectory() as folder:
        base_model().save_pretrained(folder)
        torch.manual_seed(0)
        ours = fastlora.get_peft_model(in_nf4(folder), fastlora.LoraConfig(**CONFIG))
        # Norms and the head in fp32, and gradients through the embeddings.
        base = peft.prepare_model_for_kbit_training(
            in_nf4(folder), use_gradient_checkpointing=False
        )
        torch.manual_seed(0)
        theirs = peft.get_peft_model(base, peft.LoraConfig(**CONFIG))
        report = fastlora.patch(theirs)
        return {
            "ours": train(ours),
            "PEFT's, patched": train(theirs),
            "patched layers": len(report.rows),
        }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
