"""The demo's text: JSON lines of prompts and completions, and the batches made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.commands import smollm2
from fastlora.train.losses import IGNORED
from fastlora.validation import FastLoraError


class DemoDataError(FastLoraError, ValueError):
    """The training text is missing or is not JSON lines of prompt and completion."""


class Example(NamedTuple):
    """One line of the training text."""

    prompt: str
    completion: str


def shipped(name: str) -> Path:
    """Returns a file of ``examples/data`` in the checkout; raises `DemoDataError` without one."""
    path = Path(__file__).resolve().parents[2] / "examples" / "data" / name
    if not path.is_file():
        raise DemoDataError(
            f"{path} is missing: the demo's text lies in the source checkout, not in the installed "
            "package; run it from a checkout (make demo), or pass --data FILE and --prompt TEXT"
        )
    return path


def read_examples(path: Path) -> list[Example]:
    """Returns the examples in a JSON lines file.

    Raises:
        DemoDataError: The file is missing or empty, or a line is no object with two non-empty
            strings ``prompt`` and ``completion``.
    """
    examples = []
    for number, line in _read_lines(path):
        try:
            row = json.loads(line)
            example = Example(row["prompt"], row["completion"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DemoDataError(
                f"{path}, line {number}: expected an object with 'prompt' and 'completion', "
                f"got {line[:60]!r}"
            ) from error
        if not all(isinstance(text, str) and text.strip() for text in example):
            raise DemoDataError(f"{path}, line {number}: expected two texts, got {line[:60]!r}")
        examples.append(example)
    return examples


def read_prompts(path: Path) -> list[str]:
    """Returns the non-empty lines of a text file; raises `DemoDataError` where it has none."""
    return [line.strip() for _, line in _read_lines(path)]


class MixedBatch(NamedTuple):
    """A batch whose samples belong to different adapters.

    Attributes:
        adapters: The adapter of each of the B samples.
        inputs: ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the right.
        labels: int64 ``[B, T]``; only the completion and the token that ends it have any.
    """

    adapters: list[str]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor


def make_batches(
    data: Mapping[str, Sequence[Example]],
    tokenizer: Any,
    steps: int,
    size: int,
    device: torch.device,
) -> list[MixedBatch]:
    """Returns ``steps`` batches of ``size`` examples, drawn from all adapters' data together.

    Every example is used once before any is used again (torch's generator gives the order), so a
    batch may have several samples of one adapter and none of another.
    """
    rows = [(name, example) for name, examples in data.items() for example in examples]
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(rows)).tolist()
    return [
        _batch([rows[index] for index in order[step * size : (step + 1) * size]], tokenizer, device)
        for step in range(steps)
    ]


def _batch(rows: Sequence[tuple[str, Example]], tokenizer: Any, device: torch.device) -> MixedBatch:
    encoded = []
    for _, example in rows:
        prompt = smollm2.chat_prompt(example.prompt)
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = example.completion + tokenizer.eos_token
        encoded.append((head, tokenizer(answer, add_special_tokens=False).input_ids))
    width = max(len(head) + len(tail) for head, tail in encoded)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        filled = [v + [fill] * (width - len(v)) for v in values]
        return torch.tensor(filled, device=device)

    inputs = {
        "input_ids": padded([head + tail for head, tail in encoded], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(head + tail) for head, tail in encoded], 0),
    }
    labels = padded([[IGNORED] * len(head) + tail for head, tail in encoded], IGNORED)
    return MixedBatch([name for name, _ in rows], inputs, labels)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Returns the non-empty lines with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoDataError(f"cannot read {path}: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DemoDataError(f"{path} is empty")
    return lines
