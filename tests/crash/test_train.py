"""`fastlora train` is killed at its file-system calls, and resumed.

``make crash`` kills it 100 times, at random calls.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save

from fastlora.model import adapter_folder
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.model.adapter_folder import AdapterContents, load_adapter_folder
from fastlora.train import checkpoint
from tests.support import train_runs
from tests.support.crash import Crash
from tests.support.train_runs import contents, log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")

KILLS = int(os.environ.get("FASTLORA_CRASH_KILLS", "0"))
STEPS, EVERY = 8, 2


class Armed:
    """Kills the process of a run at a change of a file; ``at`` 0 writes down every change.

    ``plant`` is called in the process first.
    """

    def __init__(
        self, below: Path, at: int, seed: int, changes: Path, plant: Callable[[], None] | None
    ) -> None:
        self._below, self._at, self._seed, self._changes = below, at, seed, changes
        self._plant = plant

    def __call__(self) -> None:
        number_configs()
        if self._plant is not None:
            self._plant()
        lines: IO[str] = self._changes.open("w", buffering=1)
        Crash(self._below, self._at, self._seed, lambda line: lines.write(f"{line}\n")).arm()


def number_configs() -> None:
    """Gives the configs of each save its step, so that no two saves have equal ones."""
    from fastlora.train.run import Run

    save_all = Run.save_adapters_and_checkpoint

    def numbered(self: Run) -> None:
        for config in self.model.peft_config.values():
            config.revision = f"step {self.step}"
        save_all(self)

    Run.save_adapters_and_checkpoint = numbered  # type: ignore[method-assign]


def save_configs_late() -> None:
    """A fault: weights do not carry the config that they are saved with."""
    adapter_folder.make_weights_file_metadata = lambda folder, text: {}


class Left(NamedTuple):
    """What a run left: its files and folders, and what its log says of each step."""

    files: dict[str, bytes]
    folders: set[str]
    losses: list[Any]


class Runs:
    """A run that can be killed and resumed."""

    def __init__(self, folder: Path) -> None:
        base, data = train_runs.make_base(folder / "base"), train_runs.make_data(folder / "data")
        self._folder, self.out = folder, folder / "out"
        given = train_runs.config(
            base, data, self.out, steps=STEPS, save_every=EVERY, eval_every=2 * EVERY
        )
        given["adapters"]["a"]["eval_data"] = str(data["a"])
        self._path = train_runs.write_config(folder / "c.json", given)

    def start(
        self,
        at: int = 0,
        seed: int = 0,
        *flags: object,
        plant: Callable[[], None] | None = None,
    ) -> bool:
        """Starts or resumes the run; returns whether it ended, and was not killed."""
        from tests.support.forked_runs import ForkedRun

        arguments = ["train", self._path, "--quiet", "--resume", *flags]
        armed = Armed(self.out, at, seed, self._folder / "changes.txt", plant)
        run = ForkedRun(arguments, self._folder / "printed.txt", armed)
        code = run.wait()
        assert code in (0, -signal.SIGKILL), run.printed()
        return code == 0

    def changes(self) -> list[str]:
        """The changes of files in the last run."""
        return (self._folder / "changes.txt").read_text().splitlines()

    def remove(self) -> None:
        """Removes what the runs left."""
        shutil.rmtree(self.out, ignore_errors=True)

    def left(self) -> Left:
        """What the runs left. Each start adds a line to the log, and pictures have dates.

        Of weights the tensors count: their metadata name the config that was there before.
        """
        files = contents(self.out)
        for name in "ab":
            files[f"{name}/{WEIGHTS_NAME}"] = save(load(files[f"{name}/{WEIGHTS_NAME}"]))
        for name in ("log.jsonl", "losses.png"):
            files.pop(name, None)
        folders = {str(p.relative_to(self.out)) for p in self.out.rglob("*") if p.is_dir()}
        return Left(files, folders, [log(self.out), log(self.out, "eval_loss")])


class Whole(NamedTuple):
    """A run that nothing killed: its changes of files, what it left, all of its checkpoints."""

    changes: list[str]
    left: Left
    checkpoints: dict[str, dict[str, bytes]]
    adapters: dict[str, list[AdapterContents]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    pytest.importorskip("transformers", reason="trains its models")
    pytest.importorskip("accelerate", reason="trains on it")
    return Runs(tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Whole:
    assert runs.start(0, 0, "--keep", STEPS)
    found = checkpoint.list_checkpoints(runs.out / "checkpoints")
    assert len(found) == STEPS // EVERY
    all_contents = {folder.name: contents(folder) for folder in found}
    adapters = {
        name: [load_adapter_folder(folder / "adapters" / name) for folder in found] for name in "ab"
    }
    for saved in adapters.values():
        assert len({str(file.config) for file in saved}) == len(saved)
    runs.remove()
    assert runs.start()
    return Whole(runs.changes(), runs.left(), all_contents, adapters)


def check_killed(out: Path, whole: Whole) -> None:
    """A kill leaves whole checkpoints, and each adapter as the run saved it after a step."""
    for folder in checkpoint.list_checkpoints(out / "checkpoints"):
        assert contents(folder) == whole.checkpoints[folder.name]
    check_adapters(out, whole)


def check_adapters(out: Path, whole: Whole) -> None:
    """Each adapter is as the run saved it after a step, or not there yet."""
    for name, saved in whole.adapters.items():
        config, weights = out / name / CONFIG_NAME, out / name / WEIGHTS_NAME
        assert weights.exists() or not config.exists()
        if config.exists():  # the first save of the adapter has ended
            found = load_adapter_folder(out / name)
            same = any(found.config == file.config and equal(found, file) for file in saved)
            assert same, f"{name} has the config of one save and the weights of another, or neither"


def equal(left: AdapterContents, right: AdapterContents) -> bool:
    """Whether two adapters have the same tensors."""
    return left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(tensor, right.tensors[key]) for key, tensor in left.tensors.items()
    )


def nth(changes: list[str], change: str, number: int) -> int:
    """Where a change is among those of a run, counted from 1."""
    return [at for at, found in enumerate(changes, 1) if found == change][number - 1]


def config_of_step_4(changes: list[str]) -> int:
    """Where adapter b's config of step 4 gets its name, with its weights already in place.

    Each save names a, b, and then both of the checkpoint.
    """
    return nth(changes, f"os.rename new-{CONFIG_NAME} {CONFIG_NAME}", 6)


def test_a_mixture_of_two_saves_is_found(runs: Runs, whole: Whole) -> None:
    runs.remove()
    at = config_of_step_4(whole.changes)
    assert not runs.start(at, seed=at, plant=save_configs_late)
    with pytest.raises(AssertionError, match="b has the config of one save and the weights"):
        check_adapters(runs.out, whole)


@pytest.mark.parametrize(
    "find",
    [
        # The log is in place, and no step is done.
        lambda changes: nth(changes, "os.rename new-log.jsonl log.jsonl", 1) + 1,
        # Adapter b has its weights of step 4 and its config of step 2.
        config_of_step_4,
        # Of the second checkpoint, half of the optimizers' state is written.
        lambda changes: nth(changes, "begin optimizers.safetensors", 2) + 1,
        # The third checkpoint is complete, and does not have its name yet.
        lambda changes: nth(changes, "os.rename new step-00000006", 1),
        # Half of the first checkpoint is removed; the last one is there.
        lambda changes: nth(changes, "os.rename step-00000004 old", 1) + 3,
    ],
)
def test_kills_at_fixed_calls(runs: Runs, whole: Whole, find: Callable[[list[str]], int]) -> None:
    """A run that is killed and resumed leaves what a run leaves that nothing killed."""
    runs.remove()
    at = find(whole.changes)
    assert not runs.start(at, seed=at)
    check_killed(runs.out, whole)
    assert runs.start()
    assert runs.left() == whole.left


@pytest.mark.skipif(not KILLS, reason="make crash")
def test_kills_at_random_calls(runs: Runs, whole: Whole) -> None:
    """Resumed runs are killed too, half of the time."""
    choose = random.Random(KILLS)
    runs.remove()
    kills = 0
    while kills < KILLS:
        if runs.start(choose.randrange(len(whole.changes)) + 1, seed=kills):
            assert runs.left() == whole.left  # it had fewer changes left to do
            runs.remove()
            continue
        kills += 1
        check_killed(runs.out, whole)
        if choose.random() < 0.5:
            assert runs.start()
            assert runs.left() == whole.left
            runs.remove()
    assert runs.start()
    assert runs.left() == whole.left
