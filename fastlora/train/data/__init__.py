"""Training data: files to rows (`files`), rows to samples (`formats`), samples to tokens
(`tokens`), documents packed into rows (`packing`), rows of all adapters in batches (`batches`).
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
