"""What the kernel tests share: where they run, in which dtypes, and tensors that show neglect.

They run natively on a CUDA GPU, else in Triton's interpreter on the CPU. Triton reads
``TRITON_INTERPRET`` once, at its import, and other tests need a Triton that compiles: so the
interpreter starts by itself where nothing but kernel tests is asked for; among other tests, without
a GPU, they skip, and the run ends with the command that runs them. The interpreter's bf16
arithmetic is wrong, so bf16 needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.kernels.lab import Lab, cap_warps, interpreted, native
from tests.support.kernels.modules import module_of

FOLDER = Path(__file__).parent
COMMAND = "python -m pytest tests/kernels"


class Launches(list[str]):
    """Each launch's kernel, without "lora_", and of how many modules, as in "mixed_shrink 3"."""

    def of(self, kernel: str) -> list[int]:
        """The modules of each launch of a kernel."""
        pairs = (launch.split() for launch in self)
        return [int(modules) for name, modules in pairs if name == kernel]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what tells a fault of the compiler's from one of ours: it often goes with the warps."""
    parser.addoption("--max-warps", type=int, help="no kernel has more warps than so many")


def pytest_configure(config: pytest.Config) -> None:
    """Starts the interpreter if only kernel tests are asked for and nothing can run them."""
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    alone = all(path.resolve().is_relative_to(FOLDER) for path in asked)
    if alone and not torch.cuda.is_available() and not sys.modules.keys() & {"triton", "fastlora"}:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if interpreted() and importlib.util.find_spec("triton") is not None:
        from tests.support.kernels import quick_interpreter

        quick_interpreter.quicken()
    if warps := config.getoption("--max-warps", None):
        cap_warps(warps)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where nothing runs kernels."""
    if not native() and not interpreted():
        for item in items:
            if item.path.is_relative_to(FOLDER):
                item.add_marker(pytest.mark.skip(reason=f"beside other tests; run {COMMAND}"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which kernel tests were skipped and no test ran."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter is not None else {}
    ran = any(stats.get(key) for key in ("passed", "failed", "error", "xfailed", "xpassed"))
    if not ran and any(COMMAND in str(report.longrepr) for report in stats.get("skipped", [])):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says last, and in red, that kernel tests did not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    number = sum(COMMAND in str(report.longrepr) for report in skipped)
    if number:
        terminalreporter.section("kernel tests did not run", red=True)
        terminalreporter.line(
            f"{number} tests of tests/kernels were skipped: without a GPU they need Triton's "
            f"interpreter, which other tests cannot have in the same process.\n"
            f"Run them alone: {COMMAND}. All tests, each kind in its own process: make test",
            red=True,
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every test with a ``dtype`` argument of no other source the dtypes that run here."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "dtype" in metafunc.fixturenames and not any("dtype" in mark.args[0] for mark in marks):
        dtypes = (torch.float32, torch.float16, *((torch.bfloat16,) if native() else ()))
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def lab() -> Lab:
    """The device under test."""
    pytest.importorskip("triton", reason="triton is not installed")
    return Lab()


@pytest.fixture
def on_the_labs_device(lab: Lab) -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with torch.device(lab.device):
        yield


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call chooses and launches by itself: tests replace what that goes by."""
    if native():
        from fastlora.kernels import launch

        monkeypatch.setattr(launch, "_CAN_CACHE", False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What operators allocate holds NaN until a kernel writes it: what is not written shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: filled(new_empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: filled(empty_like(*a, **kw)))


@pytest.fixture
def row_wise_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dots treat all rows of a tile alike, as a GPU does.

    NumPy's BLAS does not on some CPUs: a row's bits depend on the row's place in the tile.
    """
    if not interpreted():
        return
    import numpy as np

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return (a[:, :, None] * b[None]).sum(axis=1, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``calls_of(module, name, noted, seen)`` adds to seen what ``noted`` makes of a call."""

    def note(module: Any, name: str, noted: Callable[..., Any], seen: list[Any]) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(noted(*args, **kwargs))
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    return note


def modules_of(given: dict[str, Any]) -> int:
    """The number of modules of a launch; a kernel for three also computes one or two."""
    if "modules" in given:
        return int(given["modules"])
    if "first_1" in given:
        return 1 + sum(given[f"first_{i}"] < given["R"] for i in (1, 2, 3))
    if "N_1" in given:
        return 1 + sum(given[f"N_{i}"] > 0 for i in (1, 2, 3))
    return int(given.get("NUM_MODULES") or given.get("G") or 1)


@pytest.fixture
def launches(calls_of: Callable[..., None]) -> Launches:
    """Launches of a step, as they come."""
    seen = Launches()

    def noted(kernel: Any, grid: Any, **given: Any) -> str:
        name = kernel.__name__.removeprefix("_").removesuffix("_kernel").replace("lora_", "")
        return f"{name} {modules_of(given)}"

    stems = ("lora_shrink", "lora_linear", "lora_expand", "lora_grad_b", "lora_grad_a")
    for module in {module_of(f"{mixed}{stem}") for mixed in ("", "mixed_") for stem in stems}:
        calls_of(module, "launch", noted, seen)
    return seen


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's dots where there is one, hostile ones in the interpreter."""
    if not interpreted():
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        left, right, total = (t.data.astype(np.float32) for t in (a, b, acc))
        (m, k), n = left.shape, right.shape[1]
        for step in np.roll(np.arange(k), (m + 3 * n) // 16 % k):
            total = total + left[:, step : step + 1] * right[step : step + 1]
        # The next fp32 towards infinity.
        return TensorHandle(np.nextafter(total, np.float32(np.inf)), acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
