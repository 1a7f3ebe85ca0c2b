"""The command as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import get_peft_model
from fastlora.commands import cli
from fastlora.model.adapter_folder import WEIGHTS_NAME, save_adapter_folder
from fastlora.model.config import LoraConfig
from tests.support.programs import ROOT, error_of, run
from tests.support.tiny import tiny_llama

PRE = "base_model.model."
BAD = ("0", "1,x", "", "-1")  # numbers of adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q", "v"],
        rank_pattern={"v": 1},
        modules_to_save=["head"],
        base_model_name_or_path="org/base",
    )
    tensors = {
        f"{PRE}q.lora_A.weight": torch.zeros(2, 4),
        f"{PRE}q.lora_B.weight": torch.zeros(5, 2),
        f"{PRE}v.lora_A.weight": torch.zeros(1, 4, dtype=torch.bfloat16),
        f"{PRE}v.lora_B.weight": torch.zeros(6, 1, dtype=torch.bfloat16),
        f"{PRE}head.weight": torch.zeros(3, 5),
    }
    save_adapter_folder(tmp_path / "adapter", config, tensors)
    return tmp_path / "adapter"


# ------------------------------------------------------------------------------------ the command


def test_the_module_runs(adapter: Path) -> None:
    done = run("-m", "fastlora", "inspect", adapter)
    assert done.returncode == 0 and "rank" in done.stdout, done.stderr
    done = run("-m", "fastlora", "inspect", "nowhere")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("fastlora: error: nowhere: no such folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["inspect"], ["merge", "a", "b"], ["bench"], ["bench", "x"]]
    + [["bench", "mixed"], *(["bench", "mixed", "--model", "a", f"--adapters={n}"] for n in BAD)]
    + [["demo", "--adapters=0"]],
)
def test_wrong_usage_is_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fastlora" in capsys.readouterr().err


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`fastlora` alone shows the help, which describes the tool and lists the main commands first.

    The help also says how to find the options of every command.
    """
    texts = []
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert not caught.value.code and not captured.err
        texts.append(captured.out)
    alone = texts[0]
    assert texts[1] == alone
    description, epilog = (" ".join(alone.split("\n\n")[i].split()) for i in (1, -1))
    assert description == (
        "Train, serve, merge, and benchmark LoRA adapters in PEFT's format, with many adapters in "
        "one batch."
    )
    assert epilog.startswith("Run `fastlora COMMAND --help` for the options of a command.")
    listed = [line.split()[0] for line in alone.splitlines() if re.match(r" {4}\w", line)]
    assert listed[:4] == ["train", "serve", "chat", "demo"]
    assert set(listed[4:]) == {"doctor", "info", "inspect", "merge", "bench"}


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """An error names the commands with a similar name, or says where the list is."""
    messages = {
        "trian": "unknown command 'trian'; close names: train",
        "serv": "unknown command 'serv'; close names: serve",
        "xxxxxx": "unknown command 'xxxxxx'; run `fastlora --help` for a list",
    }
    for command, message in messages.items():
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--steps", "5"])
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastlora: error: {message}")


@pytest.mark.parametrize(
    ("command", "option", "close"),
    [
        ("train", "--stpes", "--steps"),
        ("serve", "--prot=1", "--port"),
        ("doctor", "--jsn", "--json"),
    ],
)
def test_unknown_options(
    command: str, option: str, close: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error is one line, with close names and without the usage of all options."""
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "folder", option])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = f"fastlora {command}: error: unrecognized arguments: {option}; close names: {close}"
    assert line.startswith(start)
    assert line.endswith(f"; run `fastlora {command} --help` for all options")


HELP = {  # some of what each command's help says
    "": "doctor info inspect merge train bench demo Exit",
    "info": "--json",
    "inspect": "ADAPTER_DIR --json",
    "merge": "BASE ADAPTER OUT --dtype",
    "train": "CONFIG --data --resume --dry-run torchrun",
    "chat": "MODEL --adapter --prompt",
    "serve": "MODEL --adapters",
    "doctor": "MODEL --adapter --json Exit",
    "demo": "--steps",
    "bench": "mixed kernels KIND --help",
    "bench mixed": "--model --adapters --tokens --dtype --out",
    "bench kernels": "--shape --contender --list --chip --out",
}


@pytest.mark.parametrize("command", HELP)
def test_each_option_says_what_it_is(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself: no help is missing, or a fragment that needs the option's name before it."""
    seen: list[argparse.ArgumentParser] = []
    show = argparse.ArgumentParser.print_help

    def note(parser: argparse.ArgumentParser, file: Any = None) -> None:
        seen.append(parser)
        show(parser, file)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", note)
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "``" not in text and not [word for word in HELP[command].split() if word not in text]
    (parser,) = seen
    for action in parser._actions:
        helps = [action.help, *(a.help for a in getattr(action, "_choices_actions", ()))]
        if action.nargs == argparse.PARSER:  # the list of commands has a text for each
            helps = helps[1:]
        for text in helps:
            assert text and not text.startswith(("of ", "to ", "(")), (action.dest, text)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "inspect", "nowhere"]) == 1
    assert cli.main(["inspect", "nowhere", "--debug"]) == 1
    assert capsys.readouterr().err.count("Traceback") >= 2


@pytest.mark.parametrize("words", cli._PROGRAMS)
def test_programs_get_their_arguments(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a program starts, the progress bars of other libraries are off in a pipe."""
    program = importlib.import_module(cli._PROGRAMS[words][0])
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in bars:
        monkeypatch.setenv(name, "")  # so that the variable is restored
        monkeypatch.delenv(name)

    def main(argv: list[str]) -> int:
        sys.stdout.write(f"{argv} {[os.environ.get(name) for name in bars]}")
        return 7

    monkeypatch.setattr(program, "main", main)
    assert cli.main([*words, "--steps", "3", "--debug", "--", "x"]) == 7
    assert capsys.readouterr().out == "['--steps', '3', '--', 'x'] ['1', '1']"


def test_bench_mixed_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no such folder" in error_of(capsys, "bench", "mixed", "--model", "nowhere")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fastlora: interrupted\n"


@pytest.mark.parametrize("buffering", [-1, 1], ids=["at the end", "at each line"])
@pytest.mark.parametrize(("command", "code"), [("inspect", 141), ("--help", 0)])
def test_a_closed_pipe_ends_a_command_quietly(
    adapter: Path,
    command: str,
    code: int,
    buffering: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in ``fastlora inspect DIR | head -1``. At exit, no buffered output raises an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffering) as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        try:
            found: object = cli.main([command, str(adapter)])
        except SystemExit as ended:
            found = ended.code
    assert found in (code, 141)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------ info


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    from fastlora.ops.execution_mode import execution_mode_of, triton_status

    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        facts["versions"]["torch"] == torch.__version__
    )
    assert facts["versions"]["fastlora"] == fastlora.__version__
    for device in facts["devices"]:
        name = device["device"]
        assert (
            device["implementation"] == execution_mode_of(torch.empty(0, device=name), "auto").impl
        )
        assert device["why"].startswith(triton_status(torch.device(name).type)[1])
    assert [d["device"] for d in facts["devices"]][0] == "cpu"
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "eager" in text and facts["devices"][0]["why"] in text


def test_info_without_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli._DISTRIBUTIONS, "peft", "no-such-distribution")
    assert cli.main(["info"]) == 0
    assert "peft          not installed" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ inspect


def test_inspect_json(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--json", str(adapter)]) == 0
    facts = json.loads(capsys.readouterr().out)
    stored = load_file(adapter / WEIGHTS_NAME)
    assert facts["parameters"] == sum(t.numel() for t in stored.values())
    assert facts["bytes"] == sum(t.nbytes for t in stored.values())
    assert (facts["r"], facts["lora_alpha"], facts["base_model"]) == (2, 6, "org/base")
    assert facts["target_modules"] == ["q", "v"]
    q, v, head = facts["modules"]
    assert q == {
        "name": "q",
        "kind": "lora",
        "rank": 2,
        "alpha": 6,
        "scaling": 3.0,
        "experts": None,
        "shape": [4, 5],
        "dtype": "float32",
        "parameters": 18,
        "bytes": 72,
    }
    assert (v["rank"], v["scaling"], v["dtype"], v["bytes"]) == (1, 6.0, "bfloat16", 20)
    assert (head["kind"], head["rank"], head["shape"]) == ("saved", None, [3, 5])


def test_inspect_table(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(adapter)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["parameters", "43"] in lines and ["target_modules", "q,", "v"] in lines
    assert ["q", "lora", "2", "6", "3", "4", "->", "5", "float32", "18", "72"] in lines


def test_inspect_folds_modules_that_are_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deep model's adapter takes a line for each kind of module; --json names all, in order."""
    config = LoraConfig(r=2, target_modules=["q", "v"], rank_pattern={"layers.2.q": 4})
    model = nn.ModuleDict({"layers": nn.ModuleList()})
    for _ in range(13):
        model["layers"].append(nn.ModuleDict({"q": nn.Linear(4, 5), "v": nn.Linear(4, 3)}))
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert [row[:4] for row in table[1:4]] == [
        ["*.q", "(12)", "lora", "2"],
        ["*.v", "(13)", "lora", "2"],
        ["layers.2.q", "lora", "4", "8"],
    ]
    assert lines[-1] == "26 modules; use --json to list them all"
    assert cli.main(["inspect", "--json", str(tmp_path)]) == 0
    names = [m["name"] for m in json.loads(capsys.readouterr().out)["modules"]]
    assert names == [f"layers.{index}.{end}" for index in range(13) for end in "qv"]


def test_inspect_counts_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks and alphas of stacks are those of an expert, also where a parameter is fused."""
    moe_models = pytest.importorskip("tests.support.moe_models")
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["w1", "w2", "w3", "q_proj"])
    get_peft_model(moe_models.moe_model("mixtral"), config).save_pretrained(tmp_path)
    assert cli.main(["inspect", "--json", str(tmp_path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    keys = ("rank", "alpha", "scaling", "experts", "parameters")
    assert {m["name"]: tuple(m[k] for k in keys) for m in facts["modules"][:3]} == {
        "model.layers.0.mlp.experts": (3, 9, 3.0, 4, 4 * 3 * (16 + 16)),
        "model.layers.0.mlp.experts.base_layer": (6, 18, 3.0, 4, 4 * 6 * (16 + 32)),
        "model.layers.0.self_attn.q_proj": (3, 9, 3.0, None, 3 * (16 + 16)),
    }
    assert facts["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert cli.main(["inspect", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.0.mlp.experts", "lora", "3", "9", "3", "4"] in [
        line[:6] for line in lines
    ]


def test_inspect_errors(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "snapshot_download" in error_of(capsys, "inspect", "org/adapter")
    assert "its subfolders adapter contain adapters" in error_of(capsys, "inspect", tmp_path)
    path = adapter / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in error_of(capsys, "inspect", adapter, "--json")


# ------------------------------------------------------------------------------------ merge


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "base"
    tiny_llama(tie_word_embeddings=False).save_pretrained(path)
    (path / "tokenizer_config.json").write_text('{"a": 1}')
    (path / "tokenizer.json").write_text('{"b": 2}')
    (path / "unrelated.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT with something in it, and PEFT's own merge beside it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=3, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(path / "a")
    model.merge_and_unload().save_pretrained(path / "merged")
    return path / "a"


def test_no_progress_bars_in_a_pipe(base: Path, trained: Path, tmp_path: Path) -> None:
    """Without a terminal, loading, merging, and saving a model print no bars."""
    done = run("-m", "fastlora", "merge", base, trained, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr and "%|" not in done.stderr, done.stderr


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merge_is_pefts(base: Path, trained: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main(["merge", str(base), str(trained), str(out), "--dtype", dtype]) == 0
    ours = load_file(out / "model.safetensors")
    theirs = load_file(trained.parent / "merged" / "model.safetensors")
    bare = load_file(base / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        expected = torch.float32 if dtype == "auto" else torch.bfloat16
        assert ours[name].dtype == expected
        # Twice the rounding of the largest weight: once for the base, once for the sum.
        budget = 2 * torch.finfo(expected).eps * tensor.abs().max()
        assert (ours[name].float() - tensor).abs().max() <= budget, name
        if name.endswith("proj.weight") or name == "lm_head.weight":
            assert (tensor - bare[name]).abs().max() > 10 * budget, name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_text() == (base / name).read_text()
    assert not (out / "unrelated.json").exists()
    assert os.listdir(out.parent) == ["out"]


def test_merge_into_a_base_that_was_saved_quantized(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    """The merged model is not quantized, and loads as any other."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bits, device_map={"": "cpu"}, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "quantized")
    assert (
        cli.main(["merge", str(tmp_path / "quantized"), str(trained), str(tmp_path / "out")]) == 0
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = fastlora.LoraModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map={"": "cpu"}),
        trained,
    )
    ids = torch.arange(9)[None]
    found, expected = merged(ids).logits, adapted.eval()(ids).logits
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_the_adapters_tokenizer_comes_first(base: Path, trained: Path, tmp_path: Path) -> None:
    (trained / "tokenizer_config.json").write_text('{"own": true}')
    try:
        (tmp_path / "out").mkdir()  # an empty folder is fine
        assert cli.main(["merge", str(base), str(trained), str(tmp_path / "out")]) == 0
    finally:
        (trained / "tokenizer_config.json").unlink()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"own": true}'


def test_merge_rejects_what_exists(
    base: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "load_causal_lm", None)  # too early to load anything
    (tmp_path / "keep").write_text("x")
    assert "not an empty folder" in error_of(capsys, "merge", base, trained, tmp_path)
    assert "not an empty folder" in error_of(capsys, "merge", base, trained, tmp_path / "keep")
    assert "no such folder" in error_of(capsys, "merge", base, "nowhere", tmp_path / "out")
    assert os.listdir(tmp_path) == ["keep"] and (tmp_path / "keep").read_text() == "x"


def test_merge_with_a_base_that_is_missing_or_wrong(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "./nowhere: no such folder" in error_of(capsys, "merge", "./nowhere", trained, out)
    (tmp_path / "empty").mkdir()
    message = error_of(capsys, "merge", tmp_path / "empty", trained, out)
    assert "cannot be loaded as a causal language model" in message
    assert not out.exists()


def test_merge_of_weights_that_are_not_finite_leaves_nothing(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    tensors = load_file(trained / WEIGHTS_NAME)
    name = next(k for k in tensors if "lora_B" in k)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, bad / WEIGHTS_NAME)
    (bad / "adapter_config.json").write_text((trained / "adapter_config.json").read_text())
    assert "finite" in error_of(capsys, "merge", base, bad, tmp_path / "out")
    assert os.listdir(tmp_path) == ["bad"]


@pytest.mark.parametrize("limit", [1 << 12, 1 << 17], ids=["config", "weights"])
def test_merge_that_cannot_be_written_leaves_nothing(
    base: Path, trained: Path, tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the size of files fails a write as a full disk does, also one of safetensors."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        error = error_of(capsys, "merge", base, trained, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 'out'} could not be written (" in error and "too large" in error
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ stderr


def test_other_libraries_say_nothing_and_leave_our_kernels_alone() -> None:
    """torchao and bitsandbytes, imported by transformers and PEFT, name files that they miss.

    The doctor imports all packages itself. In the repository root, where this runs, transformers
    does not take kernels/ for the hub's package.
    """
    pytest.importorskip("transformers", reason="imports torchao")
    pytest.importorskip("peft", reason="imports bitsandbytes")
    code = """
from fastlora.commands import cli
cli.main(["doctor"])
import transformers.modeling_utils, transformers.quantizers.auto, peft.tuners.lora.bnb
import importlib.metadata, transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    assert not is_kernels_available()
import fastlora.kernels.lora_linear
"""
    done = run("-c", code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("python ")
