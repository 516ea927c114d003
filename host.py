"""The machine: what it has, what it is doing now, and a preset that fits its card.

python host.py check-env
python host.py monitor --once
python host.py config-gpu --config=configs/small.json --gpu_gb=24
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from configurator import PositiveFloat, UserError, configure, read_object
from workspace import dispatch, shown_bytes, trainings

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
REMEDY = f"{Path(sys.executable).name} -m pip install -r requirements.txt"


# ----------------------------------------------------------------------------------------------------------
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
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    known = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
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
        return [f"no: torch knows {torch.version.cuda}, but there is no NVIDIA driver (no nvidia-smi)"]
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
    rows.append(
        (
            "memory",
            f"{shown_bytes(there[0])}, {shown_bytes(there[1])} free" if there else "not told by this system",
        )
    )
    rows.append(("disk here", f"{shown_bytes(space.free)} free of {shown_bytes(space.total)}"))
    rows += [
        (f"{name} (optional)", f"{version_of(name) or 'not installed'}: {what}")
        for name, what in OPTIONAL.items()
    ]
    print("\n".join(f"{name:<24}{value}" for name, value in rows))
    if missing:
        print(f"\nmissing: {', '.join(missing)}; {REMEDY}")
        raise SystemExit(1)
    print("\nall that is required is there")


# ----------------------------------------------------------------------------------------------------------
# What it is doing


@dataclass(frozen=True)
class MonitorConfig:
    """How often."""

    once: bool = False  # one look, for scripts


def busy():
    """Returns (ticks the processors worked, ticks in all), None where the system does not say."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def processor(before, now):
    """Returns the share of processor time between two looks, as text."""
    if None in (before, now):
        return "cpu not told by this system"
    return f"cpu {(now[0] - before[0]) / max(1, now[1] - before[1]):4.0%} of {cores()} cores"


def cards():
    """Returns a text for each NVIDIA card; without nvidia-smi that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,utilization.gpu,memory.used,memory.total,temperature.gpu"]
    try:
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ["no gpu (nvidia-smi does not answer)"]
    return [f"gpu {line}" for line in done.stdout.splitlines()] or ["no gpu"]


def last_line():
    """Returns what the newest training logged last, as text."""
    newest = next(iter(trainings()), None)
    if newest is None:
        return "no training"
    keys = ("step", "loss", "val_loss", "lr", "tokens_per_second")
    told = (f"{k} {newest.last[k]:.6g}" for k in keys if isinstance(newest.last.get(k), (int, float)))
    return f"{newest.folder}: {' | '.join(told) or 'nothing logged'}, {time.time() - newest.when:,.0f} s ago"


def monitor(cfg):
    """Processor, memory, GPU and the newest training, once a second until Ctrl-C."""
    before = busy()
    while True:
        time.sleep(1)
        now, there = busy(), memory()
        used = (
            f"memory {shown_bytes(there[0] - there[1])} of {shown_bytes(there[0])}"
            if there
            else "memory not told"
        )
        print(
            " | ".join([time.strftime("%H:%M:%S"), processor(before, now), used, *cards(), last_line()]),
            flush=True,
        )
        if cfg.once:
            return
        before = now


# ----------------------------------------------------------------------------------------------------------
# What fits

RESERVE = 1e9  # bytes that CUDA and the allocator take; an assumption
EAGER = 1.6  # activations of eager torch against those of a compiler, as model.memory_parts says


@dataclass(frozen=True)
class GpuConfig:
    """Which preset for which card."""

    config: str = "configs/small.json"  # the preset to fit: its batch and accumulation are chosen anew
    gpu_gb: PositiveFloat | None = (
        None  # the card's memory in GB, where it is elsewhere; none = the card found
    )
    output: str = "configs/rtx4090.json"  # the preset to write; it must not exist


def card_memory(cfg):
    """Returns (bytes of the card, its name); UserError where there is none."""
    if cfg.gpu_gb:
        return cfg.gpu_gb * 1e9, f"a card of {cfg.gpu_gb:g} GB"
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"no CUDA card ({describe_cuda(torch)[0]}); for one elsewhere: --gpu_gb=24, with make GPU_GB=24"
        )
    card = torch.cuda.get_device_properties(0)
    return card.total_memory, card.name


def rows_that_fit(model, bytes_there, most):
    """Returns (the most rows, a power of two, that fit, their bytes); (0, the bytes of one) if none do."""
    from model import memory_parts

    fitting, rows = (0, None), 1
    while rows <= most:
        parts = [value for name, value in memory_parts(model, rows).items() if not name.startswith("KV")]
        need = sum(parts) + (EAGER - 1) * parts[3]
        if need + RESERVE > bytes_there:
            return fitting if fitting[0] else (0, need)
        fitting, rows = (rows, need), rows * 2
    return fitting


def config_gpu(cfg):
    """A preset with the largest micro-batch that fits a card, at the tokens per step that it had."""
    from model import ModelConfig

    output, values = Path(cfg.output), read_object(cfg.config)
    if output.exists():
        raise UserError(f"{output}: exists; name another --output, or delete it")
    there, name = card_memory(cfg)
    model = configure(ModelConfig, [cfg.config], foreign_keys=True)
    total = values.get("batch_size", 8) * values.get("gradient_accumulation_steps", 1)
    rows, need = rows_that_fit(
        model, there, total & -total
    )  # a power of two that divides total: no row is lost
    if not rows:
        raise UserError(
            f"{cfg.config}: one row needs about {shown_bytes(need)}, {name} has {shown_bytes(there)}; "
            "take a smaller preset"
        )
    why = f"{cfg.config} for {name}, {shown_bytes(there)}: about {shown_bytes(need)} needed"
    values |= {"_why": why, "batch_size": rows, "gradient_accumulation_steps": total // rows}
    output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"{output}: batch_size {rows}, gradient_accumulation_steps {total // rows}; {why}")


COMMANDS = {
    "check-env": (check_env, EnvConfig),
    "monitor": (monitor, MonitorConfig),
    "config-gpu": (config_gpu, GpuConfig),
}

if __name__ == "__main__":
    dispatch(COMMANDS, sys.argv[1:], __doc__)
