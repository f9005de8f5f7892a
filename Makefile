# Every target sets itself up: it creates the environment if it is missing or out of date, then runs.
PYTHON ?= python3
# The environment is keyed to the pins: another constraints.txt or pyproject.toml means another environment.
PINS := $(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
VENV := .venv-$(PINS)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAKE ?= demo-lake
BENCHES ?= efficiency peers memory start ingest decode reader training students

.PHONY: help env demo test test-unit test-pipeline bench check docs format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(READY):
	@echo "Creating $(VENV) (about two minutes, 6 GB) ..."
	$(PYTHON) -c 'import sys; sys.exit("mmkd needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	if [ -L .venv ] || [ ! -e .venv ]; then ln -sfn $(VENV) .venv; else echo 'kept your own .venv; activate $(VENV)'; fi
	touch $@

env: $(READY)  ## create the environment

demo: $(READY)  ## the whole pipeline on a laptop: corpus, teachers, lake, student, report
	$(BIN)/mmkd demo --lake $(LAKE)

test: test-unit test-pipeline  ## every test that needs no GPU

test-unit: $(READY)  ## fast tests without Ray
	$(BIN)/python -m pytest -n auto --dist loadfile

test-pipeline: $(READY)  ## local Ray, small real models, moto S3, real kills
	$(BIN)/python -m pytest -m 'ray and not gpu and not slow'

bench: $(READY)  ## every benchmark that needs no GPU (hours; BENCHES="reader decode" for some, BENCH="--runs 1" for a look)
	for one in $(BENCHES); do $(BIN)/python tests/benchmarks/bench_$$one.py $(BENCH) || exit 1; done

check: $(READY)  ## format, lint, spelling, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell common extractor trainer cluster tests docs *.md
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## write docs/teachers.md from the catalog and docs/tables.md from the schemas
	$(BIN)/python -m common.models.document
	$(BIN)/python -m common.table_docs

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove environments and caches (not your lakes)
	if [ -L .venv ]; then rm .venv; fi
	rm -rf .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
