"""What `fastlora train` says and leaves beside adapters: data, losses, answers, trackers."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.train import data as train_data
from fastlora.train.run import train
from fastlora.train.settings import settings_from_dict
from tests.support import train_runs
from tests.support.tiny import tiny_llama
from tests.support.train_runs import log


def test_the_first_lines_say_what_is_read(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Format, columns and what is left out, before the first step; so does the dry run."""
    path = tmp_path / "a.csv"
    path.write_text(f"question,id,answer\nhi,1,yo\nho,2,ya\n{'x' * 30},3,no\n")
    flags = ["--model", base, "--out", tmp_path / "out", "--data", f"a={path}", "--steps", 1]
    flags += ["--columns", "prompt=question,completion=answer", "--max-length", 8, "--cpu"]
    lines = [
        f"a: {path}: prompts and completions (format prompt_completion), from question (as prompt)"
        ", answer (as completion); unused: id",
        "a: 1 of 3 samples are skipped: their first 8 tokens contain nothing to train on (the "
        f"first is {path}, line 4)",
        "a: 2 samples, 10 tokens (6 with loss)",
    ]
    assert cli.main(["train", *map(str, flags), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == lines
    shutil.rmtree(tmp_path / "out")
    assert cli.main(["train", *map(str, flags), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(line.removeprefix("a: ") in text for line in lines)


def test_losses_as_table_and_picture(
    base: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The table is the log's, the mean is over all steps, and the picture is one."""
    pytest.importorskip("matplotlib", reason="draws the losses")
    given = train_runs.config(base, data, tmp_path / "out", steps=3)
    given["adapters"]["a"]["eval_data"] = str(data["a"])
    train_runs.train(tmp_path / "c.json", given)
    out = tmp_path / "out"
    with (out / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [
        (int(r["step"]), r["adapter"], float(r["loss"])) for r in rows if r["kind"] != "evalua"
    ]
    expected = [(e["step"], n, v) for e in log(out) for n, v in e["loss"].items()]
    expected += [(3, "a", log(out, "eval_loss")[0]["eval_loss"]["a"])]
    assert sorted(found) == sorted(expected)
    own = [value for step, name, value in expected[:-1] if name == "a"]
    printed = capsys.readouterr().out
    assert f"a, mean loss {sum(own) / len(own):.4f}, last loss {own[-1]:.4f}, evaluation" in printed
    assert f"losses of all steps are in {out / 'losses.csv'}, {out / 'losses.png'}\n" in printed
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train_runs.train(tmp_path / "d.json", given | {"out": str(tmp_path / "bare")})
    assert "losses.csv (to also plot them, install matplotlib: pip" in capsys.readouterr().out
    assert not (tmp_path / "bare" / "losses.png").exists()


def test_the_plot_of_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a title, every step, a smoothed line, evaluations, and whole steps on the axis."""
    pytest.importorskip("matplotlib", reason="draws the losses")
    import matplotlib.figure

    from fastlora.train.run_log import LoggedLoss, plot_losses

    drawn: list[Any] = []
    figure = matplotlib.figure.Figure
    monkeypatch.setattr(
        matplotlib.figure, "Figure", lambda **how: drawn.append(figure(**how)) or drawn[-1]
    )
    values = [4.0 + (-1) ** step for step in range(1, 41)]
    losses = [LoggedLoss(step, "a", "training", v, 1.0) for step, v in enumerate(values, 1)]
    losses += [LoggedLoss(step, "a", "evaluation", 4.0, None) for step in (20, 40)]
    losses += [LoggedLoss(1, "b", "training", 2.0, 1.0), LoggedLoss(2, "b", "training", None, 1.0)]
    (tmp_path / "first").mkdir()
    assert plot_losses(tmp_path / "first", losses) == tmp_path / "first" / "losses.png"
    (axes,) = drawn[0].axes
    raw, smooth, evaluation, short = axes.lines
    assert list(raw.get_xdata()) == list(smooth.get_xdata()) == list(range(1, 41))
    assert list(raw.get_ydata()) == values
    # Means of five steps, and of three at both ends.
    assert smooth.get_ydata()[0] == pytest.approx(11 / 3)
    assert list(smooth.get_ydata()[2:4]) == pytest.approx([19 / 5, 21 / 5])
    assert list(evaluation.get_xdata()) == [20, 40] and list(evaluation.get_ydata()) == [4.0, 4.0]
    assert (list(short.get_xdata()), list(short.get_ydata())) == ([1], [2.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *("a", "a, evaluation", "b")
    ]
    assert axes.get_title() == "Loss per step: first"
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "loss"
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_more_steps(base: Path, data: Any, tmp_path: Path, capsys: Any) -> None:
    """A finished or a killed run of 4 goes on to 7: at a constant rate, bit for bit that of 7."""
    given = train_runs.config(base, data, tmp_path / "whole", steps=7, save_every=2)
    given["defaults"] |= {"warmup_ratio": 0, "schedule": "constant"}
    given["adapters"]["b"].pop("schedule")
    whole = train_runs.train(tmp_path / "c.json", given)
    train_runs.train(tmp_path / "c.json", given | {"steps": 4, "out": str(tmp_path / "4")})
    shutil.copytree(tmp_path / "4", tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-00000004")
    for done in ("4", "2"):
        given |= {"steps": 4, "out": str(tmp_path / done)}
        capsys.readouterr()
        more = train_runs.train(tmp_path / "c.json", given, "--resume", "--steps", 7)
        assert f"continuing after step {done}, to 7 steps instead of 4" in capsys.readouterr().out
        assert train_runs.same(more, whole)
        assert log(tmp_path / done) == log(tmp_path / "whole")


def test_rates_of_more_steps(base: Path, data: Any, tmp_path: Path, fails: Any) -> None:
    """The schedule is that of the new number of steps, from the next step on; not of fewer."""
    given = train_runs.config(base, data, tmp_path / "out", steps=2, save_every=2)
    given["defaults"]["warmup_ratio"] = 0
    given |= {"adapters": {"a": given["adapters"]["a"]}}
    train_runs.train(tmp_path / "c.json", given)
    assert [entry["next_lr"]["a"] for entry in log(tmp_path / "out")] == [0.005, 0]
    error = fails(given | {"steps": 1}, "--resume")
    assert "2 steps are already done, but the run is limited to 1; set --steps to 2" in error
    train_runs.train(tmp_path / "c.json", given | {"steps": 4}, "--resume")
    run = log(tmp_path / "out")
    assert [entry["next_lr"]["a"] for entry in run[2:]] == pytest.approx([0.0025, 0])
    # The third step moved by half of the rate that it began with, not by the old schedule's 0.
    states = [
        train_runs.load_file(path / "adapters" / "a" / "adapter_model.safetensors")
        for path in sorted((tmp_path / "out" / "checkpoints").iterdir())
    ]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_answers_at_evaluations(
    base: Path, data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each adapter's greedy answer to its own prompts, as it gives it alone; training goes on."""
    given = train_runs.config(base, data, tmp_path / "plain", steps=4)
    plain = train_runs.train(tmp_path / "c.json", given)
    given["adapters"]["a"]["prompts"] = ["sea?", "the north wind?"]
    given["adapters"]["b"]["prompts"] = "star"
    given |= {"out": str(tmp_path / "out"), "eval_every": 2, "sample_tokens": 5}
    found = train_runs.train(tmp_path / "c.json", given)
    assert train_runs.same(found, plain)
    entries = log(tmp_path / "out", "answers")
    assert [entry["step"] for entry in entries] == [2, 4]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    printed = capsys.readouterr().out
    for name, prompts in (("a", ["sea?", "the north wind?"]), ("b", ["star"])):
        model = fastlora.LoraModel.from_pretrained(tiny_llama(), tmp_path / "out" / name).eval()
        for prompt, entry in zip(prompts, entries[-1]["answers"][name], strict=True):
            ids = torch.tensor([tokenizer(prompt).input_ids])
            made = model.generate(
                input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=95, pad_token_id=96
            )
            answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            assert entry == {"prompt": prompt, "answer": answer}
            assert f"step 4, {name}: {prompt!r} -> {answer!r}" in printed


def test_prompts_are_put_as_the_data_is(tmp_path: Path, base: Path) -> None:
    """As a turn where the data is chats, under Alpaca's headings, or as they stand."""
    from transformers import AutoTokenizer

    from fastlora.train.data.tokenization import format_and_tokenize_prompt

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for row, expected in (
        ({"messages": chat}, "<user>hi<bot>"),
        ({"instruction": "x", "output": "y"}, train_data.formats.alpaca_prompt("hi")),
        ({"prompt": "x", "completion": "y"}, "hi"),
        ({"text": "x"}, "hi"),
    ):
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        corpus = train_data.tokenize_files([tmp_path / "d.jsonl"], tokenizer, 512)
        assert format_and_tokenize_prompt("hi", corpus, tokenizer) == tokenizer(expected).input_ids


def test_trackers(base: Path, data: Any, tmp_path: Path) -> None:
    """TensorBoard's files hold the log's losses and the answers; they are read as they are."""
    pytest.importorskip("tensorboardX", reason="writes the files")
    from tensorboardX.proto.event_pb2 import Event

    given = train_runs.config(base, data, tmp_path / "out", steps=2, track="tensorboard")
    given["adapters"]["a"] |= {"eval_data": str(data["a"]), "prompts": ["sea?"]}
    train_runs.train(tmp_path / "c.json", given | {"sample_tokens": 2})
    found: dict[tuple[str, int], float] = {}
    names = set()
    for path in (tmp_path / "out" / "trackers").rglob("events*"):
        rest = path.read_bytes()
        while rest:
            # A record: its length in 8 bytes, their checksum, the record, its checksum.
            size = int.from_bytes(rest[:8], "little")
            event, rest = Event.FromString(rest[12 : 12 + size]), rest[16 + size :]
            for value in event.summary.value:
                names.add(value.tag)
                found[value.tag, event.step] = value.simple_value
    for entry in log(tmp_path / "out"):
        for name, loss in entry["loss"].items():
            assert found[f"loss/{name}", entry["step"]] == pytest.approx(loss)
    assert {"grad_norm/a", "next_lr/a", "eval_loss/a"} <= names
    assert any(name.startswith("answers/a/1") for name in names)


def test_trackers_that_are_not_there(fails: Any, given: Any, tmp_path: Path) -> None:
    """A wrong name, and one whose library is missing; nothing is written."""
    for name, words in (
        ("tensorbord", "track: unknown tracker 'tensorbord'; close names: tensorboard"),
        ("dvclive", "tracker 'dvclive' is not installed; install it with: pip install dvclive"),
    ):
        assert words in fails(given | {"track": [name]})
        assert words in fails(given, "--track", name, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_packing_in_a_run(base: Path, data: Any, tmp_path: Path) -> None:
    """Two packed adapters in mixed batches; killed and resumed bit for bit; other rows are not."""
    given = train_runs.config(base, data, tmp_path / "out", steps=4, save_every=2, packing="bfd")
    given |= {"max_length": 40, "batch_size": 3, "micro_batch_size": 2}
    whole = train_runs.train(tmp_path / "c.json", given)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    again = train_runs.train(tmp_path / "c.json", given, "--resume")
    assert train_runs.same(again, whole)
    with pytest.raises(fastlora.FastLoraError, match="is from a different run"):
        train(
            settings_from_dict(given | {"max_length": 50}, {}, "test"), resume=True, progress=False
        )


def test_a_model_that_mixes_packed_samples_up(
    fails: Any, given: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """One that does not look at positions for its mask is refused before the first step."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def mixing(self: Any, *args: Any, position_ids: Any = None, **options: Any) -> Any:
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", mixing)
    error = fails(given | {"packing": "bfd"})
    assert "packing 'bfd' requires a model that uses position_ids to keep packed samples" in error
    assert not (tmp_path / "out").exists()


def test_loss_on_the_assistant_only(fails: Any, given: Any, tmp_path: Path) -> None:
    """No chat, no template, no marks in it: one error each, and nothing is written."""
    given |= {"assistant_only_loss": True}
    assert "a.jsonl, line 1: this sample is not a chat, but assistant_only_loss is" in fails(given)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    given["adapters"] = {"a": {"data": str(path)}}
    assert "chat.jsonl, line 1: this sample is a chat, but the base model's" in fails(given)
    template = tmp_path / "t.jinja"
    given |= {"chat_template": str(template)}
    assert "t.jinja: cannot read the file" in fails(given)
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    error = fails(given)
    assert "assistant_only_loss needs a chat template that marks the assistant's turns" in error
    template.write_text("{{ raise_exception('no such turns') }}{% generation %}{% endgeneration %}")
    assert "chat template rejected this chat (no such turns)" in fails(given)
    template.write_text("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    assert "the chat template marks no assistant tokens in this chat" in fails(given)
    assert not (tmp_path / "out").exists()
