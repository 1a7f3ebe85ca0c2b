"""Generate each adapter's answers to its prompts during evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from fastlora.integrations.transformers import end_token_ids
from fastlora.model import LoraModel
from fastlora.routing.block import adapters
from fastlora.train.data import TokenizedCorpus
from fastlora.train.data.tokenization import format_and_tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: LoraModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_by_adapter: Mapping[str, Sequence[str]],
    corpora: Mapping[str, TokenizedCorpus],
    max_new_tokens: int,
    pad_token_id: int,
) -> dict[str, list[str]]:
    """Generate each adapter's answers to its own prompts.

    Decoding is greedy. All prompts run in one mixed batch. Each prompt is formatted like its
    adapter's training data: as a user turn in a chat, as an instruction in Alpaca's template, or as
    plain text.

    Args:
        model: The model with its adapters.
        tokenizer: The tokenizer of the base model.
        prompts_by_adapter: Dict that maps each adapter to its prompts.
        corpora: Dict that maps each adapter to its training data.
        max_new_tokens: Maximum number of tokens in an answer.
        pad_token_id: Token id for padding.

    Returns:
        A dict that maps each adapter with prompts to the list of its answers, in the order of its
        prompts.
    """
    names = [name for name, texts in prompts_by_adapter.items() for _ in texts]
    asked = [
        torch.tensor(format_and_tokenize_prompt(text, corpora[name], tokenizer), dtype=torch.int64)
        for name, texts in prompts_by_adapter.items()
        for text in texts
    ]
    if not asked:
        return {}
    device = next(model.parameters()).device
    ids = pad_sequence(asked, True, pad_token_id, "left")
    mask = pad_sequence([torch.ones_like(own) for own in asked], True, 0, "left")
    with adapters(model, names):
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_token_id,
            eos_token_id=sorted(end_token_ids(model.get_base_model(), tokenizer)) or None,
        )
    texts = iter(tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True))
    return {name: [next(texts) for _ in own] for name, own in prompts_by_adapter.items() if own}
