"""``fastlora serve`` and ``fastlora chat`` with adapters of PEFT on experts: each as if alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.commands import cli
from tests.support.moe_models import moe_model
from tests.support.peft_twins import peft
from tests.support.served import Alone, make_base, serving

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "stacks": {"target_modules": ["o_proj"], "target_parameters": BOTH},
    "down": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "former": {"target_modules": "all-linear"},  # experts and routers by their former names
    "linears": {"target_modules": ["q_proj", "o_proj"]},
}


class Served(NamedTuple):
    """A server's clients, its folders, and what adapters say alone."""

    http: Any
    base: Path
    adapters: Path
    alone: Alone


def tiny_moe() -> Any:
    return moe_model("qwen3_moe", vocab_size=97, max_position_embeddings=128, eos_token_id=95)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over experts, with room for two adapters; "spare" is beside its folder's others."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(library, reason="the server needs it")
    httpx = pytest.importorskip("httpx")
    root = tmp_path_factory.mktemp("experts")
    base, folder = make_base(root / "tiny", tiny_moe()), root / "adapters"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (name, fields) in enumerate(
            {**ADAPTERS, "later/spare": ADAPTERS["stacks"]}.items()
        ):
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                r=2 + seed % 2, lora_alpha=24, init_lora_weights=False, **fields
            )
            peft.get_peft_model(tiny_moe(), config).save_pretrained(folder / name)
    options = ("--adapters", folder, "--max-adapters", 2, "--max-batch", 6, "--max-length", 64)
    with (
        serving(base, *map(str, options), "--watch", "0", "--admin-key", "k") as (url, _),
        httpx.Client(base_url=url, timeout=30, headers={"Authorization": "Bearer k"}) as http,
    ):
        yield Served(http, base, folder, Alone(base, folder))


def answer(served: Served, name: str | None, prompt: str) -> str:
    body = {"model": name or "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    made = served.http.post("/v1/completions", json=body)
    assert made.status_code == 200, made.text
    text: str = made.json()["choices"][0]["text"]
    return text


def test_mixed_requests_get_the_answer_of_their_adapter_alone(served: Served) -> None:
    """Four adapters and the base model in turns, over two places in the pool."""
    names = [*ADAPTERS, None] * 2
    prompts = [f"{'the sea ' * (1 + number % 3)}{number}" for number in range(len(names))]
    with ThreadPoolExecutor(6) as threads:
        found = [*threads.map(lambda pair: answer(served, *pair), zip(names, prompts, strict=True))]
    for name, prompt, text in zip(names, prompts, found, strict=True):
        assert served.alone.is_answer(text, prompt, name, 8), (name, prompt, text)
    assert len({served.alone.text(prompts[0], name, 8) for name in (*ADAPTERS, None)}) == 5


def test_adapters_on_experts_are_loaded_and_unloaded(served: Served) -> None:
    path = {"lora_name": "spare", "lora_path": "later/spare"}
    made = served.http.post("/v1/load_lora_adapter", json=path)
    assert made.status_code == 200, made.text
    wanted = Alone(served.base, served.adapters / "later")
    assert wanted.is_answer(answer(served, "spare", "the ship"), "the ship", "spare", 8)
    made = served.http.post("/v1/unload_lora_adapter", json={"lora_name": "spare"})
    assert made.status_code == 200, made.text
    body = {"model": "spare", "prompt": "x", "max_tokens": 1}
    assert served.http.post("/v1/completions", json=body).status_code == 404


def test_an_adapter_of_another_number_of_experts_is_refused(served: Served) -> None:
    """The message names the parameter, and the others go on."""
    config = peft.LoraConfig(r=2, **ADAPTERS["down"])
    other = peft.get_peft_model(moe_model("qwen3_moe", vocab_size=97, num_experts=3), config)
    other.save_pretrained(served.adapters / "later" / "other")
    path = {"lora_name": "other", "lora_path": "later/other"}
    made = served.http.post("/v1/load_lora_adapter", json=path)
    assert made.status_code == 422, made.text
    assert (
        "this model's 'model.layers.0.mlp.experts.down_proj' expects"
        in made.json()["error"]["message"]
    )
    assert served.alone.is_answer(answer(served, "down", "the"), "the", "down", 8)


def test_chat_with_adapters_on_experts(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """All answers are of one batch."""
    names = ["stacks", "former"]
    folders = [part for name in names for part in ("--adapter", str(served.adapters / name))]
    options = ["--temperature", "0", "--max-new-tokens", "8", "--compare", "--prompt", "hi"]
    assert cli.main(["chat", str(served.base), "--cpu", *folders, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, (*names, None), strict=True):
        text = served.alone.text("<user>hi<bot>", name, 8).strip()
        assert line == f"[{name or 'base'}] {text}".rstrip()
