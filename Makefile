# make demo | test | test-slow | test-remote | test-nightly | lint | bench | clean. The first of them makes .venv and
# installs into it, once; the first test-remote makes .server-venv, for NDIF's server.
#
#   PYTHON=python3.12 make demo        with another Python (3.10 to 3.13)
#   TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" make demo
#                                      with PyTorch's small CPU build, on Linux without a GPU
#   PYTEST_ARGS="tests/results -x" make test

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVER := .server-venv
SERVER_STAMP := $(SERVER)/.installed
DEMO := demo-report
TORCH_ARGS ?=
PYTEST_ARGS ?=

# Tried by running them: a version manager's shim may be on the path and still not work.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$name && break; done)

# Two processes share the work in tests; more threads inside each only get in each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-remote test-nightly lint bench clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/patchkit demo --out $(DEMO)
	@echo "The report is $(CURDIR)/$(DEMO)/report.html"

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not nightly and not remote" $(PYTEST_ARGS)

# What starts processes, is killed, runs out of memory, or is fuzzed or mutated.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

# What takes longest: memory against its estimate, in processes with little of it, and every method in drawn ways.
test-nightly: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m nightly $(PYTEST_ARGS)

# Against a real NDIF server on loopback. PATCHKIT_TEST_HOST and PATCHKIT_TEST_STATE name one that is up (tests/remote).
# Without the checks of shapes at every call: functions that are wrapped in them do not travel.
test-remote: $(STAMP) $(SERVER_STAMP)
	PATCHKIT_SERVER_VENV=$(CURDIR)/$(SERVER) $(BIN)/python -m pytest -o addopts="--import-mode=importlib --strict-markers" \
		tests/remote -m remote $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

clean:
	rm -rf $(VENV) $(SERVER) $(DEMO) dist build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

# Not editable, and without patchkit: a server does not have its users' packages.
$(SERVER_STAMP): tests/remote/server/requirements.txt tests/remote/server/apart.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(SERVER)/bin/python || $(PYTHON) -m venv $(SERVER) || { rm -rf $(SERVER); exit 2; }
	grep -v '^python-dateutil==' constraints.txt > $(SERVER)/constraints.txt
	$(SERVER)/bin/python -m pip install -c $(SERVER)/constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(SERVER)/bin/python -m pip install -c $(SERVER)/constraints.txt -r tests/remote/server/requirements.txt
	$(SERVER)/bin/python -m pip install --no-deps --ignore-requires-python -r tests/remote/server/apart.txt
	@touch $@
