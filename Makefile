# Thin by intent: every target is one call of a script, and fails when its command fails. Everything works without make:
# python -m venv .venv && .venv/bin/pip install -r requirements.txt, then the same commands.

PYTHON ?= python3
RUN := .venv/bin/python

# What may be set, as in `make pretrain-tiny BATCH_SIZE=8`, or exported. Each reaches its command as one quoted word,
# through the environment: whatever it holds, neither make nor the shell looks into it.
VARIABLES := CONFIG RAW_DATASET DATA_PATH SFT_DATASET DPO_DATASET GRPO_DATASET MODEL_PATH OUTPUT BATCH_SIZE LEARNING_RATE \
  GRADIENT_ACCUMULATION_STEPS MAX_STEPS WARMUP_STEPS MAX_MINUTES TEMPLATE FORMAT \
  HOST PORT SESSION_TIME GPU BACKUP_PASSPHRASE YES
$(foreach v,$(VARIABLES),$(if $(value $v),$(eval override $v := $$(value $v))$(eval export $v)))

flag = $${$(1):+"--$(2)=$$$(1)"}
PRESET = $${CONFIG:+"$$CONFIG"}
FIT = $(call flag,BATCH_SIZE,batch_size) $(call flag,LEARNING_RATE,learning_rate) \
  $(call flag,GRADIENT_ACCUMULATION_STEPS,gradient_accumulation_steps) $(call flag,MAX_STEPS,max_steps) \
  $(call flag,WARMUP_STEPS,warmup_steps) $(call flag,MAX_MINUTES,max_minutes) $(call flag,OUTPUT,output_dir)
DATA = data="$${DATA_PATH:-$$($(RUN) -m tools.workspace newest --kind=data)}" &&
PRETRAIN = $(PRESET) --data_path="$$data" $(FIT)
MODEL = model="$${MODEL_PATH:-$$($(RUN) -m tools.workspace newest$(1))}" &&
PREPARED = $(call flag,RAW_DATASET,input_path) $(call flag,OUTPUT,output_dir)
EVALUATE = $(call MODEL) $(RUN) eval.py $(PRESET) --model_path="$$model" --output_dir="$${OUTPUT:-evaluation_results}"
SESSION = $(RUN) -m tools.session
BOX = $(call flag,SESSION_TIME,minutes)
PRESET_BOX = $(BOX) $(call flag,CONFIG,config)

.DEFAULT_GOAL := help
TARGETS := help install install-flash check-env demo prepare prepare-owt prepare-wiki prepare-wt103 prepare-demo \
  create-sample-datasets pretrain-tiny pretrain-small pretrain-base resume-pretrain-tiny sft dpo grpo pipeline-full evaluate \
  evaluate-quick evaluate-detailed assess-performance serve server export session-status session-cleanup session-quick \
  session-prototype session-experiment session-evaluation session-debug session-architecture test-pipeline monitor \
  config-rtx4090 backup clean clean-checkpoints test lint
.PHONY: $(TARGETS)

##@ First

help: ## this list
	@awk -F ':.*## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables, as in make pretrain-tiny BATCH_SIZE=8\n'
	@printf '  %s %s %s %s %s %s\n' $(VARIABLES)

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

check-env: .venv/installed ## Python, torch, CUDA, memory, disk, optional packages
	$(RUN) -m tools.workspace check-env

ASK = $(RUN) sample.py --chat --prompt="What is the plural of tree?" --temperature=0 --max_new_tokens=24

demo: .venv/installed ## raw text -> a small LLaMA -> SFT -> DPO, and the three asked one question, in about a quarter of an hour
	$(RUN) data.py configs/datasets/docstrings.json
	$(RUN) train.py configs/demo.json --resume_from_checkpoint=auto
	$(RUN) sample.py --model_path=checkpoints/pretrain/demo --prompt="Return the" --num_samples=3 --seed=1
	$(RUN) data.py create_sample_datasets
	$(RUN) sft.py configs/demo_sft.json --model_path=checkpoints/pretrain/demo --resume_from_checkpoint=auto \
	  --dataset_path=data/samples/sft_train.jsonl --val_path=data/samples/sft_val.jsonl --replay_path=data/processed/docstrings
	$(RUN) dpo.py configs/demo_dpo.json --model_path=checkpoints/sft/demo --resume_from_checkpoint=auto \
	  --dataset_path=data/samples/dpo_train.jsonl --val_path=data/samples/dpo_val.jsonl
	$(ASK) --model_path=checkpoints/pretrain/demo
	$(ASK) --model_path=checkpoints/sft/demo
	$(ASK) --model_path=checkpoints/dpo/demo

##@ Data

prepare: .venv/installed ## a dataset: CONFIG=a preset, RAW_DATASET=a file, folder or hf:name; without, this Python's documentation
	$(RUN) data.py $(if $(value CONFIG)$(value RAW_DATASET),$(PRESET),configs/datasets/docstrings.json) $(PREPARED)

prepare-owt: .venv/installed ## OpenWebText, 8 million documents (network)
	$(RUN) data.py configs/datasets/openwebtext.json $(PREPARED)

prepare-wiki: .venv/installed ## English Wikipedia, 6.4 million articles (network)
	$(RUN) data.py configs/datasets/wikipedia_en.json $(PREPARED)

prepare-wt103: .venv/installed ## WikiText-103, 28,475 articles (network)
	$(RUN) data.py configs/datasets/wikitext103.json $(PREPARED)

prepare-demo: .venv/installed ## WikiText-2, 600 articles (network)
	$(RUN) data.py configs/datasets/demo_tiny.json $(PREPARED)

create-sample-datasets: .venv/installed ## small SFT and DPO files in data/samples, made on the spot
	$(RUN) data.py create_sample_datasets $(call flag,OUTPUT,output_dir)

##@ Training (the newest prepared dataset and the newest model, unless DATA_PATH and MODEL_PATH say otherwise)

pretrain-tiny: .venv/installed ## 6 blocks of 256; CONFIG=a preset of yours on top, BATCH_SIZE, LEARNING_RATE, MAX_MINUTES, ...
	$(DATA) $(RUN) train.py configs/tiny.json $(PRETRAIN)

pretrain-small: .venv/installed ## 12 blocks of 512
	$(DATA) $(RUN) train.py configs/small.json $(PRETRAIN)

pretrain-base: .venv/installed ## 24 blocks of 768
	$(DATA) $(RUN) train.py configs/base.json $(PRETRAIN)

resume-pretrain-tiny: .venv/installed ## go on from the newest sound checkpoint
	$(DATA) $(RUN) train.py configs/tiny.json $(PRETRAIN) --resume_from_checkpoint=auto

sft: .venv/installed ## conversations; SFT_DATASET=a file, TEMPLATE=chatml, instruct or chat
	$(call MODEL, --kind=pretrain) $(RUN) sft.py configs/sft.json $(PRESET) --model_path="$$model" \
	  --dataset_path="$${SFT_DATASET:-data/samples/sft_train.jsonl}" $(call flag,TEMPLATE,prompt_template) $(FIT)

dpo: .venv/installed ## preferences; DPO_DATASET=a file
	$(call MODEL, --kind=sft) $(RUN) dpo.py configs/dpo.json $(PRESET) --model_path="$$model" \
	  --dataset_path="$${DPO_DATASET:-data/samples/dpo_train.jsonl}" $(FIT)

grpo: .venv/installed ## rewards that a program checks; GRPO_DATASET=a file of questions with answers
	$(call MODEL, --kind=sft) $(RUN) grpo.py configs/grpo.json $(PRESET) --model_path="$$model" \
	  --dataset_path="$${GRPO_DATASET:-data/samples/*_train.jsonl}" $(FIT)

pipeline-full: .venv/installed ## all of it with a tiny model, without a clock: data, pretraining, SFT, DPO, evaluation
	$(SESSION) full $(PRESET_BOX)

##@ Evaluation and use

evaluate: .venv/installed ## perplexity, BoolQ, forty prompts: OUTPUT/results.json and report.md
	$(EVALUATE)

evaluate-quick: .venv/installed ## parts of the same
	$(EVALUATE) --fast_mode

evaluate-detailed: .venv/installed ## with every prompt, response and score in the report
	$(EVALUATE) --detailed_output

assess-performance: .venv/installed ## those results against what is expected of the model's size
	$(RUN) eval.py assess "$${OUTPUT:-evaluation_results}"

serve: .venv/installed ## chat in the terminal
	$(call MODEL) $(RUN) sample.py --chat --model_path="$$model"

server: .venv/installed ## chat page and OpenAI's routes; HOST, PORT
	$(call MODEL) $(RUN) server.py --model_path="$$model" $(call flag,HOST,host) $(call flag,PORT,port)

export: .venv/installed ## a model for other programs: FORMAT=hf or gguf, OUTPUT=where
	$(call MODEL) $(RUN) -m tools.export --model_path="$$model" --output="$${OUTPUT:-exported/model}" $(call flag,FORMAT,format)

##@ Sessions: time boxes, with a log and a table (docs/SESSIONS.md); SESSION_TIME=minutes

session-status: .venv/installed ## datasets, trainings, evaluations, and what to do next
	$(RUN) -m tools.workspace status

session-quick: .venv/installed ## 30 min: everything once, small
	$(SESSION) quick $(PRESET_BOX)

session-prototype: .venv/installed ## 2 h: a tiny model, complete
	$(SESSION) prototype $(PRESET_BOX)

session-experiment: .venv/installed ## 4 h: a small model and its fine-tuning
	$(SESSION) experiment $(PRESET_BOX)

session-evaluation: .venv/installed ## 1 h: the newest model, or MODEL_PATH, looked at closely
	$(SESSION) evaluation $(BOX) $(call flag,MODEL_PATH,model_path)

session-debug: .venv/installed ## does everything work here? a training, a resume and a sample on toy data
	$(SESSION) debug $(BOX)

session-architecture: .venv/installed ## 30 min: report and a few timed steps of every preset
	$(SESSION) architecture $(PRESET_BOX)

session-cleanup: .venv/installed ## delete sessions/
	$(RUN) -m tools.workspace clean-sessions $(call flag,YES,yes)

test-pipeline: .venv/installed ## session-quick in ten minutes
	$(SESSION) quick --minutes="$${SESSION_TIME:-10}" $(call flag,CONFIG,config)

##@ Upkeep (what deletes asks first; YES=1 for scripts)

monitor: .venv/installed ## processor, memory, GPU and the newest training, once a second
	$(RUN) -m tools.workspace monitor

config-rtx4090: .venv/installed ## a preset fitted to this machine's card: configs/rtx4090.json; CONFIG, GPU, OUTPUT
	$(RUN) -m tools.workspace config-gpu $(call flag,CONFIG,config) $(call flag,GPU,gpu) $(call flag,OUTPUT,output)

backup: .venv/installed ## presets, models, newest checkpoints, evaluations in one file; BACKUP_PASSPHRASE encrypts, OUTPUT names it
	$(RUN) -m tools.workspace backup $(call flag,OUTPUT,output)

clean: .venv/installed ## caches of Python and of the tools, and what killed backups left
	$(RUN) -m tools.workspace clean $(call flag,YES,yes)

clean-checkpoints: .venv/installed ## delete checkpoints/
	$(RUN) -m tools.workspace clean-checkpoints $(call flag,YES,yes)

test: .venv/installed-dev ## every test, in a process for each core but four at most
	$(RUN) -m pytest -q tests --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: .venv/installed-dev ## style: ruff's checks and its format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
