# make demo and make test need nothing but python >= 3.10, git and make. Override: PYTHON=python3.12 VENV=dir DEVICE=cpu TORCH=2.14
PYTHON ?= python3
DEFAULT_TORCH := $(shell sed -nE 's/^torch==([0-9]+\.[0-9]+).*/\1/p' sidrec_torchrec/requirements/torch.txt)
TORCH ?= $(DEFAULT_TORCH)
VENV ?= .venv$(addprefix -,$(filter-out $(DEFAULT_TORCH),$(TORCH)))
ifndef DEVICE
DEVICE := $(if $(findstring GPU,$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)
endif

# Newer than all that says what to install; the second time there is nothing to do, and no network is needed.
READY := $(VENV)/.ready-$(DEVICE)-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint audit docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY) ## make the virtual environment: torch, torchrec and fbgemm for CPU or CUDA, and this package

demo: $(READY) ## set up, then run the main job on a synthetic corpus; the report is demo/report.html
	$(VENV)/bin/sidrec pipeline --out demo

test: $(READY) ## set up, then run all tests
	$(VENV)/bin/python -m pytest -n logical --dist loadfile

lint: $(READY) ## set up, then check style, security and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

audit: $(READY) ## look up known vulnerabilities of what is installed; says so where no advisories can be reached
	$(VENV)/bin/python scripts/audit.py

docs: $(READY) ## set up, then build the documentation's site in build/site, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet

clean: ## remove the virtual environment, the demo's output and all caches
	rm -rf .venv .venv-* demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find sidrec_torchrec tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml scripts/setup.sh $(wildcard sidrec_torchrec/requirements/*.txt)
	@scripts/setup.sh $(PYTHON) $(VENV) $(DEVICE) $(TORCH)
	@rm -f $(VENV)/.ready-*
	@touch $@
