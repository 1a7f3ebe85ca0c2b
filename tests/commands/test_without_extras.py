"""Commands where only torch, triton and safetensors are installed: help and the doctor work, a run
names what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.programs import python

ROOT = Path(__file__).resolve().parents[2]
# Runs commands in a process that has none of the other libraries; prints what each gave.
CODE = """
import contextlib, importlib.abc, io, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from fastlora.commands import cli, system_checks

have = system_checks.installed_version
system_checks.installed_version = lambda name: (
    None if name in system_checks._OPTIONAL else have(name)
)

found = []
for words in {commands}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
BLOCKED = (
    *("transformers", "tokenizers", "huggingface_hub", "peft", "trl", "accelerate", "tqdm"),
    *("datasets", "pyarrow", "matplotlib", "yaml", "gguf", "bitsandbytes", "torchao"),
    *("fastapi", "uvicorn", "openai"),
)


def test_help_and_errors(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}')
    (tmp_path / "run.yaml").write_text("model: base")
    base = str(tmp_path / "base")
    train = ["train", "--model", base, "--out", str(tmp_path / "out"), "--data"]
    train += [f"a={tmp_path / 'data.jsonl'}"]
    commands = ("", "info", "inspect", "merge", "train", "chat", "serve", "bench", "demo")
    helps = [
        [*command.split(), "--help"] for command in (*commands, "bench mixed", "bench kernels")
    ]
    runs = {
        "training needs accelerate; install it with: pip install '.[train]'": train,
        "reading YAML needs PyYAML: `pip install pyyaml`": ["train", str(tmp_path / "run.yaml")],
        "chat needs transformers; install it with: pip install '.[hf]'": [*("chat", base)],
        "serve needs ": ["serve", base],
        "demo needs transformers; install it with: pip install '.[demo]'": ["demo"],
        "bench needs transformers; install it with: pip install '.[hf,bench]'": [
            *("bench", "mixed", "--model", base)
        ],
    }
    looks = [["doctor"], ["doctor", base]]
    code = CODE.format(blocked=set(BLOCKED), commands=[*looks, *helps, *runs.values()])
    (well, without_model, *found) = json.loads(python(code, tmp_path, PYTHONPATH=str(ROOT)))
    assert (well[0], well[2]) == (0, "") and (without_model[0], without_model[2]) == (1, "")
    assert "fix: pip install '.[hf]'" in without_model[1]
    for words, (exit_code, out, err) in zip(helps, found[: len(helps)], strict=True):
        assert exit_code == 0 and "usage: " in out and not err, words
    for (message, words), (exit_code, out, err) in zip(
        runs.items(), found[len(helps) :], strict=True
    ):
        assert exit_code == 1 and not out, words
        assert f"fastlora: error: {message}" in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()
