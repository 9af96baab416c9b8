# Everything runs in .venv, which `make env` makes; PYTHON picks the interpreter that makes it, JOBS the tests at a time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.env-stamp
CONFIG := configs/cpd/resnet50_prune.py
WORK   := work_dirs/resnet50_prune
JOBS   ?= 2
# Stacks of other versions, each in .venv-NAME from requirements/NAME.txt, and the Python that each is claimed for.
oldest_PYTHON ?= python3.10
middle_PYTHON ?= python3.12
newest_PYTHON ?= python3.13
PARTS  ?= tests

.PHONY: help env demo test test-cuda test-oldest test-middle test-newest lint mutants chaos fuzz zoo docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

env: $(STAMP) ## make the environment in .venv

# opencv-python needs libGL, which a server may lack; its headless twin has the same modules.
headless = $(1) -c 'import cv2' 2>/dev/null || { $(1) -m pip uninstall --quiet --yes opencv-python && \
	$(1) -m pip install --quiet --force-reinstall --no-deps opencv-python-headless; }

# torch goes first: mmcv looks for it while it is built.
$(STAMP): setup.py mmcpd/compat.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed: make env PYTHON=... (this is {sys.version})"'
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	$(call headless,$(BIN)/python)
	$(BIN)/python -c 'import mmcpd.engine'
	touch $@

# OneDL's mmcv goes before torch: beside it, it compiles operators for minutes, and against the newest in vain.
.venv-middle/.env-stamp .venv-newest/.env-stamp: before_torch = onedl-mmcv

.venv-%/.env-stamp: requirements/%.txt setup.py mmcpd/compat.py
	test -x .venv-$*/bin/python || $($*_PYTHON) -m venv .venv-$*
	$(if $(before_torch),.venv-$*/bin/python -m pip install --quiet setuptools wheel packaging)
	$(if $(before_torch),.venv-$*/bin/python -m pip install --quiet --no-build-isolation --no-deps $(before_torch))
	.venv-$*/bin/python -m pip install --quiet --requirement $<
	.venv-$*/bin/python -m pip install --quiet --no-deps --editable .
	$(call headless,.venv-$*/bin/python)
	.venv-$*/bin/python -c 'import mmcpd.engine'
	touch $@

demo: env ## train, comb, prune with distillation, fine-tune, slim, test, export and time a ResNet-50; prune it at once
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(WORK)
	$(BIN)/python tools/test.py $(CONFIG) $(WORK)/slim.pth
	$(BIN)/python tools/deploy.py $(CONFIG) $(WORK)/slim.pth
	$(BIN)/python tools/prune.py $(CONFIG) $(WORK)/dense.pth --out $(WORK)/at_once

test: env ## run the tests, the slow ones left out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m 'not slow'

test-cuda: env ## run those that need a GPU, on it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda

test-oldest test-middle test-newest: test-%: .venv-%/.env-stamp ## the same in .venv-NAME, on other versions (docs/versions.md)
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(JOBS) -m 'not slow' $(PARTS)

lint: env ## run ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: env ## break the library's claims one by one, and see whether its tests notice (some ten minutes)
	$(BIN)/python benchmarks/mutants.py --jobs $(JOBS)

chaos: env ## kill runs and damage files, and see that nothing is lost and nothing let in (under an hour)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos_kills.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos_files.py --structures 10000 --files 2000
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos_tools.py

fuzz: env ## comb, mask and slim random small nets (a minute or two)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py

zoo: env ## comb and slim one model of every architecture family, Torch-Pruning beside it (three to four hours)
	$(BIN)/python -m pip install --quiet torch-pruning==1.6.1
	$(BIN)/python benchmarks/zoo.py

docs: env ## build the documentation site in work_dirs/site
	$(BIN)/python -m pip install --quiet --requirement requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove what was built and trained, not .venv* and not data
	rm -rf work_dirs build dist *.egg-info mmcpd/.mim .pytest_cache .ruff_cache .mypy_cache
	find mmcpd tools tests configs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
