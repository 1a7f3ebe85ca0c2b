"""The base models that commands load, and what they say meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastlora.validation import FastLoraError


class CommandError(FastLoraError):
    """A command cannot do what it was asked."""


def load_base(base: str, dtype: str, command: str = "merge") -> Any:
    """Returns a base model from its folder, or from the cache of Hugging Face's hub."""
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1  # the hub's names have one
    if is_path and not Path(base).exists():
        raise CommandError(f"{base}: no such folder")
    step(f"loading {base}")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise CommandError(
            f"{command} needs transformers; install it with: pip install 'fastlora-triton[hf]'"
        ) from error
    from fastlora.integrations.transformers import as_causal_model

    with as_causal_model(base):
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def load_tokenizer(folder: str) -> Any:
    """Returns a base model's tokenizer."""
    from transformers import AutoTokenizer

    from fastlora.integrations.transformers import CANNOT_READ

    try:
        return AutoTokenizer.from_pretrained(folder)
    except CANNOT_READ as error:
        raise CommandError(f"{folder}: no tokenizer can be read ({error})") from error


def step(text: str) -> None:
    """Says what the command is at."""
    print(f"fastlora: {text}", file=sys.stderr, flush=True)
