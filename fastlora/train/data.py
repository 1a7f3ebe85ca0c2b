"""Training text: files to tokens, and the order in which samples of all adapters come.

The order is a function of seed and step alone, so a run that is resumed, or runs in more processes,
sees the same samples in the same steps.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.train.losses import IGNORED
from fastlora.validation import FastLoraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that go to the tokenizer at once.
_CHUNK = 512
# What a file is by its name's end: an object a line, one list of objects (or an object a line), a
# line of names and rows below it, one text.
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")


class DataError(FastLoraError, ValueError):
    """A data file is missing, empty, or has a line that cannot be used."""


class Place(NamedTuple):
    """Where a sample is from: a file, and its line there from 1; 0 for a plain text file.

    In a JSON list it is the number of the entry.
    """

    path: Path
    line: int

    def __str__(self) -> str:
        """As messages show it."""
        return f"{self.path}, line {self.line}" if self.line else str(self.path)


class Sample(NamedTuple):
    """A piece of text.

    Attributes:
        place: Where it is from.
        prompt: What the model is given; None where all of the text counts.
        text: What the loss is over.
    """

    place: Place
    prompt: str | None
    text: str


def read_samples(paths: Sequence[Path]) -> tuple[list[Sample], str]:
    """Returns the samples of some files, in order, and a digest of the files' bytes.

    ``.jsonl`` files hold an object a line, with strings ``prompt`` and ``completion``, or ``text``;
    ``.json`` files the same, or one list of such objects; ``.csv`` and ``.tsv`` files have columns
    of these names; ``.txt`` and ``.md`` files are one text each. Raises `DataError`, with file and
    line, where a file is of another kind, missing, empty or no UTF-8, or a line is not as
    described.
    """
    samples: list[Sample] = []
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix.lower() not in KINDS:
            raise DataError(
                f"{path}: expected a file that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{Place(path, line)}: cannot be read ({error})") from error
        digest.update(len(data).to_bytes(8, "little") + data)
        found = _samples(path, text)
        if not found:
            raise DataError(f"{path}: is empty, expected at least one sample")
        samples += found
    return samples, digest.hexdigest()


def _samples(path: Path, text: str) -> list[Sample]:
    """Returns the samples of a file's text."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _of_table(path, text, "," if kind == ".csv" else "\t")
    if kind == ".json" and text.lstrip().startswith("["):
        rows = _json(Place(path, 1), text)
        return [_sample(Place(path, number), row) for number, row in enumerate(rows, 1)]
    if kind in (".jsonl", ".json"):
        # Not splitlines(): U+2028 may stand in a JSON string.
        lines = [(Place(path, n), t) for n, t in enumerate(text.split("\n"), 1) if t.strip()]
        return [_sample(place, _json(place, line)) for place, line in lines]
    return [Sample(Place(path, 0), None, text)] if text.strip() else []


def _of_table(path: Path, text: str, delimiter: str) -> list[Sample]:
    """Returns the samples of a file whose first line names its columns."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a text may be long
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = list(reader.fieldnames or ())
    names, pair = set(columns), {"prompt", "completion"}
    if names and (pair <= names) == ("text" in names):
        raise DataError(
            f"{path}: expected columns 'prompt' and 'completion', or 'text', got {columns}"
        )
    if len(names) < len(columns):
        raise DataError(f"{path}: two columns have the same name: {columns}")
    samples = []
    try:
        for row in reader:
            place = Place(path, reader.line_num)
            if None in row or None in row.values():
                raise DataError(f"{place}: expected {len(names)} columns")
            known = {key: row[key] for key in ("prompt", "completion", "text") if key in row}
            samples.append(_sample(place, known))
    except csv.Error as error:
        place = Place(path, reader.reader.line_num)
        raise DataError(f"{place}: not valid CSV ({error})") from error
    return samples


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _json(place: Place, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}): {_shown(text)}") from error


def _sample(place: Place, row: Any) -> Sample:
    """Returns the sample that an object is."""
    shown = _shown(row)
    keys = set(row) if isinstance(row, dict) else set()
    if {"prompt", "completion"} <= keys and "text" not in keys:
        prompt, text = row["prompt"], row["completion"]
    elif "text" in keys and not keys & {"prompt", "completion"}:
        prompt, text = None, row["text"]
    else:
        raise DataError(
            f"{place}: expected an object with 'prompt' and 'completion', or with 'text', got "
            f"{shown}"
        )
    if not isinstance(text, str) or not (prompt is None or isinstance(prompt, str)):
        raise DataError(f"{place}: expected strings, got {shown}")
    try:
        f"{prompt}{text}".encode()
    except UnicodeEncodeError as error:  # JSON may name half of a character, "\\ud83d"
        raise DataError(f"{place}: a string is no text ({error.reason}), got {shown}") from error
    if not text:
        raise DataError(f"{place}: there is nothing to learn, got {shown}")
    return Sample(place, prompt, text)


@dataclass(frozen=True, eq=False)
class Corpus:
    """One adapter's samples as tokens.

    Attributes:
        ids: All tokens, int32.
        ends: Where each sample ends in ``ids``.
        heads: How many of each sample's first tokens have no label.
        places: Where each sample is from.
        digest: Of the files.
        cut: How many samples were longer than allowed.
    """

    ids: torch.Tensor
    ends: list[int]
    heads: list[int]
    places: list[Place]
    digest: str
    cut: int

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ends)

    def length(self, index: int) -> int:
        """Returns how many tokens a sample has."""
        return self.ends[index] - (self.ends[index - 1] if index else 0)

    def counted(self, index: int) -> int:
        """Returns how many tokens of a sample have a loss; the first has nothing before it."""
        return self.length(index) - max(self.heads[index], 1)

    def tokens(self, index: int) -> torch.Tensor:
        """Returns a sample's tokens, int64."""
        return self.ids[self.ends[index] - self.length(index) : self.ends[index]].long()


def encode(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    chat: bool = False,
    advance: Callable[[int], object] | None = None,
) -> Corpus:
    """Returns the samples of some files (`read_samples`) as tokens.

    A completion, and a ``text`` of a JSON line, is followed by the tokenizer's end token. What is
    longer than ``max_length``, at least 2, is cut, but for a plain text file: that becomes as many
    samples as it takes. ``advance`` is called with the number of samples since its last call.
    Raises `DataError` as `read_samples`, or where no token of a sample is left to learn from.
    """
    samples, digest = read_samples(paths)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("chat is on, and the base model's tokenizer has no chat template")
    pieces: list[torch.Tensor] = []
    heads: list[int] = []
    places: list[Place] = []
    cut = 0
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        for sample, (head, tail) in zip(chunk, _encoded(chunk, tokenizer, chat), strict=True):
            ids = head + tail
            if sample.place.line:
                cut += len(ids) > max_length
                parts = [ids[:max_length]]
            else:
                parts = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
                if len(parts) > 1 and len(parts[-1]) == 1:
                    parts.pop()  # nothing to predict its token from
            for part in parts:
                if len(part) <= max(len(head), 1):
                    raise DataError(
                        f"{sample.place}: no token is left to learn from: the prompt has "
                        f"{len(head)} tokens, and max_length is {max_length}"
                    )
                pieces.append(torch.tensor(part, dtype=torch.int32))
                heads.append(len(head))
                places.append(sample.place)
        if advance is not None:
            advance(len(chunk))
    ends = list(accumulate(map(len, pieces)))
    return Corpus(torch.cat(pieces), ends, heads, places, digest, cut)


def _encoded(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> list[tuple[list[int], list[int]]]:
    """Returns prompt and labelled tokens of each sample."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompted = [sample for sample in samples if sample.prompt is not None]
    prompts = [sample.prompt or "" for sample in prompted]
    if chat:
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        prompts = [
            str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            for turn in turns
        ]
    heads = iter(_ids(prompts, tokenizer, special=not chat))
    completions = iter(_ids([s.text for s in prompted], tokenizer, special=False))
    texts = iter(_ids([s.text for s in samples if s.prompt is None], tokenizer, special=True))
    found: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        if sample.prompt is None:
            ids = next(texts)
            ended = ids[-1:] == end or not sample.place.line
            found.append(([], ids if ended else ids + end))
        else:
            head = next(heads)
            if end and not chat and len(head) > 1 and head[-1:] == end:
                head = head[:-1]
            found.append((head, next(completions) + end))
    return found


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is cut later, which is no news.
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False).input_ids
    return found


def seed_of(*parts: object, nbytes: int = 7) -> int:
    """Returns a seed that is a function of its parts, of so many bytes."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=nbytes).digest(), "big")


class Row(NamedTuple):
    """One sample of a batch: its adapter, and its number among the adapter's."""

    adapter: str
    sample: int


class Order:
    """Which samples a step has: all adapters' data shuffled together, epoch after epoch.

    ``sizes`` are the numbers of samples by adapter, ``batch_size`` is the samples in a step.
    """

    def __init__(self, sizes: Mapping[str, int], batch_size: int, seed: int) -> None:
        self.names = list(sizes)
        self.starts = [0]
        for size in sizes.values():
            self.starts.append(self.starts[-1] + size)
        self.total = self.starts[-1]
        self.batch_size = batch_size
        self.seed = seed
        self._epochs: dict[int, torch.Tensor] = {}

    def rows(self, step: int) -> list[Row]:
        """Returns the samples of a step, counted from 0."""
        places = self._places(step * self.batch_size, self.batch_size).tolist()
        owners = [bisect_right(self.starts, place) - 1 for place in places]
        return [
            Row(self.names[owner], place - self.starts[owner])
            for place, owner in zip(places, owners, strict=True)
        ]

    def presence(self, steps: int) -> dict[str, int]:
        """Returns in how many of the first steps each adapter has a sample."""
        counts = torch.zeros(len(self.names), dtype=torch.int64)
        edges = torch.tensor(self.starts[1:])
        for first in range(0, steps, _CHUNK):
            chunk = min(_CHUNK, steps - first)
            places = self._places(first * self.batch_size, chunk * self.batch_size)
            owners = torch.bucketize(places, edges, right=True).view(chunk, -1)
            # A number for each pair of step and adapter, each counted once.
            pairs = torch.unique(owners + len(self.names) * torch.arange(chunk).unsqueeze(1))
            counts += torch.bincount(pairs % len(self.names), minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _places(self, first: int, count: int) -> torch.Tensor:
        """Returns a stretch of the endless row of shuffled epochs."""
        parts = []
        while count:
            epoch, at = divmod(first, self.total)
            parts.append(self._epoch(epoch)[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            recent = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs = {**recent, epoch: torch.randperm(self.total, generator=generator)}
        return self._epochs[epoch]


def micro_batches(rows: Sequence[Row], corpora: Mapping[str, Corpus], size: int) -> list[list[Row]]:
    """Returns a step's samples in forwards of ``size``; long samples together, to pad less."""
    ordered = sorted(rows, key=lambda row: -corpora[row.adapter].length(row.sample))
    return [list(ordered[at : at + size]) for at in range(0, len(ordered), size)]


class Batch(NamedTuple):
    """What one forward takes.

    Attributes:
        adapters: The adapter of each of the B samples.
        inputs: ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the right.
        labels: int64 ``[B, T]``, -100 where a token does not count.
    """

    adapters: list[str]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def collate(
    rows: Sequence[Row], corpora: Mapping[str, Corpus], pad: int, device: torch.device
) -> Batch:
    """Returns some samples as one padded batch."""
    tokens = [corpora[row.adapter].tokens(row.sample) for row in rows]
    width = max(len(ids) for ids in tokens)
    input_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        head = corpora[row.adapter].heads[row.sample]
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        labels[i, head : len(ids)] = ids[head:]
    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    return Batch([row.adapter for row in rows], inputs, labels.to(device))
