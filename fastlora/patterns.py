"""Matching of the patterns in a config: with Python's ``re``, or with a bound on time and memory.

PEFT's patterns are regular expressions of ``re``, whose matching time can grow exponentially. In
`bounded_matching`, PCRE2 matches them instead: it counts the steps and the memory of a match and
gives up at a limit, as ``re`` cannot. Plain names need no engine, with or without a bound.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from fastlora.validation import CheckpointError, ConfigError

# Seconds of processor time for all patterns of an adapter.
MATCHING_SECONDS = 0.25
# PCRE2 counts points that it may return to. It takes 10 ms for these of a usual pattern. Real
# patterns on real names need at most a tenth of them.
_STEPS = 100_000
# Between two such points it may pass the whole pattern. It takes 0.1 s for these characters.
_CHARACTERS = 40_000_000
_HEAP_KIB = 8192
# PCRE2 refuses patterns that compile to more than 64 KiB. It reads this many in 3 ms.
_MOST_CHARACTERS = 1 << 16

# In these, a dot is the only special character, and it matches any character.
_PLAIN = re.compile(r"[\w.-]+")
_COUNT = re.compile(r"[{,]\s*(\d+)")


class _Bounded:
    """What matching has taken in a block, and what it has prepared.

    Attributes:
        ends: Id of a field's patterns -> the patterns, which keeps the id theirs, and their index.
    """

    def __init__(self) -> None:
        self.ends: dict[int, tuple[Collection[str], _Ends]] = {}
        self._compiled: dict[str, Any] = {}
        # Seconds of processor time: of the outermost blocks that have ended, and the start of the
        # one that is open.
        self._seconds = 0.0
        self._start: float | None = None

    @contextlib.contextmanager
    def timed(self, field: str) -> Iterator[None]:
        """Counts the block as matching, and raises `CheckpointError` if the time is up.

        A block within another one counts as part of it.
        """
        outermost = self._start is None
        if outermost:
            self._start = time.thread_time()
        try:
            yield
            self._check_time(field)
        finally:
            if outermost:
                self._seconds, self._start = self._passed(), None

    def _passed(self) -> float:
        return self._seconds + (0.0 if self._start is None else time.thread_time() - self._start)

    def _check_time(self, field: str) -> None:
        if self._passed() > MATCHING_SECONDS:
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
        # PCRE2 accepts limits only at the start of a pattern, so later ones cannot override these.
        steps = min(_STEPS, _CHARACTERS // _expanded_length(pattern, expression))
        limits = f"(*LIMIT_MATCH={steps})(*LIMIT_HEAP={_HEAP_KIB})"
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


def timed(field: str) -> contextlib.AbstractContextManager[None]:
    """In `bounded_matching`, counts the block as matching of a field; elsewhere does nothing.

    Raises `CheckpointError` at the end of the block if the time is up. Matching checks the time
    too, so a block around a loop over patterns counts the loop's own time and ends with it.
    """
    bounded = _bounded.get()
    return contextlib.nullcontext() if bounded is None else bounded.timed(field)


def check_pattern(field: str, pattern: str) -> None:
    """Raises `ConfigError` unless ``pattern`` is a regular expression.

    In `bounded_matching` it raises `CheckpointError`.
    """
    bounded = _bounded.get()
    if bounded is not None:
        with bounded.timed(field):
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
    return _match(field, pattern, "{}", name, whole=True) is not None


def matches_components(field: str, pattern: str, name: str) -> bool:
    """Returns whether a pattern matches components of ``name``, wherever in it they are."""
    return _match(field, pattern, r"(^|.*\.){}($|\..*)", name) is not None


def layer_index(field: str, pattern: str, name: str) -> int | None:
    """Returns the number after the first component of ``name`` that a pattern matches, or None."""
    found = _match(field, pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", name)
    index = None if found is None else found.group("idx")
    return None if index is None else int(index)


def first_at_end(field: str, patterns: Collection[str], name: str) -> str | None:
    """Returns the first of a field's patterns that matches the last components of ``name``.

    A pattern may also match all of it. In `bounded_matching`, ``patterns`` must stay as they are.
    """
    if not patterns:
        return None
    with timed(field):
        return _ends_of(field, patterns).first(name)


def matching_no_end(field: str, patterns: Collection[str], names: Iterable[str]) -> list[str]:
    """Returns the patterns for which `first_at_end` would return None with each of ``names``."""
    if not patterns:
        return []
    names = list(names)
    with timed(field):
        ends = _ends_of(field, patterns)
        found = {pattern for name in names for pattern in ends.plain(name)}
        found |= {e for e in ends.expressions if any(ends.matches(e, name) for name in names)}
        return [pattern for pattern in patterns if pattern not in found]


class _Ends:
    """Patterns of a field that match the last components of a name; plain ones are looked up.

    Attributes:
        expressions: Each pattern that is not plain -> its place in the order.
    """

    def __init__(self, field: str, patterns: Collection[str]) -> None:
        self._field = field
        # Lengths of the parts between dots -> pattern -> its place in the order.
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        self.expressions: dict[str, int] = {}
        with timed(field):
            for place, pattern in enumerate(patterns):
                if _PLAIN.fullmatch(pattern):
                    lengths = tuple(map(len, pattern.split(".")))
                    self._plain.setdefault(lengths, {})[pattern] = place
                else:
                    self.expressions[pattern] = place

    def plain(self, name: str) -> dict[str, int]:
        """Returns the plain patterns that match, each with its place."""
        found = {}
        with timed(self._field):
            for lengths, patterns in self._plain.items():
                end = _end_with_dots(name, lengths)
                if end in patterns:
                    found[end] = patterns[end]
        return found

    def matches(self, expression: str, name: str) -> bool:
        """Returns whether an expression matches."""
        return _match(self._field, expression, r"(.*\.)?({})$", name) is not None

    def first(self, name: str) -> str | None:
        """Returns the first pattern that matches."""
        plain = self.plain(name)
        best = min(plain, key=plain.__getitem__, default=None)
        for expression, place in self.expressions.items():
            if best is not None and plain[best] < place:
                break
            if self.matches(expression, name):
                return expression
        return best


def _ends_of(field: str, patterns: Collection[str]) -> _Ends:
    bounded = _bounded.get()
    if bounded is None:
        return _Ends(field, patterns)
    if id(patterns) not in bounded.ends:
        bounded.ends[id(patterns)] = patterns, _Ends(field, patterns)
    return bounded.ends[id(patterns)][1]


def _match(field: str, pattern: str, form: str, name: str, *, whole: bool = False) -> Any:
    """Matches an expression of PEFT's that contains a pattern."""
    with timed(field):
        is_plain = _PLAIN.fullmatch(pattern) is not None
        if is_plain and len(pattern) > len(name):
            return None  # and so ``re`` compiles and caches no long pattern of a folder
        expression = form.replace("{}", pattern)
        bounded = _bounded.get()
        if bounded is not None and not is_plain:
            return bounded.match(field, pattern, expression, name, whole=whole)
        return re.fullmatch(expression, name) if whole else re.match(expression, name)


def _expanded_length(pattern: str, expression: str) -> int:
    """Returns the most characters of an expression once PCRE2 has repeated what has a count."""
    length = len(expression)
    for count in _COUNT.findall(pattern):
        length *= max(1, int(count[:6]))  # PCRE2 refuses counts of more digits
        if length > _CHARACTERS:
            break
    return length


def _end_with_dots(name: str, lengths: tuple[int, ...]) -> str | None:
    """Returns the end of a name with parts of these lengths, and a dot between any two of them.

    None if it does not begin with a component of the name.
    """
    at = start = len(name) - sum(lengths) - len(lengths) + 1
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return None
    parts = []
    for length in lengths:
        parts.append(name[at : at + length])
        at += length + 1
    return ".".join(parts)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
