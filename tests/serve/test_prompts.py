"""Prompts that are far too long are refused before they are tokenized, and delay no others."""

from __future__ import annotations

import asyncio
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fastlora.serve.long_text_detector import LongTextDetector
from fastlora.serve.prompt_tokenizer import PromptTokenizer
from fastlora.validation import ConfigError

pytest.importorskip("transformers", reason="the server needs it")

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

BYTES = pre_tokenizers.ByteLevel.alphabet()
SPLIT_BYTES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
MARKED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
# Three bytes of ASCII's controls have no token, as in SmolLM2.
WITHOUT_CONTROLS = [letter for letter in BYTES if letter not in "ĔēĆ"]


def bpe(letters: Any, **options: Any) -> models.BPE:
    """BPE with the tokens ``ab`` and ``abab``."""
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ab", "abab"])}
    return models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "ab")], **options)


def made(
    model: Any, pre_tokenizer: Any = None, normalizer: Any = None, added: tuple[Any, ...] = ()
) -> Any:
    """A tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*added, "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def bounded() -> dict[str, Any]:
    """Tokenizers of which the least tokens of a text are known."""
    fallback = [f"<0x{number:02X}>" for number in range(256)]
    marked = bpe([*fallback, *"ab▁", "<unk>"], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    stripping = AddedToken("<end>", lstrip=True, rstrip=True)
    return {
        "bytes": made(bpe(BYTES), SPLIT_BYTES),
        "bytes, NFC": made(bpe(WITHOUT_CONTROLS), SPLIT_BYTES, normalizers.NFC()),
        "bytes, stripping": made(bpe(WITHOUT_CONTROLS), SPLIT_BYTES, None, (stripping,)),
        "byte tokens": made(marked, None, MARKED),
        "byte tokens, metaspace": made(marked, pre_tokenizers.Metaspace(), normalizers.NFKC()),
    }


def unbounded() -> dict[str, Any]:
    """Tokenizers that can make one token of any text, or none."""
    words = {"a": 0, "<unk>": 1}
    spaces = pre_tokenizers.Whitespace()
    removing = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), SPLIT_BYTES])
    return {
        "unknown words": made(models.WordLevel(words, unk_token="<unk>"), spaces),
        "word pieces": made(models.WordPiece(words, unk_token="<unk>"), spaces),
        "fused unknowns": made(bpe([*"ab", "<unk>"], unk_token="<unk>", fuse_unk=True)),
        "removed spaces": made(bpe(BYTES), removing),
        "lost accents": made(bpe(BYTES), SPLIT_BYTES, normalizers.StripAccents()),
        "replaced": made(bpe(BYTES), SPLIT_BYTES, normalizers.Replace(Regex("a+"), "a")),
        "letters without a byte": made(bpe([x for x in BYTES if x != "K"]), SPLIT_BYTES),
    }


TEXTS = (
    *("abab" * 50, " " * 300, "\x04\x13\x14" * 90, "x<end>  \t\n" * 40, "\u00a0\u3000" * 90),
    *("e\u0301\u0323" * 80, "\u1100\u1161\u11a8" * 80, "K\u212a" * 80, "\ufdfa" * 30, "漢字" * 90),
    *("\u03b1\u0313\u0300\u0345" * 70, "🙂\u200d" * 60, "\U000c0000" * 60, "<eos>" * 40, ""),
)


def test_no_text_that_fits_is_rejected() -> None:
    """E3: whatever a tokenizer deletes, composes or strips, a text has its least tokens."""
    chance = random.Random(0)
    letters = "".join(TEXTS) + "ab " * 100
    texts = [*TEXTS, *("".join(chance.choices(letters, k=200)) for _ in range(40))]
    for name, tokenizer in (bounded() | unbounded()).items():
        bound = LongTextDetector(tokenizer)
        for text in texts:
            count = len(tokenizer(text, add_special_tokens=False).input_ids)
            assert not bound.certainly_exceeds_tokens(text, count), (name, text)


def test_which_tokenizers_have_a_bound() -> None:
    """E3: those of today's causal models do."""
    for name, tokenizer in bounded().items():
        assert LongTextDetector(tokenizer).certainly_exceeds_tokens("ab" * 500_000, 2048), name
    for name, tokenizer in unbounded().items():
        assert not LongTextDetector(tokenizer).certainly_exceeds_tokens("ab" * 500_000, 2048), name


def test_a_long_text_is_rejected_without_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """E3: six prompts of 1 MB kept a request for two tokens waiting for 32 s."""
    tokenizer = bounded()["bytes, NFC"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = PromptTokenizer(tokenizer, 258, 100)
    assert len(prompts.tokenize_text("abab" * 100)) == 100
    monkeypatch.setattr(type(tokenizer), "_encode_plus", None)
    said = "prompt has 1000000 characters, too many to fit in 100 tokens"
    with pytest.raises(ConfigError, match=said):
        prompts.tokenize_text("ab" * 500_000)
    with pytest.raises(ConfigError, match=said):
        prompts.tokenize_messages([{"role": "user", "content": "ab" * 500_000}])
    assert len(prompts.check_ids_in_vocabulary([10**9] * 101)) == 101  # the engine refuses them


def test_long_prompts_delay_no_short_one() -> None:
    """E3: more long prompts than there are threads are being tokenized; a short one passes."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from fastlora.serve.app import AppSettings, Server
    from fastlora.serve.engine_request import AnswerChunk

    release, entered = threading.Event(), threading.Event()

    def tokenize_text(text: str) -> list[int]:
        if len(text) > 100:
            entered.set()
            assert release.wait(30)
        return [1]

    def submit(tokens: Any, adapter: Any, sampling: Any, hear: Any) -> Any:
        hear(AnswerChunk("done", "stop", 1))

    engine: Any = SimpleNamespace(length=8, submit=submit, cancel=lambda job: None)
    prompts: Any = SimpleNamespace(tokenize_text=tokenize_text)
    adapters: Any = SimpleNamespace(usable_names=[])
    app = Server(engine, adapters, prompts, AppSettings(base="tiny")).app

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as http:

            async def one(prompt: str) -> int:
                body = {"model": "base", "prompt": prompt}
                return int((await http.post("/v1/completions", json=body)).status_code)

            long = [asyncio.create_task(one("x" * 20_000)) for _ in range(50)]
            while not entered.is_set():
                await asyncio.sleep(0.01)
            try:
                short = await asyncio.wait_for(one("hi"), 10)
            finally:
                release.set()
            return [short, *await asyncio.gather(*long)]

    assert asyncio.run(ask()) == [200] * 51


def test_threads_share_a_tokenizer() -> None:
    """E3: without a lock, and although the tokenizer came with truncation and padding."""
    tokenizer = bounded()["bytes"]
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    prompts = PromptTokenizer(tokenizer, 258, 10_000)
    found: list[int] = []

    def encode() -> None:
        found.extend(len(prompts.tokenize_text("ab c" * 20)) for _ in range(50))

    threads = [threading.Thread(target=encode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [60] * 300
