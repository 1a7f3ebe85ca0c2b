"""Files of training data: which format a file has, what becomes a sample, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlora.train.data import DataError, DataOptions, read_samples
from fastlora.train.data.formats import FORMATS, Messages, alpaca_prompt
from fastlora.train.settings import read_settings
from fastlora.validation import ConfigError

PAIRS = [("hi, you", "yo"), ('a "b"\nc', "d\te")]
CHAT: Messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def written(folder: Path, name: str, text: str) -> Path:
    """A file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def only(folder: Path, row: dict[str, Any], **reading: Any) -> Any:
    """The sample that a row is."""
    path = written(folder, "one.jsonl", json.dumps(row))
    (sample,) = read_samples([path], DataOptions(**reading)).found
    return sample


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
    paths = [written(tmp_path, name, text) for name, text in files.items()]
    for path in paths:
        found = read_samples([path]).found
        assert [(sample.prompt, sample.text) for sample in found] == PAIRS, path
    places = [str(s.source) for s in read_samples([tmp_path / "d.csv"]).found]
    assert places == [f"{tmp_path / 'd.csv'}, line {line}" for line in (2, 4)]
    (note,) = read_samples([tmp_path / "d.csv"]).notes
    assert "prompts and completions (format prompt_completion), from prompt, completion" in note
    assert note.endswith("; unused: id")


def test_parquet_and_folders_of_datasets(tmp_path: Path) -> None:
    """What Arrow holds: nested chats without the nulls that it adds, and both digests differ."""
    datasets = pytest.importorskip("datasets", reason="reads its files")
    call = {"role": "assistant", "tool_calls": [{"type": "function"}]}
    rows = [{"messages": CHAT, "n": 1}, {"messages": [CHAT[0], call], "n": 2}]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    expected = [CHAT, [CHAT[0], {**call, "content": None}]]
    for name in ("a.parquet", "folder", "splits/train"):
        found = read_samples([tmp_path / name])
        assert [sample.text for sample in found.found] == expected
        assert str(found.found[1].source) == f"{tmp_path / name}, row 2"
    with pytest.raises(
        DataError, match=r"this dataset has multiple splits; choose one of them: .*splits/train"
    ):
        read_samples([tmp_path / "splits"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: not a folder written by datasets"):
        read_samples([tmp_path / "nothing"])
    with pytest.raises(DataError, match="x.parquet: not a valid Parquet file"):
        read_samples([written(tmp_path, "x.parquet", "x")])


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("folder", "datasets")])
def test_without_the_library(tmp_path: Path, monkeypatch: Any, name: str, module: str) -> None:
    """One line names the extra."""
    (tmp_path / "folder").mkdir()
    written(tmp_path, "folder/state.json", "{}")
    written(tmp_path, "a.parquet", "x")
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        rf"{name}: reading this data requires {module}; install it with: pip install '\.\[data\]' "
        r"\(in a clone"
    )
    with pytest.raises(DataError, match=message):
        read_samples([tmp_path / name])


def test_texts(tmp_path: Path) -> None:
    """A column of texts is a sample a row, a plain file is one."""
    (row,) = read_samples([written(tmp_path, "a.csv", "text\nhello\n")]).found
    assert (row.prompt, row.text) == (None, "hello")
    (long,) = read_samples([written(tmp_path, "long.csv", f"text\n{'x' * 200_000}\n")]).found
    assert len(long.text) == 200_000
    for name in ("b.txt", "b.md"):
        (whole,) = read_samples([written(tmp_path, name, "prompt,completion\nhi,yo\n")]).found
        assert (whole.prompt, whole.text) == (None, "prompt,completion\nhi,yo\n")


def test_formats(tmp_path: Path) -> None:
    """Each is found from its columns; speakers have their usual names; cells of CSV hold JSON."""
    assert only(tmp_path, {"messages": CHAT}).text == CHAT
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert only(tmp_path, {"conversations": shared}).text == CHAT
    assert only(tmp_path, {"conversations": CHAT}).text == CHAT
    cell = written(
        tmp_path, "a.csv", 'conversations\n"' + json.dumps(CHAT).replace('"', '""') + '"'
    )
    assert read_samples([cell]).found[0].text == CHAT
    sample = only(tmp_path, {"prompt": CHAT[:1], "completion": CHAT[1:]})
    assert (sample.prompt, sample.text) == (CHAT[:1], CHAT[1:])
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):  # as TRL takes them
        assert only(tmp_path, {"messages": CHAT, "tools": given}).template_kwargs == {
            "tools": tools
        }
    sample = only(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert sample.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert "paired with an input" in sample.prompt and sample.text == "3"
    for nothing in ({"input": ""}, {"input": None}, {}):
        sample = only(tmp_path, {"instruction": "Add.", "output": "3", **nothing})
        assert sample.prompt == alpaca_prompt("Add.") and "Input" not in sample.prompt


def test_a_chat_of_texts(tmp_path: Path) -> None:
    """With chat on, prompts and instructions are a user's turn, without Alpaca's headings."""
    sample = only(tmp_path, {"prompt": "hi", "completion": "yo"}, chat=True)
    assert (sample.prompt, sample.text) == (CHAT[:1], CHAT[1:])
    sample = only(tmp_path, {"instruction": "Add.", "input": "1", "output": "3"}, chat=True)
    assert sample.prompt == [{"role": "user", "content": "Add.\n\n1"}]


def test_columns_and_formats_that_are_named(tmp_path: Path) -> None:
    """Other names of columns, and which of two formats is meant."""
    row = {"question": "hi", "answer": "yo", "text": "hiyo"}
    names = {"prompt": "question", "completion": "answer"}
    sample = only(tmp_path, row, columns=names, format="prompt_completion")
    assert (sample.prompt, sample.text) == ("hi", "yo")
    assert only(tmp_path, row).text == "hiyo"
    assert only(tmp_path, row, columns={"text": "answer"}).text == "yo"
    path = written(tmp_path, "b.jsonl", json.dumps(row))
    reading = DataOptions(columns={"text": "answer"})
    assert "from answer (as text); unused: question, text" in read_samples([path], reading).notes[0]
    with pytest.raises(DataError, match="match the formats prompt_completion and text; choose"):
        only(tmp_path, row, columns=names)
    with pytest.raises(DataError, match=r"no column named 'answr' \(`columns` maps 'pr"):
        only(tmp_path, row, columns={"prompt": "answr"})
    with pytest.raises(DataError, match=r"no column named 'messages' \(format 'messages'"):
        only(tmp_path, row, format="messages")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xlsx", "x", r"a.xlsx: expected .* extensions: .jsonl, .json, .csv, .tsv,"),
        ("a", "x", r"a: expected a folder written by"),
        ("a.csv", "question,answer\nhi,yo\n", r"\['question', 'answer'\] do not match any format"),
        ("a.csv", "text,text\na,b\n", r"several columns have the same name: \['text', 'text'\]"),
        ("a.csv", "prompt,completion\nhi\n", r"a.csv, line 2: wrong .* expected 2 values"),
        ("a.csv", "prompt,completion\nhi,yo,no\n", r"a.csv, line 2: wrong .* expected 2 values"),
        ("a.csv", "prompt,completion\nhi,yo\nhi,\n", r"line 3, column 'completion': the text is"),
        ("a.csv", 'prompt,completion\nhi,"yo\n', r"a.csv, line 2: not valid CSV"),
        ("a.csv", "prompt,completion\n", r"a.csv: no samples found"),
        ("a.csv", "", r"a.csv: no samples found"),
        ("a.csv", "messages\nhi\n", r"a.csv, line 2, column 'messages': not valid JSON"),
        ("a.json", '[{"text": "x"}, 3]', r"a.json, entry 2: expected a JSON object that"),
        ("a.json", '[{"text": "x"}', r"a.json, line 1: not valid JSON"),
        ("a.json", "[]", r"a.json: no samples found"),
        ("a.jsonl", '{"messages": []}', r"line 1, column 'messages': expected a list of messages"),
        ("a.jsonl", '{"messages": "hi"}', r"column 'messages': expected a list of messages, got"),
        ("a.jsonl", '{"messages": ["hi"]}', r"column 'messages': message 1 is 'hi', expected an"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', r'1 must have a "role" \(or "from"\)'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r'message 1 has no "content" \(or "val'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', r"has content '3'; expected"),
        ("a.jsonl", '{"conversations": [{"from": "me", "value": ""}]}', r"message 1 has role 'me'"),
        ("a.jsonl", '{"prompt": "x", "completion": [{}]}', r"line 1: one of the columns 'prompt'"),
        (
            "a.jsonl",
            r'{"messages": [{"role": "user", "content": "\ud83d"}]}',
            r"not valid Unicode",
        ),
        ("a.jsonl", '{"instruction": "x", "output": ""}', r"column 'output': the text is empty"),
        ("a.jsonl", '\n{"text": "x y"}\n[1, 2]', r"line 3: expected a JSON object .*, got"),
        ("a.jsonl", "[" * 100_000, r"line 1: not valid JSON"),
        ("a.jsonl", "\n  \n", r"a.jsonl: no samples found; expected at least one"),
        ("a.jsonl", '{"prompt": "x"}', r"the columns \['prompt'\] do not match any format"),
        ("a.jsonl", '{"prompt": "x", "completion": 3}', r"column 'completion': expected a string"),
        ("a.jsonl", '{"text": null}', r"line 1, column 'text': expected a string, got 'null'"),
        ("a.jsonl", '{"text": "x"}\n{"texts": "y"}', r"line 2: this row has no column named 't"),
        ("a.jsonl", r'{"prompt": "\udfff", "completion": "y"}', r"column 'prompt': a string is no"),
    ],
)
def test_what_raises(tmp_path: Path, name: str, text: str, words: str) -> None:
    """Nothing is trained on as something that it is not."""
    with pytest.raises(DataError, match=words):
        read_samples([written(tmp_path, name, text)])


def test_settings_of_another_kind(tmp_path: Path) -> None:
    """Data in the settings' place is no broken TOML."""
    with pytest.raises(ConfigError, match=r"expected a .toml, .json, or .yaml file"):
        read_settings(written(tmp_path, "data.jsonl", "model: x\n"), {})


def test_settings_in_yaml(tmp_path: Path) -> None:
    """The same settings as in TOML; 2e-4 is a number; keys that are no text or twice are not."""
    pytest.importorskip("yaml", reason="reads YAML")
    text = (
        "model: base\nout: /runs/x\nchat_template: t.jinja\n"
        "defaults: {lr: 2e-4, alpha: 8}\n"
        "adapters:\n  a:\n    data: [a.jsonl]\n    r: 4\n    columns: {prompt: question}\n"
    )
    settings = read_settings(written(tmp_path, "r.yaml", text), {})
    (adapter,) = settings.adapters
    assert (settings.model, settings.out) == (tmp_path / "base", Path("/runs/x"))
    assert settings.chat_template == tmp_path / "t.jinja"
    assert (adapter.learning_rate, adapter.data) == (2e-4, (tmp_path / "a.jsonl",))
    assert adapter.lora == {"lora_alpha": 8, "r": 4} and adapter.columns == {"prompt": "question"}
    text = (
        "model: base\nout: 7b/x\nsteps: 010\nbatch_size: 08\nseed: 0x10\n"
        "adapters:\n  a: &a {data: a.txt, lr: 2, <<: &d {r: 4, alpha: 8}, r: 2}\n"
        "  b: {<<: [*a, *d], lr: 3}\n"
    )
    settings = read_settings(written(tmp_path, "r.yaml", text), {})
    a, b = settings.adapters
    assert (settings.steps, settings.batch_size, settings.seed) == (10, 8, 16)
    assert settings.out == tmp_path / "7b/x"
    assert a.lora == b.lora == {"r": 2, "lora_alpha": 8} and a.data == b.data
    assert (a.learning_rate, b.learning_rate) == (2, 3)
    for text, words in (
        ("adapters: {a: {<<: {r: 2}, r: 3, r: 4}}", "the key 'r' appears twice"),
        ("adapters: {a: {<<: [{r: 2}, 3]}}", "the value of the key << must be a table or a list"),
        ("model: [", "r.yml: not valid YAML"),
        ("model: a\nmodel: b", "the key 'model' appears twice"),
        ("adapters: {no: 3}", "the key False is not a string; put it in quotes"),
        ("- a", "expected an object, found list"),
        ("model: !!python/object:os.system x", "not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_settings(written(tmp_path, "r.yml", text), {})


def test_names_of_formats_and_columns() -> None:
    """A format's columns are no other's: one file fits two only where it has both."""
    required = [set(f.required) for f in FORMATS.values()]
    assert all(a == b or not a & b for a in required for b in required)
