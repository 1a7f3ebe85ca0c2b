"""Ahead-of-time compilation of the kernels that a model will launch, in separate processes.

Triton compiles a kernel for the types and constants of its arguments, for some values (1, and
multiples of 16), and for options. `record_variants` finds out what launches would compile, without
compiling or launching anything. `compile_in_processes` compiles it into Triton's cache. Neither
needs a GPU, so this module can also compile for another chip.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, compile, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels.chips import Chip
from fastlora.kernels.stand_in_driver import StandInDriver

_MAX_MESSAGE_CHARS = 300
# A worker finds modules where its parent does.
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastlora.kernels.precompile import run_worker; run_worker()"
)


class KernelVariant(NamedTuple):
    """What one compilation of a kernel depends on; launches with equal variants share a kernel.

    Attributes:
        kernel: Module and name of the kernel, separated by a colon.
        signature: Type of each argument.
        constants: Value of each constant argument, by its path in the arguments.
        attributes: What the compiler may assume of other arguments, by their paths.
        options: Triton's options.
        target: The chip.
    """

    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return self.kernel.rpartition(":")[2].removeprefix("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """A string that is equal for equal variants."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        texts = [sorted(f"{name}={value}" for name, value in part.items()) for part in parts]
        return repr((self.kernel, texts, str(self.target)))


# -------------------------------------------------------------------------------- what to compile


@contextlib.contextmanager
def record_variants(chip: Chip) -> Iterator[dict[str, KernelVariant]]:
    """Record the variants of launches in a ``with`` block, and launch nothing.

    Outputs stay uninitialized. The context manager affects all threads. Triton's interpreter is not
    supported.

    Yields:
        The variants so far, by their keys.
    """
    found: dict[str, KernelVariant] = {}

    def record(
        self: Any,
        key: Any,
        signature: dict[str, Any],
        device: int,
        constants: dict[tuple[int, ...], Any],
        options: Any,
        attributes: dict[tuple[int, ...], Any],
        warmup: bool,
    ) -> None:
        values = {path: _reference_or_value(value) for path, value in constants.items()}
        name, own = _reference_to(self), dict(options.__dict__)
        variant = KernelVariant(name, dict(signature), values, dict(attributes), own, target)
        found[variant.key] = variant

    before: Any = driver.active
    target = before.get_current_target()
    compiles = JITFunction._do_compile
    # No kernel has been compiled for the number of this driver, so Triton asks for each of them.
    driver.set_active(StandInDriver(chip, target))
    JITFunction._do_compile = record
    try:
        yield found
    finally:
        JITFunction._do_compile = compiles
        driver.set_active(before)


class _Reference(NamedTuple):
    """A function of Triton, by its module and name."""

    function: str


def _reference_to(function: Any) -> str:
    return f"{function.fn.__module__}:{function.fn.__qualname__}"


def _reference_or_value(value: Any) -> Any:
    return _Reference(_reference_to(value)) if isinstance(value, JITFunction) else value


def _function_at(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _source_of(variant: KernelVariant) -> ASTSource:
    values = {
        path: _function_at(value.function) if isinstance(value, _Reference) else value
        for path, value in variant.constants.items()
    }
    kernel = _function_at(variant.kernel)
    return ASTSource(kernel, variant.signature, values, variant.attributes)


# ------------------------------------------------------------------------------------ compilation


def compile_variant(variant: KernelVariant) -> None:
    """Compile a variant into Triton's cache."""
    compile(_source_of(variant), target=variant.target, options=variant.options)


def is_cached(variant: KernelVariant) -> bool:
    """Return whether Triton's cache has a variant, as `triton.compile` looks it up."""
    source, backend = _source_of(variant), make_backend(variant.target)
    options = backend.parse_options({**variant.options, **source.parse_options()})
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return manager.get_group(f"{source.name[:150]}.json") is not None


def cache_folder() -> str | None:
    """Return the path of Triton's cache folder, or None if the cache is not a folder."""
    return None if knobs.cache.manager_class else knobs.cache.dir


def compile_in_processes(
    variants: Sequence[KernelVariant], processes: int
) -> Iterator[tuple[KernelVariant, str]]:
    """Compile variants in separate processes.

    A process that dies is replaced by another one, which continues with the next variant.

    Args:
        variants: The variants.
        processes: Maximum number of processes.

    Yields:
        Each variant once it has been compiled, with an error message or an empty string.
    """
    waiting: queue.SimpleQueue[KernelVariant] = queue.SimpleQueue()
    for variant in variants:
        waiting.put(variant)
    done: queue.SimpleQueue[tuple[KernelVariant, str]] = queue.SimpleQueue()
    workers = [_Worker() for _ in range(min(processes, len(variants)))]
    threads = [
        threading.Thread(target=worker.compile_all, args=(waiting, done), daemon=True)
        for worker in workers
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in variants:
            yield done.get()
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()


class _Worker:
    """A process that compiles variants one after another, for one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def compile_all(
        self,
        waiting: queue.SimpleQueue[KernelVariant],
        done: queue.SimpleQueue[tuple[KernelVariant, str]],
    ) -> None:
        """Compile waiting variants until there are none, and report each of them."""
        while not self._stopped:
            try:
                variant = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                error = self._compile(variant)
            except Exception as failure:  # for instance, no further process can be started
                error = f"{type(failure).__name__}: {failure}"
            done.put((variant, error))
        self.stop()

    def _compile(self, variant: KernelVariant) -> str:
        process = self._running_process()
        if process is None or process.stdin is None or process.stdout is None:
            return "compilation was stopped"
        request = pickle.dumps(variant)
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer: str = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            process.kill()
            code = process.wait()
            self._process = None
            return f"the process that compiled it ended with {_describe_exit(code)}"
        return answer

    def _running_process(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._process is None and not self._stopped:
                paths = json.dumps([path or os.getcwd() for path in sys.path])
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _WORKER, paths],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            return self._process

    def stop(self) -> None:
        """End the process. A compilation that it has not finished has no effect on the cache."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


def run_worker() -> None:
    """Compile the variants that arrive at stdin, and answer each with an error message or ""."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print must not become an answer
    while True:
        try:
            variant = pickle.load(requests)
        except EOFError:
            return
        error = ""
        try:
            compile_variant(variant)
        except Exception as failure:
            text = " ".join(str(failure).split())
            error = f"{type(failure).__name__}: {text[:_MAX_MESSAGE_CHARS]}"
        pickle.dump(error, answers)
        answers.flush()
