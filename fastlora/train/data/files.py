"""Read the rows of training data files. The extension of a file determines its type."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.command_line import install_command
from fastlora.validation import FastLoraError

# .jsonl: one object per line. .json: a list of objects, or one object per line. .csv and .tsv: a
# header line and rows.
TABLES = (".jsonl", ".json", ".csv", ".tsv")
TEXTS = (".txt", ".md")
PARQUET = ".parquet"
# Files that `datasets` writes beside Arrow files, for a single dataset and for several splits.
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"


class DataError(FastLoraError, ValueError):
    """The training data is invalid.

    For example, a data file is missing or empty, or contains an invalid row. The error is also
    raised for evaluation data.
    """


class SampleLocation(NamedTuple):
    """The location of a data sample, such as a file and a line number.

    Attributes:
        path: The file, or the folder of a `datasets` dataset.
        number: Number of the line, entry, or row, counted from 1; 0 for a plain text file.
        unit: The numbered unit: ``"line"``, ``"entry"``, or ``"row"``.
        others: Number of samples that are packed after this sample in the same row.
    """

    path: Path
    number: int
    unit: str = "line"
    others: int = 0

    def __str__(self) -> str:
        """Return a description of the source for error messages."""
        text = f"{self.path}, {self.unit} {self.number}" if self.number else str(self.path)
        return f"{text} (and {self.others} more in the same row)" if self.others else text


class ParsedDataFile(NamedTuple):
    """The rows of a parsed file of training or evaluation data.

    A training or evaluation sample is made from each row. The object also stores the location of
    each row and the digest of the file.

    Attributes:
        found: List of tuples (location of the row, row). A plain text file has one row, its text.
            In other files, each row is a parsed line or entry, which is a dict unless the file is
            invalid.
        digest: SHA-256 digest of the file's bytes.
        cells: Whether values are text cells of a table, in which lists are written as JSON.
    """

    found: list[tuple[SampleLocation, Any]]
    digest: bytes
    cells: bool = False


def read_rows(path: Path) -> ParsedDataFile:
    """Read the rows of a data file.

    Raises:
        DataError: The file is of an unknown type, missing, empty, not UTF-8, or malformed, or the
            library that reads it is not installed. The message names the file and, if known, the
            line.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        rows = _read_saved_dataset(path)
    elif suffix == PARQUET:
        rows = _read_parquet(path)
    elif suffix in (*TABLES, *TEXTS):
        rows = _read_text_file(path, suffix)
    else:
        known = ", ".join((*TABLES, *TEXTS))
        raise DataError(
            f"{path}: expected a folder written by datasets.Dataset.save_to_disk, or a file with "
            f"one of these extensions: {known}, {PARQUET}"
        )
    if not rows.found:
        raise DataError(f"{path}: no samples found; expected at least one")
    return rows


def quoted_excerpt(value: object) -> str:
    """Return a quoted excerpt of a value, for an error message.

    The excerpt contains at most 60 characters.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def parse_json(source: SampleLocation | str, text: str) -> Any:
    """Parse JSON text, and return its value.

    Raises `DataError` if the text is invalid. The message names ``source``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not valid JSON ({error}): {quoted_excerpt(text)}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error})") from error


def _read_text_file(path: Path, suffix: str) -> ParsedDataFile:
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{SampleLocation(path, line)}: cannot decode the text ({error})"
        ) from error
    digest = hashlib.sha256(data).digest()
    if suffix in (".csv", ".tsv"):
        return ParsedDataFile(
            _parse_table(path, text, "," if suffix == ".csv" else "\t"), digest, cells=True
        )
    if suffix in TEXTS:
        return ParsedDataFile([(SampleLocation(path, 0), text)] if text.strip() else [], digest)
    if suffix == ".json" and text.lstrip().startswith("["):
        entries = parse_json(SampleLocation(path, 1), text)
        return ParsedDataFile(
            [(SampleLocation(path, n, "entry"), row) for n, row in enumerate(entries, 1)], digest
        )
    # splitlines() would also split at U+2028, which a JSON string may contain.
    lines = [
        (SampleLocation(path, n), line)
        for n, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    return ParsedDataFile([(source, parse_json(source, line)) for source, line in lines], digest)


def _parse_table(
    path: Path, text: str, delimiter: str
) -> list[tuple[SampleLocation, dict[str, str]]]:
    """Parse the text of a CSV or TSV file, and return its rows.

    The text begins with a header line. Each row is returned as a tuple (location, dict of the
    values by column name).
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may hold a long text
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[SampleLocation, dict[str, str]]] = []
    try:
        columns = list(reader.fieldnames or ())
        if len(set(columns)) < len(columns):
            raise DataError(f"{path}: several columns have the same name: {columns}")
        for row in reader:
            source = SampleLocation(path, reader.line_num)
            if None in row or None in row.values():
                raise DataError(
                    f"{source}: wrong number of values; expected {len(columns)} values, one for "
                    f"each of the columns {columns}"
                )
            rows.append((source, row))
    except csv.Error as error:
        source = SampleLocation(path, reader.reader.line_num)
        raise DataError(f"{source}: not valid CSV ({error})") from error
    return rows


def _read_parquet(path: Path) -> ParsedDataFile:
    data = _read_bytes(path)
    pyarrow = _import_library(path, "pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        # `datasets` reads Parquet with pyarrow too, but would leave a copy in its cache.
        entries = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid Parquet file ({error})") from error
    return ParsedDataFile(_number_rows(path, entries), hashlib.sha256(data).digest())


def _read_saved_dataset(path: Path) -> ParsedDataFile:
    if (path / _SPLITS_FILE).is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / _STATE_FILE).is_file())
        named = " or ".join(str(path / name) for name in splits)
        raise DataError(f"{path}: this dataset has multiple splits; choose one of them: {named}")
    if not (path / _STATE_FILE).is_file():
        raise DataError(
            f"{path}: not a folder written by datasets.Dataset.save_to_disk "
            f"(it has no {_STATE_FILE})"
        )
    datasets = _import_library(path, "datasets")
    files = sorted(entry for entry in path.iterdir() if entry.is_file())
    digest = hashlib.sha256()
    try:
        for file in files:
            if file.suffix == ".arrow":
                data = file.read_bytes()
                digest.update(len(data).to_bytes(8, "little") + data)
        entries = datasets.load_from_disk(str(path), keep_in_memory=True).with_format(None)[:]
    except Exception as error:  # Arrow and datasets raise many types of errors
        raise DataError(f"{path}: cannot read the dataset ({error})") from error
    columns = list(entries)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*entries.values(), strict=True)]
    return ParsedDataFile(_number_rows(path, rows), digest.digest())


def _import_library(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = install_command("data")
        raise DataError(
            f"{path}: reading this data requires {name}; install it with: {install}"
        ) from error


def _number_rows(path: Path, entries: Sequence[Any]) -> list[tuple[SampleLocation, Any]]:
    return [(SampleLocation(path, number, "row"), entry) for number, entry in enumerate(entries, 1)]
