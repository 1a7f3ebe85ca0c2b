"""Parsing of arguments, and install commands for error messages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastlora.validation import near_names


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Return the parsed arguments of a command. Exit with close names if an option is unknown."""
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
    """Return the command that installs an extra of fastlora, for an error message.

    There is no release on PyPI yet, so the command runs in a clone of the repository.
    """
    return f"pip install '.[{extra}]' (in a clone of fastlora)"
