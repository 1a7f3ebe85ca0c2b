"""Run one engine in this process or in its own ones, and print its answers as JSON.

The argument is a JSON object: ``llm`` (arguments of `vllm.LLM`), ``requests`` (token IDs and an
adapter's name, ID, and folder, or null), ``sampling``, and optionally ``version``, which replaces
vLLM's own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "ANSWERS "


def wrapper_names(worker: Any) -> list[str]:
    """Return the names of the classes that compute LoRA in a worker."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return [type(each).__name__ for each in manager.punica_wrapper_mapping.values()]


def main() -> None:
    """Run the requests, and print what was answered and by which classes."""
    given = json.loads(sys.argv[1])
    import vllm
    from vllm.lora.request import LoRARequest

    if "version" in given:
        vllm.__version__ = given["version"]
    llm = vllm.LLM(enforce_eager=True, enable_lora=True, **given["llm"])
    params = vllm.SamplingParams(temperature=0.0, **given["sampling"])
    prompts = [{"prompt_token_ids": each["ids"]} for each in given["requests"]]
    loras = [LoRARequest(*each["lora"]) if each["lora"] else None for each in given["requests"]]
    made = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    answers = []
    for each in made:
        rows = [*(each.prompt_logprobs or [])[1:], *(each.outputs[0].logprobs or [])]
        logprobs = [{str(k): v.logprob for k, v in row.items()} for row in rows]
        answers.append({"ids": list(each.outputs[0].token_ids), "logprobs": logprobs})
    classes = llm.collective_rpc(wrapper_names)
    sys.stdout.write(f"{MARK}{json.dumps({'answers': answers, 'classes': classes})}\n")


if __name__ == "__main__":
    main()
