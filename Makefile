# make demo   text from the embedded model; installs what it needs into .venv first
# make test   the tests
# make lint   ruff and pyright
# make notebooks   colab/*.ipynb from their texts, colab/*.py
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
CORE := $(VENV)/.core
TEST := $(VENV)/.test

.PHONY: demo test lint notebooks clean

demo: $(CORE)
	$(BIN)/optjax generate "The old house stood at the end of the road, and"

# `make test ARGS="tests/test_tokenizer.py -k padding"` runs a part. Two processes side by side: compiling takes one core.
test: $(TEST)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	VENV="$(VENV)" .ci/typecheck

notebooks: $(TEST)
	$(BIN)/python colab/pair.py

clean:
	rm -rf $(VENV) build dist *.egg-info

# A stamp per set of dependencies: pip runs again only when pyproject.toml or the tested versions change.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "optjax needs Python 3.11 or later; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(TEST): pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]' --constraint .ci/constraints.txt
	@touch $(CORE) $@
