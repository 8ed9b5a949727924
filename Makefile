# Two commands: `make book` runs every chapter and builds the site, `make test` passes the tests.
# Each sets up what it needs. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --jobs=2

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# progress bars would end up in the chapters' outputs
export TQDM_DISABLE := 1

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:%=_build/source/%)
PACKAGE := $(shell find salnb -name '*.py')
RECORDS := $(wildcard results/*.json notebooks/scales/*.yml)
PAGES := _config.yml _toc.yml $(shell find book -type f -not -path '*/__pycache__/*')

.PHONY: help env book test test-unit test-notebooks test-pages test-slow lint serve notebook notebooks bench mutants clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

env: $(READY)  ## create .venv with the package, its extras and the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

# --- the book ---------------------------------------------------------------------------------------------

book: _build/site.stamp  ## execute all chapters and build the site into _build/html
	@echo "the book is in _build/html/index.html"

# a chapter depends on itself, on the package it shows and on the records it reads
_build/source/notebooks/%.ipynb: notebooks/%.ipynb $(PACKAGE) $(RECORDS) tools/notebooks.py $(READY)
	@echo "running $<"
	@$(BIN)/python -m tools.notebooks execute $< --to $@

_build/site.stamp: $(EXECUTED) $(PAGES) tools/site.py
	$(BIN)/python -m tools.site
	touch $@

serve: book  ## show the site on port 8000 of this machine
	$(BIN)/python -m http.server --directory _build/html --bind 127.0.0.1 8000

notebooks: $(EXECUTED)  ## run the chapters and write their outputs back into notebooks/
	for executed in $(EXECUTED); do cp $$executed notebooks/; touch $$executed; done
	$(BIN)/python -m tools.notebooks lint $(NOTEBOOKS)

notebook: $(filter _build/source/notebooks/$(N)-%,$(EXECUTED))  ## make notebook N=06: the same for one chapter
	test -n "$^" || { echo "which chapter? make notebook N=06"; exit 2; }
	cp $^ notebooks/
	touch $^
	$(BIN)/python -m tools.notebooks lint notebooks/$(N)-*.ipynb

# --- checks -----------------------------------------------------------------------------------------------

test: test-unit test-notebooks test-pages  ## pass all tests: package, notebooks, pages

# one after the other: each uses both cores
test-unit: $(READY)  ## test the package and the tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore tests/book/test_pages.py -m 'not slow'

test-notebooks: test-unit $(EXECUTED)  ## run the committed notebooks and compare their outputs
	$(BIN)/python -m pytest -n 2 --dist loadfile -p no:cacheprovider --nbval --nbval-current-env \
		--nbval-sanitize-with tests/book/nbval.cfg notebooks

test-pages: test-notebooks _build/site.stamp  ## test the built pages in headless Chromium
	$(BIN)/python -m pytest tests/book/test_pages.py

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --ignore tests/book/test_pages.py

lint: $(READY)  ## ruff, mypy and the rules for notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.notebooks lint $(NOTEBOOKS)

bench: $(READY)  ## print speeds, each as a ratio of two things measured in one run
	for file in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py); done

MINUTES := 30
SAMPLE := 200
SEED := 0
mutants: $(READY)  ## make mutants MINUTES=30 SAMPLE=200 SEED=0: break the package, see which tests notice
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.mutants --minutes $(MINUTES) --sample $(SAMPLE) --seed $(SEED) $(if $(AGAIN),--again)

clean:  ## remove everything that was built; .venv stays
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis
