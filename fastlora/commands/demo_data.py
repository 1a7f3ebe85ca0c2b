"""The demo's text: where it lies, its tokens, and the batches made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora.train.data import Batch, Corpus, DataError, Order, Reading, collate, encode

_MAX_LENGTH = 512


def shipped(name: str) -> Path:
    """Returns a file of ``examples/data`` in the checkout; raises `DataError` without one."""
    path = Path(__file__).resolve().parents[2] / "examples" / "data" / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the demo's text lies in the source checkout, not in the installed "
            "package; run it from a checkout (make demo), or pass --data FILE and --prompt TEXT"
        )
    return path


def read_styles(files: Sequence[Path], tokenizer: Any) -> dict[str, Corpus]:
    """Returns each file's examples under its name, as chats without a system prompt.

    Raises:
        DataError: A file is missing or damaged, or two have one name.
    """
    data: dict[str, Corpus] = {}
    for path in files:
        if path.stem in data:
            raise DataError(f"{path}: there is an adapter {path.stem!r} already; rename a file")
        data[path.stem] = encode([path], tokenizer, _MAX_LENGTH, Reading(chat=True))
    return data


def make_batches(
    data: Mapping[str, Corpus], pad: int, steps: int, size: int, device: torch.device
) -> list[Batch]:
    """Returns ``steps`` batches of ``size`` examples, drawn from all adapters' data together.

    Every example is used once before any is used again, so a batch may have several samples of one
    adapter and none of another.
    """
    order = Order({name: len(corpus) for name, corpus in data.items()}, size, seed=0)
    return [collate(order.rows(step), data, pad, device) for step in range(steps)]
