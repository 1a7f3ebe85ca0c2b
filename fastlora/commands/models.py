"""Load base models for commands, and report progress."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from fastlora.commands.options import Option
from fastlora.validation import FastLoraError


class CommandError(FastLoraError):
    """An error that a command reports to the user.

    This error is raised if the command cannot do what was requested.
    """


DTYPES = ("auto", "float32", "bfloat16", "float16")
# The options that `load_base_model_and_tokenizer` reads.
OPTIONS = (
    Option("model", "folder of the base model", metavar="MODEL"),
    Option(
        "--dtype",
        "dtype of the base model (default: the dtype of its weights)",
        "auto",
        more={"choices": DTYPES},
    ),
    Option("--cpu", "run on the CPU even if a GPU is available", False),
)


def load_base_model_and_tokenizer(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the base model and the tokenizer that the options specify, and return both.

    See `OPTIONS`. The model is in evaluation mode.
    """
    model, tokenizer = load_causal_lm(args.model, args.dtype), load_tokenizer(args.model)
    if torch.cuda.is_available() and not args.cpu:
        model = model.to("cuda")
    return model.eval(), tokenizer


def load_causal_lm(name_or_path: str, dtype: str) -> Any:
    """Load a causal language model by name or path.

    The path is that of a folder. The name is that of a model on the Hugging Face Hub.
    """
    # Names on the Hub have at most one slash.
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if is_path and not Path(name_or_path).exists():
        raise CommandError(f"{name_or_path}: no such folder")
    print_progress_message(f"loading {name_or_path}")
    from transformers import AutoModelForCausalLM

    from fastlora.integrations.transformers import convert_model_load_errors

    with convert_model_load_errors(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)


def load_tokenizer(folder: str) -> Any:
    """Load a tokenizer from a folder.

    It is the tokenizer of a base model. If it cannot be read, raise `CommandError`.
    """
    from transformers import AutoTokenizer

    from fastlora.integrations.transformers import CANNOT_READ

    try:
        return AutoTokenizer.from_pretrained(folder)
    except CANNOT_READ as error:
        raise CommandError(f"{folder}: cannot load the tokenizer ({error})") from error


def print_progress_message(message: str) -> None:
    """Print a progress message.

    The message is printed to stderr.
    """
    print(f"fastlora: {message}", file=sys.stderr, flush=True)
