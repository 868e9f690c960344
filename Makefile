# Needs python3 (>= 3.10) with pip, and nothing else. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST_ARGS ?= -n 2

.PHONY: help demo test fuzz fuzz-idioms test-arviz lint format docs docs-check bench clean

help:
	@echo "make demo    install, then take a hidden Markov model of the earthquake counts apart"
	@echo "make test    install, then run the tests, the examples and the documents' code"
	@echo "make fuzz    random programs against their joint tables: N=3000 of them from SEED=1000 on"
	@echo "make test-arviz  the conversion for ArviZ 1.x, where a Python >= 3.12 is there"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    install, then build the site in docs/_build/html, with all of its code run"
	@echo "make docs-check  the same, then look at every page in a headless Chromium"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove the environments, caches and output"

demo: $(VENV)/.installed-demo
	MPLBACKEND=Agg $(BIN)/python examples/earthquakes.py

# One thread per worker: the tables are small, and two workers' thread pools would fight over the cores.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest $(PYTEST_ARGS)

# Without some kinds of programs: make fuzz N=500 FUZZ_ARGS="--without chain branch"
N ?= 3000
SEED ?= 1000
FUZZ_ARGS ?=
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/fuzz.py --programs $(N) --seed $(SEED) $(FUZZ_ARGS)

# The same for programs that are made of idioms: ways to index, plates read by index or as wholes, branches.
fuzz-idioms: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/test_idiom_programs.py $(SEED) $(N)

# ArviZ 1.x needs a newer Python than the package does, and its half of the reports needs no torch. A shim of pyenv may
# be on the path and not run: each candidate is tried.
ARVIZ_VENV := .venv-arviz
ARVIZ_TESTS := tests/test_arviz_schema.py tests/test_arviz_functions.py
test-arviz:
	@for python in "$(PYTHON)" python3.12 python3.13 python3.14 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python; do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
			exec $(MAKE) --no-print-directory arviz-tests ARVIZ_PYTHON="$$python"; \
		fi; \
	done; \
	echo "no Python >= 3.12 here: the conversion for ArviZ 1.x is not tested"

.PHONY: arviz-tests
arviz-tests: $(ARVIZ_VENV)/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(ARVIZ_VENV)/bin/python -m pytest --config-file=/dev/null --rootdir=. --noconftest \
		-p no:cacheprovider -W error --quiet $(ARVIZ_TESTS)

$(ARVIZ_VENV)/.installed: constraints.txt
	@echo "installing ArviZ 1.x for $(ARVIZ_PYTHON) (once)"
	"$(ARVIZ_PYTHON)" -m venv --clear $(ARVIZ_VENV)
	$(ARVIZ_VENV)/bin/python -m pip install --quiet --constraint constraints.txt arviz xarray h5netcdf h5py matplotlib pytest
	@touch $@

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
	rm -rf $(VENV) $(ARVIZ_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf docs/_build docs/gallery examples/output
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
