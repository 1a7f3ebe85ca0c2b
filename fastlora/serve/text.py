"""An answer's tokens as text, piece by piece: whole characters only, and nothing behind a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that decide how the first ones of the answer are written (leading spaces).
_BEFORE = 5
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class AnswerText:
    """Decodes an answer while it is made.

    Args:
        tokenizer: For one thread alone, that which calls `add` and `end`.
        prompt: Tokens of the prompt.
        stop: Texts that end the answer.

    Attributes:
        stopped: Whether a stop text came; what stands behind it is dropped.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(prompt[-_BEFORE:])
        # Text up to `_read` is out; from `_from` on tokens are decoded together with the new ones.
        self._from, self._read = 0, len(self._tokens)
        self._held = ""
        self._longest = max(map(len, stop), default=0)
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is certain now."""
        self._tokens.append(token)
        return self._certain(self._new(flush=False))

    def end(self) -> str:
        """Returns what was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._certain(self._new(flush=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new(self, flush: bool) -> str:
        known = self._decode(self._tokens[self._from : self._read])
        text = self._decode(self._tokens[self._from :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not flush):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _certain(self, new: str) -> str:
        """Returns text in which no stop text can begin, and keeps the rest."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end that may be the beginning of a stop text.
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text
