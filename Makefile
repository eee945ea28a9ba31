# `make train` and `make test` set up `.venv` on first use. Torch comes first: with none installed, other packages would
# pull a build of their own choice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
DEVICES := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu)

.PHONY: train test lint setup clean

train: $(VENV)/.ready
	$(BIN)/accelerate launch train.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}. Set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev$(if $(DEVICES),$(comma)gpu)]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lmms-eval  # its model class is tested
	touch $@

comma := ,

clean:
	rm -rf $(VENV) outputs
