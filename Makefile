# The README's commands. Each sets up what it needs, on a machine with python3 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes of one thread each: more threads than cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all lint wheel docs bench bench-methods clean

demo: .venv/demo
	$(BIN)/python docs/demo/demo.py

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: .venv/dev
	$(PYTEST)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: .venv/dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(BIN)/check-wheel-contents dist

docs: .venv/demo
	$(BIN)/python docs/pictures.py

bench: .venv/bench
	$(BIN)/python docs/benchmarks/headers.py
	$(BIN)/python docs/benchmarks/merge.py

bench-methods: .venv/bench
	$(BIN)/python docs/benchmarks/methods.py
	$(BIN)/python docs/benchmarks/initialisation.py

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and pinned: a range would take a build with gigabytes of CUDA.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/bench: .venv/torch pyproject.toml
	$(PIP) --editable '.[bench]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@
