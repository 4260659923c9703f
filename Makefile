# Everything a developer types. `make help` lists it; CI calls the same targets.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WITH_ZOO := PYTHONPATH=$(VENV)/zoo
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MANIFEST := pyproject.toml constraints.txt

# The test files that hold a marker: runs of a few tests import only those, and there is no run where there are none.
marked = $(shell grep -l 'mark\.$(1)\b' tests/test_*.py tests/*/test_*.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu test-oldest guards zoo bench check format docs build lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "  %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras. The demo installs the little that it needs; dev holds all of that and more.
$(VENV)/.demo: $(MANIFEST) | $(BIN)/python
	$(INSTALL) --editable '.[demo,loggers]'
	@touch $@

$(VENV)/.dev: $(MANIFEST) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.demo $@

# timm and torchvision live apart: torchmetrics imports any torchvision that it finds, and one whose operators do not
# fit the torch build would break every import of lightning. Only the runs below that need them see the folder.
$(VENV)/.zoo: $(VENV)/.dev
	rm -rf $(VENV)/zoo
	$(INSTALL) --no-deps --target $(VENV)/zoo timm torchvision torchao
	@touch $@

$(VENV)/.bench: $(VENV)/.zoo
	$(INSTALL) --no-deps torch-pruning
	@touch $@

setup: $(VENV)/.dev ## Make .venv with everything for development

demo: $(VENV)/.demo ## Train, prune and report on real digits (under 5 minutes on 2 cores)
	$(BIN)/lightning-prune

test: $(VENV)/.zoo ## Run the fast tests and doctests, a sample of the zoo, and the tests that start processes
	$(PYTEST) -n $(JOBS) --doctest-modules lightning_prune tests
	$(if $(call marked,zoo_fast),$(WITH_ZOO) $(PYTEST) -n $(JOBS) -m "zoo_fast and not gpu" $(call marked,zoo_fast))
	$(if $(call marked,multiprocess),$(PYTEST) -m "multiprocess and not slow and not gpu" $(call marked,multiprocess))

test-all: $(VENV)/.zoo ## Run every test except the benchmarks and those that need a GPU
	$(PYTEST) -n $(JOBS) -m "not gpu and not bench and not multiprocess and not zoo and not zoo_fast" \
		--doctest-modules lightning_prune tests
	$(if $(call marked,zoo),$(WITH_ZOO) $(PYTEST) -n $(JOBS) -m "(zoo or zoo_fast) and not gpu" tests)
	$(if $(call marked,multiprocess),$(PYTEST) -m "multiprocess and not gpu" $(call marked,multiprocess))

test-gpu: $(VENV)/.dev ## Run the tests that need a CUDA device
	@$(BIN)/python -c "import torch; exit(None if torch.cuda.is_available() else 'PyTorch finds no CUDA device')"
	$(PYTEST) -m gpu tests

# The lower bounds of pyproject.toml become pins; what it does not name itself stays as in constraints.txt.
OLDEST := $(VENV)-oldest
test-oldest: ## Run the tests, those that start processes too, with the oldest dependencies that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
		| sed 's/>=/==/' > $(OLDEST)/pins.txt
	sed 's/^/^/; s/==.*/==/' $(OLDEST)/pins.txt > $(OLDEST)/names.txt
	grep -v -f $(OLDEST)/names.txt constraints.txt >> $(OLDEST)/pins.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/pins.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) tests
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "multiprocess and not slow and not gpu" $(call marked,multiprocess)

guards: $(VENV)/.dev ## Remove each guarded line and see its tests fail (GUARDS="test_check*": those tables alone)
	$(BIN)/python tests/guards/run.py --jobs $(JOBS) $(GUARDS)

# Verdicts are kept while the run lasts: after a break, `make zoo RESUME=1` judges what is left.
VERDICTS := $(VENV)/verdicts
zoo: $(VENV)/.zoo ## Prune the networks of timm, torchvision and transformers, compare each with its mask, write docs/coverage.md
	$(if $(RESUME),,rm -rf $(VERDICTS))
	$(WITH_ZOO) $(BIN)/python tests/zoo/run.py --reasons --jobs $(JOBS) --board $(VERDICTS)
	ZOO_BOARD=$(VERDICTS) $(WITH_ZOO) $(PYTEST) -m "zoo or zoo_fast" tests/zoo

bench: $(VENV)/.bench ## Measure time and memory and write docs/benchmarks.md (BENCH="--only step": that row alone)
	$(WITH_ZOO) $(PYTEST) -m bench tests/benchmarks
	$(WITH_ZOO) $(BIN)/python tests/benchmarks/bench.py $(BENCH)

check: $(VENV)/.dev ## Check format, lint, types, spelling and the import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict lightning_prune
	$(BIN)/codespell
	$(PYTEST) -q tests/test_arrows.py

format: $(VENV)/.dev ## Rewrite the files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev ## Run every example of the README and of the docstrings
	$(PYTEST) --doctest-modules lightning_prune
	$(PYTEST) -m readme tests

build: $(VENV)/.dev ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

lock: ## Renew constraints.txt (needs uv)
	printf 'torch==2.13.0\ntorchvision==0.28.0\n' > .pins
	{ sed '/^#/!d' constraints.txt; \
	  uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --constraint .pins \
	    --no-header --no-annotate --quiet | grep -v -E '^(nvidia-|cuda-)'; } > .lock
	mv .lock constraints.txt
	rm .pins

clean: ## Remove what builds, tests and runs leave behind (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov
	rm -rf outputs multirun lightning_logs wandb runs
	find lightning_prune conf tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
