"""The server as a program: keys, limits, clients that go away, metrics, SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.commands import cli, serve
from tests.support.programs import error_of
from tests.support.served import make_adapter, make_base, serving, wait_for

ROOT = Path(__file__).resolve().parents[2]
LONG: dict[str, Any] = {"model": "ash", "prompt": "x", "max_tokens": 3000, "temperature": 0}


def metric(http: Any, name: str) -> float:
    """A number of the metrics' page."""
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that never ends an answer by itself, with an adapter beside it."""
    for library in ("transformers", "fastapi", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(library, reason="the server needs it")
    root = tmp_path_factory.mktemp("server")
    make_adapter(root / "adapters" / "ash", 0)
    return make_base(root / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def narrow(base: Path) -> Iterator[Any]:
    """A server with one row, two places to wait, and a key; yields its client."""
    import httpx

    options = ("--adapters", str(base.parent / "adapters"), "--max-batch", "1", "--max-queue", "2")
    options += ("--api-key", "s3cret", "--max-length", "3500", "--drain", "1")
    with serving(base, *options) as (url, _):
        headers = {"Authorization": "Bearer s3cret"}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as http:
            yield http


@contextlib.contextmanager
def streaming(http: Any, **changes: Any) -> Iterator[Any]:
    """An answer of thousands of tokens, of which the first has come; closing it hangs up."""
    with http.stream("POST", "/v1/completions", json=LONG | {"stream": True} | changes) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_the_key_is_asked_for(narrow: Any) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        for given in ("", "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cre"):
            answer = narrow.get(path, headers={"Authorization": given})
            assert answer.status_code == 401, (path, given)
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert narrow.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert narrow.get("/v1/models").status_code == 200


def test_a_full_queue_says_when_to_come_again(narrow: Any) -> None:
    short = LONG | {"max_tokens": 2}
    with ThreadPoolExecutor(2) as threads, streaming(narrow):  # ends from the right
        waiting = [threads.submit(narrow.post, "/v1/completions", json=short) for _ in range(2)]
        wait_for(lambda: metric(narrow, "fastlora_requests_waiting") == 2)
        answer = narrow.post("/v1/completions", json=short)
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        assert narrow.get("/health").status_code == 200
        break_off = narrow.stream("POST", "/v1/completions", json=short)
        with break_off as rejected:
            assert rejected.status_code == 429
    assert [answer.result().status_code for answer in waiting] == [200, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(narrow: Any, stream: bool) -> None:
    """Of one row: the next request gets it, though thousands of tokens were asked for."""
    before = metric(narrow, "fastlora_requests_cancelled_total")
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    address = (narrow.base_url.host, narrow.base_url.port)
    with socket.create_connection(address) as client:
        client.sendall(head + body)
        wait_for(lambda: metric(narrow, "fastlora_requests_running") == 1)
    wait_for(lambda: metric(narrow, "fastlora_requests_running") == 0)
    assert metric(narrow, "fastlora_requests_cancelled_total") == before + 1
    assert narrow.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_metrics_count_answers(narrow: Any) -> None:
    narrow.get("/v1/models")
    page = narrow.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'fastlora_http_responses_total{path="/v1/models",status="200"}' in page.text
    assert 'path="/v1/nothing"' not in page.text  # clients do not make new rows


def start(*options: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """Starts the program; returns it, its URL and what it said before."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlora", "serve", *options, "--port", "0", "--cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said: list[str] = []
    for line in process.stderr or ():
        said.append(line)
        if "ready at" in line:
            return process, line.split()[-1].removesuffix("/v1"), said
    raise AssertionError("".join(said))


def test_sigterm_lets_answers_end(base: Path) -> None:
    """The program: its first lines are its own, a stream ends whole, and then it does, with 0."""
    import httpx

    process, url, said = start(str(base), "--adapters", str(base.parent / "adapters"))
    try:
        assert said[0].startswith("fastlora: listening at http://127.0.0.1:")
        assert said[1].startswith("fastlora: loading ")
        assert any("serving tiny with 1 adapter: ash" in line for line in said)
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            streaming(http, max_tokens=200) as lines,
        ):
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert (
            process.stderr.read().splitlines()[-1]
            == "fastlora: server stopped; no requests are running"
        )
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
    finally:
        process.kill()
        process.wait()


# The program, which does not read the model until there is a file "go" beside it.
SLOW = """
import pathlib, sys, time
from fastlora.commands import cli, models
load = models.load_base_model_and_tokenizer
def load_later(args):
    while not pathlib.Path(args.model, "go").exists():
        time.sleep(0.02)
    return load(args)
models.load_base_model_and_tokenizer = load_later
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def slow_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model."""
    return Path(shutil.copytree(base, tmp_path / "slow"))


@contextlib.contextmanager
def loading(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts the program; yields it and its URL while it still loads its model."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW, "serve", str(folder), *options]
    process = subprocess.Popen(
        [*command, "--port", "0", "--cpu"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while "listening at" not in line:
            assert line, "the program ended"
            line = process.stderr.readline()
        url = line.split("listening at ")[1].partition(";")[0].removesuffix("/v1")
        yield process, url
    finally:
        process.kill()
        process.wait()


def answer_of(url: str, method: str, path: str, **given: Any) -> Any:
    """An answer, once the program accepts connections into its event loop."""
    import httpx

    return httpx.request(method, f"{url}{path}", timeout=60, **given)


def test_requests_get_503_until_the_model_is_loaded(slow_base: Path) -> None:
    with loading(slow_base, "--no-warm-up") as (process, url):
        health = answer_of(url, "GET", "/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert int(health.headers["Retry-After"]) > 0
        body = LONG | {"model": "base", "max_tokens": 2}
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/nothing")):
            answer = answer_of(url, method, path, json=body)
            assert answer.status_code == 503, path
            assert answer.headers["Retry-After"] == health.headers["Retry-After"]
            assert answer.json()["error"]["code"] == "loading"
        (slow_base / "go").touch()
        assert process.stderr is not None
        said = ""
        while "ready at" not in said:
            said += process.stderr.readline() or pytest.fail("the program ended")
        assert "no kernels are compiled before the first request (--no-warm-up)" in said
        assert answer_of(url, "GET", "/health").status_code == 200
        answer = answer_of(url, "POST", "/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded_ends_the_program(
    slow_base: Path, number: signal.Signals
) -> None:
    with loading(slow_base) as (process, url):
        assert answer_of(url, "GET", "/health").status_code == 503
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert last == "fastlora: server stopped; no requests are running"


def test_a_kernel_cache_that_cannot_be_written_is_said_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(serve, "_warms_up", lambda args: True)
    assert "is not writable" in error_of(capsys, "serve", "nowhere", "--port", "0")


@pytest.mark.parametrize(
    ("options", "has_triton", "expected"),
    [
        ([], True, True),
        ([], False, False),
        (["--cpu"], True, False),
        (["--no-warm-up"], True, False),
    ],
)
def test_kernels_are_compiled_where_they_run(
    options: list[str], has_triton: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = "" if has_triton else "triton is not installed"
    monkeypatch.setattr(serve, "reason_without_kernels", lambda device: reason)
    assert serve._warms_up(serve.parse_args(["tiny", *options])) is expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--max-length", "9999"], "set to 9999 tokens, but the model supports at most 4096"),
        (["--watch", "nan"], "--watch must be at least 0, got nan"),
        (["--adapters", "nowhere"], "nowhere: no such folder; expected a folder of adapters"),
        (["--host", "no.such.invalid"], "--host no.such.invalid: cannot resolve this address"),
        (["--cpu-mib", "-1"], "--cpu-mib must be at least 0, got -1"),
    ],
)
def test_options_that_are_wrong(
    base: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(capsys, "serve", base, "--cpu", "--port", "0", *options)


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_dtype_that_is_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "nowhere", "--dtype", "fp7"])
    assert ended.value.code == 2
    assert "argument --dtype: invalid choice: 'fp7'" in capsys.readouterr().err


def test_a_path_that_is_none_is_no_name_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "serve", "path/to/model", "--port", "0")
    assert "path/to/model: no such folder" in error


def test_a_port_that_is_taken_is_said_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a server that still loads its model, too."""
    with serve._listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "serve", "nowhere", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in error


def test_help_needs_no_extra_and_running_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    assert ended.value.code == 0
    assert "--adapters" in capsys.readouterr().out
    error = error_of(capsys, "serve", "nowhere")
    assert "serve needs uvicorn; install it with: pip install '.[serve]'" in error
