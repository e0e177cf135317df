# make demo | test | lint | clean      The first of them on a fresh machine makes .venv with everything pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# No target needs a model hub.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# DeepSpeed compiles what it needs on a CPU with the ninja of the environment, which torch looks up on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint clean env

demo: env
	$(BIN)/qlora-rm demo

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

env: $(STAMP)

# torch goes first and exactly: a host's own build of it (CPU or CUDA) then satisfies every later requirement.
# deepspeed is published as source only; pip builds it in isolation, where it finds no torch, compiles nothing, and
# leaves its operators to be compiled on use.
$(STAMP): pyproject.toml constraints.txt qlora_rm/artifacts/merging/nf4.c | $(BIN)/python
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
