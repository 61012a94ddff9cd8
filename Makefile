# `make demo`, `make test` and `make test-all` set up everything they need in .venv
PYTHON ?= python3
VENV ?= .venv
# installed first, so that nothing else pulls another build of torch
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# tests run on one thread each; files stay whole, as some train a model once for all of their tests, and in the order
# that tests/conftest.py gives them, heavy ones first
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# the tests that setup.cfg leaves out, too
EVERYTHING := -m ""
READY := $(VENV)/.ready

.PHONY: setup demo real test test-slow test-all test-oldest test-oldest-all lint bench bench-gpu clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,plot,peers]"
	touch $@

demo: setup
	$(BIN)/hf-kvcache compare --out out

# a real language model, for `--model smollm2` and the slow tests that ask for it: docs/models.md
real: setup
	$(BIN)/hf-kvcache models get smollm2

# a few minutes: all but the tests marked slow
test: setup
	$(BIN)/python -m pytest $(PARALLEL)

# what `make test` leaves out
test-slow: setup
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) $(EVERYTHING)

# the same tests on the oldest supported transformers, in an environment of its own
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(PARALLEL)

test-oldest-all: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(EVERYTHING)

.venv-oldest/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-oldest/bin/python -m pip install --quiet --editable ".[dev,plot]" "transformers==5.17.0"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/run.py --device cpu

bench-gpu: setup
	$(BIN)/python benchmarks/run.py --device cuda

clean:
	rm -rf $(VENV) .venv-oldest build dist out src/*.egg-info
