"""Command-line options as rows of a table, with their types, defaults, and minimum values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.command_line import parse_arguments
from fastlora.validation import ConfigError

_METAVARS = {int: "N", float: "X", Path: "DIR"}


class Option(NamedTuple):
    """A command-line option.

    Attributes:
        flag: Name of the option. A name without dashes makes a positional argument.
        text: Help text. The default is appended unless the text mentions it.
        default: Value if the option is not given. False makes the option a switch.
        minimum: Minimum value of a number; None for no minimum.
        type: Type of the value; None for the type of the default.
        metavar: Name of the value in the help; None for a name that depends on the type.
        more: Further arguments of argparse.
    """

    flag: str
    text: str
    default: Any = None
    minimum: float | None = None
    type: Any = None
    metavar: str | None = None
    more: Mapping[str, Any] = {}


def parse_options(
    prog: str,
    description: str | None,
    options: Sequence[Option],
    argv: Sequence[str] | None,
    **more: Any,
) -> argparse.Namespace:
    """Parse the arguments of a command that has the given options.

    Returns the values of the options. Raises `ConfigError` if a number is below its minimum.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, **more)
    for option in options:
        text, kind = option.text, option.type
        if option.default is False:
            parser.add_argument(option.flag, action="store_true", help=text)
            continue
        if option.default is not None:
            kind = kind or type(option.default)
            text += "" if "(default" in text else " (default: %(default)s)"
        given = {"metavar": option.metavar or _METAVARS.get(kind), "help": text, **option.more}
        if option.flag.startswith("-"):
            given["default"] = option.default
        parser.add_argument(option.flag, type=kind or str, **given)
    args = parse_arguments(parser, argv)
    for option in options:
        value = getattr(args, option.flag.lstrip("-").replace("-", "_"))
        minimum = option.minimum
        if minimum is not None and value is not None and not minimum <= value < math.inf:
            least = f"{minimum:g}"
            raise ConfigError(f"{option.flag} must be at least {least}, got {value}")
    return args
