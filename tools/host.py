"""The machine: what it has, what it is doing now, and a preset that fits its card.

python -m tools.host check-env
python -m tools.host monitor --once
python -m tools.host config-gpu --config=configs/small.json --gpu=rtx4090
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from lib.config import UserError, configure, dispatch, read_object
from tools.workspace import command, shown_bytes, trainings

REQUIRED = ("torch", "numpy", "sentencepiece", "datasketch", "ftfy", "tqdm", "safetensors")
OPTIONAL = {
    "flash-attn": "faster attention on CUDA",
    "datasets": "hf: sources, WikiText-2 and BoolQ for eval.py",
    "pyarrow": ".parquet and .arrow",
    "zstandard": ".zst",
    "redis": "one index of duplicates for several preparations",
    "py3langid": "languages other than English",
    "tokenizers": "other models' byte-level tokenizers",
    "wandb": "--report_to=wandb",
    "tensorboard": "--report_to=tensorboard",
    "matplotlib": "curves and pictures in reports",
}


# ----------------------------------------------------------------------------------------------
# What it has


def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory():
    """Returns (bytes in all, bytes available), None where the system does not say (no /proc)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    known = {
        name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)
    }
    return known["MemTotal"], known["MemAvailable"]


def describe_cuda(torch):
    """Returns lines on the graphics cards that torch can use, or why there are none."""
    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [
            f"yes, {torch.version.cuda}",
            *(f"{card.name}, {shown_bytes(card.total_memory)}" for card in cards),
        ]
    if torch.version.cuda is None:
        return [
            "no: this torch was built without it",
            *(["Apple's MPS is there"] * torch.backends.mps.is_available()),
        ]
    if not shutil.which("nvidia-smi"):
        return [
            f"no: torch knows {torch.version.cuda}, but there is no NVIDIA driver (no nvidia-smi)"
        ]
    return [
        f"no: torch knows {torch.version.cuda}, but no card: an old driver, or CUDA_VISIBLE_DEVICES is empty"
    ]


@dataclass(frozen=True)
class EnvConfig:
    """Nothing to choose."""


def check_env(cfg=None):
    """What this machine has for the programs here; exits 1 if something required is missing."""
    rows = [("python", platform.python_version()), ("system", platform.platform())]
    missing = [] if sys.version_info >= (3, 11) else ["Python 3.11 or later"]
    for package in REQUIRED:
        version = version_of(package)
        rows.append((package, version or "MISSING"))
        missing += [] if version else [package]
    if version_of("torch"):
        import torch

        rows += [("CUDA", line) for line in describe_cuda(torch)]
    space, there = shutil.disk_usage("."), memory()
    rows.append(("cores", str(cores())))
    free = (
        f"{shown_bytes(there[0])}, {shown_bytes(there[1])} free"
        if there
        else "not told by this system"
    )
    rows.append(("memory", free))
    rows.append(("disk here", f"{shown_bytes(space.free)} free of {shown_bytes(space.total)}"))
    rows += [
        (f"{name} (optional)", f"{version_of(name) or 'not installed'}: {what}")
        for name, what in OPTIONAL.items()
    ]
    print("\n".join(f"{name:<24}{value}" for name, value in rows))
    if missing:
        remedy = command("-m", "pip", "install", "-r", "requirements.txt")
        print(f"\nmissing: {', '.join(missing)}; {remedy}")
        raise SystemExit(1)
    print("\nall that is required is there")


# ----------------------------------------------------------------------------------------------
# What it is doing


@dataclass(frozen=True)
class MonitorConfig:
    """How often."""

    once: bool = False  # one look, for scripts


def busy():
    """Returns (ticks the processors worked, ticks in all), None where the system does not say."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    ticks = [int(word) for word in first.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def processor(before, now):
    """Returns the share of processor time between two looks, as text."""
    if None in (before, now):
        return "cpu not told by this system"
    return f"cpu {(now[0] - before[0]) / max(1, now[1] - before[1]):4.0%} of {cores()} cores"


def cards():
    """Returns a line for each NVIDIA card, or one that says that there is none."""
    what = "--query-gpu=name,utilization.gpu,memory.used,memory.total,temperature.gpu"
    query = ["nvidia-smi", what, "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ["no gpu (nvidia-smi does not answer)"]
    return [f"gpu {line}" for line in done.stdout.splitlines()] or ["no gpu"]


def last_line():
    """Returns what the newest training logged last, as text."""
    newest = next(iter(trainings()), None)
    if newest is None:
        return "no training"
    keys = ("step", "loss", "val_loss", "lr", "tokens_per_second")
    told = (
        f"{k} {newest.last[k]:.6g}" for k in keys if isinstance(newest.last.get(k), (int, float))
    )
    return f"{newest.folder}: {' | '.join(told) or 'nothing logged'}, {time.time() - newest.when:,.0f} s ago"


def monitor(cfg):
    """Processor, memory, GPU and the newest training, once a second until Ctrl-C."""
    before = busy()
    while True:
        time.sleep(1)
        now, there = busy(), memory()
        used = "memory not told"
        if there:
            used = f"memory {shown_bytes(there[0] - there[1])} of {shown_bytes(there[0])}"
        parts = [time.strftime("%H:%M:%S"), processor(before, now), used, *cards(), last_line()]
        print(" | ".join(parts), flush=True)
        if cfg.once:
            return
        before = now


# ----------------------------------------------------------------------------------------------
# What fits


@dataclass(frozen=True)
class GpuConfig:
    """Which preset for which card."""

    # the preset to fit: its batch and accumulation are chosen anew
    config: str = "configs/small.json"
    gpu: str | None = None  # a card that is elsewhere, as rtx4090; none = the card found
    output: str = "configs/rtx4090.json"  # the preset to write; it must not exist


def find_card(cfg):
    """Returns (name, bytes of memory) of the card to fit; UserError where there is none."""
    import torch

    from lib.runtime import CARDS

    if cfg.gpu:
        if cfg.gpu not in CARDS:
            raise UserError(f"gpu: {cfg.gpu!r} is not known; use one of {', '.join(CARDS)}")
        return cfg.gpu, CARDS[cfg.gpu].memory
    if not torch.cuda.is_available():
        plan = f"python train.py {cfg.config} --plan_gpu=rtx4090 plans for one"
        raise UserError(
            f"no CUDA card ({describe_cuda(torch)[0]}); --gpu=rtx4090 fits to one elsewhere, {plan}"
        )
    card = torch.cuda.get_device_properties(0)
    return card.name, card.total_memory


def rows_that_fit(shape, room):
    """Returns (the most rows that fit, a power of two that divides a step; their bytes), as plan.py counts.

    shape: a PretrainConfig. (0, the bytes of one row) if not even that fits into `room` bytes.
    """
    import torch

    from tools.plan import Means, memory

    means = Means("cuda", torch.bfloat16, "sdpa", shape.compile is not False)
    step = shape.batch_size * shape.gradient_accumulation_steps
    sizes = [2**k for k in range(step.bit_length()) if step % 2**k == 0]
    needs = {n: memory(rows_of(shape, n), means)["peak"] for n in sizes}
    fitting = [n for n, need in needs.items() if need <= room]
    return (max(fitting), needs[max(fitting)]) if fitting else (0, needs[1])


def rows_of(shape, rows):
    """Returns the same step in micro-batches of `rows`."""
    step = shape.batch_size * shape.gradient_accumulation_steps
    return replace(shape, batch_size=rows, gradient_accumulation_steps=step // rows)


def config_gpu(cfg):
    """A preset with the largest micro-batch that fits a card, at the tokens per step that it had."""
    output, values = Path(cfg.output), read_object(cfg.config)
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    name, there = find_card(cfg)

    from tools.plan import RESERVE
    from train import PretrainConfig

    shape = configure(PretrainConfig, [cfg.config])
    rows, need = rows_that_fit(shape, there - RESERVE)
    told = f"about {shown_bytes(need)} needed of {shown_bytes(there)}, {RESERVE / 1e9:g} GB left to CUDA"
    if not rows:
        raise UserError(f"{cfg.config}: one row does not fit {name}: {told}; take a smaller preset")
    times = rows_of(shape, rows).gradient_accumulation_steps
    values |= {"_why": f"{cfg.config} for {name}: {told}"}
    values |= {"batch_size": rows, "gradient_accumulation_steps": times}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(
        f"{output}: batch_size {rows}, gradient_accumulation_steps {times}, the same step; {told}"
    )


COMMANDS = {
    "check-env": (check_env, EnvConfig),
    "monitor": (monitor, MonitorConfig),
    "config-gpu": (config_gpu, GpuConfig),
}

if __name__ == "__main__":
    dispatch(COMMANDS, sys.argv[1:], __doc__)
