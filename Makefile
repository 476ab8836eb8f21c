# `make setup` creates .venv; every other target depends on it, and nothing is done twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPERATORS := $(VENV)/.operators
# Most of the suite waits for processes; a file stays on one worker, because its tests share worlds and servers.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
EXTRAS := test,train,s3,nodes,metrics
NATIVE := CMakeLists.txt $(shell find csrc -type f)

# The launcher and DeepSpeed's native operators look for `deepspeed` and `ninja` on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Native operators are built for this environment alone: two environments that share a cache rebuild each other's.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

# Containers often ask Python to keep no bytecode: then each of the hundreds of processes that a run of the tests starts
# compiles moc again, which is a third of an agent's start.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: setup train test test-all lint format clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv with moc, its extension module and its tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: left to the resolver it may bring gigabytes of CUDA libraries along.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	$(call build_operators,ShareMemCommBuilder)
	touch $@

# DeepSpeed compiles its CPU operators at first use; here nobody waits for it, and no kill leaves its lock behind.
define build_operators
$(BIN)/python -c 'import sys; from deepspeed.accelerator import get_accelerator; a = get_accelerator(); [a.create_op_builder(name).load(verbose=False) for name in sys.argv[1:] if a.device_name() == "cpu"]' $(1) >/dev/null
endef

$(OPERATORS): $(STAMP)
	$(call build_operators,CPUAdamBuilder FusedAdamBuilder)
	touch $@

train: setup ## run the main job: train, lose a rank, recover, prove that nothing changed
	$(BIN)/python -m examples.main_job

test: setup $(OPERATORS) ## run the default suite
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: setup $(OPERATORS) ## run the long tests too
	$(BIN)/python -m pytest -m "not gpu"

lint: setup ## check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools leave behind
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
