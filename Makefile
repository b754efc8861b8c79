# `make demo` and `make test` need nothing but Python 3.11 or newer: each makes its virtual environment on first use.
PYTHON ?= python3
VENV ?= .venv
# What a machine without PyTorch gets, pip options included; pinned, so that no other package pulls another in.
TORCH ?= torch==2.13.0
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed

# Threads that wait must not spin: beside any other busy process, two spinning threads on two cores run ten times slower.
export OMP_WAIT_POLICY ?= passive

# The suite is thousands of small tests, so a process per core; more than eight gain little and each takes 1.5 GB.
PYTEST = $(RUN) -m pytest -q -n auto --maxprocesses 8 --dist worksteal
test test-full: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full lint format clean

demo: $(STAMP)
	$(RUN) -m ditfast.cli demo $(if $(PROCESS),--process $(PROCESS)) $(if $(OUT),--out $(OUT))

test: $(STAMP) lint
	$(PYTEST) --durations=10
	$(RUN) -m bench.chip stale

test-full: $(STAMP) lint
	$(PYTEST) --durations=20 -m "full or not full"

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# A PyTorch that this Python already has, a CUDA build for instance, is used as it is.
$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ditfast needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=..."; exit 1; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "using the PyTorch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV) && $(RUN) -m pip install -q $(TORCH); \
	fi
	$(RUN) -m pip install -q -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
