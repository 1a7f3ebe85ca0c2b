"""Functions that the commands share: argument parsing, and install commands for messages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastlora.validation import near_names


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the arguments of a command.

    If an argument is unknown, print an error message that suggests similar options, and exit with
    status 2.

    Args:
        parser: The command's parser.
        argv: The arguments, or None for those of the process.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = near_names(unknown[0].partition("=")[0], parser._option_string_actions, limit=3)
        parser.exit(
            2,
            f"{parser.prog}: error: unrecognized arguments: {' '.join(unknown)}{close}; run "
            f"`{parser.prog} --help` for all options\n",
        )
    return args


def install_command(extra: str) -> str:
    """Return the pip command that installs fastlora with an extra.

    An extra is an optional dependency group. The command is part of an error message. There is no
    release on PyPI yet, so the command must be run in a clone of the repository.

    Args:
        extra: Name of the extra, such as "train".
    """
    return f"pip install '.[{extra}]' (in a clone of fastlora)"
