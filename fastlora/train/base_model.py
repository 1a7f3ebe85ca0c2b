"""The base model of a training run and its tokenizer: read, or empty to plan with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.integrations.transformers import (
    CANNOT_READ,
    as_causal_model,
    quiet_transformers,
)
from fastlora.train.config import TrainSettings
from fastlora.train.data import Corpus
from fastlora.train.processes import TrainError, needed
from fastlora.train.quantised import (
    dtype_of,
    make_trainable,
    quantisation,
    quantise_empty,
    stored_quantisation,
)
from fastlora.validation import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU = torch.device("cpu")


def load_tokenizer(settings: TrainSettings) -> PreTrainedTokenizerBase:
    """Returns the base model's tokenizer; raises `CheckpointError` where it cannot be read."""
    transformers = _transformers()
    try:
        found = transformers.AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    except CANNOT_READ as error:
        raise CheckpointError(f"{settings.model}: no tokenizer can be read ({error})") from error
    if settings.chat_template is not None:
        try:
            found.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{settings.chat_template}: cannot be read ({error})") from error
    return found


def load_base(
    settings: TrainSettings, device: torch.device = CPU, *, progress: bool = False
) -> PreTrainedModel:
    """Returns the base model; raises `CheckpointError` where it cannot be read.

    One that `load_in` quantises lies on ``device``, any other in CPU memory.
    """
    transformers = _transformers()
    options: dict[str, Any] = {"dtype": dtype_of(settings), "local_files_only": True}
    bars = contextlib.nullcontext() if progress else quiet_transformers(notes=False)
    with as_causal_model(settings.model), bars:
        config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        bits = quantisation(settings, config)
        if bits is not None:
            options |= {"quantization_config": bits, "device_map": {"": device}}
        model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, **options)
    make_trainable(model)
    return model


def empty_base(settings: TrainSettings, *, as_stored: bool = False) -> PreTrainedModel:
    """Returns the base model on the meta device: no weights are read and none allocated.

    Where `load_in` quantises it, its linears are of that kind, and their weights not yet quantised.
    With ``as_stored`` so are those of a model that bitsandbytes had quantised when it was saved.
    """
    transformers = _transformers()
    with as_causal_model(settings.model), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        own, wanted = getattr(config, "dtype", None) or torch.float32, dtype_of(settings)
        dtype = own if wanted == "auto" else getattr(torch, wanted)
        bits = quantisation(settings, config)
        if bits is None and as_stored:
            bits = stored_quantisation(config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits is not None:
        quantise_empty(model, bits)
    return model


def enable_checkpointing(base: PreTrainedModel, settings: TrainSettings) -> None:
    """Makes a base model recompute activations, where a run asks for that."""
    if settings.gradient_checkpointing:
        # transformers 5 renamed it, and warns about the old name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(base, name) for name in names if hasattr(base, name))
        enable({"use_reentrant": False})


def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return needed("transformers")


@torch.no_grad()
def check_keeps_apart(model: nn.Module, packing: str) -> None:
    """Raises `TrainError` unless a model keeps packed documents apart by their positions.

    transformers does so in most of its models; one that doesn't would train on neighbours' words.
    Tries one forward of two rows, in which only the first document of a row changes.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).repeat(2, 1)
    positions = torch.arange(4, device=device).repeat(2)
    found = []
    for first in (0, 8):
        ids[:, :4] = torch.arange(first, first + 4, device=device)
        logits = model(input_ids=ids, position_ids=positions.expand(2, -1), use_cache=False).logits
        found.append(logits[:, 4:].float())
    before, after = found
    if float((before - after).abs().max()) > 1e-3 * float(before.abs().max()):
        raise TrainError(
            f"packing {packing!r} needs a model that keeps packed samples apart by position_ids, "
            f"and {type(model).__name__} does not; use packing 'wrapped', or none"
        )


def check_fit(base: PreTrainedModel, corpora: Iterable[Corpus]) -> None:
    """Raises unless a base model can take the samples, which it would notice in the middle.

    They may be longer than its positions, or have tokens that it has no embedding for.
    """
    positions = getattr(base.config, "max_position_embeddings", None)
    embedding: Any = base.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    for corpus in corpora:
        longest = max(range(len(corpus)), key=corpus.length)
        if positions is not None and corpus.length(longest) > positions:
            raise ConfigError(
                f"{corpus.places[longest]}: has {corpus.length(longest)} tokens, and the base "
                f"model takes {positions}; set max_length to at most that"
            )
        largest = int(corpus.ids.max())
        if largest >= vocabulary:
            raise CheckpointError(
                f"the tokenizer gave token {largest}, and the base model has {vocabulary}; they "
                "are not of one model"
            )
