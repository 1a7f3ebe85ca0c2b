"""fastlora as the LoRA backend of vLLM.

`fastlora.integrations.vllm.register` replaces parts of vLLM. The module ``fastlora_vllm`` is the
entry point that vLLM loads.
"""
