# Everything runs in its own environment, .venv, made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One busy core beside ours makes OpenMP's default spinning many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test test-all lint docs clean

quickstart: $(VENV)/.installed
	$(BIN)/poweropd quickstart

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first, as a CPU build where there is one: other packages would pull a build with several GB of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

docs: $(VENV)/.installed
	$(BIN)/poweropd objectives --markdown > docs/objectives.md

clean:
	rm -rf $(VENV)
