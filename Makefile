# make demo: a first look. make test: everything the project promises, checked.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARAMS ?= params/digits.yaml

# PyTorch's threads sleep while they wait, instead of spinning.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install conda demo test coverage lab run bench bench-threads bench-paper report docs schema notebooks clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/installed  ## makes .venv with the pinned stack

REQUIREMENTS := requirements.txt requirements-lab.txt requirements-test.txt requirements-cluster.txt \
  requirements-docs.txt

$(VENV)/installed: $(REQUIREMENTS) requirements-nodeps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer; pass make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(REQUIREMENTS:%=-r %)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

conda:  ## completes an activated conda environment
	python -m pip install --no-deps -r requirements-nodeps.txt
	python -m pip install --no-deps -e .

demo: install  ## the main job on the embedded digits: notebooks, figures, results table
	$(BIN)/python -m advkip.run --force params/digits.yaml
	$(BIN)/python -m advkip.report --runs digits --output reports/digits/index.html

run: install  ## make run PARAMS=params/x.yaml
	$(BIN)/python -m advkip.run $(PARAMS)

lab: install  ## JupyterLab on the project, at the walkthrough; make lab ARGS=--no-browser
	$(BIN)/jupyter lab --ServerApp.root_dir=. $(ARGS) notebooks/00_walkthrough.ipynb

# Programs that one test compiles serve the others, and the notebooks.
test: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/build/jax-cache
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: install  ## ruff, mypy, pytest, the notebooks on their small defaults, the documentation
	rm -rf reports/scratch build/jax-cache
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m advkip.docs & docs=$$!; wait $$types && wait $$docs
	$(BIN)/python -m pytest -n 3 --dist loadfile --nbval-lax --nbval-cell-timeout=600 notebooks tests

coverage: install  ## which lines of the package no test runs
	$(BIN)/python -m pytest -n 3 --dist loadfile --cov=advkip --cov-report=term-missing:skip-covered

bench: install  ## the engine against neural_tangents references: 13 minutes
	$(BIN)/python -m tests.bench

bench-threads: install  ## threads that sleep against threads that spin: eleven minutes
	$(BIN)/python -m tests.bench threads

bench-paper: install  ## one outer step at the paper's largest setting: 9 GB, nine minutes
	$(BIN)/python -m tests.bench paper_scale

RECORDS = $$(git ls-files "reports/*/results.json")

report: install  ## reports/index.html, reports/README.md and the README's table from the records
	$(BIN)/python -m advkip.texts README.md reports/README.md $(RECORDS)
	$(BIN)/python -m advkip.report --runs $$(dirname $(RECORDS) | xargs -n 1 basename | LC_ALL=C sort)

docs: install  ## the documentation as a static site, build/site/index.html
	$(BIN)/python -m advkip.docs

schema: install  ## params/schema.json from the settings, for editors
	$(BIN)/python -m advkip.config > params/schema.json

notebooks: install  ## notebooks/*.ipynb from notebooks/*.py (cells that stay keep their ids)
	for n in notebooks/*.py; do $(BIN)/jupytext --quiet --update --to ipynb $$n; done

clean:  ## removes .venv and caches
	rm -rf $(VENV) .coverage .mypy_cache .pytest_cache .ruff_cache *.egg-info
