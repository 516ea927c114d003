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

ASK = $(RUN) sample.py --chat --prompt="What is the plural of tree?" --temperature=0 --max_new_tokens=24

demo: .venv/installed ## raw text -> a small LLaMA -> SFT -> DPO, and the three asked one question, in about twelve minutes
	$(RUN) data.py configs/datasets/docstrings.json
	$(RUN) train.py configs/demo.json --resume_from_checkpoint=auto
	$(RUN) sample.py --model_path=checkpoints/pretrain/demo --prompt="Return the" --num_samples=3 --seed=1
	$(RUN) data.py create_sample_datasets
	$(RUN) sft.py configs/demo_sft.json --model_path=checkpoints/pretrain/demo --resume_from_checkpoint=auto \
	  --dataset_path=data/samples/sft_train.jsonl --val_path=data/samples/sft_val.jsonl
	$(RUN) dpo.py configs/demo_dpo.json --model_path=checkpoints/sft/demo --resume_from_checkpoint=auto \
	  --dataset_path=data/samples/dpo_train.jsonl --val_path=data/samples/dpo_val.jsonl
	$(ASK) --model_path=checkpoints/pretrain/demo
	$(ASK) --model_path=checkpoints/sft/demo
	$(ASK) --model_path=checkpoints/dpo/demo

test: .venv/installed-dev ## every test
	$(RUN) -m pytest -q tests

lint: .venv/installed-dev ## style: ruff's checks and its format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
