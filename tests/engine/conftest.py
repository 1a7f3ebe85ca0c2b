"""What the tests in vLLM share: registration, and one process group of one process."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import pytest

# Without vLLM, `pytest tests` finds no tests here. `make test-vllm` fails if it finds none.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# The engine and its worker run in this process, and threads are those of the process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# At INFO, vLLM logs the config of each engine.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_configure(config: pytest.Config) -> None:
    """Tests with engines in several processes run only in `make test-vllm-all`."""
    config.addinivalue_line("markers", "processes: an engine in processes of its own")


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """fastlora is registered in this process."""
    from fastlora.integrations.vllm.register import register

    assert register() is None


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """vLLM's process group of one process, and a default config, for layers without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()
