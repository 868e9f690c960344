# Needs python3 (>= 3.10) with pip, and nothing else. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST_ARGS ?= -n 2

.PHONY: help demo test lint format docs docs-check bench clean

help:
	@echo "make demo    install, then take a hidden Markov model of the earthquake counts apart"
	@echo "make test    install, then run the tests, the examples and the documents' code"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    install, then build the site in docs/_build/html, with all of its code run"
	@echo "make docs-check  the same, then look at every page in a headless Chromium"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove .venv, caches and output"

demo: $(VENV)/.installed-demo
	MPLBACKEND=Agg $(BIN)/python examples/earthquakes.py

# One thread per worker: the tables are small, and two workers' thread pools would fight over the cores.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Offline: nothing is fetched, and the pages fetch nothing. A warning is an error, and so is an exception in any cell.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Another browser: make docs-check CHROMIUM=/usr/bin/google-chrome
CHROMIUM ?=
docs-check: docs $(VENV)/.installed-docs-check
	$(BIN)/python docs/check_pages.py docs/_build/html $(if $(CHROMIUM),--chromium $(CHROMIUM))

# Chosen cases alone, without the page: make bench BENCH="-k mixture"
BENCH ?= --results benchmarks/RESULTS.md
bench: $(VENV)/.installed-bench
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/bench_*.py --override-ini python_files='bench_*.py' \
		--override-ini pythonpath=benchmarks --benchmark-columns=min,median,rounds --benchmark-group-by=group \
		--benchmark-json=.benchmarks/latest.json $(BENCH)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks docs/_build docs/gallery examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyro_vfe needs Python 3.10 or newer; say which: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch by name and before the rest: left to a dependency's range, pip takes the newest build with its CUDA packages.
$(VENV)/.installed-torch: constraints.txt | $(BIN)/python
	@echo "installing torch (once; it is large)"
	$(PIP) torch
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable '.[plots]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable '.[plots,test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.installed-docs-check: $(VENV)/.installed-docs
	$(PIP) --editable '.[docs-check]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-torch pyproject.toml
	$(PIP) --editable '.[bench]'
	@touch $@
