.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu bench-data format lint types build clean

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup
	PYTHON=$(PYTHON) scripts/setup $(VENV)

setup: $(VENV)/.ready ## Make the virtual environment with pinned packages

demo: $(VENV)/.ready ## Train a small model on two CPU ranks and show what it learned
	$(BIN)/sft-job demo

test: $(VENV)/.ready lint types ## Run the linters, the type checker and all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

test-gpu: ## Run the GPU tests with the python that is active
	python3 -m pytest -m gpu tests/gpu

bench-data: $(VENV)/.ready ## Measure tokenising and loading on a million rows
	$(BIN)/python benchmarks/data_pipeline.py

format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.ready ## Check style, imports between rooms and shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck run_sft.sh scripts/setup .ci/run

types: $(VENV)/.ready ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## Remove what was built
	rm -rf $(VENV) demo-run build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
