# make demo, make test: each builds its own environment in .venv first, once.
PYTHON ?= python3
VENV ?= .venv
# Named first and exactly, so that no other package pulls in another build.
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Of the demo's data and results.
OUT ?= demo-output

INSTALLED = $(VENV)/.installed

.PHONY: demo test check clean

demo: $(INSTALLED)
	$(VENV)/bin/csalr demo --out $(OUT)

test: check
	$(VENV)/bin/python -m pytest

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): setup.cfg pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
