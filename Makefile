# make demo, make test and make quality each create $(VENV) when needed; after that nothing touches the network.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

export HF_HUB_OFFLINE ?= 1

INSTALLED := $(VENV)/.installed

.PHONY: help demo test quality format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /make \1: /p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## pre-train both models on the documentation of the Python at hand
	$(VENV)/bin/python examples/quickstart.py $(ARGS)

test: $(INSTALLED)  ## all tests, offline, on the CPU; ARGS="-k index" chooses some
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

quality: $(INSTALLED)  ## lint and format checks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)  ## mend what make quality finds, where ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove $(VENV) and what builds and tests leave behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else \
	"Python 3.11 to 3.13 is needed, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test,examples]'
	@touch $@
