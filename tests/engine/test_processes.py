"""fastlora in vLLM's own processes: settings, bf16, tensor parallel, and HTTP."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from tests.engine.adapters import answer_logits, copy_damaged, first_near_tie, make_adapters
from tests.engine.run_engine import MARK

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
STOCK, OWN = "PunicaWrapperCPU", "FastLoraPunicaWrapper"
CONFIGS: dict[str, dict[str, Any]] = {
    "r8": {"r": 8},
    "r16": {"r": 16, "use_rslora": True},
    "r3": {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "pattern": {"r": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"o_proj": 40}},
    "other-r8": {"r": 8, "lora_alpha": 24},
}


class Model(NamedTuple):
    """A model's folder, the folder of its adapters, and PEFT's model."""

    folder: Path
    adapters: Path
    peft: Any

    def requests(self, names: Sequence[str | None], length: int = 7) -> list[dict[str, Any]]:
        """A request for each name, with a random prompt."""
        draw = random.Random(0)
        found = []
        for name in names:
            ids = [draw.randrange(300, 4000) for _ in range(length)]
            number = None if name is None else list(CONFIGS).index(name) + 1
            lora = None if name is None else [name, number, str(self.adapters / name)]
            found.append({"ids": ids, "lora": lora})
        return found


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Model:
    """SmolLM2 with a fourth group of three heads that have zero weights.

    Two processes need an even number of heads and of groups.

    Without adapters, it computes the same as SmolLM2.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    config = copy.deepcopy(source.config)
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.num_key_value_heads += 1
    config.num_attention_heads += heads_per_group
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    for name, values in source.state_dict().items():
        state[name].zero_()
        state[name][tuple(slice(size) for size in values.shape)] = values
    ids = torch.arange(300, 340).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(ids).logits, source.double()(ids).logits)
    model.float()
    root = tmp_path_factory.mktemp("padded")
    model.save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(root / "model")
    return Model(root / "model", root, make_adapters(model, root, CONFIGS))


def run_engine(model: Path, requests: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Run an engine in another process, and return its answers and the classes of its wrappers."""
    given = {
        "llm": {
            "model": str(model),
            "dtype": settings.pop("dtype", "float32"),
            "max_loras": len(CONFIGS),
            "max_lora_rank": 16,
            "max_model_len": 128,
            "max_num_seqs": 32,
            "enable_prefix_caching": False,
            **settings.pop("llm", {}),
        },
        "requests": requests,
        "sampling": settings.pop("sampling", {"max_tokens": 8}),
    }
    if "version" in settings:
        given["version"] = settings.pop("version")
    environment = {k: v for k, v in os.environ.items() if k != "FASTLORA_VLLM"}
    environment |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "PYTHONPATH": str(ROOT)} | settings
    command = [sys.executable, "-m", "tests.engine.run_engine", json.dumps(given)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if MARK in line]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[-1].partition(MARK)[2])
    return found


def check_against_peft(
    model: Model, requests: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> None:
    """Check greedy answers up to the first near tie; 90% of them have none."""
    ends = 0
    for request, answer in zip(requests, answers, strict=True):
        name = request["lora"][0] if request["lora"] else None
        logits = answer_logits(model.peft, name, request["ids"], answer["ids"])
        ends += first_near_tie(logits, answer["ids"]) == len(answer["ids"])
    assert ends >= 0.9 * len(answers)


def test_disabled_and_an_unknown_version_are_stock(padded: Model) -> None:
    """Bit for bit, and with vLLM's own classes.

    One slot is free: otherwise vLLM gives base rows the adapter of the last slot, and which one
    that is depends on the order of a set.
    """
    requests = padded.requests([None, *CONFIGS] * 2)

    def run(**settings: Any) -> dict[str, Any]:
        sampling, llm = {"max_tokens": 4, "logprobs": 2}, {"max_loras": len(CONFIGS) + 1}
        return run_engine(padded.folder, requests, sampling=sampling, llm=llm, **settings)

    stock = run(VLLM_PLUGINS="none")
    assert stock["classes"] == [[STOCK]]
    assert run(FASTLORA_VLLM="0") == stock
    assert run(version="9.9.0+cpu") == stock
    assert run()["classes"] == [[OWN]]


@pytest.mark.parametrize("sharded", [False, True])
def test_tensor_parallel(padded: Model, sharded: bool) -> None:
    requests = padded.requests([None, *CONFIGS] * 2)
    found = run_engine(
        padded.folder,
        requests,
        llm={"tensor_parallel_size": 2, "fully_sharded_loras": sharded},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_SIM_MULTI_NUMA="1",
        VLLM_CPU_OMP_THREADS_BIND="auto",
    )
    assert found["classes"] == [[OWN], [OWN]]
    check_against_peft(padded, requests, found["answers"])


def test_engine_core_and_worker_in_processes_of_their_own(padded: Model) -> None:
    requests = padded.requests([None, *CONFIGS] * 2)
    found = run_engine(padded.folder, requests, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert found["classes"] == [[OWN]]
    check_against_peft(padded, requests, found["answers"])


def test_bf16_is_as_accurate_as_peft(padded: Model) -> None:
    """Log-probabilities of prompts in bf16, compared with PEFT in fp32 and in bf16."""
    from transformers import AutoModelForCausalLM

    names = [None, *CONFIGS]
    requests = padded.requests(names, length=40)
    sampling = {"max_tokens": 1, "prompt_logprobs": 0}
    found = run_engine(padded.folder, requests, dtype="bfloat16", sampling=sampling)
    base = AutoModelForCausalLM.from_pretrained(padded.folder, dtype=torch.float32)
    rounded = make_adapters(base, padded.adapters / "again", CONFIGS).to(torch.bfloat16)
    own, theirs = [], []
    for name, request, answer in zip(names, requests, found["answers"], strict=True):
        ids = request["ids"]
        chosen = torch.tensor(ids[1:]).unsqueeze(1)
        truth, peft = (
            answer_logits(model, name, ids[:1], ids[1:]).log_softmax(-1).gather(1, chosen)[:, 0]
            for model in (padded.peft, rounded)
        )
        got = [answer["logprobs"][at][str(token)] for at, token in enumerate(ids[1:])]
        own.append((torch.tensor(got) - truth).square().mean())
        theirs.append((peft - truth).square().mean())
    assert torch.stack(own).mean().sqrt() <= 2 * torch.stack(theirs).mean().sqrt()


# ------------------------------------------------------------------------------------------- HTTP


class Server:
    """vLLM's OpenAI server in processes of its own."""

    def __init__(self, model: Model) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k != "FASTLORA_VLLM"}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_LOGGING_LEVEL": "INFO",
            "PYTHONPATH": str(ROOT),
        }
        arguments = ["--model", str(model.folder), "--served-model-name", "base", "--dtype=float32"]
        arguments += ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "16"]
        arguments += ["--max-cpu-loras", "8", "--enforce-eager", "--max-model-len", "128"]
        arguments += ["--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", "32"]
        arguments += ["--shutdown-timeout", "60"]
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.log = (model.adapters / f"server-{port}.log").open("w+")
        self.process = subprocess.Popen(
            [*program, *arguments],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)
        deadline = time.monotonic() + 400
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            try:
                if self.http.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)

    def text(self) -> str:
        """The end of its log."""
        self.log.seek(0)
        return self.log.read()[-5000:]

    def load(self, name: str, folder: Path, inplace: bool = False) -> httpx.Response:
        """Load an adapter, or replace it."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": inplace}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def answer(self, name: str, ids: list[int], tokens: int = 8) -> httpx.Response:
        """A greedy completion, with its token IDs."""
        body = {"model": name, "prompt": ids, "max_tokens": tokens, "temperature": 0.0}
        return self.http.post("/v1/completions", json=body | {"return_token_ids": True})

    def running(self) -> str:
        """The metric of running requests, or nothing if no request is running."""
        lines = self.http.get("/metrics").text.splitlines()
        running = [each for each in lines if each.startswith("vllm:num_requests_running{")]
        return "".join(each for each in running if float(each.rsplit(" ", 1)[1]) > 0)

    def kill(self) -> None:
        """Kill all of its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(padded: Model) -> Iterator[Server]:
    """A server, killed at the end."""
    made = Server(padded)
    yield made
    if made.process.poll() is None:
        made.kill()


def test_clients_while_adapters_change(padded: Model, server: Server, tmp_path: Path) -> None:
    """Every greedy answer comes from the adapter that had the name during the request.

    An answer during which its adapter was replaced in place may begin with one version and end with
    the other. Bad adapters are refused meanwhile, and so are requests for them.
    """
    bad = [
        copy_damaged(padded.adapters / "r8", tmp_path, each) for each in ("nan", "rank", "inputs")
    ]
    for name in ("r8", "r16", "r3", "pattern"):
        assert server.load(name, padded.adapters / name).status_code == 200
    # A bad adapter is refused, and the server goes on.
    assert server.load("missing", padded.adapters / "nowhere").status_code >= 400
    # The adapters that "r8" may have while a request runs.
    versions, seen, failed = ["r8"], list[tuple[str, list[int], list[int], set[str]]](), list[str]()
    names, done = ("base", "r16", "r3", "pattern", "r8"), threading.Event()

    def client(number: int) -> None:
        draw = random.Random(number)
        while not done.is_set():
            name, ids = draw.choice(names), [draw.randrange(300, 4000) for _ in range(6)]
            # The last entry may be of a load that has not taken effect yet.
            start = max(len(versions) - 2, 0)
            response = server.answer(name, ids)
            if response.status_code != 200:
                # Only "pattern" is unloaded for a moment.
                if name != "pattern" or response.status_code != 404:
                    failed.append(response.text)
                continue
            own = {name} if name != "r8" else set(versions[start:])
            seen.append((name, ids, response.json()["choices"][0]["token_ids"], own))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in clients:
        thread.start()

    def wait_for_an_answer_of_one_version() -> None:
        """Wait for an answer of "r8" during which it was not replaced."""
        count, deadline = len(seen), time.monotonic() + 120
        while not any(name == "r8" and len(own) == 1 for name, _, _, own in seen[count:]):
            assert time.monotonic() < deadline and not failed, failed[:3]
            time.sleep(0.05)

    for change in range(8):
        wait_for_an_answer_of_one_version()
        folder = ("other-r8", "r8")[change % 2]
        # Before the call and after it, answers may come from either.
        versions.append(folder)
        assert server.load("r8", padded.adapters / folder, inplace=True).status_code == 200
        versions.append(folder)
        body = {"lora_name": "pattern"}
        assert server.http.post("/v1/unload_lora_adapter", json=body).status_code == 200
        assert server.load("pattern", padded.adapters / "pattern").status_code == 200
        for folder_of_bad in bad:
            assert server.load(folder_of_bad.name, folder_of_bad).status_code >= 400
            assert server.load("r8", folder_of_bad, inplace=True).status_code >= 400
            assert server.answer(folder_of_bad.name, [300, 301, 302]).status_code == 404
    wait_for_an_answer_of_one_version()
    done.set()
    for thread in clients:
        thread.join()
    assert not failed, failed[:3]
    assert len(seen) > 64 and {name for name, *_ in seen} == set(names)
    known = [(*case, *own) for *case, own in seen if len(own) == 1]
    assert {version for *_, version in known} == {*names, "other-r8"}
    for name, ids, answer, version in known:
        logits = answer_logits(padded.peft, None if name == "base" else version, ids, answer)
        first_near_tie(logits, answer)


@pytest.fixture
def server_after_a_killed_one(padded: Model) -> Iterator[Server]:
    """A server that starts after another one was killed. It is killed at the end."""
    Server(padded).kill()
    made = Server(padded)
    yield made
    if made.process.poll() is None:
        made.kill()


def test_sigterm_drains_and_a_killed_server_serves_again(
    padded: Model, server_after_a_killed_one: Server
) -> None:
    """A request that runs during SIGTERM gets its whole answer, and the exit code is 0."""
    server = server_after_a_killed_one
    assert server.load("r8", padded.adapters / "r8").status_code == 200
    ids, tokens, found = padded.requests(["r8"])[0]["ids"], 96, list[httpx.Response]()
    client = threading.Thread(target=lambda: found.append(server.answer("r8", ids, tokens)))
    client.start()
    deadline = time.monotonic() + 60
    while not server.running():
        assert client.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    client.join(120)
    assert server.process.wait(120) == 0
    (response,) = found
    answer = response.json()["choices"][0]["token_ids"]
    assert len(answer) == tokens or response.json()["choices"][0]["finish_reason"] == "stop"
    assert first_near_tie(answer_logits(padded.peft, "r8", ids, answer), answer) > 0
