# The README's commands. Each sets up what it needs, on a machine with python3 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes of one thread each: more threads than cores wait for each other. COVERAGE=1 adds to the coverage data.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(if $(COVERAGE),--cov --cov-append --cov-report=)
# Percent of lines and branches that the whole test suite reaches, in this process and its workers.
FLOOR := 98
# The slow tests to run; CI leaves out those that depend on what else the machine does.
SLOW ?= slow

.PHONY: demo test test-slow test-all test-lowest test-pythons coverage coverage-report format lint wheel examples docs reference pictures \
	bench bench-methods clean

demo: .venv/demo
	$(BIN)/python docs/demo/demo.py

test: .venv/dev
	$(PYTEST) -m "not slow"

test-slow: .venv/dev
	$(PYTEST) -m "$(SLOW)"

test-all: .venv/dev
	$(PYTEST)

# With the lowest versions that pyproject.toml allows.
test-lowest: .venv/dev
	$(BIN)/nox -s lowest

# With each of Python 3.11 to 3.13 that is installed.
test-pythons: .venv/dev
	$(BIN)/nox -s tests

coverage: .venv/dev
	rm -f .coverage .coverage.*
	$(MAKE) test-all COVERAGE=1
	$(MAKE) coverage-report

coverage-report: .venv/dev
	$(BIN)/coverage report --fail-under=$(FLOOR)

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini docs tests tools noxfile.py
	$(BIN)/lint-imports

wheel: .venv/dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(BIN)/check-wheel-contents dist

# As users of plugins have them: in an environment of their own, with the wheel; and a plugin that was just begun.
examples: HOME_BIN := $(CURDIR)/.venv/examples/bin
examples: INSTALL = $(HOME_BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
examples: wheel
	rm -rf .venv/examples
	$(PYTHON) -m venv .venv/examples
	$(INSTALL) torch hatchling pytest
	$(INSTALL) dist/*.whl
	$(HOME_BIN)/adapt plugins new begun -o .venv/examples/torchgraft-begun
	for plugin in docs/examples/torchgraft-* .venv/examples/torchgraft-begun; do \
		$(INSTALL) --no-build-isolation $$plugin && (cd $$plugin && PATH=$(HOME_BIN):$$PATH pytest -q -p no:cacheprovider) || exit 1; \
	done
	$(HOME_BIN)/adapt plugins check ia3
	$(HOME_BIN)/adapt plugins check begun

docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

reference: .venv/dev
	$(BIN)/python docs/reference.py

pictures: .venv/demo
	$(BIN)/python docs/pictures.py

bench: .venv/bench
	$(BIN)/python docs/benchmarks/headers.py
	$(BIN)/python docs/benchmarks/merge.py
	$(BIN)/python docs/benchmarks/speed.py
	$(BIN)/python docs/benchmarks/unmerge.py
	$(BIN)/python docs/benchmarks/comparison.py

bench-methods: .venv/bench
	$(BIN)/python docs/benchmarks/methods.py
	$(BIN)/python docs/benchmarks/initialization.py

clean:
	rm -rf .venv .nox dist docs/_build .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and pinned: a range would take a build with gigabytes of CUDA.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

# One rule for every extra of pyproject.toml that a target needs.
.venv/demo .venv/bench .venv/docs .venv/lint .venv/dev: .venv/%: .venv/torch pyproject.toml
	$(PIP) --editable '.[$*]'
	touch $@
