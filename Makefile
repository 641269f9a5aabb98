# The two commands a newcomer needs: `make run` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test check setup setup-test format lint types contracts unit conformance system faults lock clean

run: setup  ## set up and start everything on this machine: drop a file, see its verdict
	@$(BIN)/bucketward up

test: setup-test  ## set up and run every check and every test
	@$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest

check: setup  ## what must pass before each commit, under a minute
	@$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest -q tests/unit tests/house

setup: $(VENV)/.done  ## the virtual environment and what running needs from the system
	@scripts/system-packages run

setup-test: setup
	@scripts/system-packages test

$(VENV)/.done: requirements-dev.txt pyproject.toml
	@scripts/system-packages python
	$(PYTHON) -c 'import sys; sys.exit("Bucketward needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 setup" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

unit conformance system: setup-test
	$(BIN)/python -m pytest tests/$@

faults: setup-test  ## kill agents a thousand times, as in docs/faults.md; make faults FAULTS='--seed 7'
	PYTHONPATH=tests $(BIN)/python -m faults.run_faults $(FAULTS)

PIP_COMPILE = $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links

lock:  ## pin the dependencies anew
	$(PIP_COMPILE) --upgrade --all-extras -o requirements-dev.txt pyproject.toml
	$(PIP_COMPILE) --extra aws --extra chat --extra yara -c requirements-dev.txt -o requirements.txt pyproject.toml

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
