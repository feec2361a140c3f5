# Everything runs in .venv, which the first target that needs it makes. `make` lists the targets.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=

bin := .venv/bin
pip := $(bin)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow check lint types docs docs-serve format bench readme clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready .venv/.ready-docs ## Make .venv: torch, nestvec with every extra, the tools for tests and docs

demo: .venv/.ready ## The whole story on this machine's own text, ends in a report (ARGS="path" for yours)
	@$(bin)/nestvec demo $(ARGS)

test: .venv/.ready ## Tests and doctests, minutes (ARGS="-k search" to choose)
	@$(bin)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu and not download" $(ARGS)

test-slow: .venv/.ready ## The tests that take longer, too
	@$(bin)/python -m pytest -q -n auto --dist loadfile -m "not gpu and not download" $(ARGS)

check: lint types test docs ## All that has to be green before a commit is shared

lint: .venv/.ready ## ruff: rules and format
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

format: .venv/.ready ## Let ruff mend what it can
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

types: .venv/.ready ## pyright over the package and the tests
	@$(bin)/pyright

docs: .venv/.ready-docs ## Build the pages into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=true $(bin)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

docs-serve: .venv/.ready-docs ## The pages on localhost:8000, rebuilt as you write
	@NO_MKDOCS_2_WARNING=true $(bin)/mkdocs serve

bench: .venv/.ready ## One benchmark into benchmarks/results/NAME.json (NAME=adaptor)
	@test -n "$(NAME)" && test -f "benchmarks/$(NAME).py" || { \
	  echo "make bench NAME=<one of: $(sort $(filter-out readme,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))))>" >&2; exit 2; }
	@$(bin)/python benchmarks/$(NAME).py $(ARGS)

readme: .venv/.ready ## Fill the tables of README and docs from benchmarks/results
	@$(bin)/python benchmarks/readme.py

clean: ## Remove what can be made again, .venv included
	@rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and made last, so a setup that failed or was interrupted runs again.
# torch comes before anything that depends on it: asked for by name, pip takes the wheel that fits
# this machine. pip is upgraded because dependency groups need 25.1.
.venv/.ready: pyproject.toml
	@rm -f .venv/.ready .venv/.ready-docs
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nestvec needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.11 ...")'
	@echo "setup 1/4: .venv"
	@$(PYTHON) -m venv .venv
	@$(pip) install --upgrade pip
	@echo "setup 2/4: $(TORCH)"
	@$(pip) install $(TORCH)
	@echo "setup 3/4: nestvec with every extra (about 1 GB)"
	@$(pip) install --editable '.[all]'
	@echo "setup 4/4: tools for the tests"
	@$(pip) install --group dev
	@touch $@

.venv/.ready-docs: .venv/.ready
	@echo "setup: tools for the docs"
	@$(pip) install --group docs
	@touch $@
