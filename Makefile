# `make demo` and `make test` do everything on a fresh machine: environment, then the job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Videos, weights and pictures beside the project; tests that need them are skipped where they are absent.
export JEPA_SHARED ?= $(abspath ../shared)
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-slow lint docs install clean

demo: install
	$(BIN)/video-jepa demo

test: install lint
	$(TEST)

test-slow: install
	$(TEST) -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages as a site, in site/index.html; what it warns of, such as a link that leads nowhere, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install: $(VENV)/installed

# Exactly the versions that CI ran; `pip install .` alone takes what the lower bounds admit.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "video-jepa needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
