"""Read training data and arrange it in batches.

Files are read as rows (`files`), rows become samples (`formats`), and samples become tokens
(`tokens`). Documents can be packed together (`packing`), and samples of all adapters are combined
in batches (`batches`).
"""

from fastlora.train.data.batches import (
    SampleOrder,
    SampleRef,
    TrainBatch,
    collate_samples,
    derive_seed,
    sorted_micro_batches,
)
from fastlora.train.data.files import DataError, SampleLocation
from fastlora.train.data.formats import DataOptions, TextOrChatSample, read_samples
from fastlora.train.data.tokenization import TokenizedCorpus, tokenize_files

__all__ = [
    "DataError",
    "DataOptions",
    "SampleOrder",
    "SampleRef",
    "SampleLocation",
    "TokenizedCorpus",
    "TrainBatch",
    "TextOrChatSample",
    "collate_samples",
    "derive_seed",
    "read_samples",
    "sorted_micro_batches",
    "tokenize_files",
]
