"""Files of training text: what becomes a sample, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora.train.config import read_settings
from fastlora.train.data import DataError, read_samples
from fastlora.validation import ConfigError

PAIRS = [("hi, you", "yo"), ('a "b"\nc', "d\te")]


def written(folder: Path, name: str, text: str) -> Path:
    """A file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path) -> None:
    """JSON lines, a JSON list, CSV and TSV; commas, quotes and line breaks are the text's."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    lines = "\n".join(map(json.dumps, rows))
    table = 'completion,id,prompt\nyo,1,"hi, you"\nd\te,2,"a ""b""\nc"\n'
    tabs = 'prompt\tcompletion\nhi, you\tyo\n"a ""b""\nc"\t"d\te"\n'
    files = {
        "a.jsonl": lines,
        "b.json": lines,
        "c.json": json.dumps(rows, indent=1),
        "d.csv": table,
        "e.CSV": table,
        "f.tsv": tabs,
    }
    for name, text in files.items():
        samples, _ = read_samples([written(tmp_path, name, text)])
        assert [(sample.prompt, sample.text) for sample in samples] == PAIRS, name
    places = [str(s.place) for s in read_samples([tmp_path / "d.csv"])[0]]
    assert places == [f"{tmp_path / 'd.csv'}, line {line}" for line in (2, 4)]


def test_texts(tmp_path: Path) -> None:
    """A column of texts is a sample a row, a plain file is one."""
    (row,), _ = read_samples([written(tmp_path, "a.csv", "text\nhello\n")])
    assert (row.prompt, row.text) == (None, "hello")
    (long,), _ = read_samples([written(tmp_path, "long.csv", f"text\n{'x' * 200_000}\n")])
    assert len(long.text) == 200_000
    for name in ("b.txt", "b.md"):
        (whole,), _ = read_samples([written(tmp_path, name, "prompt,completion\nhi,yo\n")])
        assert (whole.prompt, whole.text) == (None, "prompt,completion\nhi,yo\n")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.parquet", "x", r"a.parquet: expected a file that ends in .jsonl, .json, .csv, .tsv,"),
        ("a", "x", r"a: expected a file that ends in"),
        ("a.csv", "question,answer\nhi,yo\n", r"expected columns 'prompt' and 'completion', or"),
        (
            "a.csv",
            "text,prompt,completion\na,b,c\n",
            r"expected columns 'prompt' and 'completion', or",
        ),
        ("a.csv", "text,text\na,b\n", r"a.csv: two columns have the same name: \['text', 'text'\]"),
        ("a.csv", "prompt,completion\nhi\n", r"a.csv, line 2: expected 2 columns"),
        ("a.csv", "prompt,completion\nhi,yo,no\n", r"a.csv, line 2: expected 2 columns"),
        ("a.csv", "prompt,completion\nhi,yo\nhi,\n", r"a.csv, line 3: there is nothing to learn"),
        ("a.csv", 'prompt,completion\nhi,"yo\n', r"a.csv, line 2: not valid CSV"),
        ("a.csv", "prompt,completion\n", r"a.csv: is empty"),
        ("a.csv", "", r"a.csv: is empty"),
        ("a.json", '[{"text": "x"}, 3]', r"a.json, line 2: expected an object with 'prompt' and"),
        ("a.json", '[{"text": "x"}', r"a.json, line 1: not valid JSON"),
        ("a.json", "[]", r"a.json: is empty"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    """Nothing is trained on as something that it is not."""
    with pytest.raises(DataError, match=words):
        read_samples([written(tmp_path, name, text)])


def test_settings_of_another_kind(tmp_path: Path) -> None:
    """A YAML file, or data in the settings' place, is no broken TOML."""
    for name in ("r.yaml", "data.jsonl"):
        with pytest.raises(ConfigError, match=r"settings are read from .toml and .json files"):
            read_settings(written(tmp_path, name, "model: x\n"), {})
