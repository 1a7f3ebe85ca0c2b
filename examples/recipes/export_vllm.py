"""Export to vLLM: an adapter in the layout that it reads, or a merged model.

vLLM reads PEFT's folders: --enable-lora --lora-modules NAME=FOLDER --max-lora-rank R. vLLM 0.32
reads rank_pattern and alpha_pattern (vllm/lora/peft_helper.py); older versions took one r and one
lora_alpha for all layers. For these, an adapter of several ranks or scalings is rewritten here:
scalings go into lora_B, and factors get rows of zeros up to the largest rank. What vLLM cannot read
is refused; merge that.

NOT RUN in vLLM itself: tests/test_recipes.py checks names, config, and that PEFT computes the same.

python examples/recipes/export_vllm.py ADAPTER OUT
fastlora merge BASE ADAPTER OUT    # a merged model: any folder of transformers is one of vLLM
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import fastlora

# The largest values of --max-lora-rank that vLLM knows.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_adapter(adapter: Path, out: Path) -> dict[str, object]:
    """Writes a PEFT adapter as vLLM reads it, and returns its config.

    Raises ValueError where vLLM has no such thing: nothing is written then.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for field in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"):
        if config.get(field):
            raise ValueError(f"{adapter}: vLLM does not read {field}; merge the adapter instead")
    odd = [key for key in tensors if not key.endswith(("lora_A.weight", "lora_B.weight"))]
    if odd:
        raise ValueError(f"{adapter}: vLLM reads lora_A and lora_B of linears, found {odd[0]}")
    modules = sorted(key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key)
    ranks = {name: len(tensors[f"{name}.lora_A.weight"]) for name in modules}
    made = fastlora.LoraConfig.from_pretrained(adapter)
    prefix = "base_model.model."
    scalings = {name: made.scaling_for(name.removeprefix(prefix)) for name in modules}
    if len({*ranks.values()}) > 1 or len({*scalings.values()}) > 1:
        rank = max(ranks.values())
        for name in modules:
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            room = rank - len(a)
            tensors[f"{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, room))
            scaled = (b.double() * scalings[name]).to(b.dtype)
            tensors[f"{name}.lora_B.weight"] = torch.nn.functional.pad(scaled, (0, room))
        # A scaling of 1 everywhere.
        config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
    if config["r"] > RANKS[-1]:
        raise ValueError(f"{adapter}: r is {config['r']}, and vLLM goes up to {RANKS[-1]}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(
        {key: t.contiguous() for key, t in tensors.items()}, out / "adapter_model.safetensors"
    )
    return config


def max_lora_rank(rank: int) -> int:
    """Returns the --max-lora-rank to start vLLM with."""
    return next(known for known in RANKS if known >= rank)


def main() -> None:
    """Export the adapter that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the PEFT adapter folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    args = parser.parse_args()
    try:
        written = export_adapter(args.adapter, args.out)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{args.out}: start vLLM with --max-lora-rank {max_lora_rank(written['r'])}")


if __name__ == "__main__":
    main()
