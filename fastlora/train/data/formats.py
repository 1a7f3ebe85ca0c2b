"""Formats of training data: the columns of each format, and the samples that its rows become.

Unless the format is given, it is determined from the columns of the file alone. It is an error if
the columns match no format or several. TRL's SFTTrainer makes the same samples from each format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.train.data.files import DataError, Place, parsed_json, read_rows, shown

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


class Format(NamedTuple):
    """A format of training data.

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
    "messages": Format("chats", ("messages",), _FOR_TEMPLATES),
    "sharegpt": Format("ShareGPT chats", ("conversations",), ("tools",)),
    "alpaca": Format("Alpaca", ("instruction", "output"), ("input",)),
    "prompt_completion": Format(
        "prompts and completions", ("prompt", "completion"), _FOR_TEMPLATES
    ),
    "text": Format("texts", ("text",)),
}
PLAIN = "plain text"
COLUMNS = tuple(dict.fromkeys(c for f in FORMATS.values() for c in (*f.required, *f.optional)))


class Sample(NamedTuple):
    """A text or a chat to train on.

    Attributes:
        place: Source of the sample.
        prompt: Input of the model, as text or messages; None if there is no separate prompt.
        text: The text or messages to learn.
        template: Arguments for the chat template, in addition to the messages.
        ends: Whether an end token follows the text. This is False for plain text files only.
    """

    place: Place
    prompt: str | Messages | None
    text: str | Messages
    template: Mapping[str, Any] = {}
    ends: bool = True

    @property
    def chat(self) -> bool:
        """Whether the sample consists of messages."""
        return isinstance(self.text, list)


@dataclass(frozen=True)
class Reading:
    """Options for reading samples from files and for encoding them as tokens.

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


class Samples(NamedTuple):
    """The samples of several files.

    Attributes:
        found: All samples, in order.
        digest: SHA-256 digest of the files' bytes, in hexadecimal.
        formats: Format of each file: a name in `FORMATS`, or `PLAIN`.
        notes: One message per file, with its format, used columns, and unused columns.
    """

    found: list[Sample]
    digest: str
    formats: list[str]
    notes: list[str]


def read_samples(paths: Sequence[Path], reading: Reading | None = None) -> Samples:
    """Read the samples of several files.

    Args:
        paths: Files that end in ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, or ``.parquet``; folders
            that `datasets` saved; or plain text files that end in ``.txt`` or ``.md``.
        reading: Options; None for the defaults.

    Raises:
        DataError: See `read_rows`; or the columns of a file match no format, or a value is of the
            wrong type for its column. The message names the file, the row, and the column.
    """
    reading = reading or Reading()
    samples: list[Sample] = []
    formats: list[str] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    for path in paths:
        rows = read_rows(path)
        digest.update(rows.digest)
        if isinstance(rows.found[0][1], str) and not rows.found[0][0].number:
            ((place, text),) = rows.found
            samples.append(Sample(place, None, text, ends=False))
            formats.append(PLAIN)
            notes.append(f"{path}: plain text, split into samples of max_length tokens")
            continue
        columns = list(_object(*rows.found[0]))
        name = _found_format(path, columns, reading)
        names = {c: reading.columns.get(c, c) for c in _read_by(name)}
        for place, row in rows.found:
            values = _Values(place, _object(place, row), names, rows.cells)
            samples.append(_sample(name, values, reading.chat))
        formats.append(name)
        notes.append(_note(path, name, names, columns))
    return Samples(samples, digest.hexdigest(), formats, notes)


def a_turn(role: str, text: str) -> Messages:
    """Return a chat with one message, which has the given role and text."""
    return [{"role": role, "content": text}]


def alpaca_prompt(instruction: str, input: str = "", *, chat: bool = False) -> str:
    """Return the prompt for an instruction, in Alpaca's template unless ``chat`` is True."""
    if chat:
        return f"{instruction}\n\n{input}" if input else instruction
    given = f"### Input:\n{input}\n\n" if input else ""
    paired = _PAIRED if input else ""
    return _ALPACA.format(paired=paired, instruction=instruction, input=given)


def _read_by(name: str) -> tuple[str, ...]:
    return (*FORMATS[name].required, *FORMATS[name].optional)


def _note(path: Path, name: str, names: Mapping[str, str], columns: Sequence[str]) -> str:
    read = [
        source if source == ours else f"{source} (as {ours})"
        for ours, source in names.items()
        if source in columns
    ]
    unread = [column for column in columns if column not in names.values()]
    left = f"; unused: {', '.join(unread)}" if unread else ""
    return f"{path}: {FORMATS[name].title} (format {name}), from {', '.join(read)}{left}"


def _found_format(path: Path, columns: Sequence[str], reading: Reading) -> str:
    """Return the name of the only format in `FORMATS` that matches the columns of a file."""
    for ours, theirs in reading.columns.items():
        if theirs not in columns:
            raise DataError(
                f"{path}: has no column {theirs!r}, which `columns` maps to {ours!r}; its columns "
                f"are {list(columns)}"
            )
    taken = set(reading.columns.values())
    there = {column for column in columns if column not in taken} | set(reading.columns)
    if reading.format is not None:
        missing = [c for c in FORMATS[reading.format].required if c not in there]
        if missing:
            raise DataError(
                f"{path}: has no column {missing[0]!r}, which format {reading.format!r} needs; its "
                f"columns are {list(columns)} (to use another column, set "
                f"columns = {{ {missing[0]} = ... }})"
            )
        return reading.format
    fitting = [name for name, f in FORMATS.items() if there.issuperset(f.required)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{path}: its columns {list(columns)} match the formats "
            f'{" and ".join(fitting)}; choose one, for example format = "{fitting[0]}"'
        )
    known = "; ".join(" and ".join(f.required) for f in FORMATS.values())
    raise DataError(
        f"{path}: its columns {list(columns)} match no format. Expected {known}. If the columns "
        "have other names, map them, for example with columns = { prompt = "
        f"{columns[0] if columns else 'question'!r} }}"
    )


def _object(place: Place, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with columns, got {shown(row)}")
    return row


def _sample(name: str, values: _Values, chat: bool) -> Sample:
    """Convert a row to a sample. If ``chat`` is True, a text prompt becomes a user turn."""
    values.check_there(FORMATS[name].required)
    place = values.place
    if name == "text":
        return Sample(place, None, values.text("text"))
    if name in ("messages", "sharegpt"):
        column = FORMATS[name].required[0]
        return Sample(place, None, values.messages(column), values.template())
    if name == "alpaca":
        given = values.text("instruction"), values.text("input", optional=True)
        prompt, text = alpaca_prompt(*given, chat=chat), values.text("output")
    elif values.same_kind("prompt", "completion") is list:
        asked, answered = values.messages("prompt"), values.messages("completion")
        return Sample(place, asked, answered, values.template())
    else:
        prompt, text = values.text("prompt", empty=True), values.text("completion")
    if not chat:
        return Sample(place, prompt, text)
    return Sample(place, a_turn("user", prompt), a_turn("assistant", text), values.template())


class _Values:
    """The values of a row, which are read by the column names in `FORMATS` and validated."""

    def __init__(
        self, place: Place, row: Mapping[str, Any], names: Mapping[str, str], cells: bool
    ) -> None:
        self.place, self._row, self._names, self._cells = place, row, names, cells

    def check_there(self, columns: Sequence[str]) -> None:
        """Raise `DataError` if the row lacks any of the columns."""
        for name in map(self._names.__getitem__, columns):
            if name not in self._row:
                raise DataError(
                    f"{self.place}: has no column {name!r}, which the first row of the file "
                    f"has; its columns are {list(self._row)}"
                )

    def same_kind(self, *columns: str) -> type:
        """Return `list` if all columns contain lists, or `str` if none do.

        Raises `DataError` if only some of the columns contain lists.
        """
        lists = [isinstance(self._row[self._names[column]], list) for column in columns]
        if any(lists) and not all(lists):
            named = " and ".join(repr(self._names[column]) for column in columns)
            raise DataError(
                f"{self.place}: one of the columns {named} is a list of messages and the other is "
                "not; expected two strings or two lists"
            )
        return list if all(lists) else str

    def text(self, column: str, *, optional: bool = False, empty: bool = False) -> str:
        """Return the text in a column. If ``optional``, return "" for a missing or null value."""
        value = self._row.get(self._names[column])
        if optional and value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(column, f"expected a string, got {shown(value)}")
        self._check_encodes(column, value)
        if not (value or optional or empty):
            raise self._wrong(column, f"the text is empty, got {shown(dict(self._row))}")
        return value

    def messages(self, column: str) -> Messages:
        """Return the chat in a column as a list of messages with ``role`` and ``content``."""
        value = self._json(column)
        if not isinstance(value, list) or not value:
            raise self._wrong(column, f"expected a list of messages, got {shown(value)}")
        found = [self._message(column, n, entry) for n, entry in enumerate(value, 1)]
        self._check_encodes(column, json.dumps(found, ensure_ascii=False, default=str))
        return found

    def template(self) -> dict[str, Any]:
        """Return a dict of the row's additional arguments for the chat template."""
        found: dict[str, Any] = {}
        if "tools" in self._names and (tools := self._json("tools")) is not None:
            if not isinstance(tools, list):
                raise self._wrong("tools", f"expected a list of tools, got {shown(tools)}")
            found["tools"] = tools
        if "chat_template_kwargs" in self._names:
            more = self._json("chat_template_kwargs")
            if more is not None and not isinstance(more, dict):
                raise self._wrong("chat_template_kwargs", f"expected an object, got {shown(more)}")
            found |= more or {}
        return found

    def _json(self, column: str) -> Any:
        """Return the value in a column, parsed as JSON if it is a text cell or in ``tools``."""
        value = self._row.get(self._names[column])
        if isinstance(value, str) and (self._cells or column == "tools"):
            return parsed_json(self._where(column), value) if value else None
        return value

    def _message(self, column: str, number: int, entry: Any) -> Message:
        what = f"message {number}"
        if not isinstance(entry, dict):
            raise self._wrong(column, f"{what} is {shown(entry)}, expected an object")
        # Arrow gives every message the keys of all messages, with null for the missing ones.
        message = {key: value for key, value in entry.items() if value is not None}
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            message["role"] = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
            if "value" in message:
                message["content"] = message.pop("value")
            if message["role"] not in _ROLES:
                known = ", ".join((*_SPEAKERS, *_ROLES))
                raise self._wrong(
                    column, f"{what} is from {shown(speaker)}, expected one of {known}"
                )
        if not isinstance(message.get("role"), str):
            raise self._wrong(column, f"{what} has no role (or from), got {shown(entry)}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise self._wrong(column, f"{what} has no content (or value), got {shown(entry)}")
        if content is not None and not isinstance(content, str | list):
            raise self._wrong(column, f"{what} has content {shown(content)}, expected a string")
        # Templates read ``content``, so restore the null that was dropped above.
        return message if content is not None else {**message, "content": None}

    def _check_encodes(self, column: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may contain a lone surrogate, "\\ud83d"
            raise self._wrong(
                column, f"a string is not valid Unicode text ({error.reason})"
            ) from error

    def _where(self, column: str) -> str:
        return f"{self.place}, column {self._names[column]!r}"

    def _wrong(self, column: str, what: str) -> DataError:
        return DataError(f"{self._where(column)}: {what}")
