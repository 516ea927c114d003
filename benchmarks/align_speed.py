"""A LoRA SFT step and a DPO step against peft on transformers' Llama: same shape, rows, machine,
one process.

    python benchmarks/align_speed.py   preset tiny, 8 sequences of 256 (4 pairs), half prompt
    # without our allocator setting
    python benchmarks/align_speed.py --plain
    python benchmarks/align_speed.py --memory   peak memory, each variant in a process of its own

Rounds alternate between the variants, every second one in reverse order; a figure is the median
over rounds of one optimizer step: forward, backward, clipping, AdamW. peft's SFT is transformers'
own loss; its DPO is the straight way with PeftModel: four forwards (chosen and rejected, adapter on
and off) with full log-softmax. trl_dpo is trl's DPOTrainer.compute_loss on the same model. One
JSON line is printed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

from data import supervised_rows
from dpo import DPOConfig, Pair, pair_rows, preference_loss
from lib.config import configure
from lib.runtime import World, memory_used, tune_cpu
from model import Llama, ModelConfig, add_lora, choose_attention, next_token_loss, to_hf
from tools.plan import forward_backward
from train import LoopConfig, State

LENGTH, PROMPT, ROWS, RATE = 256, 128, 8, 1e-4
CPU = torch.device("cpu")


def examples(cfg, seed=0):
    """ROWS random (ids, mask): PROMPT ids of a prompt, the rest an answer; LENGTH positions."""
    ids = np.random.default_rng(seed).integers(10, cfg.vocab_size, (ROWS, LENGTH + 1))
    ids[1::2, :PROMPT] = ids[::2, :PROMPT]  # of each pair the prompt is the same
    mask = np.arange(LENGTH + 1) >= PROMPT
    return [(row, mask.astype(np.int64)) for row in ids]


# ---- ours


def ours(cfg):
    torch.manual_seed(0)
    model = add_lora(Llama(cfg), 16, 32.0).train()
    model.use_attention(choose_attention(CPU, LENGTH, torch.float32)[0])
    loop, world = LoopConfig(learning_rate=RATE), World(0, 1, CPU)
    return model, loop, world, State(loop, model, world, torch.float32)


def our_step(state, loop, world, batch, loss_fn):
    forward_backward(state, batch, loss_fn, batch["count"], CPU, torch.float32)
    state.update(RATE, state.clip(loop.max_grad_norm), batch["count"])


def our_sft(cfg):
    _, loop, world, state = ours(cfg)
    batch = supervised_rows([[example] for example in examples(cfg)], LENGTH, cfg.pad_token_id)
    return lambda: our_step(state, loop, world, batch, next_token_loss)


def our_dpo(cfg, known_reference=False):
    _, loop, world, state = ours(cfg)
    rows = examples(cfg)
    reference = (-900.0, -900.0) if known_reference else ()
    pairs = [Pair(chosen, rejected, reference) for chosen, rejected in zip(rows[::2], rows[1::2])]
    batch = pair_rows(pairs, LENGTH, cfg.pad_token_id)
    loss_fn = preference_loss(DPOConfig(model_path="", dataset_path=""))
    return lambda: our_step(state, loop, world, batch, loss_fn)


def our_dpo_known_reference(cfg):
    return our_dpo(cfg, known_reference=True)


# ---- peft


def theirs(cfg):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig.from_dict(to_hf(cfg), use_cache=False))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        llama, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model.train(), trainable, torch.optim.AdamW(trainable, lr=RATE)


def finish_step(loss, trainable, optimizer):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def tensors(cfg):
    rows = examples(cfg)
    return torch.tensor(np.stack([ids for ids, _ in rows])), torch.tensor(
        np.stack([mask for _, mask in rows])
    )


def peft_sft(cfg):
    model, trainable, optimizer = theirs(cfg)
    ids, mask = tensors(cfg)
    labels = ids.masked_fill(mask == 0, -100)
    return lambda: finish_step(model(input_ids=ids, labels=labels).loss, trainable, optimizer)


def peft_dpo(cfg):
    model, trainable, optimizer = theirs(cfg)
    ids, mask = tensors(cfg)

    def log_probs(rows):
        logits = model(input_ids=ids[rows]).logits[:, :-1]
        each = logits.float().log_softmax(-1).gather(-1, ids[rows, 1:, None])[..., 0]
        return (each * mask[rows, 1:]).sum(-1)

    chosen, rejected = slice(0, None, 2), slice(1, None, 2)

    def step():
        with torch.no_grad(), model.disable_adapter():
            reference = log_probs(chosen) - log_probs(rejected)
        margin = log_probs(chosen) - log_probs(rejected) - reference
        finish_step(-F.logsigmoid(0.1 * margin).mean(), trainable, optimizer)

    return step


def trl_dpo(cfg):
    """trl's own loss on the same model and rows; its trainer wants a tokenizer and a dataset to be
    built.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    model, trainable, optimizer = theirs(cfg)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="c", pad_token="a"
    )
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    trainer = trl.DPOTrainer(
        model, args=trl.DPOConfig(tempfile.mkdtemp(), max_steps=1, **settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=words,
    )  # fmt: skip
    ids, mask = (torch.cat([part[::2], part[1::2]]) for part in tensors(cfg))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    return lambda: finish_step(
        trainer.compute_loss(trainer.model, dict(batch)), trainable, optimizer
    )


VARIANTS = [our_sft, peft_sft, our_dpo, our_dpo_known_reference, peft_dpo, trl_dpo]


def preset():
    cfg = configure(ModelConfig, [str(ROOT / "configs/tiny.json")], foreign_keys=True)
    return replace(cfg, sequence_length=LENGTH)


def time_all(rounds):
    """Returns {variant: [seconds of each round]}; two rounds of warm-up are left out."""
    steps = {variant.__name__: variant(preset()) for variant in VARIANTS}
    seconds = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[2:] for name, values in seconds.items()}


def memory_of(variant):
    """Returns the peak memory in MB that three steps add to a process that has built its model."""
    step = {v.__name__: v for v in VARIANTS}[variant](preset())
    before = memory_used(CPU)
    for _ in range(3):
        step()
    return round((memory_used(CPU) - before) / 1e6)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child's side of --memory
    args = parser.parse_args()
    if not args.plain:
        tune_cpu()
    if args.one:
        print(memory_of(args.one))
        return
    if args.memory:
        names = [variant.__name__ for variant in VARIANTS]
        command = [sys.executable, __file__, "--one"]
        result = {
            n: int(subprocess.run([*command, n], capture_output=True, text=True, check=True).stdout)
            for n in names
        }
    else:
        result = {
            name: [round(1000 * f(values)) for f in (statistics.median, min, max)]
            for name, values in time_all(args.rounds).items()
        }
    known = {
        "plain": args.plain,
        "unit": "peak MB" if args.memory else "ms: median, min, max",
        "torch": torch.__version__,
    }
    print(json.dumps(result | known | {"machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
