# make demo, make test, make docs: each builds the environment .venv the first time.
PYTHON ?= python3
VENV ?= .venv
# Installed first, with exact versions, so that no other package changes the build.
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Requires torch 1.13, so it is installed without its dependencies; the extra [fastreid] has them.
FASTREID ?= fastreid==1.4.0
# Folder and host of the demo.
OUT ?= demo-output
HOST ?= torchreid

INSTALLED = $(VENV)/.installed

.PHONY: demo test check docs upstream clean

demo: $(INSTALLED)
	$(VENV)/bin/csalr demo --out $(OUT) --host $(HOST)

test: check
	$(VENV)/bin/python -m pytest --ignore-glob='*processes.py'
	# Not in parallel: each of these tests starts several processes.
	$(VENV)/bin/python -m pytest --numprocesses=0 tests/test_processes.py tests/test_fastreid_processes.py

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in docs/_build/html.
docs: $(INSTALLED)
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

# TORCHREID_REPO, FASTREID_REPO: clones of the hosts' repositories, one or both.
upstream: $(INSTALLED)
	@test -n "$(TORCHREID_REPO)$(FASTREID_REPO)" || { echo "give clones: make upstream TORCHREID_REPO=CLONE FASTREID_REPO=CLONE"; exit 2; }
	$(if $(TORCHREID_REPO),$(VENV)/bin/python projects/upstream/check.py torchreid '$(TORCHREID_REPO)')
	$(if $(FASTREID_REPO),$(VENV)/bin/python projects/upstream/check.py fastreid '$(FASTREID_REPO)')

$(INSTALLED): setup.cfg pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,torchreid,fastreid,bench,export,docs]'
	$(VENV)/bin/python -m pip install --quiet --no-deps $(FASTREID)
	touch $@

clean:
	rm -rf $(VENV) .venv-linters build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
