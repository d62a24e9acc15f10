# Needs Python 3.11-3.13 and make. The first target that needs a package installs the package into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# Only one backend of mlx may be installed: mlx-cpu and mlx-cuda-* overwrite each other's library.
ifeq ($(shell uname -s),Darwin)
BACKEND :=
else ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
BACKEND := cuda13
else
BACKEND := cpu
endif
# Tests start Python many times, which takes twice as long without compiled files.
unexport PYTHONDONTWRITEBYTECODE
comma := ,
EXTRA := $(if $(BACKEND),[$(BACKEND)])
EXTRA_DEV := [$(if $(BACKEND),$(BACKEND)$(comma))dev]
EXTRA_DOCS := [$(if $(BACKEND),$(BACKEND)$(comma))docs]

STAMP := $(VENV)/.setup
STAMP_DEV := $(VENV)/.setup-dev
STAMP_DOCS := $(VENV)/.setup-docs

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-fast check lint slow long faults fuzz shape bench real-model tiny-model docs format constraints clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install TextPolicy in it
setup-dev: $(STAMP_DEV) ## Make .venv with the tools for tests and checks too

demo: setup ## Train the embedded model on addition, and print accuracy before and after
	@$(BIN)/textpolicy demo

# A process takes file after file, first those with the most slow tests: tests/conftest.py sorts them.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

test: setup-dev ## Run the test suite without the long tests, in two processes
	@$(BIN)/python -m pytest $(SHARED)

test-fast: setup-dev ## Run the quick tests
	@$(BIN)/python -m pytest $(SHARED) -m "not slow and not long and not learning and not download"

check: setup-dev ## Check format, lint, types and layers, and run the quick tests
	@$(MAKE) --no-print-directory -j2 lint test-fast

lint: setup-dev ## Check format, lint and types, without tests
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/basedpyright

slow: setup-dev ## Run only the slow tests
	@$(BIN)/python -m pytest -m "(slow or learning) and not long"

long: setup-dev ## Run the tests that `make test` leaves out, for about half an hour
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m long

# The tests may fail: the table then says which rows do, and the exit code is the table's.
faults: setup-dev ## Break runs in every way of the table of faults, and print the table
	@mkdir -p build && rm -f build/faults.xml
	-@$(BIN)/python -m pytest -n 2 --dist worksteal -q -m proves --junitxml build/faults.xml
	@$(BIN)/python tools/fault_table.py build/faults.xml

MINUTES := 10
fuzz: setup-dev ## Feed the readers of files with mutated bytes for MINUTES=10, guided by coverage
	@$(PIP) install --only-binary :all: atheris
	@$(BIN)/python tools/fuzz_readers.py --minutes $(MINUTES)

shape: $(BIN)/python ## Print our file and function sizes beside those of admired codebases
	@$(BIN)/python tools/shape.py

bench: setup ## Train the embedded model on addition, and print JSON records of the accuracy
	@$(BIN)/python benchmarks/learning.py --env add --seeds 0 --json

real-model: setup-dev ## Make a Hugging Face folder of SmolLM2-135M-Instruct in build/, for tests
	@$(BIN)/python tools/real_model.py

tiny-model: setup ## Train the embedded model again from its seed
	@$(BIN)/python tools/tiny_model.py

docs: $(STAMP_DOCS) ## Build the documentation into site/
	@$(BIN)/mkdocs build --strict --quiet

format: setup-dev ## Format the sources, and repair what the linter can repair
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

constraints: ## Write constraints.txt from a fresh installation on this machine
	@echo "Resolving the newest versions in a fresh environment (a minute or two) ..."
	@rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	@build/constraints/bin/python -m pip --disable-pip-version-check -qq install -e ".[cpu,dev,docs]"
	@build/constraints/bin/python -m pip --disable-pip-version-check list --format=freeze \
	  --exclude-editable --exclude pip > constraints.txt
	@rm -rf build/constraints

clean: ## Remove .venv and all build outputs
	@rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "TextPolicy needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is another version." \
	    "Name an interpreter of one of these versions: make PYTHON=python3.12 setup" >&2; exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu, install it with: apt install python3-venv" >&2; exit 1; }

# First without a network, because all packages may be installed already.
define install
	@$(PIP) install --no-index --no-build-isolation --check-build-dependencies -c constraints.txt -e ".$(1)" >/dev/null 2>&1 || { \
	  echo "Installing textpolicy$(1) into $(VENV) (a minute or two the first time) ..."; \
	  $(PIP) install -c constraints.txt -e ".$(1)"; } || { \
	  echo "Not all packages that pyproject.toml names for textpolicy$(1) are installed, and the rest could not be installed." \
	    "Type the same line with a connection to a package index, or use what is installed: touch $@" >&2; exit 1; }
endef

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(EXTRA))
	@touch $@

$(STAMP_DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(EXTRA_DEV))
	@touch $(STAMP) $@

$(STAMP_DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(EXTRA_DOCS))
	@touch $(STAMP) $@
