"""Batches of training data: the order in which samples are used, and their padding.

The order is a function of the seed and the step only. A run that is resumed, or that uses more
processes, therefore sees the same samples in the same steps.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from fastlora.train.data.tokenization import TokenizedCorpus
from fastlora.train.losses import IGNORED

# Number of steps that `SampleOrder.count_steps_with_samples` handles at a time.
_CHUNK = 512


def derive_seed(*parts: object, nbytes: int = 7) -> int:
    """Hash the given parts into a seed of ``nbytes`` bytes."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=nbytes).digest(), "big")


class SampleRef(NamedTuple):
    """A reference to one sample of a corpus.

    Each adapter has its own corpus, so the name of the adapter identifies the corpus.

    Attributes:
        adapter: The name of the adapter.
        sample: The index of the sample in the adapter's corpus.
    """

    adapter: str
    sample: int


class SampleOrder:
    """The order in which a run uses its training samples.

    The order determines the samples of each step. In every epoch, the data of all adapters is
    shuffled together.

    Args:
        sizes: Dict that maps each adapter to its number of samples.
        batch_size: Number of samples in a step.
        seed: Seed of the shuffles.
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

    def step_samples(self, step: int) -> list[SampleRef]:
        """Return references to the samples that a training step uses.

        Steps are counted from 0.
        """
        indices = self._slice_shuffled_epochs(step * self.batch_size, self.batch_size).tolist()
        owners = [bisect_right(self.starts, index) - 1 for index in indices]
        return [
            SampleRef(self.names[owner], index - self.starts[owner])
            for index, owner in zip(indices, owners, strict=True)
        ]

    def count_steps_with_samples(self, total_steps: int) -> dict[str, int]:
        """For each adapter, count the steps that contain at least one of its samples.

        Only the first ``total_steps`` steps of the run are considered.
        """
        counts = torch.zeros(len(self.names), dtype=torch.int64)
        edges = torch.tensor(self.starts[1:])
        for first in range(0, total_steps, _CHUNK):
            chunk = min(_CHUNK, total_steps - first)
            indices = self._slice_shuffled_epochs(first * self.batch_size, chunk * self.batch_size)
            owners = torch.bucketize(indices, edges, right=True).view(chunk, -1)
            # Encode each pair of step and adapter as a number, and count each pair once.
            pairs = torch.unique(owners + len(self.names) * torch.arange(chunk).unsqueeze(1))
            counts += torch.bincount(pairs % len(self.names), minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _slice_shuffled_epochs(self, first: int, count: int) -> torch.Tensor:
        """Return a slice of the endless sequence of shuffled epochs.

        The sequence consists of sample indices. Each epoch contains the index of each sample once,
        in random order.

        Args:
            first: Position in the sequence at which the slice starts.
            count: Number of indices in the slice.
        """
        parts = []
        while count:
            epoch, at = divmod(first, self.total)
            parts.append(self._epoch_permutation(epoch)[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _epoch_permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            recent = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs = {**recent, epoch: torch.randperm(self.total, generator=generator)}
        return self._epochs[epoch]


def sorted_micro_batches(
    rows: Sequence[SampleRef], corpora: Mapping[str, TokenizedCorpus], size: int
) -> list[list[SampleRef]]:
    """Sort the samples of a step by length, and split them into micro-batches.

    A micro-batch is a list of ``size`` samples. Each list is the input of one forward pass. Sorting
    reduces the padding.
    """
    ordered = sorted(rows, key=lambda row: -corpora[row.adapter].num_tokens(row.sample))
    return [list(ordered[at : at + size]) for at in range(0, len(ordered), size)]


class TrainBatch(NamedTuple):
    """A batch of training samples.

    It contains the inputs, labels, and adapters of one forward pass.

    Attributes:
        adapters: The adapter of each of the B samples.
        inputs: ``input_ids``, int64 ``[B, T]``, padded on the right, and ``attention_mask``. If
            packed documents are kept separate, ``position_ids`` replaces ``attention_mask``.
            Positions begin at 0 in each document and in the padding.
        labels: Labels of shape ``[B, T]``, int64; -100 for tokens that do not contribute to the
            loss.
    """

    adapters: list[str]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def collate_samples(
    rows: Sequence[SampleRef],
    corpora: Mapping[str, TokenizedCorpus],
    pad: int,
    device: torch.device,
) -> TrainBatch:
    """Combine samples into one padded batch on ``device``."""
    samples = [(corpora[row.adapter], row.sample) for row in rows]
    tokens = [corpus.token_ids(sample) for corpus, sample in samples]
    labels = [corpus.labels(sample, IGNORED) for corpus, sample in samples]
    inputs = {"input_ids": pad_sequence(tokens, True, pad)}
    if any(corpus.documents is not None for corpus, _ in samples):
        # Without a mask, transformers keeps documents separate by their positions.
        documents = [
            [len(ids)] if corpus.documents is None else corpus.documents[sample]
            for (corpus, sample), ids in zip(samples, tokens, strict=True)
        ]
        width = inputs["input_ids"].shape[1]
        positions = [[*map(torch.arange, (*own, width - sum(own)))] for own in documents]
        inputs["position_ids"] = torch.stack([torch.cat(own) for own in positions])
    else:
        inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in tokens], True)
    return TrainBatch(
        [row.adapter for row in rows],
        {name: tensor.to(device) for name, tensor in inputs.items()},
        pad_sequence(labels, True, IGNORED).to(device),
    )
