# Every target installs what it needs into .venv first; after that `make install` takes no time.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
FRESH_OPTION = $(if $(FRESH),--fresh $(FRESH))
KEEP_OPTION = $(if $(KEEP),--keep $(KEEP))
BACKBONE_OPTION = $(if $(BACKBONE),--backbone $(BACKBONE))
STRIP := $(BIN)/nbstripout --extra-keys metadata.language_info
PARALLEL := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: help install reproduce test test-slow test-graphs test-8bit smoke demo lab lint strip lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED) ## the environment in .venv, from requirements.lock

# Bytecode now: where Python may not write it, every stage would spend half a minute on compiling what it imports.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements.lock)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

reproduce: install ## every table and figure; JOBS=2 stages at a time; FRESH=grid, students or all: run those anew
	$(BIN)/python -m gad.pipeline reproduce --jobs $(JOBS) $(FRESH_OPTION)

test: install ## the tests that take seconds each
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: install ## those that train, are killed and go on, or run the study notebooks
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not pipeline"

test-graphs: install ## the whole graph at its smallest in copies: `smoke` from nothing, changed; photographs; a fork
	$(BIN)/python -m pytest $(PARALLEL) -m pipeline

test-8bit: install ## those of the 8-bit optimiser, with bitsandbytes beside the environment
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target build/8bit --no-deps bitsandbytes==0.50.2
	PYTHONPATH=build/8bit $(BIN)/python -m pytest tests/test_memory.py -k 8_bits

smoke: install ## the whole graph from nothing at its smallest, in a temporary copy; KEEP=FOLDER keeps it there
	$(BIN)/python -m gad.pipeline smoke --jobs $(JOBS) $(KEEP_OPTION)

demo: install ## a student without and one with GAD, side by side, in demo/; BACKBONE=... is theirs
	$(BIN)/python -m gad.pipeline demo --jobs $(JOBS) $(BACKBONE_OPTION)

lab: install ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir . --LabApp.default_url=/lab/tree/notebooks

lint: install ## ruff, and that the notebooks hold no outputs
	$(BIN)/ruff check .
	$(STRIP) --verify notebooks/*.ipynb notebooks/study/*.ipynb

strip: install ## outputs out of the notebooks (DVC takes a notebook with outputs for a changed one)
	$(STRIP) notebooks/*.ipynb notebooks/study/*.ipynb

lock: install ## requirements.lock from pyproject.toml, keeping versions; UPGRADE=1 takes the newest
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --output-file requirements.lock

clean: ## training states, scratch copies and caches of tools; no result
	rm -rf data/.resume demo build .pytest_cache .ruff_cache
	find gad notebooks tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
