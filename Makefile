# make demo    the main job, in its own virtual environment; OUT=DIR sets where
# make test    lint, types, import contract, tests
# make test-slow    the main job in full, a warm start, the wheel, a real browser; make test-long: the other warm starts
# make audit   known vulnerabilities among the pinned dependencies
# PIP_ARGS is passed to pip, such as the index of PyTorch's CPU builds (see the README). EXTRAS=,gym adds what the tests of
# task gym need, a C compiler among it; without it they are skipped.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
EXTRAS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-long clients audit lint format clean

demo: $(VENV)/.train-ready
	$(BIN)/selfroute demo --out "$(OUT)"

# One thread a test process: two of two threads that share two cores wait for each other. A file in one process makes its
# fixtures once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not long and not gpu" -n auto --maxprocesses 4 --dist loadfile

# Two at a time, and whoever is done takes of what the other still has: the main job alone is a third of it all.
test-slow: $(VENV)/.dev-ready clients
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not gpu" -n 2 --dist worksteal

test-long: $(VENV)/.dev-ready
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/pytest -m "long and not gpu"

# LiteLLM's SDK and lm-evaluation-harness do not share an environment with selfroute's tested set.
clients: .venv-clients/.ready

.venv-clients/.ready: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet $(PIP_ARGS) --requirement $<
	touch $@

audit: $(VENV)/.dev-ready
	$(BIN)/python -m tests.audit

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[train]"
	touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[compare,dev$(EXTRAS)]"
	touch $@ $(VENV)/.train-ready

clean:
	rm -rf $(VENV) .venv-clients build dist
