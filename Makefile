# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A rank for each GPU, else for each core: the largest of 8, 4, 2 and 1 that fits, which all divide the digits' batches.
comma  := ,
ifeq ($(origin CUDA_VISIBLE_DEVICES),undefined)
GPUS    = $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)
else
GPUS    = $(words $(filter-out -1,$(subst $(comma), ,$(CUDA_VISIBLE_DEVICES))))
endif
CORES   = $(shell env -u OMP_NUM_THREADS nproc)
FITS    = $(shell n=$(1); echo $$((n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1)))
RANKS  ?= $(call FITS,$(if $(filter-out 0,$(GPUS)),$(GPUS),$(CORES)))

.PHONY: env train trial test test-all chaos lint tensorboard clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is %s; call make PYTHON=/path/to/python3.11" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[deepspeed,tune,remote,dev]'
	touch $(STAMP)

train: env
	$(BIN)/torchrun --nproc_per_node=$(RANKS) -m gdd_dist.train

SOURCE ?= $(error give the images: make trial SOURCE=cifar10:cifar-10-python.tar.gz, or SOURCE=folder:IMAGES)
trial: env
	$(BIN)/python -m sharding build $(SOURCE) data/cifar10
	$(BIN)/torchrun --nproc_per_node=$(RANKS) -m gdd_dist.train --preset cifar10-cpu --data data/cifar10

test: lint
	$(BIN)/python -m pytest -q -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -q

chaos: env
	$(BIN)/python -m pytest -q tests/integration/test_fault_chaos.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: env
	$(BIN)/tensorboard --logdir runs --host 127.0.0.1

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
