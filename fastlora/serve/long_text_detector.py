"""Detect texts that exceed a number of tokens, without tokenizing them.

This requires two facts about the tokenizer: how many characters a token can represent, and which
characters can disappear. If a tokenizer can replace any number of characters by one token (for an
unknown word, for instance), there is no bound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Composition combines at most four characters into one, since NFD splits one into at most four.
_COMPOSED = 4
_PART = 1 << 16  # characters to process between two checks of the bound
_ASCII_CONTROLS = frozenset(map(chr, (*range(32), 127)))


class LongTextDetector:
    """Detects texts that are too long, without tokenizing them.

    A text is too long if it exceeds a token limit. A detected text is certain to exceed the limit.
    A text that is not detected may exceed the limit as well. The detector uses the maximum number
    of characters per token. This maximum exists for byte-level BPE, and for BPE with byte tokens
    for unknown characters, in tokenizers of the ``tokenizers`` library.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._character_bound_and_vanishing = (
            None
            if backend is None
            else _character_bound_and_vanishing(json.loads(backend.to_str()))
        )

    def certainly_exceeds_tokens(self, text: str, tokens: int) -> bool:
        """Return whether ``text`` is certain to have more than ``tokens`` tokens."""
        if self._character_bound_and_vanishing is None:
            return False
        characters, vanishing = self._character_bound_and_vanishing
        left = tokens * characters
        if len(text) <= left or vanishing is None:
            return len(text) > left
        for start in range(0, len(text), _PART):
            left -= len(vanishing.sub("", text[start : start + _PART]))
            if left < 0:
                return True
        return False


def _character_bound_and_vanishing(
    parts: Mapping[str, Any],
) -> tuple[int, re.Pattern[str] | None] | None:
    """Return the maximum character count per token, and a regex for what the tokenizer may drop.

    The regex matches the characters that the tokenizer may drop. It is None if the tokenizer drops
    no characters. The function returns None instead of a tuple if no maximum is known.

    Args:
        parts: The tokenizer as JSON.
    """
    model, added = parts["model"], parts["added_tokens"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return None
    normalizers = list(_flatten_steps(parts["normalizer"], "normalizers"))
    splits = list(_flatten_steps(parts["pre_tokenizer"], "pretokenizers"))
    if not all(
        _NEVER_SHORTENS.get(str(step["type"]), _never)(step) for step in (*normalizers, *splits)
    ):
        return None
    vanishing = ""
    if any(step["type"] == "ByteLevel" for step in (*normalizers, *splits)):
        lacking = {
            byte for byte, letter in _byte_level_characters_below_0xc0() if letter not in vocabulary
        }
        if any(0x80 <= byte < 0xC0 for byte in lacking):  # all non-ASCII characters contain these
            return None
        characters = {chr(byte) for byte in lacking if byte < 0x80}
        if not characters <= _ASCII_CONTROLS:  # other characters may be composed with an accent
            return None
        vanishing = re.escape("".join(sorted(characters)))
    elif not (model.get("byte_fallback") and _byte_tokens() <= vocabulary.keys()):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):
        vanishing += r"\s"
    longest = max(map(len, (*vocabulary, *(token["content"] for token in added))))
    composed = any(step["type"] in ("NFC", "NFKC") for step in normalizers)
    pattern = re.compile(f"[{vanishing}]+") if vanishing else None
    return longest * (_COMPOSED if composed else 1), pattern


def _flatten_steps(part: Mapping[str, Any] | None, steps_key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or a pre-tokenizer, with nested sequences flattened.

    ``part`` is the normalizer or pre-tokenizer as JSON. ``steps_key`` is the key under which a
    sequence lists its steps.
    """
    if part is not None and part["type"] == "Sequence":
        for own in part[steps_key]:
            yield from _flatten_steps(own, steps_key)
    elif part is not None:
        yield part


def _byte_level_characters_below_0xc0() -> Iterator[tuple[int, str]]:
    """Yield each byte below 0xC0 with the character that byte-level vocabularies use for it."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for number in range(0x80):
        yield number, split.pre_tokenize_str(chr(number))[0][0]
    for number in range(0x80, 0xC0):  # as the second byte of a character
        yield number, split.pre_tokenize_str(chr(number))[0][0][1]


def _byte_tokens() -> set[str]:
    return {f"<0x{number:02X}>" for number in range(256)}


def _always(step: Mapping[str, Any]) -> bool:
    return True


def _never(step: Mapping[str, Any]) -> bool:
    return False


def _replaces_by_as_many(step: Mapping[str, Any]) -> bool:
    pattern = step["pattern"].get("String")
    return bool(pattern) and len(step["content"]) >= len(pattern)


# Steps that never shorten a text, except by composing characters.
_NEVER_SHORTENS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend"), _always),
    **dict.fromkeys(("ByteLevel", "Metaspace", "Digits", "UnicodeScripts"), _always),
    "Replace": _replaces_by_as_many,
    **dict.fromkeys(("Split", "Punctuation"), lambda step: step["behavior"] != "Removed"),
}
