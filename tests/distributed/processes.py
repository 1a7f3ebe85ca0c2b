"""Runs a file of checks in two processes, once, and tells how each check ended.

A file of checks is a module whose functions ``check_*`` every process runs in order. One that fails
in a process may leave others waiting, which end by a timeout of the process group.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORLD = 2
# Seconds that a file of checks may take, and that one process may be behind the other.
TIMEOUT, BEHIND = 240, 180


def checks_of(module: Any) -> dict[str, Callable[..., None]]:
    """The checks of a module by name, in its order."""
    return {n: f for n, f in vars(module).items() if n.startswith("check_") and callable(f)}


def environment() -> dict[str, str]:
    """Variables of a process that finds these files, one thread, no GPU, and its neighbours."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        found["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def run(name: str, folder: Path, timeout: float = TIMEOUT) -> dict[str, str]:
    """Runs ``name``'s checks in two processes; returns what failed, by check, or empty strings."""
    command = [sys.executable, str(HERE / "processes.py"), name, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**environment(), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        output = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found: dict[str, str] = {}
    for rank, text in enumerate(output):
        path = folder / f"{name}-{rank}.json"
        assert path.is_file(), f"process {rank} died:\n{text[-4000:]}"
        for check, failure in json.loads(path.read_text(encoding="utf-8")).items():
            found[check] = found.get(check, "") + (f"process {rank}:\n{failure}" if failure else "")
    return found


def main(name: str, folder: str) -> None:
    """Is one of the processes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    # Before the processes wait for each other: on a busy machine one may import for a minute more.
    checks = checks_of(importlib.import_module(name))
    store = dist.FileStore(f"{folder}/{name}.store", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=BEHIND)
    )
    found: dict[str, str] = {}
    for check, function in checks.items():
        torch.manual_seed(0)
        try:
            function(Path(folder))
            found[check] = ""
        except Exception:
            found[check] = traceback.format_exc()
            break  # the other process may be anywhere
    Path(f"{folder}/{name}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
