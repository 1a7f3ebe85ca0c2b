"""Batches of training data: the order in which samples of all adapters come, padded.

The order is a function of seed and step alone, so a run that is resumed, or runs in more processes,
sees the same samples in the same steps.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from fastlora.train.data.tokens import Corpus
from fastlora.train.losses import IGNORED

# Steps that are drawn at once.
_CHUNK = 512


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
        inputs: ``input_ids``, int64 ``[B, T]``, padded on the right, and ``attention_mask``; where
            documents of a row are kept apart, ``position_ids`` in its place, which begin at 0 in
            each document and in the padding.
        labels: int64 ``[B, T]``, -100 where a token does not count.
    """

    adapters: list[str]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def collate(
    rows: Sequence[Row], corpora: Mapping[str, Corpus], pad: int, device: torch.device
) -> Batch:
    """Returns some samples as one padded batch."""
    samples = [(corpora[row.adapter], row.sample) for row in rows]
    tokens = [corpus.tokens(sample) for corpus, sample in samples]
    labels = [corpus.labels(sample, IGNORED) for corpus, sample in samples]
    inputs = {"input_ids": pad_sequence(tokens, True, pad)}
    if any(corpus.documents is not None for corpus, _ in samples):
        # transformers keeps documents apart by their positions where it is given no mask.
        documents = [
            [len(ids)] if corpus.documents is None else corpus.documents[sample]
            for (corpus, sample), ids in zip(samples, tokens, strict=True)
        ]
        width = inputs["input_ids"].shape[1]
        positions = [[*map(torch.arange, (*own, width - sum(own)))] for own in documents]
        inputs["position_ids"] = torch.stack([torch.cat(own) for own in positions])
    else:
        inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in tokens], True)
    return Batch(
        [row.adapter for row in rows],
        {name: tensor.to(device) for name, tensor in inputs.items()},
        pad_sequence(labels, True, IGNORED).to(device),
    )
