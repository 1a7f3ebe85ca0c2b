"""The demo's text: JSON lines of prompts and completions, and the batches made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora import smollm2
from fastlora.validation import FastLoraError

IGNORED = -100  # the label that transformers leaves out of the loss


class DemoDataError(FastLoraError, ValueError):
    """The training text is missing or is not JSON lines of prompt and completion."""


class Example(NamedTuple):
    """One line of the training text."""

    prompt: str
    completion: str


def shipped(name: str) -> Path:
    """Returns a file of ``examples/data`` in the checkout; raises `DemoDataError` without one."""
    path = Path(__file__).resolve().parent.parent / "examples" / "data" / name
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


def make_batches(
    examples: Sequence[Example], tokenizer: Any, steps: int, size: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Returns ``steps`` batches of ``size`` examples in random order, padded on the right.

    Every example is used once before any is used again (torch's generator gives the order). Each
    batch has ``input_ids``, ``attention_mask`` and ``labels``, all int64 ``[size, length]``; only
    the completion and the token that ends it have labels.
    """
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(examples)).tolist()
    batches = []
    for step in range(steps):
        rows = []
        for index in order[step * size : (step + 1) * size]:
            prompt = smollm2.chat_prompt(examples[index].prompt)
            head = tokenizer(prompt, add_special_tokens=False).input_ids
            tail = tokenizer(
                examples[index].completion + tokenizer.eos_token, add_special_tokens=False
            ).input_ids
            rows.append((head + tail, [IGNORED] * len(head) + tail))
        width = max(len(ids) for ids, _ in rows)
        pad = tokenizer.pad_token_id
        batch = {
            "input_ids": [ids + [pad] * (width - len(ids)) for ids, _ in rows],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
            "labels": [labels + [IGNORED] * (width - len(labels)) for _, labels in rows],
        }
        batches.append({k: torch.tensor(v, device=device) for k, v in batch.items()})
    return batches


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
