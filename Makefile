# `make demo` and `make test` set up everything they need in .venv
PYTHON ?= python3
VENV ?= .venv
# installed first, so that nothing else pulls another build of torch
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# tests run on one thread each; files stay whole, as some train a model once for all of their tests
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready

.PHONY: setup demo test test-oldest lint bench bench-gpu clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,plot,peers]"
	touch $@

demo: setup
	$(BIN)/hf-kvcache compare --out out

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

# the same tests on the oldest supported transformers, in an environment of its own
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(PARALLEL)

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
