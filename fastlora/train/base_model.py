"""Load the tokenizer and the base model of a training run, or create the model without weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.integrations.transformers import (
    CANNOT_READ,
    convert_model_load_errors,
    quiet_transformers,
)
from fastlora.train.data import TokenizedCorpus
from fastlora.train.data.tokenization import format_and_tokenize_prompt
from fastlora.train.processes import TrainError, import_or_raise
from fastlora.train.quantization import (
    base_model_dtype,
    bitsandbytes_config,
    prevent_repacking_and_cast_warnings,
    quantize_meta_model,
    stored_bitsandbytes_config,
)
from fastlora.train.settings import TrainSettings
from fastlora.validation import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU = torch.device("cpu")


def load_tokenizer(settings: TrainSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer for the given training settings.

    The tokenizer belongs to the base model that the settings specify. If `chat_template` is set, it
    replaces the chat template of the tokenizer.

    Raises:
        CheckpointError: The tokenizer cannot be read.
        ConfigError: The chat template cannot be read.
    """
    transformers = _transformers()
    try:
        found = transformers.AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    except CANNOT_READ as error:
        raise CheckpointError(f"{settings.model}: cannot load the tokenizer ({error})") from error
    if settings.chat_template is not None:
        try:
            found.chat_template = settings.chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{settings.chat_template}: cannot read the file ({error})"
            ) from error
    return found


def load_base_model(
    settings: TrainSettings, device_if_quantized: torch.device = CPU, *, progress: bool = False
) -> PreTrainedModel:
    """Load and return the base model.

    Args:
        settings: The settings of the run.
        device_if_quantized: Device for a model that `load_in` quantizes. Any other model is loaded
            into CPU memory.
        progress: Whether to show the progress bars of transformers.

    Raises:
        CheckpointError: The model cannot be read.
        ConfigError, TrainError: See `bitsandbytes_config`.
    """
    transformers = _transformers()
    options: dict[str, Any] = {"dtype": base_model_dtype(settings), "local_files_only": True}
    bars = contextlib.nullcontext() if progress else quiet_transformers(hide_messages=False)
    with convert_model_load_errors(settings.model), bars:
        config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        bits = bitsandbytes_config(settings, config)
        if bits is not None:
            options |= {"quantization_config": bits, "device_map": {"": device_if_quantized}}
        model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, **options)
    prevent_repacking_and_cast_warnings(model)
    return model


def build_base_model_on_meta(
    settings: TrainSettings, *, keep_stored_quantization: bool = False
) -> PreTrainedModel:
    """Build the base model on the meta device.

    No weights are read or allocated. If `load_in` is set, the linear layers are replaced with
    quantized layers of bitsandbytes, but their weights are not quantized yet. With
    ``keep_stored_quantization=True``, this also applies to a model that bitsandbytes had already
    quantized when it was saved.
    """
    transformers = _transformers()
    with convert_model_load_errors(settings.model), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        own, wanted = getattr(config, "dtype", None) or torch.float32, base_model_dtype(settings)
        dtype = own if wanted == "auto" else getattr(torch, wanted)
        bits = bitsandbytes_config(settings, config)
        if bits is None and keep_stored_quantization:
            bits = stored_bitsandbytes_config(config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits is not None:
        quantize_meta_model(model, bits)
    return model


def enable_gradient_checkpointing_if_set(base: PreTrainedModel, settings: TrainSettings) -> None:
    """Enable gradient checkpointing in the base model if the settings ask for it."""
    if settings.gradient_checkpointing:
        # transformers 5 renamed the method and warns about the old name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(base, name) for name in names if hasattr(base, name))
        enable({"use_reentrant": False})


def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return import_or_raise("transformers")


@torch.no_grad()
def check_separates_packed_samples(model: nn.Module, packing: str) -> None:
    """Raise `TrainError` unless the model keeps packed samples separate.

    The attention of the model must use ``position_ids`` to separate the documents in a row. Most
    models in transformers do so. In any other model, the tokens of a document would attend to the
    documents before it in the row. The check runs two forward passes that differ only in the first
    document of each row, and compares the logits of the second document.
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
            f"packing {packing!r} requires a model that uses position_ids to keep packed samples "
            f"separate, but {type(model).__name__} does not; set packing to 'wrapped' or turn "
            "packing off"
        )


def check_samples_fit_model(base: PreTrainedModel, corpora: Iterable[TokenizedCorpus]) -> None:
    """Raise an error unless the base model can process all samples.

    Both the length and the token ids of each sample are checked.

    Raises:
        ConfigError: A sample is longer than the model's maximum number of positions.
        CheckpointError: A token id is outside the model's vocabulary.
    """
    positions = _max_positions(base)
    for corpus in corpora:
        longest = max(range(len(corpus)), key=corpus.num_tokens)
        if positions is not None and corpus.num_tokens(longest) > positions:
            raise ConfigError(
                f"{corpus.sources[longest]} has {corpus.num_tokens(longest)} tokens, but the base "
                f"model supports at most {positions}; set max_length to {positions} or less"
            )
        _check_token_ids_fit_model(base, int(corpus.ids.max()))


def check_prompts_fit_model(
    base: PreTrainedModel,
    settings: TrainSettings,
    corpora: Mapping[str, TokenizedCorpus],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise an error unless all prompts and their answers fit the base model.

    A prompt and an answer with the maximum number of tokens must not need more positions than the
    model has. The token ids of a prompt must be in the model's vocabulary. ``corpora`` maps each
    adapter to its training data, whose format determines the format of the prompts.

    Raises:
        ConfigError: A prompt and an answer with the maximum number of tokens need more positions
            than the model has.
        CheckpointError: A token id is outside the model's vocabulary.
    """
    positions, answer = _max_positions(base), settings.sample_tokens
    for adapter in settings.adapters:
        for prompt in adapter.prompts:
            ids = format_and_tokenize_prompt(prompt, corpora[adapter.name], tokenizer)
            _check_token_ids_fit_model(base, max(ids, default=0))
            # The last token of an answer is not an input.
            if positions is not None and len(ids) + answer - 1 > positions:
                remedy = (
                    f"set sample_tokens to {positions - len(ids) + 1} or less"
                    if len(ids) <= positions
                    else "shorten the prompt"
                )
                raise ConfigError(
                    f"adapter {adapter.name!r}: the prompt {prompt[:40]!r} has {len(ids)} tokens, "
                    f"and its answer can have up to {answer} tokens, but the base model has only "
                    f"{positions} positions; {remedy}"
                )


def _max_positions(base: PreTrainedModel) -> int | None:
    """Return the model's maximum number of positions, or None if it has no maximum."""
    return getattr(base.config, "max_position_embeddings", None)


def _check_token_ids_fit_model(base: PreTrainedModel, largest: int) -> None:
    """Raise `CheckpointError` if the largest token id is outside the model's vocabulary."""
    embedding: Any = base.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer produced token id {largest}, but the base model has only "
            f"{vocabulary} token embeddings; use the tokenizer that belongs to the model"
        )
