"""Matching of the patterns in an adapter's config, optionally with limits on time and memory.

PEFT's patterns are regular expressions for Python's ``re``, which can take exponential time to
match. Inside `bounded_matching`, PCRE2 matches them instead. Unlike ``re``, PCRE2 counts the steps
and the memory of a match and stops at a limit. Patterns that are plain names do not need PCRE2.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from fastlora.validation import CheckpointError, ConfigError

# CPU seconds for matching all patterns of one adapter.
MATCHING_SECONDS = 0.25
# PCRE2's match limit, in backtracking points. A typical pattern reaches this limit in 10 ms. Real
# patterns and module names need at most a tenth of it.
_STEPS = 100_000
# Between two backtracking points, PCRE2 may scan the whole pattern. It scans this many characters
# in 0.1 s.
_CHARACTERS = 40_000_000
_HEAP_KIB = 8192
# PCRE2 rejects patterns that compile to more than 64 KiB. It parses this many characters in 3 ms.
_MOST_CHARACTERS = 1 << 16

# Plain patterns. A dot is their only special character, and it matches any character.
_PLAIN = re.compile(r"[\w.-]+")
_COUNT = re.compile(r"[{,]\s*(\d+)")


class _BoundedPatternMatcher:
    """Matches patterns within a time limit.

    The memory for matching and the length of a regular expression are also limited. A pattern that
    exceeds a limit raises `CheckpointError`. Each outermost `bounded_matching` block has its own
    matcher. The matcher measures the CPU time spent on matching so far, and caches the compiled
    patterns.

    Attributes:
        suffix_indexes: Maps the ``id()`` of a collection of patterns to a tuple (collection, index
            of the collection). The reference to the collection prevents the id from being reused.
    """

    def __init__(self) -> None:
        self.suffix_indexes: dict[int, tuple[Collection[str], _SuffixPatternIndex]] = {}
        self._compiled: dict[str, Any] = {}
        # CPU seconds: the sum over the outermost `count_toward_matching_time_limit` blocks
        # that have ended, and the start of the open one.
        self._seconds = 0.0
        self._start: float | None = None

    @contextlib.contextmanager
    def count_toward_matching_time_limit(self, config_field: str) -> Iterator[None]:
        """Context manager that counts its block's time toward the time limit for pattern matching.

        The CPU time of the ``with`` block is counted: the time of the matches and the time between
        them. The time of nested blocks is counted only once.

        Args:
            config_field: Name of the config field with the patterns, for error messages.

        Raises:
            CheckpointError: The time limit is exceeded at the end of the block.
        """
        outermost = self._start is None
        if outermost:
            self._start = time.thread_time()
        try:
            yield
            self._check_time(config_field)
        finally:
            if outermost:
                self._seconds, self._start = self._passed(), None

    def _passed(self) -> float:
        return self._seconds + (0.0 if self._start is None else time.thread_time() - self._start)

    def _check_time(self, field: str) -> None:
        if self._passed() > MATCHING_SECONDS:
            raise CheckpointError(
                f"{field}: matching the config's patterns took longer than the limit of "
                f"{MATCHING_SECONDS} s"
            )

    def compile_with_pcre2(self, field: str, pattern: str, expression: str) -> Any:
        """Compile a regular expression with PCRE2.

        The result is cached.

        Args:
            field: Name of the config field, for error messages.
            pattern: The pattern in the config.
            expression: The expression to compile, which contains the pattern.

        Raises:
            CheckpointError: The pattern is too long or invalid, or pcre2 is not installed.
        """
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
        steps = min(_STEPS, _CHARACTERS // _max_length_with_repeats_expanded(pattern, expression))
        limits = f"(*LIMIT_MATCH={steps})(*LIMIT_HEAP={_HEAP_KIB})"
        try:
            found = pcre2.compile(f"{limits}(?:{expression})", jit=False)
        except pcre2.LibraryError as error:
            raise CheckpointError(
                f"{field} has a regular expression that PCRE2 does not accept: {_short(pattern)} "
                f"({error})"
            ) from error
        self._compiled[expression] = found
        return found

    def match(
        self, field: str, pattern: str, expression: str, name: str, *, full_match: bool
    ) -> Any:
        compiled = self.compile_with_pcre2(field, pattern, expression)
        import pcre2  # installed: `compile_with_pcre2` has imported it

        try:
            return compiled.fullmatch(name) if full_match else compiled.match(name)
        except pcre2.LibraryError as error:
            raise CheckpointError(
                f"{field}: matching {_short(pattern)} takes too long ({error})"
            ) from error


_bounded: ContextVar[_BoundedPatternMatcher | None] = ContextVar(
    "fastlora_bounded_matching", default=None
)


@contextlib.contextmanager
def bounded_matching() -> Iterator[None]:
    """Context manager that limits how long pattern matching may take.

    The memory of pattern matching is also limited. Both limits apply to the current thread. Inside
    the ``with`` block, a pattern that exceeds a limit raises `CheckpointError`. A regular
    expression also raises this error if pcre2 is not installed. A nested block shares the limits of
    the outer block.
    """
    if _bounded.get() is not None:
        yield
        return
    token = _bounded.set(_BoundedPatternMatcher())
    try:
        yield
    finally:
        _bounded.reset(token)


def count_toward_matching_time_limit(
    config_field: str,
) -> contextlib.AbstractContextManager[None]:
    """Return a context manager whose time counts toward the time limit for pattern matching.

    The CPU time of the ``with`` block is counted: the time of the matches and the time between
    them. The block raises `CheckpointError` at its end if the time limit is exceeded. Each match
    inside the block also checks the limit. A block around a loop over patterns therefore counts the
    time of the loop itself, and the loop stops when the limit is exceeded. Outside
    `bounded_matching`, the context manager does nothing.

    Args:
        config_field: Name of the config field with the patterns, for error messages.
    """
    bounded = _bounded.get()
    return (
        contextlib.nullcontext()
        if bounded is None
        else bounded.count_toward_matching_time_limit(config_field)
    )


def check_pattern(field: str, pattern: str) -> None:
    """Raise `ConfigError` if a pattern is not a valid regular expression.

    Inside `bounded_matching`, raise `CheckpointError` instead.

    Args:
        field: Name of the config field, for error messages.
        pattern: The pattern.
    """
    bounded = _bounded.get()
    if bounded is not None:
        with bounded.count_toward_matching_time_limit(field):
            if not _PLAIN.fullmatch(pattern):
                bounded.compile_with_pcre2(field, pattern, pattern)
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{field} must contain valid regular expressions, got {pattern!r} ({error})"
        ) from error


def matches_whole_name(field: str, pattern: str, name: str) -> bool:
    """Return whether a pattern matches an entire module name."""
    return _match(field, pattern, "{}", name, full_match=True) is not None


def matches_consecutive_components(field: str, pattern: str, name: str) -> bool:
    """Return whether a pattern matches consecutive components of a module name.

    The components of a name are separated by dots.
    """
    return _match(field, pattern, r"(^|.*\.){}($|\..*)", name) is not None


def layer_index_after_match(field: str, pattern: str, name: str) -> int | None:
    """Return the layer index that follows a pattern's match in a module name.

    The result is None if no number follows a match, or if the number is the last component of the
    name. If numbers follow several matches, the first number is returned. For example, the result
    is 3 for the pattern "layers" and the name "model.layers.3.mlp".

    Args:
        field: Name of the config field, for error messages.
        pattern: The pattern.
        name: The module name.
    """
    found = _match(field, pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", name)
    index = None if found is None else found.group("idx")
    return None if index is None else int(index)


def first_pattern_matching_name_suffix(
    field: str, patterns: Collection[str], name: str
) -> str | None:
    """Return the first pattern that matches a suffix of a module name.

    The result is None if no pattern matches. A suffix consists of one or more of the last
    dot-separated components of the name, and may be the entire name. Patterns may be regular
    expressions. Inside `bounded_matching`, ``patterns`` must not be modified, because its index is
    cached.

    Args:
        field: Name of the config field, for error messages.
        patterns: The patterns in the field.
        name: The module name.
    """
    if not patterns:
        return None
    with count_toward_matching_time_limit(field):
        return _suffix_index(field, patterns).first_pattern_matching_suffix(name)


def patterns_matching_no_suffix(
    field: str, patterns: Collection[str], names: Iterable[str]
) -> list[str]:
    """Return a list of the patterns that do not match the end of any of the given module names.

    Args:
        field: Name of the config field, for error messages.
        patterns: The patterns in the field.
        names: The module names.
    """
    if not patterns:
        return []
    names = list(names)
    with count_toward_matching_time_limit(field):
        index = _suffix_index(field, patterns)
        found = {
            pattern
            for name in names
            for pattern in index.indices_of_plain_patterns_matching_suffix(name)
        }
        found |= {
            e
            for e in index.expressions
            if any(index.expression_matches_end(e, name) for name in names)
        }
        return [pattern for pattern in patterns if pattern not in found]


class _SuffixPatternIndex:
    """An index for finding the suffix patterns that match a module name.

    A suffix pattern matches a name if the pattern matches a suffix of the name. The patterns are
    those of one config field. Patterns that are plain names are looked up in dicts. All other
    patterns are regular expressions, which are matched one by one.

    Attributes:
        expressions: Maps each pattern that is not a plain name to its position in the field.
    """

    def __init__(self, field: str, patterns: Collection[str]) -> None:
        self._field = field
        # Maps the lengths of the parts between dots to a dict of patterns and their positions.
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        self.expressions: dict[str, int] = {}
        with count_toward_matching_time_limit(field):
            for place, pattern in enumerate(patterns):
                if _PLAIN.fullmatch(pattern):
                    lengths = tuple(map(len, pattern.split(".")))
                    self._plain.setdefault(lengths, {})[pattern] = place
                else:
                    self.expressions[pattern] = place

    def indices_of_plain_patterns_matching_suffix(self, name: str) -> dict[str, int]:
        """Return the indices of the plain patterns that match a suffix of a module name.

        A plain pattern is a name without regular-expression syntax, except that a dot matches any
        character. The result is a dict that maps each matching pattern to its index in the config
        field.
        """
        found = {}
        with count_toward_matching_time_limit(self._field):
            for lengths, patterns in self._plain.items():
                end = _name_suffix_as_plain_pattern(name, lengths)
                if end in patterns:
                    found[end] = patterns[end]
        return found

    def expression_matches_end(self, expression: str, name: str) -> bool:
        """Return whether a regular expression matches the end of a module name.

        The end must consist of one or more whole components of the name.
        """
        return _match(self._field, expression, r"(.*\.)?({})$", name) is not None

    def first_pattern_matching_suffix(self, name: str) -> str | None:
        """Return the first pattern in the config field that matches a suffix of a module name.

        The result is None if no pattern matches.
        """
        plain = self.indices_of_plain_patterns_matching_suffix(name)
        best = min(plain, key=plain.__getitem__, default=None)
        for expression, place in self.expressions.items():
            if best is not None and plain[best] < place:
                break
            if self.expression_matches_end(expression, name):
                return expression
        return best


def _suffix_index(field: str, patterns: Collection[str]) -> _SuffixPatternIndex:
    bounded = _bounded.get()
    if bounded is None:
        return _SuffixPatternIndex(field, patterns)
    if id(patterns) not in bounded.suffix_indexes:
        bounded.suffix_indexes[id(patterns)] = patterns, _SuffixPatternIndex(field, patterns)
    return bounded.suffix_indexes[id(patterns)][1]


def _match(field: str, pattern: str, template: str, name: str, *, full_match: bool = False) -> Any:
    """Match a module name against a pattern from a config field.

    The pattern is first inserted into a template. The resulting expression must match at the
    beginning of the name or, if ``full_match`` is True, match the entire name.

    Args:
        field: Name of the config field, for error messages.
        pattern: The pattern.
        template: Regular expression of PEFT into which the pattern is inserted at ``{}``.
        name: The module name.
        full_match: Whether the expression must match the entire name instead of its beginning.

    Returns:
        The match object, or None if there is no match.
    """
    with count_toward_matching_time_limit(field):
        is_plain = _PLAIN.fullmatch(pattern) is not None
        if is_plain and len(pattern) > len(name):
            return None  # keeps `re` from compiling a folder's long pattern
        expression = template.replace("{}", pattern)
        bounded = _bounded.get()
        if bounded is not None and not is_plain:
            return bounded.match(field, pattern, expression, name, full_match=full_match)
        return re.fullmatch(expression, name) if full_match else re.match(expression, name)


def _max_length_with_repeats_expanded(pattern: str, expression: str) -> int:
    """Return an upper bound on the length of a regular expression with its repeats expanded.

    PCRE2 expands the repeats in an expression. For example, ``a{3}`` is expanded to ``aaa``. The
    bound applies to the length of the expression itself, not to the length of a match. The function
    stops counting repeats when the length exceeds ``_CHARACTERS``.

    Args:
        pattern: The pattern in the config, whose repeats are counted.
        expression: The expression to compile, which contains the pattern.
    """
    length = len(expression)
    for count in _COUNT.findall(pattern):
        length *= max(1, int(count[:6]))  # PCRE2 rejects counts of more digits
        if length > _CHARACTERS:
            break
    return length


def _name_suffix_as_plain_pattern(module_name: str, part_lengths: tuple[int, ...]) -> str | None:
    """Convert a suffix of a module name to a plain pattern, or return None if it is not possible.

    The pattern matches names with this suffix. A plain pattern is a name without regular-expression
    syntax, except that a dot matches any character. The pattern consists of parts of the given
    lengths in characters, separated by dots. The parts are copied from the name. A dot replaces the
    character between two parts. The result is None if the name is too short, or if the first part
    does not start at the beginning of a component of the name.
    """
    at = start = len(module_name) - sum(part_lengths) - len(part_lengths) + 1
    if start < 0 or (start > 0 and module_name[start - 1] != "."):
        return None
    parts = []
    for length in part_lengths:
        parts.append(module_name[at : at + length])
        at += length + 1
    return ".".join(parts)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
