"""Tests of fastlora in vLLM. They run in an environment of their own: `make test-vllm`."""
