"""How far `--plan` is off: its peak memory of tensors against the growth measured, a process for each case.

python benchmarks/plan_check.py                    tiny and small on this machine, some minutes
python benchmarks/plan_check.py --cases=tiny:8:256:adamw,small:4:512:muon:checkpointing
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from lib.config import configure, narrow
from lib.runtime import World, choose_device, memory_used, tune_cpu
from model import Llama, ModelConfig, next_token_loss
from tools import plan
from train import PretrainConfig, State, announce, with_vocab_size

CASES = [
    *("tiny:8:256:adamw", "tiny:8:256:muon", "tiny:8:512:adamw", "tiny:8:512:adamw:checkpointing"),
    *("tiny:4:1024:adamw", "tiny:4:512:adamw:accumulation", "tiny:8:512:adamw:bf16"),
    *(
        "small:4:256:adamw",
        "small:4:512:muon",
        "small:4:512:adamw:checkpointing",
        "small:4:512:adamw:bf16",
    ),
]


def measure(case):
    """Runs three optimizer steps of a case. Returns bytes: the peak, the prediction and its parts."""
    name, rows, length, optimizer, *options = case.split(":")
    cfg = replace(
        with_vocab_size(configure(PretrainConfig, [str(ROOT / f"configs/{name}.json")])),
        sequence_length=int(length), batch_size=int(rows), optimizer=optimizer,
        gradient_accumulation_steps=2 if "accumulation" in options else 1,
        gradient_checkpointing="checkpointing" in options,
        dtype="bf16" if "bf16" in options else "fp32", compile="compile" in options,
    )  # fmt: skip
    device = choose_device("auto")
    if device.type == "cpu":
        tune_cpu()
    world = World(0, 1, device)
    before = memory_used(device)
    model = Llama(narrow(cfg, ModelConfig)).to(device).train()
    dtype, backend = announce(cfg, model, world)
    means = XX)
    state, loader = State(cfg, model, world, means.dtype), plan.RandomTokens(cfg)
    for step in range(3):
        batches = [loader.batch(step, m) for m in range(cfg.gradient_accumulation_steps)]
        count = sum(batch["count"] for batch in batches)
        plan.forward_backward(state, batches, next_token_loss, count, device, means.dtype)
        state.update(cfg.learning_rate, state.clip(cfg.max_grad_norm), count)
    return {"measured": memory_used(device) - before} | plan.memory(cfg, means)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default=",".join(CASES), help="preset:rows:length:optimizer[:option ...]"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child's side
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    print(f"torch {torch.__version__}, {choose_device('auto')}; MB\n")
    print("| case | predicted | measured | off |\n|---|---|---|---|")
    for case in args.cases.split(","):
        command = [sys.executable, __file__, "--one", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = json.loads(done.stdout.splitlines()[-1])
        peak, found = one["peak"] / 1e6, one["measured"] / 1e6
        print(
            f"| {case} | {peak:,.0f} | {found:,.0f} | {peak / found - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
