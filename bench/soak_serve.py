"""A server under load: correct answers, flat memory, and throughput compared with other methods.

    python bench/soak_serve.py [--minutes 3] [--rounds 3] [--clients 32] [--adapters 24] [--slots 8]
        [--out bench/results]

Memory is stable once every adapter has been read, which takes more minutes on a busy machine.

The first part starts `fastlora serve` on SmolLM2-135M in fp32. Clients request completions from
random adapters while other adapters are loaded, swapped, and unloaded. Every greedy completion is
compared with the adapter alone (`LoraModel` and `generate`). Where the two differ, the two best
logits of the adapter alone must lie within the error budget. The budget is four times the largest
error of its fp32 logits against float64: twice the error for each of the two runs. These
completions are counted and listed.

The second part sends the same requests to three methods of serving, in turn in one process:
`set_adapter` and `generate` for one request after another; dynamic batching (`generate` on a closed
batch that `AdapterPool.plan` splits); and fastlora's engine. The exit code is 1 if an answer was
wrong, a request failed, memory grew, or the engine's median is below twice that of the first
method.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora.bench.cpu_run import csv_rows
from fastlora.bench.machine import processor
from fastlora.bench.mixed_contest import twin
from fastlora.bench.soak import resident_bytes
from fastlora.commands import smollm2
from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.engine import Engine
from fastlora.serve.engine_request import AnswerChunk
from fastlora.serve.sampling import SamplingParams

PROMPTS = (
    "The best thing about a long winter is",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.\n\n",
    "List three reasons to learn how to cook:\n1.",
    "In the year 1905, a young clerk in the patent office of Bern wrote four papers which changed "
    "physics. The first of them was about",
)
MOST_TOKENS = 24
ADMIN_KEY = "soak"  # the key to load, swap, and unload adapters
LEAST = 2.0  # minimum ratio of tokens per second to one request after another
RATES = ("tokens_per_cpu_second", "tokens_per_second")
GROWTH = 1.03  # limit of the last quarter's median memory divided by the second's


class Case(NamedTuple):
    """A request."""

    name: str | None
    prompt: str
    tokens: int


def make_adapters(model: Any, root: Path, count: int) -> list[str]:
    """Save random adapters of ranks 4 to 16 on all linear layers that change the output."""
    generator = torch.Generator().manual_seed(0)
    names = [f"a{index:02d}" for index in range(count)]
    for first, rank in enumerate((4, 8, 16)):
        config = fastlora.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        adapted = fastlora.get_peft_model(twin(model), config)
        for name in names[first::3]:
            with torch.no_grad():
                for key, own in adapted.named_parameters():
                    if "lora_B" in key:
                        own.copy_(0.03 * torch.randn(own.shape, generator=generator))
            adapted.save_pretrained(root / name)
    return names


class Alone:
    """Runs the adapters alone, one request at a time."""

    def __init__(self, model: Any, tokenizer: Any, root: Path, names: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        adapted: Any = fastlora.LoraModel.from_pretrained(model, root / names[0], names[0])
        for name in names[1:]:
            adapted.load_adapter(root / name, name)
        self.model = adapted.eval()
        self._known: dict[tuple[str | None, str], tuple[list[int], list[float]]] = {}

    @torch.no_grad()
    def answer(self, case: Case, **options: Any) -> Any:
        """Return the answer of `set_adapter` and `generate`."""
        ids = self.tokenizer(case.prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": case.tokens, "do_sample": False, **options}
        self.model.set_adapter(case.name)
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **options
        )

    def truth(self, name: str, prompt: str) -> tuple[list[int], list[float]]:
        """Return the most likely tokens, and the gap of each one's logit to the second best."""
        if (name, prompt) not in self._known:
            case = Case(name, prompt, MOST_TOKENS)
            made = self.answer(case, return_dict_in_generate=True, output_logits=True)
            gaps = []
            for logits in made.logits:
                first, second = logits[0].topk(2).values.tolist()
                gaps.append(first - second)
            self._known[name, prompt] = made.sequences[0, -len(gaps) :].tolist(), gaps
        return self._known[name, prompt]

    def parting(self, case: Case, text: str) -> tuple[int, float] | None:
        """Return the index of the first differing token of a served text, and the gap there.

        The result is None if the texts are equal.
        """
        tokens, gaps = self.truth(str(case.name), case.prompt)
        tokens = tokens[: case.tokens]
        before = self.tokenizer(case.prompt).input_ids[-5:]
        start = len(self.tokenizer.decode(before))

        def decoded(count: int) -> str:
            whole = self.tokenizer.decode(before + tokens[:count], skip_special_tokens=True)
            return str(whole[start:])

        if decoded(len(tokens)) == text:
            return None
        same = 0
        while same < len(tokens) and text.startswith(decoded(same + 1)):
            same += 1
        same = min(same, len(tokens) - 1)
        return same, gaps[same]

    @torch.no_grad()
    def budget(self, names: Sequence[str]) -> float:
        """Return four times the largest error of fp32 logits against float64, over some texts."""
        exact = copy.deepcopy(self.model).double()
        worst = 0.0
        for name, prompt in zip(names, PROMPTS, strict=False):
            tokens, _ = self.truth(name, prompt)
            ids = torch.tensor([self.tokenizer(prompt).input_ids + tokens])
            for model in (self.model, exact):
                model.set_adapter(name)
            error = self.model(ids).logits.double() - exact(ids).logits
            worst = max(worst, error.abs().max().item())
        return 4 * worst


# ---------------------------------------------------------------------------------------- soak test


async def traffic(
    url: str, pid: int, root: Path, names: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Run the clients and concurrent changes of adapters; return what the clients observed."""
    import httpx

    end = time.monotonic() + 60 * args.minutes
    found: list[tuple[Case, str]] = []
    failed: list[str] = []
    sizes: list[float] = []
    waits: list[float] = []
    changes = 0
    tokens = 0

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal tokens
        chance = random.Random(number)
        while time.monotonic() < end:
            name, prompt = chance.choice(names), chance.choice(PROMPTS)
            case = Case(name, prompt, chance.randint(8, MOST_TOKENS))
            body = {"model": name, "prompt": prompt, "max_tokens": case.tokens}
            greedy = chance.random() < 0.9
            start = time.monotonic()
            answer = await http.post(
                "/v1/completions", json=body | {"temperature": float(not greedy)}
            )
            waits.append(time.monotonic() - start)
            if answer.status_code != 200:
                failed.append(answer.text)
                continue
            tokens += answer.json()["usage"]["completion_tokens"]
            if greedy:
                found.append((case, answer.json()["choices"][0]["text"]))

    async def changing(http: httpx.AsyncClient) -> None:
        nonlocal changes
        chance = random.Random(-1)
        while time.monotonic() < end:
            await asyncio.sleep(1)
            extra, source = f"extra{chance.randrange(4)}", chance.choice(names)
            body = {"lora_name": extra, "lora_path": source, "load_inplace": True}
            swapped = {"lora_name": source, "lora_path": source, "load_inplace": True}
            copied = root / "copied"
            for path, content in (
                ("load", body),
                ("load", swapped),
                *([("unload", {"lora_name": extra})] if chance.random() < 0.5 else []),
            ):
                answer = await http.post(
                    f"/v1/{path}_lora_adapter",
                    json=content,
                    headers={"Authorization": f"Bearer {ADMIN_KEY}"},
                )
                changes += 1
                if answer.status_code != 200:
                    failed.append(answer.text)
            if copied.exists():
                shutil.rmtree(copied)
            else:
                shutil.copytree(root / source, root / ".copied")
                (root / ".copied").rename(copied)
            sizes.append(resident_bytes(pid) / 2**20)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await asyncio.gather(changing(http), *(client(n, http) for n in range(args.clients)))
        metrics = (await http.get("/metrics")).text
    quarter = max(len(sizes) // 4, 1)
    return {
        "answers": found,
        "failed": failed,
        "requests": len(waits),
        "tokens": tokens,
        "seconds": 60 * args.minutes,
        "wait_median": statistics.median(waits),
        "changes": changes,
        "mib": (statistics.median(sizes[quarter : 2 * quarter] or sizes), max(sizes)),
        "growth": statistics.median(sizes[-quarter:])
        / statistics.median(sizes[quarter : 2 * quarter] or sizes),
        "metrics": metrics,
    }


def soak(
    folder: Path, root: Path, names: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Start the server, run the traffic, and stop the server with SIGTERM."""
    command = [sys.executable, "-m", "fastlora", "serve", str(folder), "--adapters", str(root)]
    command += ["--port", "0", "--max-adapters", str(args.slots), "--dtype", "float32", "--cpu"]
    command += ["--max-batch", str(args.clients), "--max-length", "256", "--watch", "1"]
    command += ["--admin-key", ADMIN_KEY]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        print(line, end="")
        if "ready at" in line:
            url = line.split()[-1].removesuffix("/v1")
            break
    rest: list[str] = []
    threading.Thread(target=lambda: rest.extend(process.stderr or ()), daemon=True).start()
    try:
        seen = asyncio.run(traffic(url, process.pid, root, names, args))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    print("".join(rest), end="")
    seen["code"] = code
    return seen


# --------------------------------------------------------------------------------------- throughput


def in_turn(alone: Alone, cases: Sequence[Case]) -> int:
    """Serve one request after another; return the number of generated tokens."""
    made = 0
    for case in cases:
        prompt = len(alone.tokenizer(case.prompt).input_ids)
        made += alone.answer(case).shape[1] - prompt
    return made


@torch.no_grad()
def dynamic(pool: Any, model: Any, tokenizer: Any, cases: Sequence[Case], clients: int) -> int:
    """Serve closed batches that the pool's plan splits; return the number of answer tokens."""
    tokenizer.padding_side = "left"
    made = 0
    for first in range(0, len(cases), clients):
        waiting = cases[first : first + clients]
        for part in pool.plan([case.name for case in waiting]):
            batch = [waiting[index] for index in part]
            given = tokenizer([case.prompt for case in batch], return_tensors="pt", padding=True)
            out = model.generate(
                **given,
                adapter_names=[case.name for case in batch],
                max_new_tokens=max(case.tokens for case in batch),
                do_sample=False,
                pad_token_id=2,
            )[:, given.input_ids.shape[1] :]
            for case, row in zip(batch, out.tolist(), strict=True):
                own = row[: case.tokens]
                made += own.index(2) + 1 if 2 in own else len(own)
    return made


def continuous(engine: Engine, tokenizer: Any, cases: Sequence[Case], clients: int) -> int:
    """Serve ``clients`` clients, each of which sends its next request once it has its answer."""
    left, lock, done, made = list(reversed(cases)), threading.Lock(), threading.Semaphore(0), [0]

    def send() -> None:
        with lock:
            case = left.pop() if left else None
        if case is not None:
            tokens = tokenizer(case.prompt).input_ids
            engine.submit(tokens, case.name, SamplingParams(case.tokens, 0.0), hear)

    def hear(chunk: AnswerChunk) -> None:
        if chunk.error is not None:
            raise SystemExit(chunk.error)
        if chunk.finish_reason is not None:
            made[0] += chunk.tokens
            done.release()
            send()

    for _ in range(clients):
        send()
    for _ in cases:
        done.acquire()
    return made[0]


def contest(
    alone: Alone, plain: Any, root: Path, names: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the tokens per second of each method and round, by processor time and by the clock.

    Everything runs on one thread at a time. Other work on the machine affects only the clock.
    """
    tokenizer = alone.tokenizer
    models = [twin(plain) for _ in range(2)]
    pools = [fastlora.AdapterPool(model, max_adapters=args.slots) for model in models]
    for name in names:
        pools[0].register(name, root / name)
    adapters = ServedAdapters(pools[1], root, ("base",))
    adapters.sync_with_folder()
    engine = Engine(
        models[1],
        copy.deepcopy(tokenizer),
        adapters,
        rows=args.clients,
        length=256,
        max_waiting=args.clients,
    )
    ways: dict[str, Callable[[Sequence[Case]], int]] = {
        "set_adapter + generate": lambda cases: in_turn(alone, cases),
        "dynamic batching": lambda cases: dynamic(
            pools[0], models[0], tokenizer, cases, args.clients
        ),
        "fastlora serve": lambda cases: continuous(engine, tokenizer, cases, args.clients),
    }
    found: list[dict[str, Any]] = []
    for number in range(args.rounds + 1):  # the first round warms up
        chance = random.Random(number)
        cases = [
            Case(chance.choice(names), chance.choice(PROMPTS), chance.randint(8, MOST_TOKENS))
            for _ in range(args.requests if number else 4)
        ]
        counts = []
        for name, way in ways.items():
            start, wall = time.process_time(), time.perf_counter()
            counts.append(way(cases))
            rates = [
                round(counts[-1] / seconds, 2)
                for seconds in (time.process_time() - start, time.perf_counter() - wall)
            ]
            if number:
                row = {"round": number, "way": name, "tokens": counts[-1]}
                found.append(row | dict(zip(RATES, rates, strict=True)))
                print(
                    f"round {number}, {name}: {rates[0]:.1f} tokens a second of processor time, "
                    f"{rates[1]:.1f} by the clock"
                )
        print(f"round {number}: {counts} tokens", flush=True)
    engine.close()
    return found


def main() -> int:
    """Parse the arguments, run both parts, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="of traffic; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="of the contest; 0 for none")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for CSVs of what was found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = smollm2.converted_smollm2_dir(progress=False)
    plain, tokenizer = smollm2.load_model(folder), smollm2.load_tokenizer(folder)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastlora-soak-") as given:
        root = Path(given)
        names = make_adapters(plain, root, args.adapters)
        alone = Alone(twin(plain), tokenizer, root, names)
        if args.minutes:
            row, faults = report_soak(soak(folder, root, names, args), alone, names)
            wrong += faults
            write(args.out, "serve_soak_cpu.csv", [row])
        if args.rounds:
            rows = contest(alone, plain, root, names, args)
            wrong += report_contest(rows)
            write(args.out, "serve_contest_cpu.csv", rows)
    print("\n".join(wrong) if wrong else "all is well")
    return int(bool(wrong))


def write(folder: Path | None, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV, if a folder is given."""
    if folder is not None:
        with csv_rows(folder / name) as write_row:
            for row in rows:
                write_row(row)


def report_soak(
    seen: dict[str, Any], alone: Alone, names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Print the clients' observations; return a row for the CSV, and a list of problems."""
    budget = alone.budget(names)
    near, wrong = [], [f"failed: {text}" for text in seen["failed"][:5]]
    for case, text in seen["answers"]:
        parting = alone.parting(case, text)
        if parting is not None and parting[1] <= budget:
            near.append((case.name, PROMPTS.index(case.prompt), *parting))
        elif parting is not None:
            wrong.append(f"{case} parts at {parting}: {text!r}")
    if seen["growth"] > GROWTH:
        wrong.append(f"memory grew by {seen['growth']:.3f}")
    if seen["code"] != 0:
        wrong.append(f"the server ended with {seen['code']}")
    print(
        f"{seen['requests']} requests in {seen['seconds']:.0f} s, {seen['tokens']} tokens "
        f"({seen['tokens'] / seen['seconds']:.1f} a second), median wait "
        f"{seen['wait_median']:.2f} s; "
        f"{seen['changes']} loads, swaps and unloads; memory {seen['mib'][0]:.0f} MiB, at most "
        f"{seen['mib'][1]:.0f}, the last quarter {seen['growth']:.3f} of the second"
    )
    print(
        f"{len(seen['answers'])} greedy answers, {len({a[0][:2] for a in seen['answers']})} of "
        f"them different; {len(near)} part at near ties (gap at most {budget:.2g}), "
        f"{len(wrong)} faults"
    )
    for place in sorted(set(near)):
        print("  near tie: adapter {}, prompt {}, token {}, gap {:.2g}".format(*place))
    for line in seen["metrics"].splitlines():
        if line.startswith(("fastlora_forward", "fastlora_adapter_", "fastlora_first")):
            print(f"  {line}")
    row = {name: seen[name] for name in ("seconds", "requests", "tokens", "changes")}
    row |= {"wait_median_s": round(seen["wait_median"], 2), "greedy": len(seen["answers"])}
    row |= {"near_ties": len(near), "faults": len(wrong), "mib": round(seen["mib"][0])}
    return row | {"mib_most": round(seen["mib"][1]), "growth": round(seen["growth"], 3)}, wrong


def report_contest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Print medians and ratios of the rounds; return a list of problems."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["way"], []).append(row[RATES[0]])
    first, *_, last = found.values()
    for name, rates in found.items():
        ratio = statistics.median(a / b for a, b in zip(rates, first, strict=True))
        print(
            f"{name:<24} {statistics.median(rates):7.1f} tokens a second of processor time (rounds "
            f"{min(rates):.1f} to {max(rates):.1f}), {ratio:.2f} of one after another"
        )
    ratio = statistics.median(a / b for a, b in zip(last, first, strict=True))
    print(f"{processor()}, {torch.get_num_threads()} thread: {ratio:.2f}")
    return [] if ratio >= LEAST else [f"only {ratio:.2f} times one after another"]


if __name__ == "__main__":
    sys.exit(main())
