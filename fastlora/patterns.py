"""Matching of the patterns in a config: with Python's ``re``, or with a bound on time and memory.

PEFT's patterns are regular expressions of ``re``, whose matching time can grow exponentially. In
`bounded_matching`, PCRE2 matches them instead: it counts the steps and the memory of a match and
gives up at a limit, as ``re`` cannot. Plain names need no engine, with or without a bound.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from fastlora.validation import CheckpointError, ConfigError

# Seconds of processor time for all patterns of an adapter.
MATCHING_SECONDS = 0.25
# PCRE2 takes 10 ms for these steps. Real patterns on real names need at most a tenth of them.
_STEPS = 100_000
_HEAP_KIB = 8192
# PCRE2 refuses patterns that compile to more than 64 KiB. It reads this many in 3 ms.
_MOST_CHARACTERS = 1 << 16

# In these, a dot is the only special character, and it matches any character.
_PLAIN = re.compile(r"[\w.-]+")


class _Bounded:
    """PCRE2's patterns, and the processor time that is left for them."""

    def __init__(self) -> None:
        self._compiled: dict[str, Any] = {}
        self._end = time.thread_time() + MATCHING_SECONDS

    def check_time(self, field: str) -> None:
        if time.thread_time() > self._end:
            raise CheckpointError(
                f"{field}: matching the config's patterns takes more than {MATCHING_SECONDS:g} s"
            )

    def compiled(self, field: str, pattern: str, expression: str) -> Any:
        """Returns PCRE2's form of an expression, which contains the pattern."""
        found = self._compiled.get(expression)
        if found is not None:
            return found
        if len(pattern) > _MOST_CHARACTERS:
            raise CheckpointError(
                f"{field}: a pattern has {len(pattern)} characters, expected at most "
                f"{_MOST_CHARACTERS}"
            )
        try:
            import pcre2
        except ImportError as error:
            raise CheckpointError(
                f"{field}={pattern!r} is a regular expression. Matching it with a time limit needs "
                "pcre2; install it with: pip install pcre2"
            ) from error
        # The limits stand first. PCRE2 takes no others from behind a parenthesis.
        limits = f"(*LIMIT_MATCH={_STEPS})(*LIMIT_HEAP={_HEAP_KIB})"
        try:
            found = pcre2.compile(f"{limits}(?:{expression})", jit=False)
        except pcre2.LibraryError as error:
            raise CheckpointError(
                f"{field} has a regular expression that PCRE2 refuses, {_short(pattern)} ({error})"
            ) from error
        self._compiled[expression] = found
        return found

    def match(self, field: str, pattern: str, expression: str, name: str, *, whole: bool) -> Any:
        compiled = self.compiled(field, pattern, expression)
        import pcre2  # it is installed

        try:
            return compiled.fullmatch(name) if whole else compiled.match(name)
        except pcre2.LibraryError as error:
            raise CheckpointError(
                f"{field}: matching {_short(pattern)} takes too long ({error})"
            ) from error


_bounded: ContextVar[_Bounded | None] = ContextVar("fastlora_bounded_matching", default=None)


@contextlib.contextmanager
def bounded_matching() -> Iterator[None]:
    """Bounds the time and memory of all matching in the block, in this thread.

    Within it, a pattern that exceeds the bound raises `CheckpointError`. So does a regular
    expression where pcre2 is not installed. Blocks do not nest: the inner one has the same bound.
    """
    if _bounded.get() is not None:
        yield
        return
    token = _bounded.set(_Bounded())
    try:
        yield
    finally:
        _bounded.reset(token)


def check_pattern(field: str, pattern: str) -> None:
    """Raises `ConfigError` unless ``pattern`` is a regular expression.

    In `bounded_matching` it raises `CheckpointError`.
    """
    bounded = _bounded.get()
    if bounded is not None:
        bounded.check_time(field)
        if not _PLAIN.fullmatch(pattern):
            bounded.compiled(field, pattern, pattern)
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{field} must hold valid regular expressions, got {pattern!r} ({error})"
        ) from error


def matches_whole(field: str, pattern: str, name: str) -> bool:
    """Returns whether a pattern matches all of ``name``."""
    if _PLAIN.fullmatch(pattern):
        return _is_same(pattern, name)
    return _match(field, pattern, "{}", name, whole=True) is not None


def matches_end(field: str, pattern: str, name: str) -> bool:
    """Returns whether a pattern matches the last components of ``name``, or all of it."""
    bounded = _bounded.get()
    if bounded is not None:
        bounded.check_time(field)
    if _PLAIN.fullmatch(pattern):
        start = len(name) - len(pattern)
        return (start == 0 or name[start - 1 : start] == ".") and _is_same(pattern, name[start:])
    return _match(field, pattern, r"(.*\.)?({})$", name) is not None


def matches_components(field: str, pattern: str, name: str) -> bool:
    """Returns whether a pattern matches components of ``name``, wherever in it they are."""
    return _match(field, pattern, r"(^|.*\.){}($|\..*)", name) is not None


def layer_index(field: str, pattern: str, name: str) -> int | None:
    """Returns the number after the first component of ``name`` that a pattern matches, or None."""
    found = _match(field, pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", name)
    index = None if found is None else found.group("idx")
    return None if index is None else int(index)


def _match(field: str, pattern: str, form: str, name: str, *, whole: bool = False) -> Any:
    """Matches an expression of PEFT's that contains a pattern."""
    expression = form.replace("{}", pattern)
    bounded = _bounded.get()
    if bounded is not None:
        bounded.check_time(field)
        if not _PLAIN.fullmatch(pattern):
            return bounded.match(field, pattern, expression, name, whole=whole)
    return re.fullmatch(expression, name) if whole else re.match(expression, name)


def _is_same(plain: str, name: str) -> bool:
    if plain == name:
        return True
    pairs = zip(plain, name, strict=False)
    return "." in plain and len(plain) == len(name) and all(p in (c, ".") for p, c in pairs)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
