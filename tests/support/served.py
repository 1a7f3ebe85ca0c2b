"""A small model with a folder of adapters, and a server for it on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

import fastlora
from tests.support import train_runs
from tests.support.tiny import randomize, tiny_llama

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
LENGTH = 128
NEAR_TIE = 1e-4  # fp32 logits of this model, of some 1 to 10, err by 1e-6


def make_base(folder: Path, model: Any = None, **changes: Any) -> Path:
    """Saves a base model; its tokenizer has a chat template, and puts no spaces between tokens."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        train_runs.make_base(folder, model, eos_token_id=95, **changes)
    )
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make_byte_base(folder: Path) -> Path:
    """Saves a base model with a token for each byte, as tokenizers of today's models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tiny_llama(vocab_size=260).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, seed: int, r: int = 2, **changes: Any) -> Path:
    """Saves an adapter that changes what the model says."""
    config = fastlora.LoraConfig(r=r, lora_alpha=4 * r, target_modules="all-linear", **changes)
    model = fastlora.get_peft_model(tiny_llama(), config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def wait_for(true: Callable[[], bool]) -> None:
    """Waits until the server has seen something."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


class Alone:
    """What each adapter says alone, by `generate` of transformers."""

    def __init__(self, base: Path, adapters: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._base, self._adapters = base, adapters
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._load = AutoModelForCausalLM.from_pretrained
        self._models: dict[str | None, Any] = {}

    def model(self, name: str | None) -> Any:
        """The model with one adapter, or none."""
        if name not in self._models:
            model = self._load(self._base)
            if name is not None:
                model = fastlora.LoraModel.from_pretrained(model, self._adapters / name, name)
            self._models[name] = model.eval()
        return self._models[name]

    def tokens(self, text: str, name: str | None, count: int) -> list[int]:
        """The likeliest tokens behind a text, up to the end token."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            made = self.model(name).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=96,
            )
        return made[0, ids.shape[1] :].tolist()

    def text(self, text: str, name: str | None, count: int) -> str:
        """The same, as text."""
        return self.decode(self.tokens(text, name, count))

    def is_answer(self, found: str, text: str, name: str | None, count: int) -> bool:
        """Whether an answer is this adapter's, but for what follows two logits that nearly tie."""
        wanted = self.text(text, name, count)
        if found == wanted:
            return True
        same = next(i for i, pair in enumerate(zip_longest(found, wanted)) if len({*pair}) > 1)
        ids = self.tokenizer(text + wanted[:same], return_tensors="pt").input_ids
        with torch.no_grad():
            first, second = self.model(name)(ids).logits[0, -1].topk(2).values.tolist()
        return bool(first - second < NEAR_TIE)

    def decode(self, tokens: list[int]) -> str:
        """Tokens as text."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@contextlib.contextmanager
def serving(base: Path, *options: str) -> Iterator[tuple[str, Any]]:
    """Serves in a thread of this process; yields the URL and the application."""
    from fastlora.commands import serve

    args = serve.parse_args([str(base), "--cpu", *options])
    app, _ = serve.build_app_and_adapter_names(args)
    listening = socket.create_server(("127.0.0.1", 0))
    server = serve.make_uvicorn_server(app, args, serve.connection_limits(args, None))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
