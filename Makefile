# Thin by intent: every target is one call of a script, and fails when its command fails. Everything works without make:
# python -m venv .venv && .venv/bin/pip install -r requirements.txt, then the same commands.

PYTHON ?= python3
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help install install-flash demo test lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## a virtual environment in .venv with what requirements.txt names

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

install-flash: .venv/installed ## flash-attn, where there is CUDA and its compiler
	$(RUN) -m pip install flash-attn --no-build-isolation

QUESTION := What is the plural of tree?
demo: .venv/installed ## raw text -> a small LLaMA -> SFT -> DPO, the three asked one question; about ten minutes
	$(RUN) data.py configs/datasets/docstrings.json
	$(RUN) train.py configs/demo.json --resume_from_checkpoint=auto
	$(RUN) sample.py --model_path=checkpoints/pretrain/demo/final --prompt="Return the" --num_samples=3 --seed=1
	$(RUN) data.py create_sample_datasets
	$(RUN) sft.py configs/sft.json --model_path=checkpoints/pretrain/demo --dataset_path=data/samples/sft_train.jsonl \
	  --resume_from_checkpoint=auto
	$(RUN) dpo.py configs/dpo.json --model_path=checkpoints/sft --dataset_path=data/samples/dpo_train.jsonl \
	  --resume_from_checkpoint=auto
	$(RUN) sample.py --chat --model_path=checkpoints/pretrain/demo --prompt="$(QUESTION)" --temperature=0
	$(RUN) sample.py --chat --model_path=checkpoints/sft --prompt="$(QUESTION)" --temperature=0
	$(RUN) sample.py --chat --model_path=checkpoints/dpo --prompt="$(QUESTION)" --temperature=0

test: .venv/installed-dev ## every test
	$(RUN) -m pytest -q tests

lint: .venv/installed-dev ## style: ruff's checks and its format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
