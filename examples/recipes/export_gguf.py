"""Export to GGUF, for llama.cpp: an adapter of a Llama, or a merged one.

Names, metadata and the order of rows are those of llama.cpp's convert_lora_to_gguf.py and
convert_hf_to_gguf.py, by the `gguf` package. For another architecture, for quantized files, or
where a model's tokenizer has a name of its own in llama.cpp, use those scripts: they read the
folders that fastlora writes (`fastlora merge`, `save_pretrained`).

NOT RUN in llama.cpp itself: tests/test_recipes.py reads the files back, adds the adapter to the
base model in GGUF's own layout, and compares logits with transformers' reading of it.

python examples/recipes/export_gguf.py adapter ADAPTER BASE OUT.gguf
python examples/recipes/export_gguf.py model FOLDER OUT.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastlora

ARCHITECTURE = "llama"


def export_adapter(adapter: Path, base: Path, out: Path) -> None:
    """Writes a PEFT adapter as one GGUF file; ``base`` is the base model's folder (its config).

    Raises ValueError where a GGUF adapter has no such thing: nothing is written then.
    """
    config = _llama_config(base)
    made = fastlora.LoraConfig.from_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    odd = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        raise ValueError(f"{adapter}: a GGUF adapter has lora_A and lora_B alone, found {odd[0]}")
    prefix = "base_model.model."
    modules = sorted(key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key)
    # llama.cpp multiplies by alpha / rank, with one alpha. Other scalings go into lora_B.
    plain = not (made.use_rslora or made.rank_pattern or made.alpha_pattern)
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(made.lora_alpha) if plain else 0.0)
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        name = _gguf_name(f"{module.removeprefix(prefix)}.weight", config)
        # An alpha of 0 is none to llama.cpp: the update is taken as it is.
        scale = 1.0 if plain else made.scaling_for(module.removeprefix(prefix))
        writer.add_tensor(f"{name}.lora_a", _numbers(a))
        writer.add_tensor(f"{name}.lora_b", _numbers(_rows(b.float() * scale, module, config)))
    _write(writer)


def export_model(folder: Path, out: Path, tokenizer_pre: str = "default") -> None:
    """Writes a model of transformers, merged or not, as one GGUF file in fp32.

    Args:
        folder: Of the model and its tokenizer, which is of the kind of GPT-2's (byte-level BPE).
        out: The file.
        tokenizer_pre: llama.cpp's name of how the tokenizer splits text, such as "llama-bpe" or
            "smollm"; convert_hf_to_gguf.py has them.
    """
    config = _llama_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if (folder / "tokenizer.json").is_file():
        _add_tokenizer(writer, folder, config.vocab_size, tokenizer_pre)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        module = name.rpartition(".")[0]
        writer.add_tensor(_gguf_name(name, config), _numbers(_rows(tensor, module, config)))
    _write(writer)


def _llama_config(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(f"{folder}: is a {config.model_type}; this recipe writes Llamas")
    if _rope(config).get("rope_type", "default") != "default":
        raise ValueError(
            f"{folder}: rotary embeddings are scaled, which this recipe does not write"
        )
    return config


def _rope(config: Any) -> dict[str, Any]:
    """Returns the rotary embedding's settings, which transformers 5 has in one place."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gguf_name(name: str, config: Any) -> str:
    """Returns llama.cpp's name of a tensor."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"llama.cpp's Llama has no tensor for {name}")
    return found


def _rows(tensor: torch.Tensor, module: str, config: Any) -> torch.Tensor:
    """Returns a weight, bias or lora_B with its rows in llama.cpp's order.

    Its rotary embedding turns neighbors; that of transformers turns the halves of a head. So the
    rows of q and k are dealt: the first of each half, the second of each half, ...
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.rpartition(".")[2])
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int, pre: str) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if data["model"]["type"] != "BPE":
        kind = data["model"]["type"]
        raise ValueError(f"{folder}: the tokenizer is {kind}; use llama.cpp's own conversion")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    tokens, kinds = [], []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kind = gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        kinds.append(kind if number in by_id else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", metavar="adapter|model", required=True)
    adapter = kinds.add_parser("adapter", help="export an adapter")
    adapter.add_argument("adapter", type=Path, metavar="ADAPTER", help="the PEFT adapter folder")
    adapter.add_argument("base", type=Path, metavar="BASE", help="folder of the base model")
    model = kinds.add_parser("model", help="export a model without adapters")
    model.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the model")
    for kind in (adapter, model):
        kind.add_argument("out", type=Path, metavar="OUT.gguf", help="the file to write")
    args = parser.parse_args()
    try:
        if args.kind == "adapter":
            export_adapter(args.adapter, args.base, args.out)
        else:
            export_model(args.folder, args.out)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
