# make demo, make test: everything that they need is set up on first use, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-long lint types gpu clean

demo: $(STAMP)
	$(BIN)/camshaft demo

test: $(STAMP) lint types
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not long"

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	@rm -rf .typecheck && mkdir -p .typecheck/camshaft
	@cd .typecheck/camshaft && ln -s ../../camshaft/* . && for folder in graph models passes export runtime; do ln -s ../../$$folder $$folder; done
	MYPYPATH=.typecheck $(BIN)/mypy -p camshaft

# What compiles for minutes.
test-long: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m "long and not gpu"

# On a machine with a CUDA GPU and the packages already there.
gpu:
	$(PYTHON) -m pytest -q -m gpu

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .typecheck .pytest_cache .mypy_cache .ruff_cache
