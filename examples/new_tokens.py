"""New tokens: the embedding is resized, and of it the new rows alone train.

python examples/new_tokens.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny import WORDS, counting, loss_on, parse_arguments, tiny_llama, train

from fastlora import LoraConfig, LoraModel, get_peft_model


def larger() -> torch.nn.Module:
    """Returns a model whose vocabulary has two more tokens; its head is tied to the embedding."""
    model = tiny_llama(tie_word_embeddings=True)
    model.resize_token_embeddings(WORDS + 2)
    return model


def main() -> dict[str, object]:
    """Returns losses, what trains of the embedding, and the size of the file."""
    new = [WORDS, WORDS + 1]
    ids = counting(step=2)
    ids[:, ::5] = new[0]  # a mark before each run
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], trainable_token_indices=new
    )
    model = get_peft_model(larger(), config)
    embedding = model.get_input_embeddings()
    old_rows = embedding.token_adapter.base_layer.weight.clone()
    before = loss_on(model, ids)
    train(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        # The two rows, not the embedding; the head is tied and has the same rows.
        model.save_pretrained(folder, save_embedding_layers=False)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        loaded = LoraModel.from_pretrained(larger(), folder)
    trained = loss_on(model, ids)
    return {
        "before": before,
        "trained": trained,
        "loaded": loss_on(loaded, ids),
        "rows": tuple(embedding.token_adapter.trainable_tokens_delta["default"].shape),
        "other rows as before": torch.equal(embedding.token_adapter.base_layer.weight, old_rows),
        "bytes": size,
        "merged": loss_on(model.merge_and_unload(), ids),  # the head is still tied
    }


if __name__ == "__main__":
    parse_arguments(__doc__)
    print(main())
