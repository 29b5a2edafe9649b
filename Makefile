# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
SLOW_FIRST := tests/launch tests/papers tests/common tests/data tests/test_*.py

.PHONY: help setup demo test test-long lint bench gpu foundation

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: .venv/.dev  ## make .venv with all that tests and metrics need

demo: .venv/.core  ## train and test every method on embedded photos, on a CPU, and write the report
	$(BIN)/isr demo

test: lint  ## what CI runs: lint, types and all tests that need no GPU and no downloaded weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not weights and not long" $(SLOW_FIRST)

test-long: .venv/.dev  ## run the tests that take minutes: every fault, every process count
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "long and not gpu and not weights" tests

lint: .venv/.dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.core  ## run the speed comparisons of benchmarks/
	@set -e; for name in degradation metrics train_step "paper_scale --device cpu --tiny"; do \
		set -- $$name; file=benchmarks/$$1.py; shift; echo "$$file $$*"; $(BIN)/python $$file "$$@"; done

gpu: .venv/.dev  ## on one GPU: every demo row on CUDA against the CPU, then steps at paper scale (docs/performance.md)
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python benchmarks/paper_scale.py
	$(BIN)/python benchmarks/report.py

foundation: .venv/.core  ## train the embedded tiny foundation again (an hour or two)
	$(BIN)/isr foundation

# Two sets, the core alone being enough for the demo; each is installed again when these two files change.
.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# pyiqa brings opencv-python, which needs libGL, over opencv-python-headless: the headless files are laid on top again.
.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,metrics,compare,tagger]'
	$(INSTALL) --force-reinstall --no-deps opencv-python-headless
	@touch .venv/.core $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python %d.%d is too old, isr-papers needs 3.11 or later: name one with make PYTHON=..." % v)'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
