"""Read training data and arrange it in batches.

Files are read as rows (`files`), rows become samples (`formats`), and samples become tokens
(`tokens`). Documents can be packed together (`packing`), and samples of all adapters are combined
in batches (`batches`).
"""

from fastlora.train.data.batches import Batch, Order, Row, collate, micro_batches, seed_of
from fastlora.train.data.files import DataError, Place
from fastlora.train.data.formats import Reading, Sample, read_samples
from fastlora.train.data.tokens import Corpus, encode

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "Order",
    "Place",
    "Reading",
    "Row",
    "Sample",
    "collate",
    "encode",
    "micro_batches",
    "read_samples",
    "seed_of",
]
