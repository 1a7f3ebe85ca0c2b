"""fastlora in one engine of vLLM in this process, on SmolLM2 in fp32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from fastlora.integrations.vllm.wrapper import FastLoraPunicaWrapper
from tests.engine.adapters import (
    CONFIGS,
    NEAR_TIE,
    answer_logits,
    copy_damaged,
    first_near_tie,
    make_adapters,
)

PROMPTS = ("The capital of France is", "Once upon a time, there was", "To make a cup of tea,")
TOKENS = 12
IDS = {name: number for number, name in enumerate(CONFIGS, 1)}


class Served(NamedTuple):
    """An engine, the folder of its adapters, PEFT's model, and the tokens of the prompts."""

    llm: LLM
    root: Path
    model: Any
    prompts: list[list[int]]

    def request(self, name: str | None, **kwargs: Any) -> LoRARequest | None:
        """vLLM's request for an adapter."""
        if name is None:
            return None
        return LoRARequest(name, IDS[name], str(self.root / name), **kwargs)

    def answers(
        self, names: Sequence[str | None], prompts: Sequence[int], **sampling: Any
    ) -> list[Any]:
        """The greedy answers of one batch: a prompt's number and an adapter for each request."""
        params = SamplingParams(temperature=0.0, **({"max_tokens": TOKENS} | sampling))
        inputs = [{"prompt_token_ids": self.prompts[number]} for number in prompts]
        requests = [self.request(name) for name in names]
        made = self.llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
        return [each.outputs[0] for each in made]


@pytest.fixture(scope="module")
def served(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One engine, with a slot for each adapter and none left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    model = make_adapters(base, root, CONFIGS)
    llm = LLM(
        str(smollm2_dir),
        dtype="float32",
        enable_lora=True,
        max_loras=len(CONFIGS),
        max_lora_rank=64,
        max_model_len=128,
        max_num_seqs=64,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    yield Served(llm, root, model, prompts)
    del llm
    cleanup_dist_env_and_memory()


def _worker(served: Served) -> Any:
    core = served.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker


def test_the_wrapper_is_fastloras(served: Served) -> None:
    manager = _worker(served).model_runner.lora_manager._adapter_manager
    wrappers = set(manager.punica_wrapper_mapping.values())
    assert [type(each) for each in wrappers] == [FastLoraPunicaWrapper]


def test_answers_are_those_of_peft(served: Served) -> None:
    """Every slot is full, and one batch has every adapter and the base model."""
    names: list[str | None] = [None, *CONFIGS]
    cases = [(name, number) for number in range(len(PROMPTS)) for name in names]
    made = served.answers([name for name, _ in cases], [number for _, number in cases])
    ends = 0
    texts = set[tuple[int, ...]]()
    for (name, number), answer in zip(cases, made, strict=True):
        tokens = list(answer.token_ids)
        logits = answer_logits(served.model, name, served.prompts[number], tokens)
        ends += first_near_tie(logits, tokens) == len(tokens)
        texts.add(tuple(tokens))
    assert ends >= 0.9 * len(cases)
    # Adapters that change nothing would prove nothing.
    assert len(texts) > 0.9 * len(cases)


@pytest.mark.parametrize(
    "names",
    [("head-r12",), ("head-r12", "all-r8"), ("head-r12", None, "embedding-r8", "head-r12")],
)
def test_prompt_logprobs_are_those_of_peft(served: Served, names: tuple[str | None, ...]) -> None:
    """With an adapter on the output layer, and with others in the batch."""
    numbers = [index % len(PROMPTS) for index in range(len(names))]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    inputs = [{"prompt_token_ids": served.prompts[number]} for number in numbers]
    requests = [served.request(name) for name in names]
    made = served.llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
    for name, number, answer in zip(names, numbers, made, strict=True):
        ids = served.prompts[number]
        logprobs = answer_logits(served.model, name, ids[:1], ids[1:]).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
        rows = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        found = torch.tensor([row[token].logprob for token, row in rows])
        torch.testing.assert_close(found, expected, atol=NEAR_TIE, rtol=0.0)


def test_base_rows_are_those_of_a_batch_without_adapters(served: Served) -> None:
    """Bit for bit: with equal lengths, both batches have the same shapes in every step."""
    numbers = [0] * 16
    mixed = [None if index % 3 == 0 else list(CONFIGS)[index % 12] for index in range(16)]
    settings = {"ignore_eos": True, "max_tokens": 6, "logprobs": 3}
    made = served.answers(mixed, numbers, **settings)
    alone = served.answers([None] * 16, numbers, **settings)
    for name, own, other in zip(mixed, made, alone, strict=True):
        if name is None:
            assert list(own.token_ids) == list(other.token_ids)
            for left, right in zip(own.logprobs, other.logprobs, strict=True):
                assert {k: v.logprob for k, v in left.items()} == {
                    k: v.logprob for k, v in right.items()
                }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("damaged", "header|deserializ"),
        ("nan", "non-finite values"),
        ("infinity", "non-finite values"),
        ("outputs", "with 576 inputs and 191 outputs, but the layer has 576 inputs and 192"),
        ("inputs", "with 575 inputs and 192 outputs, but the layer has 576 inputs and 192"),
        ("half", "lora_B is missing"),
        ("ranks", "expected"),
        ("rank", "max_lora_rank"),
        ("config-rank", "max_lora_rank"),
    ],
)
def test_a_bad_adapter_is_refused_and_nothing_changes(
    served: Served, tmp_path: Path, change: str, message: str
) -> None:
    """Also in place of a loaded adapter, which stays."""
    folder = copy_damaged(served.root / "all-r8", tmp_path, change)
    before = [list(each.token_ids) for each in served.answers(["all-r8", None], [0, 0])]
    loaded = served.llm.llm_engine.list_loras()
    for number, kwargs in ((99, {}), (IDS["all-r8"], {"load_inplace": True})):
        request = LoRARequest("bad", number, str(folder), **kwargs)
        with pytest.raises(Exception, match=message):
            served.llm.llm_engine.add_lora(request)
    assert served.llm.llm_engine.list_loras() == loaded
    after = [list(each.token_ids) for each in served.answers(["all-r8", None], [0, 0])]
    assert after == before


def test_running_requests_keep_their_adapters(served: Served, tmp_path: Path) -> None:
    """While others are replaced in place and evicted, and with another rank."""
    engine = served.llm.llm_engine
    engine.add_lora(served.request("all-r64"))
    expected = [list(each.token_ids) for each in served.answers(["all-r16-rslora", None], [1, 1])]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for number, name in enumerate(("all-r16-rslora", None)):
        prompt = {"prompt_token_ids": served.prompts[1]}
        engine.add_request(f"running-{number}", prompt, params, lora_request=served.request(name))
    found: dict[str, list[int]] = {}
    step = 0
    other = LoRARequest("up-r5", IDS["up-r5"], str(served.root / "all-r64"), load_inplace=True)
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        if step == 3:
            engine.add_lora(other)
        if step == 6:
            assert engine.remove_lora(IDS["all-r64"])
    assert [found["running-0"], found["running-1"]] == expected
    # The adapter in place of the first one answers as its files do.
    made = served.llm.generate(
        [{"prompt_token_ids": served.prompts[1]}],
        params,
        lora_request=[LoRARequest("up-r5", IDS["up-r5"], str(served.root / "all-r64"))],
        use_tqdm=False,
    )
    tokens = list(made[0].outputs[0].token_ids)
    logits = answer_logits(served.model, "all-r64", served.prompts[1], tokens)
    assert first_near_tie(logits, tokens) > 0
    engine.add_lora(
        LoRARequest("up-r5", IDS["up-r5"], str(served.root / "up-r5"), load_inplace=True)
    )


def test_an_adapter_loaded_again_under_its_name(served: Served) -> None:
    """Requests for the old and the new one run together, and each keeps its own.

    vLLM gives an adapter that is loaded again a new ID. Requests with one adapter name are equal.
    """
    engine, names = served.llm.llm_engine, ("all-r8", "qkvo-r32")
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for number, name in enumerate(names):
        request = LoRARequest("same", 200 + number, str(served.root / name))
        prompt = {"prompt_token_ids": served.prompts[number]}
        engine.add_request(f"same-{number}", prompt, params, lora_request=request)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    for number, name in enumerate(names):
        tokens = found[f"same-{number}"]
        logits = answer_logits(served.model, name, served.prompts[number], tokens)
        assert first_near_tie(logits, tokens) > 0
        assert engine.remove_lora(200 + number)


@pytest.mark.parametrize("change", ["use_dora", "lora_bias"])
def test_what_vllm_refuses_is_refused_in_its_words(
    served: Served, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / change
    shutil.copytree(served.root / "all-r8", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {change: True}))
    words = {"use_dora": "DoRA", "lora_bias": "bias"}[change]
    with pytest.raises(ValueError, match=words):
        served.llm.llm_engine.add_lora(LoRARequest("refused", 98, str(folder)))
    assert 98 not in served.llm.llm_engine.list_loras()
