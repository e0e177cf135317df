# The first target on a fresh machine makes .venv with everything pinned.
#   make demo          the whole road on a small model
#   make test          all tests but the long ones     make test-long     those of ten seconds and more
#   make check         lint, and the fast tests        make test-deep     with fresh seeds, more examples, every moment of a kill
#   make test-gpu      what only a GPU can show
#   make lint          style and types                 make test-install  a wheel, installed and walked through
#   make dist          wheel and sdist in dist/        make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# No target needs a model hub.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# DeepSpeed compiles what it needs on a CPU with the ninja of the environment, which torch looks up on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Of a deep run: `make test-deep SEED=N` draws again what a run that printed N has drawn.
ifndef SEED
SEED := $(shell date +%s)
endif

.PHONY: demo test check test-long test-deep test-gpu test-install lint dist clean env

demo: env
	$(BIN)/qlora-rm demo

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not gpu"

test-long: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "long and not gpu"

check: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long and not gpu" --ignore=tests/attacks

test-deep: env
	@echo "make test-deep SEED=$(SEED)"
	QLORA_RM_DEEP=$(SEED) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --hypothesis-seed=$(SEED)

test-gpu: env
	$(BIN)/python -m pytest -m gpu

test-install: env
	$(BIN)/python -m tests.installing

dist: env
	$(BIN)/python -m build --no-isolation

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

env: $(STAMP)

# torch goes first and exactly: a host's own build of it (CPU or CUDA) then satisfies every later requirement.
# deepspeed is published as source only; pip builds it in isolation, where it finds no torch, compiles nothing, and
# leaves its operators to be compiled on use.
$(STAMP): pyproject.toml setup.py constraints.txt qlora_rm/merging/nf4.c | $(BIN)/python
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qlora_rm -name '*.so' -delete; rm -f $(STAMP)
	find qlora_rm tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
