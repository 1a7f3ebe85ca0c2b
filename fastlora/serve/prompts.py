"""What a request says, as tokens; several threads may ask at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from fastlora.validation import ConfigError


class Prompts:
    """Makes tokens of texts and of conversations; ``vocabulary`` is how many a model knows."""

    def __init__(self, tokenizer: Any, vocabulary: int = 0) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()  # a fast tokenizer is borrowed while it works

    def of_text(self, text: str) -> list[int]:
        """Returns the tokens of a text that is to go on: with a beginning, without an end."""
        ids = self._tokens(text, special=True)
        if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
            del ids[-1]
        return ids

    def of_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Returns tokens that a client made; raises `ConfigError` for those that do not exist."""
        odd = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if odd is not None:
            raise ConfigError(
                f"prompt has token {odd}, expected numbers from 0 to {self._vocabulary - 1}"
            )
        return list(tokens)

    def of_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation by the model's chat template.

        Raises:
            ConfigError: There is no template, or it refuses the conversation.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError("the model has no chat template; use /v1/completions")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
        except Exception as error:  # of jinja, whose templates refuse roles by raising
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise ConfigError(f"the model's chat template refuses messages: {error}") from error
        return self._tokens(text, special=False)  # the template has them

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return list(ids)
