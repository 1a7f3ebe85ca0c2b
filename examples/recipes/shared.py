"""What the recipes here train: the examples' random Llama, a tokenizer for it, and some texts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from tiny import tiny_llama  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

COLORS = ["red", "green", "blue", "gray", "black", "white"]
THINGS = ["sea", "ship", "lamp", "star"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(**settings: object) -> LlamaForCausalLM:
    """Returns the same random model at every call; with a real one, `from_pretrained`."""
    return tiny_llama(tie_word_embeddings=False, **settings)


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of a token a word; with a real model, `AutoTokenizer`."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: number for number, word in enumerate([*special, *COLORS, *THINGS, "the", "is"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def texts() -> list[str]:
    """Returns a text for each thing, its color the one of its number."""
    return [f"the {thing} is {COLORS[i]}" for i, thing in enumerate(THINGS)]
