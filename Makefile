# The commands of the README. Everything goes into .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# `make train ARGS="trainer.max_time=00:00:05:00"` passes more settings on.
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test soak cpus coverage lint types docs constraints

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 22

setup: $(VENV)/installed  ## create .venv with the pinned versions

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone: it decides which build the rest is resolved against
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: setup  ## train on Shakespeare for about three minutes and continue three sentences
	$(BIN)/triton-gru-train experiment=quickstart $(ARGS)
	$(BIN)/triton-gru-predict prompt="To be, or not to be" num_sentences=3

test: setup  ## run all tests but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak" $(ARGS)

soak: setup  ## run the long tests: killed sweeps and runs, machines of their own network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m soak $(ARGS)

cpus: setup  ## run the numerics tests as CPUs of other kinds compute (ARGS=--quick: two minutes)
	$(BIN)/python -m tests.cpus $(ARGS)

coverage: setup  ## measure the coverage of the shorter tests; pyproject.toml has the least allowed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not soak" \
		tests/triton_gru tests/lightning_module --cov --cov-report=term $(ARGS)

lint: setup  ## check the format and the style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## check the types with mypy
	$(BIN)/python -m mypy

docs: setup  ## build the site of docs/ into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A fresh environment with the newest versions that pyproject.toml allows; torch and triton stay
# where they are pinned until someone moves them by hand, because the kernels are tested with them.
constraints:  ## refresh constraints.txt with the newest versions
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install -q $$(grep -E '^(torch|triton)==' constraints.txt)
	.venv-constraints/bin/python -m pip install -q '.[dev]'
	.venv-constraints/bin/python -m pip freeze --exclude triton-gru > constraints.new
	sed -e 's/+cpu$$//' constraints.new > constraints.txt
	rm -rf .venv-constraints constraints.new
