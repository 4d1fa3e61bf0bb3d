# Everything here works on a machine with nothing but Python 3.11 or later: each target makes the virtual environment
# that it needs. PYTHON=/path/to/python3.12 chooses another interpreter, VENV=DIR another place.

VENV ?= .venv
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do $$name $(NEW_ENOUGH) && echo $$name && break; done)
endif
BIN := $(VENV)/bin

.PHONY: help demo test test-all lint docs clean

help:
	@echo "make demo      install into $(VENV), boot a TD, explore every interleaving of a lock program"
	@echo "make test      the fast test suite"
	@echo "make test-all  all tests, the slow ones too"
	@echo "make lint      ruff, mypy and the room order"
	@echo "make docs      the documentation, into site/"
	@echo "make clean     remove $(VENV), site/ and caches"

demo: $(VENV)/.septum
	$(BIN)/septum boot
	$(BIN)/septum explore trylock --param rounds=2

test: $(VENV)/.septum-dev
	$(BIN)/pytest

test-all: $(VENV)/.septum-dev
	$(BIN)/pytest -m ""

lint: $(VENV)/.septum-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.septum-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .import_linter_cache

# One stamp per set of dependencies; it is as old as the last installation, so a second run installs nothing.
$(VENV)/.septum: EXTRA :=
$(VENV)/.septum-dev: EXTRA := [dev]
$(VENV)/.septum-docs: EXTRA := [docs]
$(VENV)/.septum $(VENV)/.septum-dev $(VENV)/.septum-docs: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "septum needs Python 3.11 or later: install it, or say make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" $(NEW_ENOUGH) || \
		{ echo "septum needs Python 3.11 or later, and $(PYTHON) is not: say make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null && "$(PYTHON)" -m venv $(VENV); } || \
		{ echo "septum needs Python's venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@echo "installing septum$(EXTRA) into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".$(EXTRA)"
	@touch $@
