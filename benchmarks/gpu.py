"""One driver for half an hour on a GPU: floors, exactness, training and decoding speed against the
HF stack.

    python benchmarks/gpu.py --out=results.jsonl                       everything, in order of worth
    python benchmarks/gpu.py --items=train:tiny,hf:tiny:eager          some of it
    # every kind of item once, at toy size: some minutes
    python benchmarks/gpu.py --small --device=cpu

Every item runs in a process of its own with its own time limit and appends one JSON line at once,
so an item that hangs or runs out of memory costs only itself. Speeds are medians over timed
optimizer steps after warm-up; MFU counts 6 N + 12 L C T FLOPs per token (head counted, attention
in full) over 989e12, the H100's dense bf16 peak by datasheet.
"""

import argparse
import json
import os
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

from lib.config import configure, narrow
from lib.runtime import World, autocast, choose_device, choose_dtype, seed_everything, tune_cpu
from model import (
    Llama,
    ModelConfig,
    flops_per_token,
    load_model,
    next_token_loss,
    save_model,
    to_hf,
)
from sample import fuse
from tools.plan import RandomTokens, forward_backward
from train import PretrainConfig, State, compile_model, with_vocab_size

PEAK = 989e12
ITEMS = [
    *("floors", "exact", "determinism"),
    *(
        "train:tiny",
        "train:small",
        "train:base",
        "train:tiny:eager",
        "train:small:eager",
        "train:base:eager",
    ),
    *(
        "hf:tiny:eager",
        "hf:tiny:compile",
        "hf:small:eager",
        "hf:small:compile",
        "hf:base:eager",
        "hf:base:compile",
    ),
    *("train:tiny:deterministic", "train:small:deterministic", "train:base:deterministic"),
    *(
        "decode:tiny:1:8:64",
        "decode:small:1:64",
        "decode:base:1:64",
        "hfdecode:tiny",
        "hfdecode:small",
        "hfdecode:base",
    ),
    *("train:tiny:muon", "train:small:muon", "train:base:muon", "train:base:checkpointing"),
    *(
        "train:tiny:fp16",
        "aligned:tiny:sft",
        "aligned:tiny:dpo",
        "aligned:small:sft",
        "aligned:small:dpo",
    ),
    *(
        "memory:tiny",
        "memory:tiny:eager",
        "memory:small",
        "memory:base",
        "memory:base:checkpointing",
    ),
    *("profile:tiny", "profile:small", "profile:tiny:decode"),
]


def preset(name, small, **changes):
    """Returns the PretrainConfig of configs/NAME.json with AdamW, at toy size without a GPU."""
    adamw = "--optimizer=adamw --adamw_learning_rate=none --learning_rate=3e-4 --beta2=0.95"
    words = [str(ROOT / f"configs/{name}.json"), *adamw.split()]
    cfg = with_vocab_size(configure(PretrainConfig, words))
    if small:
        toy = {
            "n_layer": 2,
            "d_model": 64,
            "n_head": 4,
            "d_ff": 128,
            "vocab_size": 512,
            "sequence_length": 64,
        }
        changes = (
            toy
            | {"num_key_value_heads": None, "batch_size": 2, "gradient_accumulation_steps": 2}
            | changes
        )
    return replace(cfg, **changes)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def summary(cfg, seconds, tokens, device):
    """Returns the figures of a training speed item from the seconds of each timed step."""
    rate = tokens / statistics.median(seconds)
    return {
        "tokens_per_second": round(rate),
        "p10_p90": [round(tokens / s) for s in np.quantile(seconds, [0.9, 0.1])],
        "mfu_989": round(flops_per_token(cfg) * rate / PEAK, 4),
        "peak_memory_gb": peak_memory(device) and round(peak_memory(device) / 1e9, 3),
        "timed_steps": len(seconds),
        "rows": cfg.batch_size,
        "accumulation": cfg.gradient_accumulation_steps,
        "sequence_length": cfg.sequence_length,
    }


# ---- items


def floors(small):
    """What the card does at best: a big matmul, a big copy, and the matmuls of our own shapes."""
    device = choose_device("auto")
    size = 512 if small else 8192

    def timed(work, flops, repeats=20):
        for _ in range(3):
            work()
        wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        wait(device)
        return flops * repeats / (time.perf_counter() - began)

    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    big = torch.empty(2**20 if small else 2**31, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    result = {"matmul_tflops": timed(lambda: a @ a, 2 * size**3) / 1e12}
    result["copy_gb_per_second"] = timed(lambda: other.copy_(big), 2 * big.numel()) / 1e9
    rows = 256 if small else 16384
    for name, (k, n) in {
        "256->1024": (256, 1024),
        "512->2048": (512, 2048),
        "768->3072": (768, 3072),
    }.items():
        x, w = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((rows, k), (k, n)))
        result[f"tflops {name}"] = timed(lambda x=x, w=w: x @ w, 2 * rows * k * n) / 1e12
    return {k: round(v, 1) for k, v in result.items()}


def exact(small):
    """Device against CPU in fp32, compiled against eager, bf16 against fp32, checkpointing on
    against off.
    """
    device = choose_device("auto")
    cfg = preset(
        "tiny", True, d_model=128, n_head=2, num_key_value_heads=1, d_ff=256, sequence_length=256
    )
    torch.manual_seed(0)
    model = Llama(narrow(cfg, ModelConfig)).eval()
    batch = RandomTokens(cfg).batch(0, 0)
    cpu = {k: torch.from_numpy(batch[k]) for k in ("ids", "labels")}
    with torch.no_grad():
        reference = model(cpu["ids"])
    loss, _ = next_token_loss(model, cpu)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.to(device)
    there = {k: v.to(device) for k, v in cpu.items()}

    def gradient_gap():
        pairs = zip(model.parameters(), gradients, strict=True)
        gap = max(((p.grad.cpu() - g).norm() / g.norm()).item() for p, g in pairs)
        model.zero_grad()
        return gap

    result = {}
    with torch.no_grad():
        result["fp32 logits, device - cpu (max abs)"] = (
            (model(there["ids"]).cpu() - reference).abs().max().item()
        )
    next_token_loss(model, there)[0].backward()
    result["fp32 gradients, device / cpu (worst relative)"] = gradient_gap()
    model.train()
    model.model.gradient_checkpointing = True
    next_token_loss(model, there)[0].backward()
    result["the same with checkpointing"] = gradient_gap()
    model.model.gradient_checkpointing = False
    with autocast(device, torch.bfloat16):
        rough, _ = next_token_loss(model, there)
    result["bf16 loss / fp32 loss - 1"] = (rough / loss.to(device) - 1).item()
    compile_model(model)
    next_token_loss(model, there)[0].backward()
    result["fp32 gradients, compiled / cpu (worst relative)"] = gradient_gap()
    return result


def stepper(cfg, device, model=None, loss_fn=next_token_loss, batch=None):
    """Returns (model, a function that takes optimizer step N as fit does and returns its loss).

    Every step has a fresh random batch, or always `batch`.
    """
    dtype, _ = choose_dtype(cfg.dtype if device.type == "cuda" else "fp32", device)
    world, loader, accumulation = (
        World(0, 1, device),
        RandomTokens(cfg),
        cfg.gradient_accumulation_steps,
    )
    seed_everything(cfg.seed)
    model = model or Llama(narrow(cfg, ModelConfig)).to(device)
    model.train().model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        compile_model(model)
    state = State(cfg, model, world, dtype)

    def batches(step):
        return [batch or loader.batch(step, m) for m in range(accumulation)]

    coming = [batches(0)]

    def take(step):
        now = coming.pop()
        count = sum(b["count"] for b in now)
        loss = sum(forward_backward(state, b, loss_fn, count, device, dtype) for b in now)
        coming.append(batches(step + 1))  # while the GPU computes, as in fit
        state.update(cfg.learning_rate, state.clip(cfg.max_grad_norm), count)
        return loss

    return model, take


def steps(cfg, count, device, **others):
    """Runs `count` optimizer steps; returns (model, seconds of each step, losses)."""
    model, take = stepper(cfg, device, **others)
    seconds, losses = [], []
    for step in range(count):
        wait(device)
        began = time.perf_counter()
        losses.append(take(step))
        wait(device)
        seconds.append(time.perf_counter() - began)
    return model, seconds, [loss.item() for loss in losses]


def determinism(small):
    """The same seed twice, and another seed, must give equal and different weights."""
    device = choose_device("auto")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cfg = preset(
        "tiny", small, compile=not small, batch_size=4, gradient_accumulation_steps=1, dropout=0.1
    )
    totals = []
    for seed in (1, 1, 2):
        torch.compiler.reset()
        model, _, _ = steps(replace(cfg, seed=seed), 10, device)
        totals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return {
        "same_seed_equal": torch.equal(totals[0], totals[1]),
        "other_seed_equal": torch.equal(totals[0], totals[2]),
    }


def train(small, name, *options):
    """Optimizer steps of a preset at its own batch, compiled unless `eager`; muon, fp16, rows=N,
    vocab=N.
    """
    device = choose_device("auto")
    if "deterministic" in options:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    changes = {
        "compile": "eager" not in options and not small,
        "gradient_checkpointing": "checkpointing" in options,
    }
    changes["optimizer"] = "muon" if "muon" in options else "adamw"
    changes["dtype"] = "fp16" if "fp16" in options else "bf16"
    for option in options:
        if option.startswith("vocab="):
            changes["vocab_size"] = int(option[6:])
        if option.startswith("rows="):  # the same tokens per step in bigger or smaller pieces
            rows, base = int(option[5:]), preset(name, small)
            total = base.batch_size * base.gradient_accumulation_steps
            changes |= {"batch_size": rows, "gradient_accumulation_steps": max(1, total // rows)}
    cfg = preset(name, small, **changes)
    began = time.perf_counter()
    warm, timed = (2, 3) if small else (10, 30 if name != "base" else 15)
    _, seconds, losses = steps(cfg, warm + timed, device)
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length
    result = summary(cfg, seconds[warm:], tokens, device)
    result |= {
        "first_step_seconds": round(seconds[0], 1),
        "all_seconds": round(time.perf_counter() - began, 1),
    }
    return result | {"first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}


def aligned(small, name, stage):
    """SFT or DPO steps of a rank 16 adapter: 16 sequences of 512 (8 pairs), the second half an
    answer.
    """
    from data import supervised_rows
    from dpo import DPOConfig, Pair, pair_rows, preference_loss
    from model import add_lora

    device, rows, length = choose_device("auto"), 4 if small else 16, 32 if small else 512
    loop = {
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "compile": not small,
        "dtype": "bf16",
    }
    cfg = preset(name, small, sequence_length=length, **loop)
    torch.manual_seed(0)
    model = add_lora(Llama(narrow(cfg, ModelConfig)), 16, 32.0).to(device)
    ids = np.random.default_rng(0).integers(10, cfg.vocab_size, (rows, length + 1))
    examples = [(row, (np.arange(length + 1) >= length // 2).astype(np.int64)) for row in ids]
    batch, loss_fn = (
        supervised_rows([[e] for e in examples], length, cfg.pad_token_id),
        next_token_loss,
    )
    if stage == "dpo":
        pairs = [
            Pair(chosen, rejected, ()) for chosen, rejected in zip(examples[::2], examples[1::2])
        ]
        batch = pair_rows(pairs, length, cfg.pad_token_id)
        loss_fn = preference_loss(DPOConfig(model_path="", dataset_path=""))
    warm, timed = (1, 2) if small else (5, 20)
    _, seconds, losses = steps(cfg, warm + timed, device, model=model, loss_fn=loss_fn, batch=batch)
    return summary(cfg, seconds[warm:], rows * length, device) | {
        "milliseconds": round(1000 * statistics.median(seconds[warm:]), 2),
        "first_step_seconds": round(seconds[0], 1),
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
    }


def memory(small, name, *options):
    """Peak memory of three steps as torch counts it, beside what train.py --plan predicts."""
    from tools.plan import memory as planned

    device = choose_device("auto")
    changes = {"compile": "eager" not in options and not small, "dtype": "bf16"}
    changes |= {"gradient_checkpointing": "checkpointing" in options}
    changes["optimizer"] = "muon" if "muon" in options else "adamw"
    cfg = preset(name, small, **changes)
    steps(cfg, 3, device)
    dtype = choose_dtype(cfg.dtype, device)[0]
    predicted, seen = (
        planned(cfg, device.type, dtype.itemsize, cfg.compile)["peak"],
        peak_memory(device),
    )
    return {
        "predicted_gb": round(predicted / 1e9, 3),
        "peak_memory_gb": seen and round(seen / 1e9, 3),
        "predicted / seen": seen and round(predicted / seen, 3),
    }


def profile(small, name, *options):
    """The kernels of two optimizer steps, or of 32 decoded tokens with `decode`, dearest first."""
    from sample import Engine, Request, Sampling, generate

    device = choose_device("auto")
    if "decode" in options:
        model = ready_to_generate(preset(name, small), device)
        engine = Engine(model, 1, 48 if small else 256, graphs=device.type == "cuda")

        def work(_):
            for _ in generate(
                model, [Request(list(range(10, 26)), 32, Sampling(temperature=0.0))], engine
            ):
                pass
    else:
        _, work = stepper(preset(name, small, compile=not small), device)
    for number in range(5):
        work(number)
    wait(device)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as record:
        began = time.perf_counter()
        work(5), work(6)
        wait(device)
        wall = time.perf_counter() - began
    table = sorted(record.key_averages(), key=lambda k: -k.self_device_time_total)
    return {
        "wall_ms": round(1000 * wall, 2),
        "busy_ms": round(sum(k.self_device_time_total for k in table) / 1000, 2),
        "kernels": sum(k.count for k in table),
        "dearest": [
            [k.key[:90], k.count, round(k.self_device_time_total / 1000, 3)] for k in table[:24]
        ],
    }


def hf(small, name, mode):
    """transformers' LlamaForCausalLM under its own Trainer: same shape, batch, precision, fused
    AdamW.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    cfg = preset(name, small)
    device = choose_device("auto")
    shape = LlamaConfig.from_dict(to_hf(narrow(cfg, ModelConfig)), use_cache=False)
    model = LlamaForCausalLM(shape)
    warm, timed = (2, 3) if small else (10, 20 if name != "base" else 10)
    stamps = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait(device)
            stamps.append(time.perf_counter())

    rows = (warm + timed) * cfg.batch_size * cfg.gradient_accumulation_steps
    ids = torch.from_numpy(
        np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, cfg.sequence_length))
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=warm + timed, per_device_train_batch_size=cfg.batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps, bf16=device.type == "cuda",
            torch_compile=mode == "compile", optim="adamw_torch_fused",
            learning_rate=cfg.learning_rate,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=device.type == "cpu", max_grad_norm=1.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[Stamp()]).train()
    seconds = np.diff(stamps)[warm - 1 :].tolist()
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length
    import transformers

    return summary(cfg, seconds, tokens, device) | {"transformers": transformers.__version__}


def saved(cfg, folder):
    torch.manual_seed(0)
    save_model(Llama(narrow(cfg, ModelConfig)), Path(folder))


def ready_to_generate(cfg, device):
    """Returns what sample.open_model makes of a model folder, in 16 bit on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        saved(cfg, folder)
        return fuse(
            load_model(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        )


def decode(small, name, *options):
    """Our engine, greedy, prompt 64, 192 new tokens per row: in CUDA graphs, and as it is unless
    `graphs`.
    """
    from sample import Engine, Request, Sampling, generate

    device = choose_device("auto")
    cuda = device.type == "cuda"
    prompt, new, result = (16, 8, {}) if small else (64, 192, {})
    model = ready_to_generate(preset(name, small), device)
    kinds = ([True] if "graphs" in options else [True, False]) if cuda else [False]
    for batch in [int(option) for option in options if option.isdigit()] or [1]:
        prompts = np.random.default_rng(0).integers(10, 500, (batch, prompt)).tolist()
        for graphs in kinds:
            engine, rates = Engine(model, batch, prompt + new, graphs=graphs), []
            began = time.perf_counter()
            for _ in range(2 if small else 4):  # the first compiles and captures
                requests = [Request(ids, new, Sampling(temperature=0.0)) for ids in prompts]
                wait(device)
                start = time.perf_counter()
                for _ in generate(model, requests, engine):
                    pass
                wait(device)
                rates.append(batch * new / (time.perf_counter() - start))
            kind = "graphs" if graphs else "eager"
            result[f"{kind} x{batch}"] = round(statistics.median(rates[1:]))
            result[f"{kind} x{batch} seconds in all"] = round(time.perf_counter() - began, 1)
    return result


def hfdecode(small, name):
    """transformers' generate on the same shape and prompt, its defaults, greedy."""
    from transformers import AutoModelForCausalLM

    device = choose_device("auto")
    new, result = (8 if small else 192), {}
    with tempfile.TemporaryDirectory() as folder:
        saved(preset(name, small), folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    for batch in (1, 64):
        prompts = torch.randint(10, 500, (batch, 16 if small else 64), device=device)
        rates = []
        for _ in range(2 if small else 3):
            wait(device)
            began = time.perf_counter()
            out = model.generate(
                prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
            wait(device)
            rates.append((out.shape[1] - prompts.shape[1]) * batch / (time.perf_counter() - began))
        result[f"generate x{batch}"] = round(statistics.median(rates[1:]))
    return result


# ---- the driver


def environment():
    device = choose_device("auto")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "machine": card,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%F"),
    }


def run_item(item, small):
    name, *options = item.split(":")
    if choose_device("auto").type == "cpu":
        tune_cpu()
    kinds = (floors, exact, determinism, train, aligned, memory, profile, hf, decode, hfdecode)
    return {kind.__name__: kind for kind in kinds}[name](small, *options)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", default=",".join(ITEMS), help="comma separated, see the functions of this file"
    )
    parser.add_argument("--out", default="gpu.jsonl", help="JSON lines are appended here")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds in all; what does not fit is left out"
    )
    parser.add_argument("--limit", type=float, default=150, help="seconds for one item")
    parser.add_argument(
        "--small", action="store_true", help="toy sizes, to try this file without a GPU"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="cpu: hide the GPU"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child's side
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_item(args.one, args.small)))
        return
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # before CUDA is asked anything, here and in the children
        )
    items = args.items.split(",")
    if args.small:  # where all presets are one toy, tiny stands for them
        items = [item for item in items if not {"small", "base"} & set(item.split(":"))]
        args.budget, args.limit = max(args.budget, 1800), max(args.limit, 600)
    began, known = time.monotonic(), environment()
    for item in items:
        left = args.budget - (time.monotonic() - began)
        if left < 10:
            print(f"{item}: left out, the budget is spent")
            continue
        command = [sys.executable, __file__, "--one", item, *(["--small"] if args.small else [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=min(args.limit, left)
            )
            text = done.stdout.strip().splitlines()
            result = (
                json.loads(text[-1]) if done.returncode == 0 else {"failed": done.stderr[-1500:]}
            )
        except subprocess.TimeoutExpired:
            result = {"failed": f"took more than {min(args.limit, left):.0f} s"}
        line = json.dumps({"item": item} | result | known | {"small": args.small})
        with open(args.out, "a") as f:
            f.write(line + "\n")
        print(f"{time.monotonic() - began:6.0f} s  {item}: {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
