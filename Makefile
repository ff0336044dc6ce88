# SPDX-License-Identifier: Apache-2.0
# The verbs of this repository; CI uses the same ones. Verbs that need the environment run `make setup` first if it is out of date.

READY := .venv/.setup-stamp
BIN := .venv/bin
DEMO := examples/fashion-mnist

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint bench clean dist golden

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## Make .venv with the versions of constraints.txt (PYTHON=..., PIP_EXTRA_INDEX_URL=...)

demo: $(READY) ## Build examples/fashion-mnist for this machine, then for a Raspberry Pi 4 that is not connected
	$(BIN)/python $(DEMO)/fetch.py && $(BIN)/edgekd build --recipe $(DEMO)/edgekd.toml --target host && $(BIN)/edgekd build --recipe $(DEMO)/edgekd.toml --target rpi4 --inconclusive-ok

test: $(READY) ## Run the suite (ARGS="-k cache")
	$(BIN)/python -m pytest -m "not long and not device" -n 2 --dist loadfile $(ARGS)

test-long: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(READY) ## Check style, types and layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: $(READY) ## Run the benchmarks, which print ratios
	set -e; for program in benchmarks/*.py; do $(BIN)/python $$program; done

clean: ## Remove build outputs; .venv, fetched data and the cache stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache examples/*/build

dist: $(READY) ## Make the wheel and the source archive in dist/
	$(BIN)/python -m build --no-isolation

golden: $(READY) ## Rewrite the golden files; review the diff before you commit it
	EDGEKD_GOLDEN=1 $(BIN)/python -m pytest tests/golden

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh
