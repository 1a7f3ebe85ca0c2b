"""Many adapters behind one model: a pool brings in what a batch needs.

python examples/serving_pool.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny import counting, parse_arguments, tiny_llama, train

import fastlora
from fastlora import LoraConfig, get_peft_model


def make_adapters(folder: Path, count: int) -> None:
    """Writes adapters, as somebody has trained them, each into a folder of its name."""
    for step in range(1, count + 1):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
        train(model, counting(step), steps=3)
        model.save_pretrained(folder / f"step{step}")


def main() -> dict[str, object]:
    """Returns the names that the pool knows, those on the device, and whether rows are right."""
    ids = counting(step=1, samples=3)
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder), 4)
        base = tiny_llama()
        with fastlora.AdapterPool(base, max_adapters=2) as pool, torch.no_grad():
            names = pool.register_folder(folder)  # nothing is read yet
            with fastlora.adapters(pool, ["step1", None, "step2"]):  # one for each sample
                mixed = base(input_ids=ids).logits
            with fastlora.adapters(pool, ["step3"] * 3):  # makes room for itself
                base(input_ids=ids)
            tokens = base.generate(
                input_ids=ids[:2, :3], max_new_tokens=2, adapter_names=["step4", "step1"]
            )
            resident = list(pool.loaded_names)
            print(pool.stats())
        one = fastlora.LoraModel.from_pretrained(tiny_llama(), Path(folder) / "step1")
        with torch.no_grad():
            alone = one(input_ids=ids[:1]).logits
    return {
        "names": names,
        "resident": resident,
        "generated": tuple(tokens.shape),
        "largest difference": (mixed[:1] - alone).abs().max().item(),
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
