# Everything runs in .venv, which the first target that needs it makes. Python 3.11 or newer, make
# and git are all that a machine must have.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
BUILT := _build/.built
BOOK_SOURCES := $(NOTEBOOKS) $(wildcard phase2/*.py) _config.yml _toc.yml \
    $(shell find book -type f -not -path '*.egg-info/*' -not -path '*/__pycache__/*')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install book test lab serve notebooks package mutants clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install everything (the other targets do it when needed)

$(INSTALLED): pyproject.toml constraints.txt book/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Phase 2 needs Python 3.11 or newer: make PYTHON=python3.x" \
	    if sys.version_info < (3, 11) else 0)'
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): this takes some minutes the first time."
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[book,test,train]' -e book
	@touch $@

# A book that built with warnings is built whole the next time: Sphinx does not repeat them.
$(BUILT): $(INSTALLED) $(BOOK_SOURCES)
	$(RUN) phase2_book.exporter --check
	$(VENV)/bin/jupyter-book build . --all -W -n --keep-going
	@touch $@

book: $(BUILT)  ## build the book
	@echo
	@echo "The book is $(CURDIR)/_build/html/index.html"
	@echo "Open that file in a browser (it needs no network), or serve it with: make serve"

test: $(BUILT)  ## unit tests, every notebook as a test, the exporter's check, the book without warnings
	$(RUN) ruff check .
	$(RUN) pytest tests
	$(RUN) pytest $(NOTEBOOKS) --nbval --nbval-current-env --nbval-cell-timeout=240 \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg -n 2 --dist loadfile

lab: $(INSTALLED)  ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab --notebook-dir=. notebooks

serve: $(BUILT)  ## serve the book at http://127.0.0.1:8000, or another PORT=…
	$(RUN) http.server $(PORT) --bind 127.0.0.1 --directory _build/html

notebooks: $(INSTALLED)  ## run every notebook and store its outputs
	$(RUN) phase2_book.exporter
	$(RUN) phase2_book.execute $(NOTEBOOKS)
	$(RUN) phase2_book.picture notebooks/01_decay.ipynb picture book/assets/picture.png
	$(RUN) phase2_book.exporter --check

package: $(INSTALLED)  ## write phase2/ from the notebooks
	$(RUN) phase2_book.exporter
	@rm -rf build  # pip would install what an earlier build has left there

mutants: $(INSTALLED)  ## break the functions of the mechanisms one by one: does anything notice?
	$(VENV)/bin/python tests/mutation.py

clean:  ## remove what was built; .venv stays
	rm -rf _build build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
