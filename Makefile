# The main ones: install, demo, test, lint, bench. Each target says what it does.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# For the CPU build of torch (much smaller): make install TORCH_INDEX=<index of the PyTorch CPU wheels>
TORCH_INDEX ?=

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Files of tests at a time. Most of them wait for processes and leases.
TEST_PROCESSES ?= 3

.PHONY: install demo test test-long test-gpu chaos lint format bench clean

install: $(VENV)/.installed  ## make .venv with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nograd needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and its family (the CUDA build: about 5 GB to download); this takes minutes"
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --index-url $(TORCH_INDEX) --constraint constraints.txt torch torchvision)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[worker,flower,dev]'
	touch $@

demo: install  ## private Redis, a worker, Flower; six models answer real inputs
	$(BIN)/nograd demo $(DEMO_ARGS)

test: lint  ## what CI runs
	$(BIN)/pytest -m 'not slow and not gpu' --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-long: install  ## the tests that take minutes
	$(BIN)/pytest -m 'slow and not gpu' --timeout 1800 $(PYTEST_ARGS)

chaos: install  ## kill, freeze and cut real workers and Redis, then check the history: make chaos ARGS="--rounds 40 --seed 1" or ARGS="backfill"
	$(BIN)/python benchmarks/chaos $(ARGS)

test-gpu: install  ## on a machine with a CUDA device
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p nograd.tasks -p nograd.producer -p nograd.workers

# mypy does not follow an editable install: give it the packages under the names they are imported by.
.PHONY: types
types:
	@mkdir -p build/types/nograd
	@for name in tasks producer workers; do ln -sfn ../../../$$name build/types/nograd/$$name; done

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## side-by-side measurements
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
