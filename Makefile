# Thin by intent: each target is one command in a virtual environment that is made on first use.
#
#   make demo            index the standard library of the running Python on all lanes
#   make test            format, lint, types, import rules, then every test      (ARGS='tests/core -x' for some)
#   make check           the first four only
#   make soak            the tests that run for minutes
#   make bench           every benchmark, peers beside us; bench-quick: ours only; bench-check: against the baseline
#   make clean           remove the environment and every cache
#
# PYTHON=python3.12 picks the interpreter and keeps an environment of its own (.venv-3.12).

SHELL := /bin/sh
# Where an environment forbids byte code, every process that the tests and benchmarks start would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?=
ARGS ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
VENV ?= .venv$(if $(PYTHON),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check rules types pytest soak bench bench-quick bench-check clean

help:
	@sed -n '/^# *make/s/^# *//p; /^# PYTHON/s/^# //p' Makefile

demo: $(VENV)/.web
	@$(BIN)/stageflow demo $(ARGS)

# Types are checked beside the first tests: the one takes one core, the others seldom both.
test: rules
	@$(MAKE) --no-print-directory -j2 types pytest

check: rules types

rules: $(VENV)/.dev
	@$(BIN)/ruff format --check --quiet . || { echo "make check: run '$(BIN)/ruff format .'" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }

types: $(VENV)/.dev
	@$(BIN)/mypy --no-error-summary

pytest: $(VENV)/.dev
	@$(BIN)/python -m pytest -q $(ARGS)

soak: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -m soak $(ARGS)

bench: $(VENV)/.bench
	@$(BIN)/python -m benchmarks run $(ARGS)

bench-quick: $(VENV)/.bench
	@$(BIN)/python -m benchmarks quick $(ARGS)

bench-check: $(VENV)/.bench
	@$(BIN)/python -m benchmarks check $(ARGS)

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml when what it names is installed; the sources themselves are linked, not copied.
$(VENV)/.web: $(VENV)/.made pyproject.toml
	@echo "installing stageflow[web] into $(VENV)"
	@$(PIP) -e '.[web]'
	@$(BIN)/python -m compileall -q stageflow executors  # as pip does for what it copies: else the first job would
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "installing stageflow[dev] into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.web $@

$(VENV)/.bench: $(VENV)/.made pyproject.toml
	@echo "installing stageflow[test,bench] into $(VENV)"
	@$(PIP) -e '.[test,bench]'
	@touch $(VENV)/.web $@

# The first candidate that really runs and is new enough: a version manager's shim may exist and refuse to start.
# An environment that is already there and works is kept. Without ensurepip (some distributions split it off),
# the interpreter's own pip puts pip into the environment.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

$(VENV)/.made:
	@if $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for python in $(CANDIDATES); do \
	    if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: Stageflow needs Python 3.11 or newer; none of these is: $(CANDIDATES). Say PYTHON=/path/to/python." >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	if $$found -c 'import ensurepip' 2>/dev/null; then \
	    $$found -m venv --clear $(VENV); \
	elif $$found -m pip --version >/dev/null 2>&1; then \
	    $$found -m venv --clear --without-pip $(VENV) && $$found -m pip -qq --python $(BIN)/python install pip; \
	else \
	    echo "make: $$found has neither ensurepip nor pip: install your system's python3-venv package." >&2; exit 1; \
	fi && touch $@
