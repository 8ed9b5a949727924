# Two commands: `make book` runs every chapter and builds the site, `make test` passes the tests.
# Each sets up what it needs. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --jobs=2

PYTHON ?= python3
# the versions to install; make CONSTRAINTS= takes the newest
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VERSIONS := $(VENV)/.versions
# progress bars would end up in the chapters' outputs
export TQDM_DISABLE := 1

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:%=_build/source/%)
READS := $(NOTEBOOKS:notebooks/%.ipynb=_build/reads/%.d)
PACKAGE := $(shell find salnb -name '*.py')
PAGES := _config.yml _toc.yml $(wildcard CHANGELOG.md LICENSE) $(shell find book -type f -not -path '*/__pycache__/*')

.PHONY: help env book test test-unit test-notebooks test-pages test-slow test-oldest test-oldest-quick test-colab test-recipes test-gpu
.PHONY: lint serve pdf notebook notebooks bench mutants clean

CHECK_PYTHON = command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): make PYTHON=…"; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

env: $(READY) $(VERSIONS)  ## create .venv with the package, its extras and the versions of constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(CHECK_PYTHON)
	@$(PYTHON) tools/install.py $(VENV) $(CONSTRAINTS:%=--constraint %) --editable '.[test,lint]'
	@$(BIN)/pip list --format freeze > $@

# newer only where an installation changed a version
$(VERSIONS): $(READY)
	@cmp --silent $< $@ || cp $< $@

# --- the book ---------------------------------------------------------------------------------------------

book: _build/site.stamp  ## execute all chapters and build the site into _build/html
	@echo "the book is in _build/html/index.html"

# A chapter depends on itself, on the installed versions, and on what its last run read of this tree: modules,
# records, scales. tools/reads.py writes that down; a chapter without such a file has not been run.
_build/source/notebooks/%.ipynb: notebooks/%.ipynb _build/reads/%.d tools/notebooks.py tools/reads.py $(VERSIONS)
	@echo "running $<"
	@$(BIN)/python -m tools.notebooks execute $< --to $@ --depfile $(word 2,$^)

$(READS): ;
include $(wildcard $(READS))
.PHONY: listing
listing:

# the page of the package's functions is made of its docstrings
_build/site.stamp: $(EXECUTED) $(PAGES) $(PACKAGE) tools/site.py
	$(BIN)/python -m tools.site
	touch $@

pdf: _build/site.stamp  ## print the site as one PDF, _build/html/salnb.pdf (needs Chromium)
	$(BIN)/python -m tools.pdf

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

# each uses both cores: together they run one after the other
ifneq ($(filter test,$(MAKECMDGOALS)),)
$(EXECUTED) test-notebooks: | test-unit
test-pages: | test-notebooks
endif

test-unit: $(READY)  ## test the package and the tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n 2 --dist loadfile --durations 20 --ignore tests/book/test_pages.py -m 'not slow'

test-notebooks: $(READY)  ## run the committed notebooks and compare their outputs
	$(BIN)/python -m pytest -n 2 --dist loadfile -p no:cacheprovider --nbval --nbval-current-env \
		--nbval-sanitize-with tests/book/nbval.cfg notebooks

test-pages: _build/site.stamp  ## test the built pages in headless Chromium
	$(BIN)/python -m pytest tests/book/test_pages.py

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=3600 --ignore tests/book/test_pages.py

# the oldest versions that pyproject.toml promises, in an environment of their own
OLDEST := .venv-oldest
OLDEST_PYTEST := OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider -m 'not slow'
NOT_PACKAGE := book tools test_makefile.py test_project.py test_workflows.py
QUICK := saliency objective double_backward test_losses.py test_trust.py test_pool.py

# some of them have wheels for no newer Python than 3.11; a name on the path may be of one that does not run
IS_OLDEST := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON_OLDEST = $(shell for python in $(PYTHON) python3.11; do \
	$$python -c '$(IS_OLDEST)' 2>/dev/null && echo $$python && break; done)

CHECK_PYTHON_OLDEST = test -n '$(PYTHON_OLDEST)' || \
	{ echo "the oldest versions need Python 3.11, and there is none: make PYTHON=…"; exit 1; }

.PHONY: has-python-oldest
has-python-oldest:
	@$(CHECK_PYTHON_OLDEST)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@$(CHECK_PYTHON_OLDEST)
	@$(PYTHON_OLDEST) tools/install.py $(OLDEST) --constraint constraints-oldest.txt --editable '.[train]' \
		foolbox hypothesis matplotlib pytest pytest-xdist seaborn timm
	@$(OLDEST)/bin/pip list --format freeze > $@

test-oldest: $(OLDEST)/.ready  ## test the package with the oldest versions that it promises
	$(OLDEST_PYTEST) tests $(NOT_PACKAGE:%=--ignore tests/%)

test-oldest-quick: $(OLDEST)/.ready  ## of these tests, what depends on PyTorch the most
	$(OLDEST_PYTEST) $(QUICK:%=tests/%) --ignore tests/objective/test_ddp.py

# as a reader on Colab has it: its PyTorch, to which the set-up cell adds the package; no source tree
COLAB := .venv-colab
COLAB_PACKAGES := 'torch==2.11.*' 'torchvision==0.26.*' ipykernel papermill

test-colab:  ## run every chapter from a wheel, in an environment that holds what Colab has
	@$(CHECK_PYTHON)
	rm -rf _build/colab $(COLAB)
	@trap 'rm -rf $(COLAB)' EXIT; \
	$(PYTHON) tools/install.py $(COLAB) $(COLAB_PACKAGES); \
	$(COLAB)/bin/pip wheel --quiet --no-deps --wheel-dir _build/colab .; \
	$(PYTHON) tools/install.py $(COLAB) "$$(echo _build/colab/*.whl)[chapters]"; \
	$(COLAB)/bin/python -P tools/elsewhere.py $(NOTEBOOKS) --outputs _build/colab

# the recipes of chapter 17 in the libraries that the book's environment does not have
RECIPES := .venv-recipes

test-recipes:  ## run the recipes of chapter 17 with transformers, Accelerate and PEFT
	@$(CHECK_PYTHON)
	@trap 'rm -rf $(RECIPES)' EXIT; \
	$(PYTHON) tools/install.py $(RECIPES) --editable '.[chapters,recipes]' hypothesis pytest; \
	$(RECIPES)/bin/python -m pytest -rs -p no:cacheprovider tests/objective/test_recipes.py

# with the Python at hand, as a machine with a GPU may have no network: nothing is installed
DEVICE := cuda
GPU_TESTS := gpu augment/test_devices.py augment/test_equivariance.py double_backward/test_functions.py \
	double_backward/test_fused.py double_backward/test_networks.py objective/test_compiled.py \
	objective/test_objective.py saliency/test_definitions.py saliency/test_methods.py \
	test_losses.py test_trust.py
GPU_NEEDS := torch torchvision pytest
CHECK_GPU_NEEDS = $(PYTHON) -c 'import importlib.util, sys; \
	lacks = [name for name in "$(GPU_NEEDS)".split() if importlib.util.find_spec(name) is None]; \
	sys.exit("$(PYTHON) has no " + " and no ".join(lacks) + ": make PYTHON=…" if lacks else 0)'

test-gpu:  ## test on a GPU, or DEVICE=cpu, with nothing but torch, torchvision and pytest
	@$(CHECK_PYTHON)
	@$(CHECK_GPU_NEEDS)
	@PYTHONPATH=$(CURDIR):$(CURDIR)/_build/gpu:$${PYTHONPATH:-} PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTHON) -m pytest -p no:cacheprovider --device $(DEVICE) -m on_device \
		-rs --durations 20 $(GPU_TESTS:%=tests/%)

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

clean:  ## remove everything that was built; the environments stay
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis
