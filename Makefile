# make demo   prune the demo model end to end, on CPU, in minutes
# make smollm2   prune a real LLM of 30 layers end to end, on CPU, in about an hour; TASKS=FOLDER also scores benchmark tasks
# make test         run every test that this machine can run, in under 20 minutes on 2 cores
# make test-quick   run the tests that start no torchrun and take seconds, in under 3 minutes
# make test-two-nodes   run eight processes on two simulated nodes, and lose one of these; about 5 minutes on 2 cores
# make test-serving   serve pruned models with vLLM and compare them with transformers; its environment is .venv-serving
# make docs   build the documentation site in site/
# All create .venv and install what they need at the versions in constraints.txt; `make setup` does only that.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed
SERVING := .venv-serving
SERVING_STAMP := $(SERVING)/.installed

# With glibc's defaults, small training steps on a CPU spend half of their time on returning memory to the kernel and
# faulting it in again.
test test-quick test-two-nodes demo smollm2: export MALLOC_MMAP_THRESHOLD_ := 1073741824
test test-quick test-two-nodes demo smollm2: export MALLOC_TRIM_THRESHOLD_ := 2000000000
test test-quick test-two-nodes demo smollm2: export MALLOC_TOP_PAD_ := 268435456
# One thread per process, because the demo and the parallel tests start several processes.
test test-quick test-two-nodes demo smollm2: export OMP_NUM_THREADS := 1

.PHONY: setup demo smollm2 test test-quick test-two-nodes test-serving lint format docs clean

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "megaprune needs Python >= 3.11, and '$(PYTHON)' is not one: try 'make setup PYTHON=python3.11'" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# torch first, so that no other package selects its build.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/torchrun --nproc-per-node 2 tools/prune.py --config examples/demo/demo.yaml

# Resumable: what is finished is not repeated. docs/evaluation.md says where the data of the tasks are.
SMOLLM2_TASKS := arc_easy,piqa,winogrande,openbookqa,lambada_openai,copa
smollm2: $(STAMP)
	$(BIN)/python examples/smollm2/prepare.py runs/smollm2/data
	$(BIN)/torchrun --nproc-per-node 2 tools/compare.py --config examples/smollm2/smollm2.yaml --save runs/smollm2/results \
		$(if $(TASKS),--tasks $(SMOLLM2_TASKS) --task-path $(TASKS) --task-limit 200 --task-pruned true)

# Two at a time, for two cores; tests/conftest.py says which tests stay together.
WORKERS := -n 2
test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

test-quick: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not parallel"

test-two-nodes: $(STAMP)
	PROCESSES_PER_NODE=4 $(BIN)/python -m pytest tests/parallel/test_two_nodes.py

# An environment of its own, because vLLM pins torch and transformers.
$(SERVING_STAMP): pyproject.toml tests/serving/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "megaprune needs Python >= 3.11, and '$(PYTHON)' is not one: try 'make test-serving PYTHON=python3.11'" >&2; exit 1; }
	[ -x $(SERVING)/bin/python ] || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python tests/serving/install.py
	@touch $@

test-serving: $(SERVING_STAMP)
	$(SERVING)/bin/python -m pytest -m serving tests/serving tests/benchmarks tests/generation

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mkdocstrings reads the sources without importing them, so the site needs none of the run's own packages.
$(DOCS_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt $$($(BIN)/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Keeps .venv and all runs except the demo's.
clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage* htmlcov runs/demo
	find megaprune tools tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
