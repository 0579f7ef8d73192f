# Two commands do all their own set-up: `make demo` and `make test`.

PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs bench clean

demo: $(VENV)/run
	@echo "starting emulated providers and a receiver …"
	@$(BIN)/receiver demo

# The tests start many processes: without bytecode each would compile everything anew.
test: $(VENV)/dev
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest

lint: $(VENV)/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: $(VENV)/dev
	@$(BIN)/python -m tests.openapi
	@$(BIN)/python -m tests.demo

bench: $(VENV)/dev
	@$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it, or call make PYTHON=…"; exit 1; }
	@echo "making a virtual environment in $(VENV) with $(PYTHON), which takes some seconds …"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing the receiver and some forty packages that it uses there, once: a minute or two …"
	@$(PIP) -e '.[storage]'
	@touch $@

$(VENV)/dev: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing the receiver there, with all that its tests use, once: some minutes …"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/run
