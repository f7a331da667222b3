# Each target is a line or two of plain pip and Python; README.md shows them for those without make.
# Paths are relative, so that the checkout may lie in a folder with spaces in its name.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean

demo: .venv/installed
	$(BIN)/distill run digits --fresh

test: .venv/tools
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/tools
	$(BIN)/python -m pytest -m "slow or gpu"

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/tools: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist build
