# One command each; the first of them sets up .venv, and again only when pyproject.toml or constraints.txt changes.
#   make PYTHON=python3.12 demo    takes another Python (3.11 or newer) for .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: byte code is written for what is imported, not for the thousands of modules that never are.
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input -c constraints.txt
DEV_EXTRAS := offline,pdf,fonts,train,langchain,langchain-agents,llama-index,ray,remote,serve,notebooks,docs,dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs dist clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Index the bundled corpus, compress it, ask it questions: offline, on any machine
	@$(BIN)/vist-rag demo

# Processes of one thread each: two of several threads slow each other down. Files stay whole, for what they share.
test: $(VENV)/.installed-dev  ## The test suite; make test ARGS="-k layout" passes arguments on
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# No cache for lint-imports: it keeps what it resolved when a module was still missing.
lint: $(VENV)/.installed-dev  ## Style, types, layers, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/codespell

# A notebook that fails is an error. Each is executed again only when it changes; ARGS="-D nb_execution_mode=off": none is.
docs: $(VENV)/.installed-dev  ## The documentation as HTML, in docs/_build/html; every notebook is executed
	@OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b html $(ARGS) docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The wheel is installed into an environment of its own, without the checkout: what users will have.
dist: $(VENV)/.installed-dev  ## Wheel and sdist, in dist/, installed into a clean environment and tried there
	@$(BIN)/python .ci/dist.py $(ARGS)

clean:  ## Remove .venv and whatever was built or cached
	rm -rf $(VENV) dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vist-rag needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing vist-rag into $(VENV) (a few minutes the first time) ..."
	@$(PIP_INSTALL) -e '.[offline]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests, linters and documentation into $(VENV) ..."
	@$(PIP_INSTALL) -e '.[$(DEV_EXTRAS)]'
	@touch $@
