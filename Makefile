.DEFAULT_GOAL := help
KILLS ?= 12
SEED ?= 1
N ?= 10000

.PHONY: help setup demo test test-slow test-cluster chaos chaos-files fuzz mutations test-gpu bench bench-data format lint types image base-digest lock clean

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup
	PYTHON=$(PYTHON) scripts/setup $(VENV)

setup: $(VENV)/.ready ## Make the virtual environment with pinned packages

demo: $(VENV)/.ready ## Train a small model on two CPU ranks and show what it learned
	$(BIN)/sft-job demo

test: $(VENV)/.ready lint types ## Run the linters, the type checker and the tests that need no GPU, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.ready ## Run the slow tests: benchmarks, chaos, and long runs of the real command
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses 2 --dist loadfile

# Slurm's jobs are struck at moments that a build beside them would move, and one engine is enough: one after the other.
test-cluster: $(VENV)/.ready ## Run jobs on a real Slurm and in a real Docker, started for it, and disturb them; show manifests to a real API server (root; SFT_JOB_TEST_TOOLS names the scripts)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster --numprocesses 2 --timeout 600 -rs tests/cluster/test_kube_manifests.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'cluster and alone' --numprocesses 0 --timeout 900 -rs tests/cluster/test_slurm_*.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'cluster and not alone' --numprocesses 3 --dist load --maxschedchunk 1 --timeout 900 -rs tests/cluster/test_slurm_*.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster --numprocesses 0 --timeout 900 -rs tests/cluster/test_docker_*.py

chaos: $(VENV)/.ready ## Kill runs (KILLS=200 SEED=1) and compare each with one that nobody touched; ONLY=k repeats one
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED) $(if $(ONLY),--only $(ONLY))

chaos-files: $(VENV)/.ready ## Kill a run at every single write, fsync and rename of its saves
	OMP_NUM_THREADS=1 CHAOS_STRIDE=1 $(BIN)/pytest -n0 -m slow --timeout 3000 tests/chaos/test_files.py

fuzz: $(VENV)/.ready ## Check N=10000 bad configs: never a traceback
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.fuzz --number $(N)

mutations: $(VENV)/.ready ## Put known bugs back, one at a time, and show which test catches each
	$(BIN)/python -m tests.chaos.mutations

test-gpu: ## Run the GPU tests with the python that is active
	python3 -m pytest -m gpu tests/gpu

bench: ## Measure training beside TRL on this machine's GPU (ROWS=name,...) with the python that is active
	python3 -m benchmarks.throughput $(if $(ROWS),--rows $(ROWS))

bench-data: $(VENV)/.ready ## Measure tokenising and loading on a million rows
	$(BIN)/python benchmarks/data_pipeline.py

.PHONY: manifests test-kubelet

manifests: $(VENV)/.ready ## Write the ready-made Kubernetes manifests below deploy/manifests
	$(BIN)/python -m deploy.kubernetes.ready

test-kubelet: $(VENV)/.ready ## Train in a pod of the image under a real kubelet, and delete it (IMAGE_TAR=archive; else make image; root)
	OMP_NUM_THREADS=1 SFT_JOB_KUBELET=1 IMAGE_TAR=$(IMAGE_TAR) $(BIN)/pytest -n0 -m cluster --timeout 3000 -rs tests/cluster/test_kube_pod.py

format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.ready ## Check style, imports between rooms and shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck run_sft.sh scripts/setup scripts/image scripts/base-digest scripts/lock .ci/run
	$(BIN)/hadolint --config .hadolint.yaml Dockerfile

types: $(VENV)/.ready ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

image: ## Build the container image (IMAGE=NAME:TAG BASE_IMAGE= FLASH_ATTENTION=fa4|fa2|none; scripts/image lists the rest)
	scripts/image

base-digest: ## Pin the image's base by the digest that its tag has now (pulls it)
	scripts/base-digest

lock: $(VENV)/.ready ## Lock the image's packages with hashes, at the versions of constraints.txt
	UV=$(BIN)/uv scripts/lock

clean: ## Remove what was built
	rm -rf $(VENV) demo-run build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
