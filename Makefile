# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet -c constraints.txt

.PHONY: help setup demo test lint bench foundation

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: .venv/.dev  ## make .venv with all that tests and metrics need

demo: .venv/.core  ## train and test every method on embedded photos, on a CPU, and write the report
	$(BIN)/isr demo

test: lint  ## what CI runs: lint, types and all tests that need no GPU and no downloaded weights
	$(BIN)/python -m pytest -m "not gpu and not weights"

lint: .venv/.dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.core  ## run the speed comparisons of benchmarks/
	@set -e; for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file"; done

foundation: .venv/.core  ## train the embedded tiny foundation again (an hour or two)
	$(BIN)/isr foundation

# The core alone, for the demo. A stamp is older than the files that decide what is installed, or it stands.
.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# pyiqa brings opencv-python, which needs libGL, over opencv-python-headless: the headless files are laid on top again.
.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev,metrics]'
	$(INSTALL) --force-reinstall --no-deps opencv-python-headless
	@touch .venv/.core $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} is too old: isr-papers needs 3.11 or later, name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
