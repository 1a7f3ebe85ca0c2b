"""Encode samples as tokens, and mark the tokens that contribute to the loss.

The tokens of a sample are the same as in TRL's SFTTrainer (1.16). A text, or a completion that is
text, is followed by the tokenizer's end token. A chat is formatted by the tokenizer's chat
template. A prompt and its completion are encoded together. The loss begins at the first token that
differs from the tokens of the prompt alone, so a token that spans the boundary is learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.train.data.files import DataError, SampleLocation
from fastlora.train.data.formats import (
    DataOptions,
    Messages,
    TextOrChatSample,
    alpaca_prompt,
    read_samples,
    single_message_chat,
)
from fastlora.train.data.packing import pack_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Number of texts in one call of the tokenizer.
_CHUNK = 512
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """The tokenized training or evaluation samples of one adapter.

    The methods `token_ids` and `labels` return the token ids and the labels of a sample. The corpus
    stores the tokens and the loss masks of the samples, from which `labels` creates the labels.

    Attributes:
        ids: Tokens of all samples, int32.
        counts: Whether each token contributes to the loss, bool. The first token of a sample never
            does, because no token precedes it.
        ends: Index in ``ids`` after the last token of each sample.
        sources: Source of each sample.
        digest: Digest of the content of the files.
        documents: Lengths of the packed documents of each sample if they are kept separate;
            otherwise None.
        cut: Number of samples that were truncated.
        notes: Notes about the files, one per line.
        example: One of the samples, before encoding.
        formats: Format of each file.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    ends: list[int]
    sources: list[SampleLocation]
    digest: str
    documents: list[list[int]] | None = None
    cut: int = 0
    notes: tuple[str, ...] = ()
    example: TextOrChatSample | None = None
    formats: tuple[str, ...] = ()
    _counted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        sums = torch.nn.functional.pad(self.counts.long().cumsum(0), (1, 0))
        starts = [0, *self.ends[:-1]]
        self._counted[:] = (sums[self.ends] - sums[starts]).tolist()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ends)

    def __str__(self) -> str:
        """Return a one-line summary with the numbers of samples and tokens."""
        cut = f" ({self.cut} truncated)" if self.cut else ""
        what = "sample" if self.documents is None else "row"
        return (
            f"{len(self)} {what}{'s' if len(self) > 1 else ''}{cut}, {len(self.ids):,} "
            f"token{'s' if len(self.ids) > 1 else ''} ({sum(self._counted):,} with loss)"
        )

    def num_tokens(self, sample_index: int) -> int:
        """Return the number of tokens in a sample."""
        return self.ends[sample_index] - (self.ends[sample_index - 1] if sample_index else 0)

    def num_loss_tokens(self, sample_index: int) -> int:
        """Return the number of tokens in a sample that contribute to the loss."""
        return self._counted[sample_index]

    def token_ids(self, sample_index: int) -> torch.Tensor:
        """Return the token ids of a sample as a tensor.

        The dtype is int64.
        """
        return self.ids[self._span(sample_index)].long()

    def labels(self, sample_index: int, ignore_index: int) -> torch.Tensor:
        """Return the labels of a sample as a tensor.

        The dtype is int64. Tokens that do not contribute to the loss have the label
        ``ignore_index``.
        """
        span = self._span(sample_index)
        return torch.where(self.counts[span], self.ids[span].long(), ignore_index)

    def _span(self, sample_index: int) -> slice:
        return slice(
            self.ends[sample_index] - self.num_tokens(sample_index), self.ends[sample_index]
        )


class _TokenizedDocument(NamedTuple):
    """A tokenized document.

    Attributes:
        source: Source of the document.
        ids: Tokens of the document.
        counts: Whether each token contributes to the loss, if a token precedes it.
        parted: Number of tokens at the end of the prompt that change when the completion follows.
    """

    source: SampleLocation
    ids: list[int]
    counts: list[bool]
    parted: int = 0

    def slice_tokens(self, start: int, stop: int) -> _TokenizedDocument:
        """Return the tokens from ``start`` to ``stop`` as a new document."""
        return self._replace(ids=self.ids[start:stop], counts=self.counts[start:stop])

    @property
    def has_loss_tokens(self) -> bool:
        """Whether any tokens contribute to the loss.

        These are tokens of the document. The document is assumed to have a row of its own. No token
        then precedes the first token of the document, so the first token does not contribute to the
        loss.
        """
        return any(self.counts[1:])


def tokenize_files(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    options: DataOptions | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> TokenizedCorpus:
    """Read and tokenize the samples in the given files.

    A sample longer than ``max_length`` is truncated. A plain text file is instead split into as
    many samples as necessary. The packings ``"bfd_split"`` and ``"wrapped"`` split samples too.
    Samples in which no token contributes to the loss are left out.

    Args:
        paths: Files to read; see `read_samples`.
        tokenizer: The tokenizer of the base model.
        max_length: Maximum number of tokens in a sample or a packed row, at least 2.
        options: Options; None for the defaults.
        advance: Function that is called with the number of samples encoded since the last call.

    Raises:
        DataError: See `read_samples`; or a chat template is missing, cannot format a chat, or does
            not mark the assistant's messages although ``assistant_only_loss`` is on; or no sample
            has a loss.
    """
    options = options or DataOptions()
    samples, digest, formats, notes = read_samples(paths, options)
    _check_compatible_with_options(samples, tokenizer, options)
    splits = options.packing in ("bfd_split", "wrapped")  # these packings split long samples
    documents: list[_TokenizedDocument] = []
    cut = parted = 0
    empty: list[SampleLocation] = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        for sample, found in zip(chunk, _tokenize_chunk(chunk, tokenizer, options), strict=True):
            size = len(found.ids)
            parted += found.parted > 0
            if sample.ends and not splits:
                found = found.slice_tokens(0, max_length)
                cut += size > max_length and found.has_loss_tokens
            if not found.has_loss_tokens:
                empty.append(found.source)
            elif sample.ends:
                documents.append(found)
            else:
                pieces = (
                    found.slice_tokens(at, at + max_length) for at in range(0, size, max_length)
                )
                # A piece of a single token has no loss.
                documents += [piece for piece in pieces if piece.has_loss_tokens]
        if advance is not None:
            advance(len(chunk))
    if not documents:
        raise DataError(
            f"{empty[0]}: neither this sample nor any other sample of the same adapter has tokens "
            f"to train on; the prompts may be longer than max_length ({max_length})"
        )
    if empty:
        notes.append(
            f"{len(empty)} of {len(samples)} samples are skipped: their first {max_length} tokens "
            f"contain nothing to train on (the first is {empty[0]})"
        )
    if parted:
        notes.append(
            f"in {parted} samples, the last tokens of the prompt change when the completion is "
            "appended; their loss starts at the first token that differs (to avoid this, end "
            "prompts at the end of a word)"
        )
    more = {"digest": digest, "cut": cut, "example": samples[0], "formats": tuple(formats)}
    if options.packing is None:
        return _corpus_from_rows(
            [[d] for d in documents], separate_documents=False, notes=tuple(notes), **more
        )
    rows = _pack_rows(documents, max_length, options.packing)
    separate_documents = options.packing != "wrapped"
    notes.append(
        f"packed by {options.packing}: {len(documents)} samples in {len(rows)} rows of at most "
        f"{max_length} tokens, "
        + (
            "each with its own positions and attention"
            if separate_documents
            else "without separating samples within a row"
        )
    )
    return _corpus_from_rows(
        rows, separate_documents=separate_documents, notes=tuple(notes), **more
    )


def format_and_tokenize_prompt(
    text: str, corpus: TokenizedCorpus, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Format a prompt in the same way as the training data, and return its token ids."""
    example = corpus.example
    if example is not None and example.is_chat:
        return _tokenize_chat(
            tokenizer, single_message_chat("user", text), {}, add_generation_prompt=True
        )[0]
    if corpus.formats[:1] == ("alpaca",):
        text = alpaca_prompt(text)
    (ids,) = _tokenize_texts([text], tokenizer)
    return ids


def _pack_rows(
    documents: list[_TokenizedDocument], size: int, strategy: str
) -> list[list[_TokenizedDocument]]:
    """Pack documents into rows.

    Rows in which no token contributes to the loss are dropped.
    """
    rows = pack_documents([len(d.ids) for d in documents], size, strategy)
    found = [[documents[i].slice_tokens(start, stop) for i, start, stop in row] for row in rows]
    # In wrapped rows, the first token of a document follows the previous document.
    flat = strategy == "wrapped"
    return [
        row
        for row in found
        if any(
            piece.has_loss_tokens or (flat and n and any(piece.counts))
            for n, piece in enumerate(row)
        )
    ]


def _corpus_from_rows(
    rows: list[list[_TokenizedDocument]], *, separate_documents: bool, **more: Any
) -> TokenizedCorpus:
    """Create a tokenized corpus from rows that each contain one or more documents."""
    tokens = [torch.tensor(d.ids, dtype=torch.int32) for row in rows for d in row]
    counts = [
        torch.tensor(
            [d.counts[0] and n > 0 and not separate_documents, *d.counts[1:]], dtype=torch.bool
        )
        for row in rows
        for n, d in enumerate(row)
    ]
    lengths = [[len(d.ids) for d in row] for row in rows]
    return TokenizedCorpus(
        torch.cat(tokens),
        torch.cat(counts),
        list(accumulate(map(sum, lengths))),
        [row[0].source._replace(others=len(row) - 1) for row in rows],
        documents=lengths if separate_documents else None,
        **more,
    )


def _check_compatible_with_options(
    samples: Sequence[TextOrChatSample], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> None:
    """Raise `DataError` unless the samples and the tokenizer are compatible with the options.

    If a sample is a chat, the tokenizer must have a chat template. With ``assistant_only_loss``,
    all samples must be chats, and the chat template must mark the assistant's messages.
    """
    chat = next((sample for sample in samples if sample.is_chat), None)
    text = next((sample for sample in samples if not sample.is_chat), None)
    if options.assistant_only_loss and text is not None:
        raise DataError(
            f"{text.source}: this sample is not a chat, but assistant_only_loss is on; use data "
            "with a 'messages' or 'conversations' column, or set chat = true to convert prompts "
            "and completions to chats"
        )
    if chat is None:
        return
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"{chat.source}: this sample is a chat, but the base model's tokenizer has no chat "
            "template; set chat_template to a file that contains one"
        )
    text_of = template.get("default", "") if isinstance(template, dict) else template
    if options.assistant_only_loss and not _GENERATION.search(text_of):
        raise DataError(
            "assistant_only_loss needs a chat template that marks the assistant's turns with "
            "{% generation %} and {% endgeneration %}, but the base model's template does not; "
            "set chat_template to a file that contains such a template"
        )


def _tokenize_chunk(
    samples: Sequence[TextOrChatSample], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Iterator[_TokenizedDocument]:
    """Tokenize a chunk of samples, and yield a tokenized document for each sample.

    All texts of the chunk are tokenized together. Each chat is tokenized when its document is
    yielded. Each document includes its loss mask, which depends on the options.
    """
    end = tokenizer.eos_token or ""
    heads: list[str] = []
    wholes: list[str] = []
    for _, prompt, text, _, ends in samples:
        if isinstance(text, str):
            heads += [prompt] if isinstance(prompt, str) else []
            ended = text if not ends or text.endswith(end) else text + end
            wholes.append((heads[-1] if prompt is not None else "") + ended)
    heads_ids, wholes_ids = (
        iter(_tokenize_texts(heads, tokenizer)),
        iter(_tokenize_texts(wholes, tokenizer)),
    )
    for sample in samples:
        if sample.is_chat:
            yield _tokenize_chat_sample(sample, tokenizer, options)
            continue
        head = [] if sample.prompt is None else next(heads_ids)
        yield _document_with_masked_prompt(sample.source, head, next(wholes_ids), options)


def _tokenize_chat_sample(
    sample: TextOrChatSample, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> _TokenizedDocument:
    prompt: Any = sample.prompt or []
    head: list[int] = []
    try:
        if prompt:
            head, _ = _tokenize_chat(
                tokenizer, prompt, sample.template_kwargs, add_generation_prompt=True
            )
        whole = prompt + sample.text
        own = options.assistant_only_loss
        ids, assistant_mask = _tokenize_chat(
            tokenizer, whole, sample.template_kwargs, return_assistant_mask=own
        )
    except Exception as error:  # a template may raise any error
        raise DataError(
            f"{sample.source}: the tokenizer's chat template rejected this chat ({error})"
        ) from error
    found = _document_with_masked_prompt(sample.source, head, ids, options)
    if assistant_mask is None:
        return found
    if not any(assistant_mask):
        raise DataError(
            f"{sample.source}: assistant_only_loss is on, but the chat template marks no assistant "
            "tokens in this chat"
        )
    both = [
        mine and bool(theirs) for mine, theirs in zip(found.counts, assistant_mask, strict=True)
    ]
    return found._replace(counts=both)


def _document_with_masked_prompt(
    source: SampleLocation,
    prompt_token_ids: list[int],
    document_token_ids: list[int],
    options: DataOptions,
) -> _TokenizedDocument:
    """Create a tokenized document whose prompt is masked out of the loss.

    ``document_token_ids`` contains the tokens of the document, and ``prompt_token_ids`` contains
    the tokens of the prompt alone. The masked tokens are the prefix that the document shares with
    the prompt: the loss starts at the first token of the document that differs from the prompt. The
    result also stores the source and the number of prompt tokens after the shared prefix. Without
    ``completion_only_loss``, no token is masked. The document is not truncated.
    """
    same = next(
        (
            n
            for n, (a, b) in enumerate(zip(prompt_token_ids, document_token_ids, strict=False))
            if a != b
        ),
        None,
    )
    start = min(len(prompt_token_ids), len(document_token_ids)) if same is None else same
    parted = len(prompt_token_ids) - start
    first = start if options.completion_only_loss else 0
    return _TokenizedDocument(
        source, document_token_ids, [n >= first for n in range(len(document_token_ids))], parted
    )


def _tokenize_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: long texts are truncated later, so a warning about their length would mislead.
    found: list[list[int]] = tokenizer(text=texts, verbose=False).input_ids
    return found


def _tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    more: Any,
    *,
    add_generation_prompt: bool = False,
    return_assistant_mask: bool = False,
) -> tuple[list[int], list[int] | None]:
    """Tokenize a chat with the chat template.

    Returns a tuple (token ids, mask of the assistant's tokens). The mask is None unless
    ``return_assistant_mask`` is True.
    """
    made: Any = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=return_assistant_mask,
        **more,
    )
    return list(made["input_ids"]), made["assistant_masks"] if return_assistant_mask else None
