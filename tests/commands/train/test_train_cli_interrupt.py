"""SIGINT and SIGTERM in `fastlora train`, and a disk that fills while it saves."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.commands import cli
from fastlora.train import checkpoint, command, prepare, run
from fastlora.train.processes import RunProcesses
from fastlora.train.run import Run, train
from fastlora.train.settings import settings_from_dict
from fastlora.train.signals import RunInterrupted
from tests.support import train_runs
from tests.support.programs import ROOT, error_of
from tests.support.train_runs import log, same

STEPS = 6


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """Programs that a shell starts in the background ignore SIGINT, and a run respects that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config_of(base: Path, data: dict[str, Path], out: Path) -> dict[str, Any]:
    """A run of 6 steps in 2 forwards each, with evaluations after 2, 4 and 6, checkpoints at 5."""
    given = train_runs.config(base, data, out, steps=STEPS, save_every=5, eval_every=2)
    given["adapters"]["a"] |= {"eval_data": str(data["a"])}
    return given


@pytest.fixture(scope="module")
def whole(base: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that no signal interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train_runs.train(folder / "c.json", config_of(base, data, folder / "out"))
    return folder / "out"


def signal_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, *numbers: signal.Signals
) -> None:
    """Sends signals to this process at the given call of a function."""
    real, calls = getattr(owner, name), [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            for number in numbers:
                signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("owner", "name", "call", "number", "step"),
    [
        (run, "causal_lm_losses", 3, signal.SIGINT, 2),  # the first of two forwards of step 2
        (torch.optim.AdamW, "step", 5, signal.SIGTERM, 3),
        (run, "causal_lm_losses", 5, signal.SIGINT, 2),  # an evaluation
        (checkpoint, "_write_state", 1, signal.SIGTERM, 5),
        (run, "causal_lm_losses", 9 + 4 + 4, signal.SIGINT, 4),
        (Run, "evaluate", 3, signal.SIGTERM, STEPS),  # the last one
    ],
)
def test_the_first_signal_saves(
    owner: Any,
    name: str,
    call: int,
    number: signal.Signals,
    step: int,
    base: Path,
    data: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """E20: the run ends its step, saves adapters and a checkpoint, and says how to go on.

    The command that it prints resumes the run, which ends with the adapters and the log of a run
    that no signal interrupted.
    """
    out, path = tmp_path / "out", tmp_path / "c d.json"
    train_runs.write_config(path, config_of(base, data, out))
    with monkeypatch.context() as patched:
        signal_at(patched, owner, name, call, number)
        assert cli.main(["train", str(path), "--quiet"]) == 128 + number
    printed = capsys.readouterr()
    folder = checkpoint.checkpoint_path(out / "checkpoints", step)
    when = (
        f"after step {step} of {STEPS}" if step < STEPS else f"after the run's last step ({STEPS})"
    )
    *_, report, resume = printed.err.splitlines()
    assert report == (
        f"fastlora: interrupted by {number.name} {when}; saved: {out / 'a'}, {out / 'b'} and "
        f"{folder}"
    )
    assert f"{number.name}: the run will save its adapters and a checkpoint" in printed.out
    assert same(out, folder / "adapters")
    assert len(log(out)) == step
    program, *arguments = shlex.split(resume.removeprefix("resume with: "))
    assert program == "fastlora" and arguments == ["train", str(path), "--quiet", "--resume"]
    assert cli.main(arguments) == 0
    assert same(out, whole)
    for kind in ("loss", "eval_loss"):
        assert log(out, kind) == log(whole, kind)


def test_adapters_are_saved_first(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an interrupted run begins its checkpoint, it has saved the adapters that took a step."""
    found: list[dict[str, torch.Tensor]] = []
    write_state = checkpoint._write_state

    def looking(folder: Path, state: checkpoint.CheckpointState) -> None:
        found.append(train_runs.saved(tmp_path / "out"))
        write_state(folder, state)

    signal_at(monkeypatch, run, "causal_lm_losses", 1, signal.SIGINT)
    monkeypatch.setattr(checkpoint, "_write_state", looking)
    with pytest.raises(RunInterrupted, match="by SIGINT after step 1 of 4") as caught:
        train(settings_from_dict(given, {}, "test"), progress=False)
    assert caught.value.signal == signal.SIGINT
    assert caught.value.checkpoint == tmp_path / "out" / "checkpoints" / "step-00000001"
    (early,) = found
    assert same(early, caught.value.checkpoint / "adapters")


def test_the_second_signal_ends_the_run(
    given: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """E20: nothing more is saved. After a second SIGTERM, the system ends the process."""
    from tests.support.forked_runs import ForkedRun, SignalInStep

    path, out = train_runs.write_config(tmp_path / "c.json", given), tmp_path / "out"
    killed = ForkedRun(
        ["train", path, "--quiet"],
        tmp_path / "printed.txt",
        SignalInStep(2, signal.SIGINT, signal.SIGTERM),
    )
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        given_here = train_runs.write_config(tmp_path / "d.json", given | {"out": "here"})
        signal_at(patched, run, "causal_lm_losses", 3, signal.SIGTERM, signal.SIGINT)
        assert cli.main(["train", str(given_here), "--quiet"]) == 130
    assert capsys.readouterr().err.endswith("fastlora: interrupted\n")
    assert {entry.name for entry in (tmp_path / "here").iterdir()} == {"log.jsonl"}
    assert killed.wait() == -signal.SIGTERM
    assert {entry.name for entry in out.iterdir()} == {"log.jsonl", ".run.lock"}
    train_runs.train(path, given, "--resume")
    assert len(log(out)) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step(
    given: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """While data or weights are read, a signal ends the run at once; nothing is written."""
    path = train_runs.write_config(tmp_path / "c.json", given)
    for owner, name in ((prepare, "read_and_tokenize_data"), (Run, "_make_model")):
        with monkeypatch.context() as patched:
            signal_at(patched, owner, name, 1, number)
            assert cli.main(["train", str(path), "--quiet"]) == 128 + number
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"fastlora: interrupted by {number.name} before the first step; nothing was trained"
        )
        assert not (tmp_path / "out").exists()


def test_handlers_of_the_program_stay(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run leaves signals alone that the program handles, and all of them in another thread."""
    settings = settings_from_dict(given, {}, "test")
    seen: list[Any] = []
    signal_at(monkeypatch, run, "causal_lm_losses", 3, signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        assert train(settings, progress=False).steps == 4
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]

    do_step = Run._run_training_step

    def looking(run: Run) -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        do_step(run)

    monkeypatch.setattr(Run, "_run_training_step", looking)
    other = settings_from_dict(given, {"out": str(tmp_path / "other")}, "test")
    thread = threading.Thread(target=train, args=(other,), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert seen[1:] == [signal.default_int_handler] * 4
    assert same(tmp_path / "out", tmp_path / "other")


def two_processes(
    path: Path, codes: list[int], *flags: str, prepare: dict[int, Any] | None = None
) -> list[str]:
    """Runs a config in two processes, which end with these codes; returns what each printed.

    ``prepare`` is by rank.
    """
    from tests.support.forked_runs import processes

    runs = processes(2, ["train", path, "--quiet", *flags], path.parent, prepare)
    assert [each.wait() for each in runs] == codes
    return [each.printed() for each in runs]


def test_all_processes_end_the_same_step(
    base: Path, data: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    """E20: a signal reaches one of two processes; both end that step, and the first one saves."""
    from tests.support.forked_runs import SignalInStep

    out = tmp_path / "out"
    path = train_runs.write_config(tmp_path / "c.json", config_of(base, data, out))
    # torchrun sends a second one: it counts as the same.
    twice = SignalInStep(3, signal.SIGTERM, signal.SIGTERM)
    printed = two_processes(path, [128 + signal.SIGTERM, 0], prepare={1: twice})
    assert f"interrupted by SIGTERM after step 3 of {STEPS}; saved: {out / 'a'}, " in printed[0]
    resume = f"torchrun --nproc-per-node 2 -m fastlora train {path} --quiet --resume"
    assert f"resume with: {resume}\n" in printed[0]
    assert "Traceback" not in "".join(printed)
    assert len(log(out)) == 3
    two_processes(path, [0, 0], "--resume")
    assert same(out, whole) and log(out) == log(whole)


# ------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``fill(limit)`` lets no file grow over so many bytes in the last save of a run."""
    save, limits = Run.save_adapters_and_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def start(limit: int) -> None:
        def limited(run: Run) -> None:
            if run.step < run.schedule.steps:
                return save(run)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            try:
                return save(run)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(Run, "save_adapters_and_checkpoint", limited)

    return start


def test_adapters_that_fit_on_a_full_disk(
    given: Any, tmp_path: Path, fill: Callable[[int], None]
) -> None:
    """E20: each adapter that fits is saved, and the message says each thing once."""
    whole = train_runs.train(tmp_path / "c.json", given | {"out": str(tmp_path / "whole")})
    out, sizes = tmp_path / "out", {}
    for name in "ab":
        folder = tmp_path / "whole" / name
        sizes[name] = max(file.stat().st_size for file in folder.iterdir())
    assert sizes["a"] != sizes["b"]
    small, large = sorted(sizes, key=lambda name: sizes[name])
    cases = (
        (sizes[small], f"{out / large} could not be written (", [small]),
        (sizes[large], "step-00000004 could not be written (", ["a", "b"]),
    )
    for limit, start, kept in cases:
        fill(limit)
        with pytest.raises(fastlora.FastLoraError) as caught:
            train(settings_from_dict(given, {}, "test"), resume=True, progress=False)
        error = str(caught.value)
        assert start in error and error.count("could not be written") == 1
        names = ", ".join(str(out / name) for name in kept)
        older = checkpoint.checkpoint_path(out / "checkpoints", 2)
        assert error.endswith(
            f"; adapters saved after step 4: {names}; continue from {older} with --resume"
        )
        found = train_runs.saved(out)
        for key, tensor in whole.items():
            assert (key[0] in kept) == torch.equal(tensor, found[key]), key
        assert [path.name for path in checkpoint.list_checkpoints(out / "checkpoints")] == [
            "step-00000002"
        ]


def full_log(patched: pytest.MonkeyPatch) -> None:
    """The line of step 3 does not fit into the log."""
    from tests.support.forked_runs import FullLogInStep

    patched.setattr(Run, "_run_training_step", Run._run_training_step)  # set back at the end
    FullLogInStep(3)()


def full_at(owner: Any, name: str, call: int, start: str = "") -> Callable[[Any], None]:
    """No space is left at a call of a function, among those with a text that starts so."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        real, calls = getattr(owner, name), [0]

        def called(*args: Any, **kwargs: Any) -> Any:
            counts = str(args[0]).startswith(start)
            calls[0] += counts
            if counts and calls[0] == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        patched.setattr(owner, name, called)

    return patch


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
@pytest.mark.parametrize(
    ("fill_disk", "what", "step"),
    [
        (full_log, "{out}/log.jsonl", 3),
        (full_at(RunProcesses, "log_to_trackers", 3), "trackers", 2),
        (full_at(command, "_print_message", 1, "step 4"), "answers", 4),
        (full_at(csv, "writer", 1), "{out}/losses.csv", STEPS),
        (full_at(RunProcesses, "close_trackers", 1), "trackers", STEPS),
    ],
)
def test_a_full_disk_ends_a_run_as_a_signal_does(
    fill_disk: Callable[[pytest.MonkeyPatch], None],
    what: str,
    step: int,
    base: Path,
    data: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log or another report of the run does not fit: adapters and a checkpoint are saved.

    The one error names them, and the resumed run ends as one that never stopped.
    """
    out = tmp_path / "out"
    given = config_of(base, data, out) | {"sample_tokens": 1}
    given["adapters"]["a"]["prompts"] = ["sea?"]
    path = train_runs.write_config(tmp_path / "c.json", given)
    with monkeypatch.context() as patched:
        fill_disk(patched)
        error = error_of(capsys, "train", path, "--quiet")
    folder = checkpoint.checkpoint_path(out / "checkpoints", step)
    assert error == (
        f"fastlora: error: {what.format(out=out)} could not be written ([Errno 28] No space left "
        f"on device); adapters saved after step {step}: {out / 'a'}, {out / 'b'}; continue "
        f"from {folder} with --resume"
    )
    assert same(out, folder / "adapters")
    assert cli.main(["train", str(path), "--quiet", "--resume"]) == 0
    assert same(out, whole)
    lost = 3 if fill_disk is full_log else None
    for kind in ("loss", "eval_loss"):
        assert log(out, kind) == [entry for entry in log(whole, kind) if entry["step"] != lost]


def test_answers_that_the_model_cannot_give(
    base: Path, data: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: Any, fails: Any
) -> None:
    """Whatever it raises ends the run as a full disk does: everything trained so far is saved."""
    given = config_of(base, data, tmp_path / "out") | {"sample_tokens": 1}
    given["adapters"]["a"]["prompts"] = ["sea?"]
    for step in (2, STEPS):
        with monkeypatch.context() as patched:
            patched.setattr(run, "generate_answers", lambda *args: [][len(args)])
            folder = checkpoint.checkpoint_path(tmp_path / "out" / "checkpoints", step)
            assert fails(given, *(["--resume"] if step > 2 else [])) == (
                "fastlora: error: the answers to the prompts could not be generated (IndexError: "
                "list index out of range); change or remove the prompts, or reduce sample_tokens; "
                "adapters saved after step "
                f"{step}: {tmp_path / 'out' / 'a'}, {tmp_path / 'out' / 'b'}; continue from "
                f"{folder} with --resume"
            )
        given["eval_every"] = 0
    assert same(tmp_path / "out", whole)
    train_runs.train(tmp_path / "c.json", given, "--resume")
    assert len(log(tmp_path / "out", "answers")) == 1


def test_answers_that_failed_are_repeated(
    base: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: Any, fails: Any
) -> None:
    """So is the evaluation before them, which is in the log once."""
    given = config_of(base, data, tmp_path / "out") | {"sample_tokens": 1, "eval_every": 2}
    given["adapters"]["a"] |= {"prompts": ["sea?"], "eval_data": str(data["a"])}
    with monkeypatch.context() as patched:
        patched.setattr(run, "generate_answers", lambda *args: [][len(args)])
        assert "reduce sample_tokens; adapters saved after step 2" in fails(given)
    train_runs.train(tmp_path / "c.json", given, "--resume")
    for key in ("eval_loss", "answers"):
        steps = [entry["step"] for entry in log(tmp_path / "out", key)]
        assert steps == [*range(2, STEPS + 1, 2)]


def test_a_full_disk_at_the_first_save(
    given: Any, tmp_path: Path, fill: Callable[[int], None], fails: Callable[..., str]
) -> None:
    """No folder is left without an adapter in it."""
    fill(200)
    assert "adapters saved after step 4: none; no checkpoint" in fails(given | {"save_every": 0})
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"log.jsonl"}


def test_a_full_disk_before_the_first_step(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Nothing was trained, and the error says so."""
    full_at(RunProcesses, "log_to_trackers", 1)(monkeypatch)
    assert fails(given).endswith("No space left on device); nothing was trained")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"log.jsonl"}


def test_a_log_and_an_adapter_that_do_not_fit(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """The other adapter is saved, and the error is that of the adapter, once."""
    full_log(monkeypatch)
    full_at(run, "save_adapter_folder", 1, str(tmp_path / "out" / "a"))(monkeypatch)
    given["save_every"] = 0
    out = tmp_path / "out"
    assert fails(given) == (
        f"fastlora: error: {out / 'a'} could not be written ([Errno 28] No space left on device); "
        f"adapters saved after step 3: {out / 'b'}; no checkpoint was saved"
    )
    assert {entry.name for entry in out.iterdir()} == {"log.jsonl", "b"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_output_on_a_full_disk(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar, or what a signal prints, that does not fit loses no adapter."""

    def say(text: str) -> None:
        if text.startswith("SIG"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    open_log = Run._open_log_and_check_evaluated

    def with_full_output(run: Run) -> bool:
        monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))  # noqa: SIM115
        return open_log(run)

    signal_at(monkeypatch, run, "causal_lm_losses", 3, signal.SIGINT)
    monkeypatch.setattr(Run, "_open_log_and_check_evaluated", with_full_output)
    with pytest.raises(RunInterrupted, match="after step 2 of 4; saved"):
        train(settings_from_dict(given, {}, "test"), on_message=say)
    with contextlib.suppress(OSError):
        sys.stderr.close()
    monkeypatch.undo()
    assert same(tmp_path / "out", tmp_path / "out" / "checkpoints" / "step-00000002" / "adapters")
    assert train(settings_from_dict(given, {}, "test"), resume=True, progress=False).steps == 4


@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_the_reader_of_the_output_ends_first(
    streams: str, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """In a terminal, Ctrl-C also ends the `tee` that reads the output of the run."""
    out, path = tmp_path / "out", tmp_path / "c.json"
    train_runs.write_config(path, config_of(base, data, out) | {"steps": 100_000})
    read, write = os.pipe()
    with open(tmp_path / "errors", "w+") as errors, open(read), open(write, "w") as pipe:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastlora", "train", str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=pipe,
            stderr=pipe if streams == "both" else errors,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not ((out / "log.jsonl").is_file() and log(out)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), read)  # closes the pipe
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
        errors.seek(0)
        found = errors.read()
    assert code == 128 + signal.SIGINT, found
    assert "Broken pipe" not in found and "Exception ignored" not in found
    (saved,) = (out / "checkpoints").iterdir()
    assert same(out, saved / "adapters")


def test_all_processes_end_where_the_log_is_full(
    base: Path, data: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    """The first process cannot write the log of step 3; all end after the step that follows."""
    from tests.support.forked_runs import FullLogInStep

    out = tmp_path / "out"
    path = train_runs.write_config(tmp_path / "c.json", config_of(base, data, out))
    printed = two_processes(path, [1, 1], prepare={0: FullLogInStep(3)})
    folder = checkpoint.checkpoint_path(out / "checkpoints", 4)
    kept = (
        f"adapters saved after step 4: {out / 'a'}, {out / 'b'}; continue from {folder} with "
        "--resume"
    )
    assert kept in printed[0]
    assert same(out, folder / "adapters")
    two_processes(path, [0, 0], "--resume")
    assert same(out, whole)
