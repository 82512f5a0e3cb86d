# make demo   a working detector on synthetic images, from nothing but Python 3.11 or later
# make test   the fast tests; make check   linters, types, import contracts
FITS := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# Both are tried by running them: a name on the path can be a wrapper around a version that is not installed.
PYTHON ?= $(shell for python in python3.11 python3; do $$python $(FITS) 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow check clean

demo: $(VENV)/installed
	$(BIN)/retinanet demo

test: $(VENV)/installed-dev check
	$(BIN)/python -m pytest -m "not slow" --durations 30

slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow --durations 30

check: $(VENV)/installed-dev
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) $(FITS) 2>/dev/null || \
		{ echo "make: needs Python 3.11 or later; PYTHON=/path/to/python names it" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,all]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
