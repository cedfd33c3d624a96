# `make demo` runs the main job, `make test` the tests: each makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell (cat settings.ini setup.py pyproject.toml fasterkd/__init__.py; pwd) | cksum | cut -d' ' -f1)

export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

$(shell $(BIN)/python -c 'import pip' 2>/dev/null || rm -f $(VENV)/.installed-* $(BIN)/python)

.PHONY: install demo test prepare tutorials check clean
install: $(STAMP)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.10 or newer, or give one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10))' || { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/a/newer/one" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) cannot make environments: apt-get install python3-venv, or make PYTHON=/path/to/another" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(STAMP): | $(BIN)/python
	@echo "installing fasterkd and what it needs into $(VENV) (about 2 minutes and 6 GB the first time)"
	@rm -f $(VENV)/.installed-*
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python -m fasterkd

test: install
	$(BIN)/python -m pytest -q -rs

prepare: install
	$(BIN)/nbdev-export
	$(BIN)/nbdev-test --save --n-workers 0 --skip-folder-re '^[_.]|tutorials'
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

# the tutorials in full, with their outputs: minutes each, CIFAR-10 two hours on one core; the tests run a quick form and save nothing
tutorials: install
	FASTERKD_FULL=1 $(BIN)/nbdev-test --save --n-workers 0 --cell-timeout 0 nbs/tutorials
	$(BIN)/nbdev-clean

check: install
	PATH="$(abspath $(BIN)):$$PATH" tools/check.sh

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _docs
