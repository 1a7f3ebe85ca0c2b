"""What `fastlora train` refuses, and what is left when it stops: one line, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.train import checkpoint
from fastlora.train.prepare import check_dropout_dtype
from fastlora.train.run import NonFiniteError, open_run
from fastlora.train.settings import settings_from_dict
from fastlora.validation import ConfigError
from tests.support import train_runs
from tests.support.train_runs import same

# ------------------------------------------------------------------------------------------- data


def test_bad_lines(fails: Any, given: Any, tmp_path: Path) -> None:
    """File and line are named, before a weight is read or a file written."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x y"}\n{"text": "x')
    given["adapters"]["b"]["data"] = [str(tmp_path / "data" / "b.jsonl"), str(path)]
    for flags in ((), ("--dry-run",)):
        assert f"{path}, line 2: not valid JSON (Unterminated string" in fails(given, *flags)
    assert not (tmp_path / "out").exists()


def test_missing_and_binary_data(fails: Any, given: Any, tmp_path: Path) -> None:
    """The file is named; also evaluation data is read before training."""
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    given["adapters"]["a"]["data"] = str(tmp_path / "x.txt")
    assert "x.txt, line 1: cannot decode the text ('utf-8' codec" in fails(given)
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\xe9t\xe9\n")
    assert "x.txt, line 3: cannot decode the text ('utf-8' codec" in fails(given)
    given["adapters"]["a"]["data"] = str(tmp_path / "nowhere.txt")
    assert "nowhere.txt: cannot read the file ([Errno 2]" in fails(given)
    (tmp_path / "empty.txt").write_text(" \n")
    given["adapters"]["a"] = {
        **{"data": str(tmp_path / "data" / "a.jsonl"), "eval_data": str(tmp_path / "empty.txt")}
    }
    assert "empty.txt: no samples found" in fails(given)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 512, "completion": "y"}))
    given["adapters"]["a"] = {"data": str(tmp_path / "long.jsonl")}
    assert "line 1: neither this sample nor any other sample of the same adapter" in fails(given)
    assert not (tmp_path / "out").exists()


def test_data_that_the_model_cannot_take(fails: Any, given: Any, tmp_path: Path) -> None:
    """Too long for its positions, or tokens of another vocabulary: not in the middle of a run."""
    short = train_runs.make_base(tmp_path / "short", max_position_embeddings=16)
    error = fails(given | {"model": str(short)})
    assert (
        "a.jsonl, line 3 has 29 tokens, but the base model supports at most 16; set max_length"
        in error
    )
    few = train_runs.make_base(tmp_path / "few", vocab_size=90)
    for flags in ((), ("--dry-run",)):
        assert "the tokenizer produced token id 95, but the base model has only 90" in fails(
            given | {"model": str(few)}, *flags
        )
    assert not (tmp_path / "out").exists()


def test_prompts_that_the_model_cannot_take(fails: Any, given: Any, tmp_path: Path) -> None:
    """A prompt and the longest answer to it share the positions of the model."""
    short = train_runs.make_base(tmp_path / "short", max_position_embeddings=40)
    given |= {"model": str(short), "sample_tokens": 38}
    for prompt, remedy in (
        ("tide", "set sample_tokens to 37 or less"),
        ("x" * 40 + "y", "shorten the"),
    ):
        given["defaults"]["prompts"] = [prompt]
        for flags in ((), ("--dry-run",)):
            error = fails(given, *flags)
            assert (
                f"the prompt {prompt[:40]!r} has {len(prompt)} tokens, and its answer can" in error
            )
            assert f"has only 40 positions; {remedy}" in error
    assert not (tmp_path / "out").exists()
    given["defaults"]["prompts"] = ["tide"]
    train_runs.train(tmp_path / "c.json", given | {"sample_tokens": 37})


# ----------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", None, "'model' is missing; expected a folder"),
        ("out", None, "'out' is missing; expected a folder"),
        ("adapters", {}, "no adapters were given"),
        ("adapters.a.data", None, "adapters.a: data is missing"),
        ("adapters.a.data", [], "adapters.a.data is empty"),
        ("stepz", 3, "unknown key 'stepz'; close names: steps"),
        ("lr", 3, "unknown key 'lr'; it belongs in [defaults] or in an adapter's table"),
        ("adapters.a.rank", 3, "adapters.a: unknown key 'rank'"),
        ("adapters.a.learning_rate", 1e-3, "'learning_rate' is set twice, under its full"),
        ("adapters.a.lr", "fast", "learning_rate must be a number at least 0, got 'fast'"),
        ("adapters.a.lr", -1, "learning_rate must be a number at least 0, got -1"),
        ("adapters.a.lr", 1e39, "learning_rate must be a number from 0 to 3.4e+37, got 1e+39"),
        ("adapters.a.lr", 3e38, "learning_rate must be a number from 0 to 3.4e+37, got 3e+38"),
        ("adapters.a.weight_decay", 1e39, "weight_decay must be a number from 0 to 3.4e+38, got"),
        ("adapters.a.max_grad_norm", "x", "max_grad_norm must be a number at least 0, got 'x'"),
        ("adapters.a.schedule", "step", "schedule must be one of linear, cosine, constant"),
        ("defaults.warmup_ratio", 2, "warmup_ratio must be a number from 0 to 1, got 2"),
        ("adapters.a.r", 0, "adapter 'a': r must be a positive integer, got 0"),
        ("adapters.a.targets", ["query"], "'a': target_modules entries ['query'] match no module"),
        ("adapters.a.inference_mode", True, "inference_mode = true freezes the adapter"),
        ("adapters.a.init_from", "nowhere", "already has a config; remove r"),
        ("adapters.x/y", {"data": "d"}, "invalid adapter name 'x/y'"),
        ("adapters.checkpoints", {"data": "d"}, "invalid adapter name 'checkpoints'"),
        ("adapters.__base__", {"data": "d"}, "'__base__', which selects the base model"),
        ("adapters.training", {"data": "d"}, "adapter_name cannot be 'training'"),
        ("adapters.a.bias", "all", "'a' has bias='all', which trains base model biases"),
        (
            "adapters.a.init_lora_weights",
            "pissa",
            "'a': init_lora_weights='pissa' changes the base",
        ),
        ("adapters.a.init_lora_weights", "eva", "'a': init_lora_weights='eva' needs fastlora.init"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("batch_size", 2.5, "batch_size must be an integer, got 2.5"),
        ("micro_batch_size", 9, "micro_batch_size must be at most batch_size (4), got 9"),
        ("keep", 0, "keep must be at least 1"),
        ("dtype", "float8_e4m3fn", "dtype must be one of auto, float32, bfloat16, float16"),
        ("chat", "yes", "chat must be true or false"),
        ("chat", True, "tokenizer has no chat template"),
        ("epochs", -1, "epochs must be a number from 0 to 1e+06, got -1"),
        ("epochs", 1e308, "epochs must be a number from 0 to 1e+06, got 1e+308"),
        ("steps", 10**20, "samples, but at most 1000000000 are supported; reduce steps"),
        ("batch_size", 10**20, "000 samples, but at most 1000000000 are supported; reduce steps"),
        pytest.param(
            *("adapters.a.lr", 10**400, "learning_rate must be a number from 0 to 3.4e+37, got 1"),
            id="a large lr",
        ),
        pytest.param(
            *("adapters.a.alpha", 10**400, "'a': lora_alpha must be a finite number, got 1"),
            id="a large alpha",
        ),
        ("adapters.a.r", 10**30, "'a': r must be at most 2147483647, got 1"),
        ("adapters.a.rank_pattern", {"q": 10**30}, "rank_pattern['q'] must be at most 2147483647"),
        ("model", "~nosuchuser/x", "cannot expand the home directory in ~nosuchuser/x; specify"),
        ("adapters.a.data", "a\0b", "adapters.a.data must be a path, got '"),
        ("out", "", "out must be a path, got ''"),
        ("chat_template", "", "chat_template must be a path, got ''"),
        ("adapters.a.data", ["a", ""], "adapters.a.data must be a path, got ''"),
        ("adapters.base", {"data": "d"}, "invalid adapter name 'base'"),
        ("adapters.-x", {"data": "d"}, "invalid adapter name '-x'"),
        (f"adapters.{'x' * 129}", {"data": "d"}, "use at most 128 letters, digits, _, and -"),
        ("model", "nowhere", "nowhere: not a model folder (it has no config.json)"),
    ],
)
def test_bad_config(
    fails: Any, given: Any, tmp_path: Path, path: str, value: Any, words: str
) -> None:
    """Every wrong key and value is named, and nothing is written."""
    train_runs.change(path, value)(given)
    assert words in fails(given)
    assert not (tmp_path / "out").exists()


def test_bad_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any) -> None:
    """No file, no TOML, no table; and an ``out`` that is a file."""
    for name, text, words in (
        ("x.toml", "a = ", "x.toml: not valid TOML"),
        ("x.json", "{", "x.json: not valid JSON"),
        ("x.json", "[]", "expected an object, found list"),
        ("x.json", '{"adapters": []}', "adapters must be a table"),
        ("x.json", '{"steps": 1, "steps": 2}', "the key 'steps' appears twice; keep only one"),
        ("x.json", '{"adapters": {"a": {}, "a": {}}}', "the key 'a' appears twice; keep only one"),
    ):
        (tmp_path / name).write_text(text)
        assert cli.main(["train", str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "nowhere.toml")]) == 1
    assert "nowhere.toml: cannot read the file" in capsys.readouterr().err
    path = train_runs.write_config(tmp_path / "c.json", given)
    assert cli.main(["train", str(path), "--out", ""]) == 1
    assert "out must be a path, got ''" in capsys.readouterr().err
    (tmp_path / "out").write_text("")
    assert cli.main(["train", str(path)]) == 1
    assert "out: expected a folder, found a file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--data", "x.jsonl"])
    assert caught.value.code == 2


def test_too_few_steps_and_forwards(
    fails: Any, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter without a step, and processes without a forward."""
    given |= {"steps": 1, "batch_size": 1, "micro_batch_size": 1}
    assert "none of the 1 steps uses a training sample for adapter" in fails(given)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "2 forward passes of up to 2 samples, but each of the 3 processes needs" in fails(
        given | {"steps": 4, "batch_size": 4, "micro_batch_size": 2}, "--dry-run"
    )
    message = fails(given | {"steps": 4, "batch_size": 2, "micro_batch_size": 1}, "--dry-run")
    assert message.rstrip().endswith("set batch_size to at least 3")
    # torchrun's variables without its rendezvous: nobody trains alone over the others' files.
    assert "torchrun started 3 processes" in fails(given)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64], ids=str)
def test_dropout_needs_a_float(dtype: torch.dtype) -> None:
    """In a layer, alone and in a mixed batch: one typed error, and nothing has been drawn."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    config = fastlora.LoraConfig(r=2, lora_dropout=0.1, target_modules=["0"])
    tuned = fastlora.get_peft_model(model, config).train()
    base = tuned.get_base_model()[0]
    base._parameters["weight"] = torch.nn.Parameter(base.weight.to(dtype), requires_grad=False)
    base._parameters["bias"] = None
    x = torch.ones(3, 8).to(dtype)
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match=f"dropout does not support {dtype}; expected a 16-"):
        tuned(x)
    assert torch.equal(torch.get_rng_state(), before)
    with (
        fastlora.adapters(tuned, ["default"] * 3, seeds={"default": 1}),
        pytest.raises(TypeError, match=f"dropout does not support {dtype}"),
    ):
        tuned(x)


def test_dropout_and_the_base_models_dtype() -> None:
    """A base in 8 bits is named before training begins."""
    with_dropout = {"a": fastlora.LoraConfig(lora_dropout=0.1, target_modules=["q"])}
    with pytest.raises(ConfigError, match=r"'a' has lora_dropout=0.1.*float8_e4m3fn"):
        check_dropout_dtype(with_dropout, torch.float8_e4m3fn)
    check_dropout_dtype(with_dropout, torch.bfloat16)
    check_dropout_dtype({"a": fastlora.LoraConfig(target_modules=["q"])}, torch.float8_e4m3fn)


def test_a_frozen_adapter(given: Any) -> None:
    """One that something froze behind the optimizers' back stops the step; nothing has moved."""
    with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
        for name, parameter in run.model.named_parameters():
            if ".b." in name:
                parameter.requires_grad_(False)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        with pytest.raises(fastlora.FastLoraError, match="adapter 'b' is frozen"):
            run._run_training_step()
        assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


# ------------------------------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite(fails: Any, given: Any, tmp_path: Path) -> None:
    """Stops with step and adapter; the last good checkpoint stays, and holds the others' steps."""
    given["adapters"]["b"] |= {"lr": 1e30, "warmup_ratio": 0}
    error = fails(given, "--save-every", "1")
    root = tmp_path / "out" / "checkpoints"
    assert "step 2: the loss of adapter 'b' is nan" in error
    assert f"the last good checkpoint is {root / 'step-00000001'}" in error
    assert f"{tmp_path / 'data' / 'b.jsonl'}, line " in error
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000001"]
    assert checkpoint.read_checkpoint_state(root / "step-00000001").step == 1
    assert same(tmp_path / "out", root / "step-00000001" / "adapters")


def test_a_weight_that_is_not_finite(given: Any, tmp_path: Path) -> None:
    """An update out of range after a good loss: no checkpoint and no saved adapter holds it."""
    with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
        weight = next(p for n, p in run.model.named_parameters() if "lora_B.b." in n)

        def spoil(*_: Any) -> None:
            if run.step == 3:  # the last one
                with torch.no_grad():
                    weight[0, 0] = -torch.inf

        run.optimizers.by_adapter["b"].register_step_post_hook(spoil)
        with pytest.raises(
            NonFiniteError, match="step 4: the largest absolute weight of adapter 'b' is inf"
        ):
            run.train()
    root = tmp_path / "out" / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000002"]
    assert same(tmp_path / "out", root / "step-00000002" / "adapters")


def test_a_gradient_that_is_not_finite(given: Any) -> None:
    """The error says what, where and when, to a caller too."""
    with open_run(settings_from_dict(given, {}, "test"), progress=False) as run:
        poisoned = [p for n, p in run.model.named_parameters() if "lora_B.a." in n][0]
        poisoned.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NonFiniteError, match="the gradient of adapter 'a' is") as caught:
            run._run_training_step()
        assert (caught.value.step, caught.value.adapter) == (1, "a")
        assert "no checkpoint has been saved yet" in str(caught.value)
