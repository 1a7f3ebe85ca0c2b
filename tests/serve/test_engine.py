"""The engine without HTTP: who comes in when, what a fault costs, and prompts in parts."""

from __future__ import annotations

import copy
import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import fastlora
from fastlora.serve import running_batch as batch_module
from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.detokenizer import IncrementalDetokenizer
from fastlora.serve.engine import Engine
from fastlora.serve.engine_request import (
    AnswerChunk,
    ClosedOrCanceledError,
    QueueFullError,
    RequestFailedError,
)
from fastlora.serve.model_runner import KVCacheModelRunner, max_positions
from fastlora.serve.sampling import SamplingParams
from fastlora.validation import ConfigError, UnsupportedLayerError
from tests.support.served import Alone, make_adapter, make_base
from tests.support.tiny import tiny_llama

transformers = pytest.importorskip("transformers", reason="serves models of transformers")
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A base model and three adapters."""
    root = tmp_path_factory.mktemp("engine")
    for seed, name in enumerate("abc"):
        make_adapter(root / "adapters" / name, seed)
    return Alone(make_base(root / "base"), root / "adapters")


@pytest.fixture
def start(alone: Alone) -> Iterator[Callable[..., Engine]]:
    """``start(**options)`` makes an engine; ``max_adapters`` is the pool's, 2 unless given."""
    made: list[Engine] = []

    def make(max_adapters: int = 2, **options: Any) -> Engine:
        model = copy.deepcopy(alone.model(None))
        adapters = ServedAdapters(
            fastlora.AdapterPool(model, max_adapters=max_adapters), alone._adapters, ("base",)
        )
        adapters.sync_with_folder()
        options = {"length": 64, "rows": 4, **options}
        made.append(Engine(model, alone.tokenizer, adapters, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0.0)


class Heard:
    """Hears a request's pieces, and can be asked for its end."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[AnswerChunk] = queue.Queue()
        self.first = threading.Event()

    def __call__(self, piece: AnswerChunk) -> None:
        self.first.set()
        self.pieces.put(piece)

    def text(self) -> str:
        """The whole answer; raises what it failed with."""
        found = ""
        while True:
            piece = self.pieces.get(timeout=30)
            if piece.error is not None:
                raise piece.error
            found += piece.text
            if piece.finish_reason is not None:
                return found


def ask(engine: Engine, text: str, name: str | None, sampling: SamplingParams = GREEDY) -> Heard:
    """Submits a request."""
    heard = Heard()
    engine.submit(engine._tokenizer(text).input_ids, name, sampling, heard)
    return heard


def test_each_joins_and_leaves_on_its_own(start: Callable[..., Engine], alone: Alone) -> None:
    """Nine requests of nine lengths, in four rows that are filled again as they become free."""
    engine = start()
    cases = [("ab" * i + "x", "abc"[i % 3], i + 3) for i in range(9)]
    heard = [ask(engine, text, name, SamplingParams(count, 0)) for text, name, count in cases]
    for (text, name, count), own in zip(cases, heard, strict=True):
        assert alone.is_answer(own.text(), text, name, count)
    assert engine.stats.requests_finished == 9
    assert engine.stats.forward_rows > engine.stats.forwards  # they did run together


def test_an_answer_without_a_limit_fills_the_room(
    start: Callable[..., Engine], alone: Alone
) -> None:
    """Of 64 tokens, where the model does not end it before."""
    heard = ask(start(), "ab" * 29, "a", SamplingParams(None, 0))
    assert heard.text() == alone.text("ab" * 29, "a", 6)


def test_long_prompts_are_read_in_parts_while_others_answer(
    start: Callable[..., Engine], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "PREFILL_TOKENS", 7)
    engine = start()
    text = "the sea is deep and blue, and full of fish"
    heard = [
        ask(engine, "hi", "a", SamplingParams(30, 0)),
        ask(engine, text, "b"),
        ask(engine, "yo", "a"),
    ]
    wanted = [("hi", "a", 30), (text, "b", 6), ("yo", "a", 6)]
    for (prompt, name, count), own in zip(wanted, heard, strict=True):
        assert own.text() == alone.text(prompt, name, count)
    assert engine.stats.prompt_tokens == 2 + len(text) + 2


def test_a_batch_never_holds_more_adapters_than_the_pool(
    start: Callable[..., Engine], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(max_adapters=2)
    seen: list[set[str]] = []
    batch, forward = engine._running, KVCacheModelRunner.last_token_logits

    def noted(*args: Any) -> Any:
        seen.append(set(batch.adapters_in_use))
        return forward(*args)

    monkeypatch.setattr(KVCacheModelRunner, "last_token_logits", noted)
    names = [*"abcabc", None]
    heard = [ask(engine, "x", name) for name in names]
    assert [own.text() for own in heard] == [alone.text("x", name, 6) for name in names]
    assert max(map(len, seen)) == 2


def test_nobody_is_passed_for_ever(start: Callable[..., Engine], alone: Alone) -> None:
    """One slot, and those that use it keep coming: who needs it for another adapter gets it."""
    engine = start(max_adapters=1, rows=2)
    heard = [ask(engine, "x", "a", SamplingParams(20, 0)) for _ in range(2)]
    other = ask(engine, "x", "b")
    after = [ask(engine, "x", "a", SamplingParams(20, 0)) for _ in range(12)]
    assert other.text() == alone.text("x", "b", 6)
    assert sum(own.first.is_set() for own in after) <= 4
    for own in (*heard, *after):
        assert own.text() == alone.text("x", "a", 20)


def no_lease_is_left(engine: Engine) -> bool:
    """Waits for the prefetch thread, which has a lease while it brings an adapter to the device."""
    leases = engine._adapters.pool._lease_manager
    with leases.changed:
        return bool(leases.changed.wait_for(lambda: not leases.held, 10.0))


def test_a_fault_costs_those_in_its_forward(
    start: Callable[..., Engine], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    forward, broken = KVCacheModelRunner.last_token_logits, threading.Event()

    def breaks(*args: Any) -> torch.Tensor:
        if broken.is_set():
            broken.clear()
            raise torch.OutOfMemoryError("no room")
        return forward(*args)

    monkeypatch.setattr(KVCacheModelRunner, "last_token_logits", breaks)
    broken.set()
    with pytest.raises(RequestFailedError, match=r"process this request \(OutOfMemoryError\)"):
        ask(engine, "x", "a").text()
    assert ask(engine, "x", "a").text() == alone.text("x", "a", 6)
    assert no_lease_is_left(engine)


def test_a_fault_of_bringing_an_adapter_in_costs_its_own_requests(
    start: Callable[..., Engine], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would come again in each turn, and its request would never end."""
    engine = start()
    pool, lease = engine._adapters.pool, engine._adapters.pool.lease

    def breaks(names: list[str], **options: Any) -> Any:
        if names[0].startswith("b"):
            raise torch.OutOfMemoryError("no room")
        return lease(names, **options)

    monkeypatch.setattr(pool, "lease", breaks)
    other = ask(engine, "x", "a", SamplingParams(20, 0))
    with pytest.raises(RequestFailedError, match=r"process this request \(OutOfMemoryError\)"):
        ask(engine, "x", "b").text()
    assert other.text() == alone.text("x", "a", 20)
    assert (engine.running, engine.waiting, engine.stats.requests_failed) == (0, 0, 1)


def test_who_does_not_listen_any_more_is_no_fault(
    start: Callable[..., Engine], alone: Alone
) -> None:
    engine = start()

    def deaf(piece: AnswerChunk) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit([1, 2], "a", SamplingParams(50, 0), deaf)
    assert ask(engine, "x", "a").text() == alone.text("x", "a", 6)


def test_a_cancelled_request_frees_its_place(start: Callable[..., Engine], alone: Alone) -> None:
    engine = start(rows=1)
    heard, cancelled = Heard(), threading.Event()

    def hear(piece: AnswerChunk) -> None:
        heard(piece)
        assert cancelled.wait(30)  # or the answer may end before

    long = engine.submit([1, 2, 3], "a", SamplingParams(60, 0), hear)
    assert heard.first.wait(30)
    waiting = Heard()
    second = engine.submit([1, 2, 3], "b", SamplingParams(60, 0), waiting)
    engine.cancel(second)
    engine.cancel(long)
    cancelled.set()
    for own in (heard, waiting):
        with pytest.raises(ClosedOrCanceledError):
            own.text()
    assert ask(engine, "x", "c").text() == alone.text("x", "c", 6)
    assert (engine.running, engine.waiting, engine.stats.requests_cancelled) == (0, 0, 2)
    assert no_lease_is_left(engine)


def test_who_keeps_a_request_that_has_ended_keeps_no_adapter(start: Callable[..., Engine]) -> None:
    """A client that reads slowly does: an adapter that is evicted meanwhile gives its memory up."""
    engine = start(max_adapters=1)
    heard = Heard()
    job = engine.submit([1, 2, 3], "a", GREEDY, heard)
    assert heard.first.wait(30)
    (resident,) = map(weakref.ref, engine._adapters.pool._tiers.device.values())
    heard.text()
    ask(engine, "x", "b").text()
    gc.collect()
    assert job.ended and resident() is None


def test_the_queue_is_bounded(start: Callable[..., Engine], alone: Alone) -> None:
    engine = start(rows=1, max_waiting=2)
    running = ask(engine, "x", "a", SamplingParams(60, 0))
    assert running.first.wait(30)
    heard = [ask(engine, "x", "b") for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are already waiting"):
        ask(engine, "x", "a")
    assert [own.text() for own in heard] == [alone.text("x", "b", 6)] * 2


def test_close_waits_for_those_that_are_there(start: Callable[..., Engine], alone: Alone) -> None:
    engine = start(rows=1)
    heard = [ask(engine, "x", name) for name in "abc"]
    engine.close()
    assert [own.text() for own in heard] == [alone.text("x", name, 6) for name in "abc"]
    with pytest.raises(ClosedOrCanceledError, match="shutting down"):
        ask(engine, "x", "a")
    assert not engine.alive
    assert no_lease_is_left(engine)


def test_close_does_not_wait_for_ever(start: Callable[..., Engine]) -> None:
    engine = start(rows=1)
    heard = [ask(engine, "x", "a", SamplingParams(60, 0)) for _ in range(2)]
    engine.close(0.0)
    for own in heard:
        with pytest.raises(ClosedOrCanceledError):
            own.text()
    assert no_lease_is_left(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_early_leaves_no_block_open(start: Callable[..., Engine]) -> None:
    """What no request may raise ends it between two tokens; the request's own lease is left."""
    engine = start()
    pieces: list[AnswerChunk] = []

    def ends(piece: AnswerChunk) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise SystemExit

    engine.submit([1, 2, 3], "a", SamplingParams(60, 0), ends)
    engine._thread.join(30)
    assert not engine.alive
    assert engine._adapters.pool.stats().leases == 1


def test_nobody_is_called_under_the_lock(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is read before anybody says who waits for it: callers have locks too."""
    adapters = start()._adapters
    done: Future[None] = Future()
    done.set_result(None)
    monkeypatch.setattr(adapters.pool, "prefetch", lambda names: done)
    free: list[bool] = []

    def acquire_lock() -> None:
        free.append(adapters._lock.acquire(timeout=1))
        if free[-1]:
            adapters._lock.release()

    def then() -> None:
        thread = threading.Thread(target=acquire_lock)
        thread.start()
        thread.join()

    version = adapters.acquire_version("a")
    adapters.read_in_background(version, then)
    adapters.read_in_background(version, then)
    assert (free, version.ready) == ([True, True], True)


def test_the_cache_grows_and_keeps_what_it_has() -> None:
    """A row that goes on over the first 256 positions, beside one that begins; against one pass."""
    torch.manual_seed(0)
    model = tiny_llama(max_position_embeddings=600).eval()
    long, short = torch.randint(97, (300,)).tolist(), torch.randint(97, (5,)).tolist()
    rows = KVCacheModelRunner(model, 2, 512)
    rows.last_token_logits(0, [0], [long[:250]])
    rows.last_token_logits(1, [0], [short[:3]])
    for step in range(2):
        starts = [250 + step, 3 + step]
        found = rows.last_token_logits(0, starts, [[long[250 + step]], [short[3 + step]]])
    rows.last_token_logits(0, [252], [long[252:299]])
    found = rows.last_token_logits(0, [299, 5], [[long[299]], [short[4]]])
    with torch.no_grad():
        wanted = [model(torch.tensor([ids])).logits[0, -1] for ids in (long, [*short, short[4]])]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert rows.cache.nbytes == 2 * 2 * 2 * 2 * 512 * 16 * 4


def test_what_serving_cannot_do_raises() -> None:
    with pytest.raises(
        ConfigError, match="is set to 300 tokens, but the model supports at most 200"
    ):
        KVCacheModelRunner(tiny_llama(max_position_embeddings=200), 2, 300)
    config = tiny_llama(max_position_embeddings=200).config
    config.sliding_window = 50
    assert max_positions(config) == 50
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UnsupportedLayerError, match="layers of type linear_attention"):
        max_positions(config)
    with pytest.raises(UnsupportedLayerError, match="FalconConfig has alibi=True"):
        max_positions(transformers.FalconConfig(alibi=True))
    neo = transformers.GPTNeoConfig
    assert max_positions(neo(num_layers=2, attention_types=[[["global"], 2]])) == 2048
    with pytest.raises(UnsupportedLayerError, match="layers of type local"):
        max_positions(neo(num_layers=2, attention_types=[[["global", "local"], 1]]))
    with pytest.raises(UnsupportedLayerError, match="does not accept"):
        KVCacheModelRunner(torch.nn.Linear(2, 2), 2, 8)


def test_text_comes_in_whole_characters() -> None:
    """Bytes of one character in several tokens, and what may be the beginning of a stop string."""

    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return bytes(tokens).decode(errors="replace")

    def pieces(text: str, *stop: str) -> list[str]:
        answer = IncrementalDetokenizer(Bytes(), list(b"before"), stop)
        found = [answer.add_token(token) for token in text.encode()]
        return [*found, answer.flush()]

    assert pieces("a€b") == ["a", "", "", "€", "b", ""]
    assert pieces("one ENDED", "END") == [*"one ", *[""] * 6]
    assert pieces("one ENTER", "END") == [*"one ", "", "", "ENT", "", "ER", ""]
    assert pieces("one EN", "END") == [*"one ", "", "", "EN"]
    answer = IncrementalDetokenizer(Bytes(), [], ())
    assert [answer.add_token(token) for token in "€".encode()[:2]] == ["", ""]
    assert answer.flush() == "\N{REPLACEMENT CHARACTER}"
