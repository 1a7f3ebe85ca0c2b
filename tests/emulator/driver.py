"""Stands in for Triton's CUDA driver: kernels compile for a GPU, and their PTX is executed here."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from fastlora.kernels.stand_in_driver import StandInDriver
from tests.emulator.build import cache_folder
from tests.emulator.decode import Program
from tests.emulator.execute import FORWARD, Outcome, clear_last_launch, execute

# Triton 3.6 puts no fence.proxy.async between cp.async and wgmma, in any kernel of sm_90.
WITHOUT_COPY_FENCE = "3.6."
COPY_FENCE = "PROXY wgmma reads what cp.async wrote, no fence.proxy.async"
CHIPS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_120", "sm_121")
# Triton and fastlora keep what they compiled by the number of the device.
_numbers = itertools.count(2_000)
_numbers_of: dict[tuple[str, int], int] = {}


@dataclass
class Emulation:
    """The launches of a block under `emulate`.

    Attributes:
        chip: Kernels are compiled for it; ``processors`` is the number of its multiprocessors.
        order, seed, limit: As in `execute.execute`; they may change between launches.
        log: A file that gets a line of JSON for each launch; empty for none.
        launches: What each launch did, in order.
        programs: The kernels that were launched.
        replacements: Programs that are executed in place of others, to plant faults.
        exempt: The beginning of reports that are dropped; empty for none.
    """

    chip: str
    processors: int
    order: int = FORWARD
    seed: int = 1
    limit: int = 0
    log: str = ""
    launches: list[Outcome] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    replacements: dict[Program, Program] = field(default_factory=dict)
    exempt: str = ""

    @property
    def reports(self) -> list[str]:
        """What the checks found in all launches."""
        return [report for launch in self.launches for report in launch.reports]

    def counts(self) -> Counter[str]:
        """Returns the executed instructions of all launches by opcode."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            total.update(launch.counts)
        return total

    def launch(
        self, program: Program, grid: tuple[int, int, int], *given: Any, dependent: bool
    ) -> None:
        """Executes a launch; its arguments are tensors, addresses and numbers."""
        if program not in self.programs:
            self.programs.append(program)
        storages = [value.untyped_storage() for value in given if isinstance(value, torch.Tensor)]
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in given]
        outcome = execute(
            self.replacements.get(program, program),
            grid,
            values,
            storages,
            dependent=dependent,
            order=self.order,
            seed=self.seed,
            limit=self.limit,
        )
        if self.exempt:
            kept = [report for report in outcome.reports if not report.startswith(self.exempt)]
            outcome = replace(outcome, reports=kept)
        self.launches.append(outcome)
        if self.log:
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            line = {"chip": self.chip, "order": self.order, "test": test, **asdict(outcome)}
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if outcome.fatal:
            raise RuntimeError(f"{program.name} was stopped: {outcome.fatal[0]}")


_current: list[Emulation] = []


@contextlib.contextmanager
def emulate(
    chip: str = "sm_90",
    processors: int = 4,
    *,
    order: int = FORWARD,
    seed: int = 1,
    limit: int = 0,
    log: str = "",
) -> Iterator[Emulation]:
    """Within the block, fastlora's kernels run on CPU tensors as compiled for an NVIDIA GPU.

    Configs are chosen for the chip, Triton compiles and binds arguments, and fastlora keeps
    launches, as on a GPU. Compiled kernels are kept on disk for each chip and version of Triton.
    Not for two threads at once, and not for Triton's interpreter.

    Raises:
        ValueError: The emulator does not execute the chip's instructions.
        RuntimeError: ``TRITON_INTERPRET=1`` is set, or the C++ part cannot be built.
    """
    if chip not in CHIPS:
        why = ": it lacks tcgen05" if chip in ("sm_100", "sm_103") else ""
        raise ValueError(f"the emulator does not execute {chip}{why}; it knows {', '.join(CHIPS)}")
    from fastlora.env import triton_interpreted

    if triton_interpreted():
        raise RuntimeError("the emulator needs Triton's compiler; unset TRITON_INTERPRET")
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    from fastlora.kernels import chips
    from fastlora.ops import execution_mode

    emulation = Emulation(chip, processors, order, seed, limit, log)
    if triton.__version__.startswith(WITHOUT_COPY_FENCE) and chip == "sm_90":
        emulation.exempt = COPY_FENCE
    described, status = chips.Chip(chip, processors), (True, f"emulated ({chip})")
    kernels = cache_folder() / f"triton-{triton.__version__}-{chip}"
    before = driver._active
    driver.set_active(_Driver(described))
    compiler.max_shared_mem.cache_clear()
    clear_last_launch()
    _current.append(emulation)
    try:
        with (
            # Real cubins must not be found here, nor PTX in place of them elsewhere.
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(kernels)),
            mock.patch.object(CUDABackend, "make_cubin", _ptx_as_cubin),
            mock.patch.object(chips, "chip_of", lambda _: described),
            mock.patch.object(execution_mode, "KERNEL_DEVICES", ("cpu",)),
            mock.patch.object(execution_mode, "triton_status", lambda *_: status),
        ):
            yield emulation
    finally:
        _current.remove(emulation)
        clear_last_launch()
        driver.set_active(before)
        compiler.max_shared_mem.cache_clear()


def _ptx_as_cubin(self: Any, src: str, *_: Any) -> bytes:
    return src.encode()


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


class _Driver(StandInDriver):
    """What Triton's runtime asks of a driver; launches are executed."""

    def __init__(self, chip: Any) -> None:
        super().__init__(chip)
        key = chip.arch, chip.num_sms
        self._number = _numbers_of.get(key) or _numbers_of.setdefault(key, next(_numbers))
        self.launcher_cls = _Launcher

    def get_active_torch_device(self) -> torch.device:
        """Returns where tensors are."""
        return torch.device("cpu")

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Returns module, function, registers, spills and the most threads of a program."""
        program = Program(binary.decode(), shared)
        return program, program, 0, 0, 1024


class _Launcher:
    """Launches one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        kinds = [
            (name, kind) for name, given in source.signature.items() for kind in _leaves([given])
        ]
        self._is_argument = [kind != "constexpr" for _, kind in kinds]
        self._names = [name for name, kind in kinds if kind != "constexpr"]
        self._dependent = bool(getattr(metadata, "launch_pdl", False))
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("the emulator gives kernels no scratch memory")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        program: Program,
        packed: Any,
        about: Any,
        enter: Any,
        leave: Any,
        *values: Any,
    ) -> None:
        leaves = zip(_leaves(values), self._is_argument, strict=True)
        given = [value for value, is_argument in leaves if is_argument]
        # Triton adds two parameters, for scratch memory that no kernel here has.
        if len(given) + 2 != len(program.parameters):
            raise RuntimeError(
                f"{program.name} has {len(program.parameters)} parameters, got {len(given)} values"
            )
        program.arguments = self._names
        _current[-1].launch(program, (x, y, z), *given, dependent=self._dependent)
