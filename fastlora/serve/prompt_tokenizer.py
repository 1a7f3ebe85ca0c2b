"""Convert the prompts of requests to tokens, in several threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlora.serve.long_text_detector import LongTextDetector
from fastlora.validation import ConfigError


class PromptTokenizer:
    """Tokenizes the prompts of requests.

    The prompts are texts and conversations. Threads share the tokenizer without a lock. This is
    safe because every call uses it with the same options, which the first call sets.

    Args:
        tokenizer: A transformers tokenizer. No other code may use it with other options.
        vocabulary: Number of tokens in the model's vocabulary.
        length: Maximum number of tokens in a prompt and its answer; None for no limit. A text that
            is certainly longer is rejected before it is tokenized.
    """

    def __init__(self, tokenizer: Any, vocabulary: int = 0, length: int | None = None) -> None:
        self._tokenizer, self._vocabulary, self._length = tokenizer, vocabulary, length
        self._bound = LongTextDetector(tokenizer)
        self._tokens("", special=False)  # turns off truncation and padding, which a file may set

    def tokenize_text(self, text: str) -> list[int]:
        """Return the token ids of a text.

        The model should continue the text. A start token is added, but no end token.
        """
        ids = self._tokens(text, special=True)
        if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
            del ids[-1]
        return ids

    def check_ids_in_vocabulary(self, tokens: Sequence[int]) -> list[int]:
        """Check that token ids are in the vocabulary, and return the ids as a list.

        The token ids come from a client. The ids are not checked if the prompt is too long, because
        the engine rejects the prompt.

        Raises:
            ConfigError: A token id is not in the vocabulary.
        """
        if self._length is not None and len(tokens) > self._length:
            return list(tokens)
        odd = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if odd is not None:
            raise ConfigError(
                f"prompt contains {odd}, expected token ids from 0 to {self._vocabulary - 1}"
            )
        return list(tokens)

    def tokenize_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of the messages of a conversation.

        The chat template is applied to the messages.

        Raises:
            ConfigError: There is no chat template, or it rejects the conversation.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError("the model has no chat template; use /v1/completions instead")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja templates reject roles by raising
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise ConfigError(f"the model's chat template rejects the messages: {error}") from error
        return self._tokens(text, special=False)  # the template adds special tokens

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        if self._length is not None and self._bound.certainly_exceeds_tokens(text, self._length):
            raise ConfigError(
                f"the prompt has {len(text)} characters, too many to fit in {self._length} tokens; "
                f"the prompt and the completion together can have at most {self._length} tokens"
            )
        # With a list, the tokenizer lets other threads run.
        ids = self._tokenizer(
            [text], add_special_tokens=special, return_attention_mask=False, verbose=False
        ).input_ids
        return list(ids[0])


def check_no_surrogates(name: str, text: str) -> None:
    """Raise `ConfigError` if a string contains a surrogate code point.

    A surrogate code point cannot be encoded in UTF-8. ``name`` says where the string comes from,
    for the error message.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name} contains an unpaired surrogate; expected text that UTF-8 can encode"
        ) from None
