"""Runs files of checks in two processes each, once, and tells how each check ended.

A file of checks is a module whose functions ``check_*`` every process runs in order. One that fails
in a process may leave others waiting, which end by a timeout of the process group.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[3]
WORLD = 2
# Seconds that a file of checks may take, and that one process may be behind the other.
TIMEOUT, BEHIND = 240, 180


def module_of(name: str) -> Any:
    """Imports a file of checks by its name."""
    return importlib.import_module(f"tests.distributed.{name}")


def checks_of(module: Any) -> dict[str, Callable[..., None]]:
    """The checks of a module by name, in its order."""
    return {n: f for n, f in vars(module).items() if n.startswith("check_") and callable(f)}


def environment() -> dict[str, str]:
    """Variables of a process that finds these files, with one thread, no GPU, and its neighbor."""
    found = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        found["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def run(names: Sequence[str], folder: Path, timeout: float = TIMEOUT) -> str:
    """Runs files of checks one after the other, each in two processes; returns what they print.

    Args:
        names: The files.
        folder: Where each gets a folder, for what its checks write and for `outcome_of`.
        timeout: Seconds for a file.
    """
    for name in names:
        (folder / name).mkdir()
    command = [sys.executable, "-m", __spec__.name, str(folder), str(timeout), *names]
    done = subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def outcome_of(name: str, folder: Path, output: str) -> dict[str, str]:
    """Returns what failed of a file that `run` has run, by check, or empty strings."""
    found: dict[str, str] = {}
    for rank in range(WORLD):
        path = folder / name / f"{rank}.json"
        assert path.is_file(), f"process {rank} died:\n{output[-4000:]}"
        for check, failure in json.loads(path.read_text(encoding="utf-8")).items():
            found[check] = found.get(check, "") + (f"process {rank}:\n{failure}" if failure else "")
    return found


def main(folder: str, timeout: str, *names: str) -> None:
    """Is the process that imports what the others run, once for all of them where it can fork."""
    torch.set_num_threads(1)
    # Before the processes wait for each other: on a busy machine one may import for a minute more.
    for name in names:
        module_of(name)
    import_what_steps_need()
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for name in names:
        pair = [
            context.Process(target=take_part, args=(name, Path(folder) / name, rank))
            for rank in range(WORLD)
        ]
        end = time.monotonic() + float(timeout)
        for process in pair:
            process.start()
        for process in pair:
            process.join(max(0.0, end - time.monotonic()))
        for rank, process in enumerate(pair):
            if process.is_alive():
                process.kill()
                sys.stdout.write(f"{name}: process {rank} hung\n")
                (Path(folder) / name / f"{rank}.json").unlink(missing_ok=True)


def import_what_steps_need() -> None:
    """Imports a model's class, and torch's compiler, for which optimizers look in a first step.

    There is no backward here: autograd's threads would not outlive a fork.
    """
    steps = importlib.import_module("tests.support.distributed.steps")
    model = steps.build()
    with torch.no_grad():
        model(input_ids=steps.tokens(0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()


def take_part(name: str, folder: Path, rank: int) -> None:
    """Is one of the two processes of a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(folder)
    checks = checks_of(module_of(name))
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=BEHIND)
    )
    found: dict[str, str] = {}
    for check, function in checks.items():
        torch.manual_seed(0)
        try:
            function(folder)
            found[check] = ""
        except Exception:
            found[check] = traceback.format_exc()
            break  # the other process may be anywhere
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
