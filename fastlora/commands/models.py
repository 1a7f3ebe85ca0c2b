"""The base models that commands load, and what they say meanwhile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from fastlora.commands.options import Option
from fastlora.validation import FastLoraError


class CommandError(FastLoraError):
    """A command cannot do what it was asked."""


# What `load` reads.
OPTIONS = (
    Option("model", "folder of the base model", metavar="MODEL"),
    Option("--dtype", "dtype of the base model (default: its own)", "auto"),
    Option("--cpu", "don't use an accelerator", False),
)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the base model that options name, in evaluation mode, and its tokenizer."""
    model, tokenizer = load_base(args.model, args.dtype), load_tokenizer(args.model)
    if torch.cuda.is_available() and not args.cpu:
        model = model.to("cuda")
    return model.eval(), tokenizer


def load_base(base: str, dtype: str) -> Any:
    """Returns a base model from its folder, or from the cache of Hugging Face's hub."""
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1  # the hub's names have one
    if is_path and not Path(base).exists():
        raise CommandError(f"{base}: no such folder")
    step(f"loading {base}")
    from transformers import AutoModelForCausalLM

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
