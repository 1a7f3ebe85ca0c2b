"""The block of a batch stays open while its rows have the same adapters, and no longer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.routing.active import active_routings
from fastlora.serve import running_batch as batch_module
from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.detokenizer import IncrementalDetokenizer
from fastlora.serve.engine_request import EngineCounters, EngineRequest, RequestFailedError
from fastlora.serve.model_runner import KVCacheModelRunner
from fastlora.serve.running_batch import RunningBatch
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import AdapterNotFoundError, FastLoraError
from tests.support.served import make_adapter, wait_for
from tests.support.tiny import tiny_llama

pytest.importorskip("transformers", reason="serves models of transformers")
PROMPT = [1, 2, 3]


class Letters:
    """A tokenizer with a letter for each token."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """The text of some tokens."""
        return "".join(chr(65 + token) for token in tokens)


class Run:
    """A batch over a pool of its own, without the engine's thread.

    Attributes:
        opened: For each block that was opened, what clients call the adapters of its rows.
        logits: What each forward gave.
        errors: Why requests left, or None.
        fails: Whether the next forwards raise.
    """

    def __init__(self, root: Path, max_adapters: int = 4) -> None:
        model = tiny_llama().eval()
        self.pool = fastlora.AdapterPool(model, max_adapters=max_adapters)
        self.adapters = ServedAdapters(self.pool, root, reserved=())
        self.adapters.sync_with_folder()
        self.opened: list[list[str | None]] = []
        self.logits: list[torch.Tensor] = []
        self.errors: list[FastLoraError | None] = []
        self.fails = False
        rows = KVCacheModelRunner(model, 4, 64)
        self._forward, rows.last_token_logits = rows.last_token_logits, self._noted  # type: ignore[method-assign]
        self.batch = RunningBatch((), self.pool, rows, EngineCounters(), self._left)

    def _noted(self, *args: Any) -> torch.Tensor:
        if self.fails:
            raise torch.OutOfMemoryError("no room")
        self.logits.append(self._forward(*args))
        return self.logits[-1]

    def _left(self, job: EngineRequest, error: FastLoraError | None) -> None:
        self.errors.append(error)
        if job.version is not None:
            self.adapters.release_version(job.version)

    def opens(self, pool: Any, names: list[str | None]) -> contextlib.AbstractContextManager[None]:
        """`fastlora.adapters`, noted."""
        self.opened.append([name and name.partition("\n")[0] for name in names])
        return fastlora.adapters(pool, names)

    def join(self, *names: str | None) -> list[EngineRequest]:
        """Lets a request in for each name; its answer is as long as the cache allows."""
        made = []
        for name in names:
            version = None if name is None else self.adapters.acquire_version(name)
            text = IncrementalDetokenizer(Letters(), PROMPT, ())
            job = EngineRequest(PROMPT, version, SamplingParams(60, 0), lambda piece: None, text)
            if version is not None:
                job.lease = self.pool.lease([version.name])
            made.append(job)
        self.batch.jobs += made
        return made

    def turns(self, count: int) -> None:
        """Takes some turns."""
        for _ in range(count):
            self.batch.prefill_and_decode()

    @property
    def is_open(self) -> bool:
        """Whether a block is open in this thread, and so holds a lease."""
        own = sum(job.lease is not None for job in self.batch.jobs)
        held = self.pool.stats().leases - own
        assert held == len(active_routings())
        return bool(held)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with three adapters."""
    for seed, name in enumerate("abc"):
        make_adapter(tmp_path / name, seed)
    return tmp_path


@pytest.fixture
def start(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """``start()`` makes a run, whose opened blocks are noted, and closes it at the end."""
    made: list[Run] = []

    def make(**options: Any) -> Run:
        made.append(Run(root, **options))
        monkeypatch.setattr(batch_module, "routed_to", made[-1].opens)
        return made[-1]

    yield make
    for run in made:
        run.batch.close_adapters_block()


def test_a_block_is_held_while_the_rows_keep_their_adapters(start: Callable[..., Run]) -> None:
    """The first block follows rows, which its forward alone may see, so it closes behind that."""
    run = start()
    first = run.join("a", "b", None)
    run.turns(6)
    assert run.opened == [["a", "b", None]] * 2
    assert run.is_open

    (other,) = run.join("c")
    run.turns(4)
    assert run.opened[2:] == [["c"], ["a", "b", None, "c"]]

    first[1].canceled = True
    run.batch.remove_canceled()
    assert not run.is_open  # or b could not be evicted
    run.turns(3)
    assert run.opened[4:] == [["a", "c", None]]

    for job in (first[0], other):
        job.canceled = True
    run.batch.remove_canceled()
    run.turns(3)  # of the base model alone
    assert len(run.opened) == 5
    assert not run.is_open
    first[2].canceled = True
    run.batch.remove_canceled()
    assert run.errors == [None] * 4


def test_a_held_block_changes_no_number(start: Callable[..., Run]) -> None:
    """Against a block for each forward: two requests, a third that joins, one that leaves."""
    found = []
    for holds in (True, False):
        run = start()
        jobs = run.join("a", None)
        for turn in range(12):
            if turn == 4:
                jobs += run.join("b")
            if turn == 8:
                jobs[0].canceled = True
                run.batch.remove_canceled()
            run.batch.prefill_and_decode()
            if not holds:
                run.batch.close_adapters_block()
        assert (len(run.opened) < len(run.logits) / 2) == holds
        found.append(run)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    one, other = (run.batch.jobs for run in found)
    assert [job.tokens for job in one] == [job.tokens for job in other]


@pytest.mark.parametrize("changes", ["served", "pooled"])
def test_an_adapter_that_is_replaced_between_two_tokens(
    start: Callable[..., Run], root: Path, changes: str
) -> None:
    """A request keeps its version of the server's; what the pool replaces, it sees at once."""
    found = []
    for when in (None, 4):
        run = start()
        (job,) = run.join("a")
        run.turns(4)
        if when is not None and changes == "served":
            run.adapters.load("a", "b", replace=True)
        elif when is not None:
            assert job.version is not None
            run.pool.load(job.version.name, root / "b")
        run.turns(2)
        if changes == "served":
            run.join("a")
            run.turns(2)
        run.batch.close_adapters_block()  # a thread's blocks end in reverse order
        found.append(run.logits)
    # A prompt and its first token, three tokens, then two of the new adapter or of the old one.
    before, after = found
    same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    if changes == "served":
        assert same[:7] == [True] * 7  # and then the new request's prompt
        assert not same[7]
        assert run.opened == [["a"]] * 2 + [["a", "a"]] * 2  # the first that mixes follows rows
    else:
        assert same == [True] * 5 + [False] * 2
        assert run.opened == [["a"]] * 2


def test_others_come_and_go_while_a_block_is_open(start: Callable[..., Run], root: Path) -> None:
    """One is evicted for another, one is unloaded, one is loaded: none waits for the block."""
    run = start(max_adapters=2)
    run.join("a")
    run.turns(3)
    assert run.is_open
    names = {name: run.adapters.acquire_version(name).name for name in "abc"}
    for name in "bc":
        run.pool.lease([names[name]], timeout=0.0).release()
    assert run.pool.loaded_names == [names["a"], names["c"]]
    for name in "abc":
        run.adapters.release_version(run.adapters._versions[name])
    run.adapters.unload("c")
    run.adapters.load("new", "b")
    assert names["c"] not in run.pool
    assert run.is_open
    run.turns(3)
    assert run.errors == []


def test_an_adapter_that_the_pool_forgets_fails_its_rows(start: Callable[..., Run]) -> None:
    """The block does not keep it for the next token."""
    run = start()
    (job,) = run.join("a")
    run.turns(3)
    assert job.version is not None
    run.pool.unload(job.version.name)
    run.turns(1)
    assert [type(error) for error in run.errors] == [AdapterNotFoundError]
    assert not run.is_open


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_a_forward_that_fails_leaves_no_block_open(start: Callable[..., Run], turns: int) -> None:
    """The first one, whose block follows rows, and one within a held block."""
    run = start()
    run.join("a", "b")
    run.turns(turns)
    run.fails = True
    run.batch.prefill_and_decode()
    assert not run.is_open
    assert [type(error) for error in run.errors] == [RequestFailedError] * 2
    assert run.pool.stats().leases == 0
    run.fails = False
    run.join("a", "b")
    run.turns(4)
    assert run.errors[2:] == []


def test_a_row_that_failed_is_zeros_for_the_next_request(start: Callable[..., Run]) -> None:
    """Masked positions of a shorter row take part in a product, where NaN times 0 is NaN."""
    run = start()
    run.join("a")
    run.turns(6)
    (spoilt,) = run.join("b")
    run.turns(1)
    rows = run.batch._rows.cache
    assert run.batch.jobs[1] is spoilt
    for kept in rows._all():
        kept[1] = float("nan")
    run.batch._fail(spoilt, RequestFailedError("not finite"))
    run.join("c")
    run.turns(3)
    assert all(logits.isfinite().all() for logits in run.logits)
    assert [type(error) for error in run.errors] == [RequestFailedError]


def test_closing_ends_the_block(start: Callable[..., Run]) -> None:
    run = start()
    run.join("a", "b")
    run.turns(3)
    assert run.is_open
    run.batch.close_adapters_block()
    assert not run.is_open


def test_the_pool_and_the_server_have_one_record(start: Callable[..., Run]) -> None:
    """Of an adapter that the watch found, and of one that a client loaded."""
    run = start()
    run.adapters.load("mine", "b")
    for name in ("a", "mine"):
        version = run.adapters.acquire_version(name)
        assert run.pool._tiers.entry(version.name) is version
        done: list[str] = []
        run.adapters.read_in_background(version, lambda: done.append(name))  # noqa: B023  # waited for below
        wait_for(lambda: bool(done))  # noqa: B023
        assert version.ready
        run.adapters.release_version(version)
