# Sightwire. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip, e.g. the index of PyTorch's CPU builds.
PIP_ARGS ?=
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
# pip's own output is long; one word for each package shows that it goes on.
PIP = $(BIN)/pip install --disable-pip-version-check $(PIP_ARGS)
PIP_PROGRESS = sed -u -n -e 's/^Collecting \([A-Za-z0-9_.-]*\).*/  \1/p' -e 's/^Installing collected.*/  unpacking (half a minute)/p'
say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: demo test check format bench clean

demo: $(VENV)/.demo
	$(call say,system packages for the RTSP camera (optional))
	@bash deploy/system-packages.sh demo || true
	$(call say,starting; the first start exports the pack)
	@$(BIN)/sightwire demo

test: $(VENV)/.dev
	$(call say,system packages for the end-to-end tests)
	@bash deploy/system-packages.sh test || true
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	@mkdir -p bench-results
	$(BIN)/sightwire export base
	$(BIN)/python -m bench.pipeline --json bench-results/pipeline.json

$(BIN)/python:
	$(call say,virtual environment in $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; give it as make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "apt-get install python3-venv, then try again"; exit 1; }

# The test environment holds everything of the demo's, so that one never undoes the other.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(call say,installing Sightwire and what it needs (a minute or two))
	@test -e $(VENV)/.dev || $(PIP) -e '.[demo]' | $(PIP_PROGRESS)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(call say,installing Sightwire with its tests and tools (a minute or two))
	@$(PIP) -e '.[dev]' | $(PIP_PROGRESS)
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-results
