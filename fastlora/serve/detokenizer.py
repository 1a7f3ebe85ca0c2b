"""Decode an answer into text incrementally, in whole characters and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Number of prompt tokens that affect how the first tokens of the answer decode (leading spaces).
_BEFORE = 5
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Decodes an answer incrementally, while it is being generated.

    Args:
        tokenizer: The tokenizer. Only the thread that calls `add_token` and `flush` may use it.
        prompt: Tokens of the prompt.
        stop: Texts that end the answer.

    Attributes:
        stopped: Whether a stop string has appeared. It is dropped, and so is all text after it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(prompt[-_BEFORE:])
        # Tokens before `_read` have been decoded. Those from `_from` on are decoded again together
        # with new tokens.
        self._from, self._read = 0, len(self._tokens)
        self._held = ""
        self._longest = max(map(len, stop), default=0)
        self.stopped = False

    def add_token(self, token: int) -> str:
        """Add the next token, and return any new text that is final."""
        self._tokens.append(token)
        return self._hold_back_stop_prefix(self._new(flush=False))

    def flush(self) -> str:
        """Return any text that is still held back after the last token."""
        if self.stopped:
            return ""
        text = self._hold_back_stop_prefix(self._new(flush=True))
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

    def _hold_back_stop_prefix(self, new: str) -> str:
        """Hold back any text that may be the start of a stop string, and return the rest."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # Find the longest suffix of the text that a stop string begins with.
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text
