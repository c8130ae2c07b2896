# The whole project from one place. Everything is installed into .venv from the hash-locked uv.lock;
# uv itself comes by pip, into a virtualenv of its own, because it removes from .venv whatever the
# lock does not name.

PYTHON ?= python3
VENV ?= .venv
# The one place that says which uv.
UV_VERSION := 0.13.8

BIN := $(VENV)/bin
TOOLS := .venv-uv
UV := $(TOOLS)/$(UV_VERSION)/bin/uv
READY := $(VENV)/.ready

# Tests start a thousand processes. Where bytecode may not be written each compiles all anew, which
# makes the suite a quarter slower.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test coverage lint bench up docs test-pythons install clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Export a sample database with real servers and workers, and check every file
	$(BIN)/python -m examples.export.demo

test: $(READY) ## Run every test, with coverage of lines and branches
	$(BIN)/pytest -n 4 --dist worksteal --cov --cov-report=term-missing:skip-covered

coverage: $(READY) ## The same, and count the lines that workers and other processes run
	$(BIN)/pytest -n 4 --dist worksteal --cov --cov-config=tests/coverage-everywhere.ini \
	    --cov-report=term-missing:skip-covered

lint: $(READY) ## Check style, types and which part may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Measure
	$(BIN)/python -m benchmarks

up: $(READY) ## Run servers, worker, beat and Flower with the demo's jobs until ^C
	$(BIN)/dispatcher standalone --jobs examples/export/jobs.yaml \
	    --database shop --prepare "python3 -m examples.export.make_shop"

docs: $(READY) ## Write the generated parts of the documentation
	$(BIN)/python scripts/generate_docs.py

test-pythons: ## Run every test on each supported Python that is installed, in a .venv-3.x of its own
	@bash scripts/each-python.sh '$(MAKE)'

install: $(READY) ## Make .venv and nothing else

clean: ## Remove the virtualenvs, the demo's files and its data; not while something runs
	rm -rf .venv .venv-* demo-out .dispatcher

$(UV):
	@bash scripts/check-python.sh '$(PYTHON)'
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)/$(UV_VERSION)
	$(TOOLS)/$(UV_VERSION)/bin/python -m pip install --quiet --disable-pip-version-check \
	    uv==$(UV_VERSION)

# The interpreter by its full path, and not one of a virtualenv that uv may be about to replace: uv
# must take the one that was asked for, and fetch none. It trusts whom the system trusts, as pip did
# that fetched it: behind a proxy that opens TLS, only the system knows the proxy's authority.
$(READY): uv.lock pyproject.toml | $(UV)
	@bash scripts/check-python.sh '$(PYTHON)'
	UV_PROJECT_ENVIRONMENT=$(VENV) UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=$${UV_SYSTEM_CERTS:-true} \
	UV_PYTHON="$$($(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')" \
	    $(UV) sync --quiet --frozen --all-extras --compile-bytecode
	@touch $@
