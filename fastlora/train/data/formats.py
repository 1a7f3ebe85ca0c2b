"""Formats of training data: the columns of each format, and the samples that its rows become.

Unless the format is given, it is determined from the columns of the file alone. It is an error if
the columns match several formats or none. TRL's SFTTrainer makes the same samples from each format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.train.data.files import (
    DataError,
    SampleLocation,
    parse_json,
    quoted_excerpt,
    read_rows,
)

Message = dict[str, Any]
Messages = list[Message]
PACKINGS = ("bfd", "bfd_split", "wrapped")
# Names of speakers in ShareGPT chats -> roles in chat templates.
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The two prompts of Stanford Alpaca (Taori et al., 2023), after which the format is named.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


class DataFormat(NamedTuple):
    """A training data format, such as chat messages or prompt-completion pairs.

    A format has a name, and it defines the columns from which the samples of a file are read.

    Attributes:
        title: The common name of the format.
        required: Columns that every row must have.
        optional: Columns that rows may have.
    """

    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_FOR_TEMPLATES = ("tools", "chat_template_kwargs")
FORMATS = {
    "messages": DataFormat("chats", ("messages",), _FOR_TEMPLATES),
    "sharegpt": DataFormat("ShareGPT chats", ("conversations",), ("tools",)),
    "alpaca": DataFormat("Alpaca", ("instruction", "output"), ("input",)),
    "prompt_completion": DataFormat(
        "prompts and completions", ("prompt", "completion"), _FOR_TEMPLATES
    ),
    "text": DataFormat("texts", ("text",)),
}
PLAIN = "plain text"
COLUMNS = tuple(dict.fromkeys(c for f in FORMATS.values() for c in (*f.required, *f.optional)))


class TextOrChatSample(NamedTuple):
    """A training sample that consists of either text or chat messages.

    Attributes:
        source: Source of the sample.
        prompt: Input of the model, as text or messages; None if there is no separate prompt.
        text: The text or messages to learn.
        template_kwargs: Arguments for the chat template, in addition to the messages.
        ends: Whether an end token follows the text. This is False for plain text files only.
    """

    source: SampleLocation
    prompt: str | Messages | None
    text: str | Messages
    template_kwargs: Mapping[str, Any] = {}
    ends: bool = True

    @property
    def is_chat(self) -> bool:
        """Whether the sample consists of chat messages rather than text.

        Such a sample is in chat format.
        """
        return isinstance(self.text, list)


@dataclass(frozen=True)
class DataOptions:
    """Options for how training data is read and prepared, such as the data format.

    Other options include the packing of the samples and the parts of a sample that contribute to
    the loss. The options apply to evaluation data too.

    Attributes:
        format: A name in `FORMATS`, or None to determine the format from the columns.
        columns: Dict that maps column names in `FORMATS` to column names in the files.
        chat: Whether to turn a text prompt into a user's turn, and a text completion into the
            assistant's answer.
        completion_only_loss: Whether to exclude prompts from the loss.
        assistant_only_loss: Whether only the assistant's messages contribute to the loss. The chat
            template must mark them.
        packing: A name in `PACKINGS`, or None for one sample per row.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    completion_only_loss: bool = True
    assistant_only_loss: bool = False
    packing: str | None = None


class SamplesFromFiles(NamedTuple):
    """The samples that were read from training data files.

    The tuple also contains information about the files, such as the format of each file. The files
    may contain evaluation data instead of training data.

    Attributes:
        found: All samples, in order. Each sample contains its source.
        digest: SHA-256 digest of the files' bytes, in hexadecimal.
        formats: Format of each file: a name in `FORMATS`, or `PLAIN`.
        notes: One message per file, with its format, used columns, and unused columns.
    """

    found: list[TextOrChatSample]
    digest: str
    formats: list[str]
    notes: list[str]


def read_samples(paths: Sequence[Path], options: DataOptions | None = None) -> SamplesFromFiles:
    """Read samples from data files.

    The result also contains information about the files, such as the format of each file.

    Args:
        paths: Files that end in ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, or ``.parquet``; folders
            that `datasets` saved; or plain text files that end in ``.txt`` or ``.md``.
        options: Options; None for the defaults.

    Raises:
        DataError: See `read_rows`; or the columns of a file do not match any format, or a value is
            of the wrong type for its column. The message names the file, the row, and the column.
    """
    options = options or DataOptions()
    samples: list[TextOrChatSample] = []
    formats: list[str] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    for path in paths:
        rows = read_rows(path)
        digest.update(rows.digest)
        if isinstance(rows.found[0][1], str) and not rows.found[0][0].number:
            ((source, text),) = rows.found
            samples.append(TextOrChatSample(source, None, text, ends=False))
            formats.append(PLAIN)
            notes.append(f"{path}: plain text, split into samples of max_length tokens")
            continue
        columns = list(_require_object(*rows.found[0]))
        name = _detect_format(path, columns, options)
        names = {c: options.columns.get(c, c) for c in _columns_of_format(name)}
        for source, row in rows.found:
            values = _RowValues(source, _require_object(source, row), names, rows.cells)
            samples.append(_row_to_sample(name, values, options.chat))
        formats.append(name)
        notes.append(_describe_file_format(path, name, names, columns))
    return SamplesFromFiles(samples, digest.hexdigest(), formats, notes)


def single_message_chat(role: str, text: str) -> Messages:
    """Return a chat that consists of a single message with the given role and text."""
    return [{"role": role, "content": text}]


def alpaca_prompt(instruction: str, input: str = "", *, chat: bool = False) -> str:
    """Return the Alpaca prompt for an instruction and its input.

    If ``chat`` is True, the prompt is for a chat message, which does not use Alpaca's template.
    """
    if chat:
        return f"{instruction}\n\n{input}" if input else instruction
    given = f"### Input:\n{input}\n\n" if input else ""
    paired = _PAIRED if input else ""
    return _ALPACA.format(paired=paired, instruction=instruction, input=given)


def _columns_of_format(name: str) -> tuple[str, ...]:
    return (*FORMATS[name].required, *FORMATS[name].optional)


def _describe_file_format(
    path: Path, name: str, names: Mapping[str, str], columns: Sequence[str]
) -> str:
    read = [
        source if source == ours else f"{source} (as {ours})"
        for ours, source in names.items()
        if source in columns
    ]
    unread = [column for column in columns if column not in names.values()]
    left = f"; unused: {', '.join(unread)}" if unread else ""
    return f"{path}: {FORMATS[name].title} (format {name}), from {', '.join(read)}{left}"


def _detect_format(path: Path, columns: Sequence[str], options: DataOptions) -> str:
    """Return the name of the data format that matches the columns of a file.

    Exactly one format in `FORMATS` must match.
    """
    for ours, theirs in options.columns.items():
        if theirs not in columns:
            raise DataError(
                f"{path}: no column named {theirs!r} (`columns` maps {ours!r} to it); available "
                f"columns: {list(columns)}"
            )
    taken = set(options.columns.values())
    there = {column for column in columns if column not in taken} | set(options.columns)
    if options.format is not None:
        missing = [c for c in FORMATS[options.format].required if c not in there]
        if missing:
            raise DataError(
                f"{path}: no column named {missing[0]!r} (format {options.format!r} needs it); "
                f"available columns: {list(columns)} (to use another column, set "
                f"columns = {{ {missing[0]} = ... }})"
            )
        return options.format
    fitting = [name for name, f in FORMATS.items() if there.issuperset(f.required)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{path}: the columns {list(columns)} match the formats "
            f'{" and ".join(fitting)}; choose one, for example format = "{fitting[0]}"'
        )
    known = "; ".join(" and ".join(f.required) for f in FORMATS.values())
    raise DataError(
        f"{path}: the columns {list(columns)} do not match any format. Expected {known}. If your "
        "columns have different names, map them, for example with columns = { prompt = "
        f"{columns[0] if columns else 'question'!r} }}"
    )


def _require_object(source: SampleLocation, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{source}: expected a JSON object that maps column names to values, got "
            f"{quoted_excerpt(row)}"
        )
    return row


def _row_to_sample(format_name: str, values: _RowValues, chat: bool) -> TextOrChatSample:
    """Convert a row's values to a training sample.

    If ``chat`` is True, a text prompt becomes a user turn.
    """
    values.check_row_has_columns(FORMATS[format_name].required)
    source = values.source
    if format_name == "text":
        return TextOrChatSample(source, None, values.get_text("text"))
    if format_name in ("messages", "sharegpt"):
        column = FORMATS[format_name].required[0]
        return TextOrChatSample(
            source, None, values.get_messages(column), values.get_chat_template_kwargs()
        )
    if format_name == "alpaca":
        given = values.get_text("instruction"), values.get_text("input", optional=True)
        prompt, text = alpaca_prompt(*given, chat=chat), values.get_text("output")
    elif values.common_list_or_str_type("prompt", "completion") is list:
        asked, answered = values.get_messages("prompt"), values.get_messages("completion")
        return TextOrChatSample(source, asked, answered, values.get_chat_template_kwargs())
    else:
        prompt, text = values.get_text("prompt", empty=True), values.get_text("completion")
    if not chat:
        return TextOrChatSample(source, prompt, text)
    return TextOrChatSample(
        source,
        single_message_chat("user", prompt),
        single_message_chat("assistant", text),
        values.get_chat_template_kwargs(),
    )


class _RowValues:
    """The values of one row in a data file.

    A training sample is made from these values. A value is validated when it is read. Columns are
    named as in `FORMATS`.
    """

    def __init__(
        self, source: SampleLocation, row: Mapping[str, Any], names: Mapping[str, str], cells: bool
    ) -> None:
        self.source, self._row, self._names, self._cells = source, row, names, cells

    def check_row_has_columns(self, required_columns: Sequence[str]) -> None:
        """Raise `DataError` if any of the columns is missing from the row."""
        for name in map(self._names.__getitem__, required_columns):
            if name not in self._row:
                raise DataError(
                    f"{self.source}: this row has no column named {name!r}, but the first row of "
                    f"the file does; available columns: {list(self._row)}"
                )

    def common_list_or_str_type(self, *columns: str) -> type:
        """Return the common type of the values in the given columns, `list` or `str`.

        The result is `list` if all of the values are lists, and `str` if no value is a list. Raises
        `DataError` if only some of the values are lists. Values that are not lists are not
        validated here: if one of them is not a string, `get_text` raises an error.
        """
        lists = [isinstance(self._row[self._names[column]], list) for column in columns]
        if any(lists) and not all(lists):
            named = " and ".join(repr(self._names[column]) for column in columns)
            raise DataError(
                f"{self.source}: one of the columns {named} is a list of messages and the other is "
                "not; expected two strings or two lists"
            )
        return list if all(lists) else str

    def get_text(self, column: str, *, optional: bool = False, empty: bool = False) -> str:
        """Return the text in a column.

        If ``optional``, a missing or null value becomes an empty string.
        """
        value = self._row.get(self._names[column])
        if optional and value is None:
            return ""
        if not isinstance(value, str):
            raise self._value_error(column, f"expected a string, got {quoted_excerpt(value)}")
        self._check_encodes(column, value)
        if not (value or optional or empty):
            raise self._value_error(
                column, f"the text is empty in this row: {quoted_excerpt(dict(self._row))}"
            )
        return value

    def get_messages(self, column: str) -> Messages:
        """Return the chat messages in a column.

        The messages are validated: each message has a ``role`` and ``content``. Raises `DataError`
        if the column does not contain a list of valid messages, or if the list is empty.
        """
        value = self._get_parsed_value(column)
        if not isinstance(value, list) or not value:
            raise self._value_error(
                column, f"expected a list of messages, got {quoted_excerpt(value)}"
            )
        found = [self._message(column, n, entry) for n, entry in enumerate(value, 1)]
        self._check_encodes(column, json.dumps(found, ensure_ascii=False, default=str))
        return found

    def get_chat_template_kwargs(self) -> dict[str, Any]:
        """Return the additional keyword arguments for the chat template.

        The chat template gets these arguments in addition to the messages. The arguments come from
        the columns ``tools`` and ``chat_template_kwargs`` of the row.
        """
        found: dict[str, Any] = {}
        if "tools" in self._names and (tools := self._get_parsed_value("tools")) is not None:
            if not isinstance(tools, list):
                raise self._value_error(
                    "tools", f"expected a list of tools, got {quoted_excerpt(tools)}"
                )
            found["tools"] = tools
        if "chat_template_kwargs" in self._names:
            more = self._get_parsed_value("chat_template_kwargs")
            if more is not None and not isinstance(more, dict):
                raise self._value_error(
                    "chat_template_kwargs", f"expected an object, got {quoted_excerpt(more)}"
                )
            found |= more or {}
        return found

    def _get_parsed_value(self, column: str) -> Any:
        """Return the value in a column, parsed if it is stored as a JSON string.

        In the cells of a table and in the column ``tools``, a string is JSON, and an empty string
        becomes None. Any other value is returned unchanged.
        """
        value = self._row.get(self._names[column])
        if isinstance(value, str) and (self._cells or column == "tools"):
            return parse_json(self._cell_location(column), value) if value else None
        return value

    def _message(self, column: str, number: int, entry: Any) -> Message:
        what = f"message {number}"
        if not isinstance(entry, dict):
            raise self._value_error(
                column, f"{what} is {quoted_excerpt(entry)}, expected an object"
            )
        # Arrow gives every message the keys of all messages, with null for the missing ones.
        message = {key: value for key, value in entry.items() if value is not None}
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            message["role"] = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
            if "value" in message:
                message["content"] = message.pop("value")
            if message["role"] not in _ROLES:
                known = ", ".join((*_SPEAKERS, *_ROLES))
                raise self._value_error(
                    column, f"{what} has role {quoted_excerpt(speaker)}, expected one of {known}"
                )
        if not isinstance(message.get("role"), str):
            raise self._value_error(
                column,
                f'{what} must have a "role" (or "from") key with a string value, '
                f"got {quoted_excerpt(entry)}",
            )
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise self._value_error(
                column, f'{what} has no "content" (or "value"): {quoted_excerpt(entry)}'
            )
        if content is not None and not isinstance(content, str | list):
            raise self._value_error(
                column, f"{what} has content {quoted_excerpt(content)}; expected a string"
            )
        # Templates read ``content``, so restore the null that was dropped above.
        return message if content is not None else {**message, "content": None}

    def _check_encodes(self, column: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may contain a lone surrogate, "\\ud83d"
            raise self._value_error(
                column, f"a string is not valid Unicode text ({error.reason})"
            ) from error

    def _cell_location(self, column: str) -> str:
        return f"{self.source}, column {self._names[column]!r}"

    def _value_error(self, column: str, what: str) -> DataError:
        return DataError(f"{self._cell_location(column)}: {what}")
