"""The needs of a training before it begins: parameters, tokens, memory by part, hours.

    python train.py configs/base.json --plan               this machine, with a few timed steps
    python train.py configs/base.json --plan_gpu=rtx4090   a card elsewhere, by its datasheet

Memory is counted from the shapes, within about 20 % of what torch holds. This machine is timed.
For a card elsewhere `card_seconds` knows two limits: arithmetic and bandwidth.
"""

import time
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np

from lib.config import UserError
from lib.runtime import autocast, datasheets, memory_used, to_device
from model import ModelConfig, activation_bytes, count_parameters, flops_per_token, rows_per_group
from train import State, announce, compiles, total_steps, with_vocab_size

STEPS = 3  # optimizer steps that are timed after the warm-up
PATIENCE = 120  # seconds for them; a slower machine is timed with one row at a time
RESERVE = 1e9  # bytes of a card for CUDA itself and the allocator's fragments: an assumption


# ----------------------------------------------------------------------------------------------
# Memory


def memory(cfg, device="cuda", size=2, fused=True):
    """Returns the bytes of a training step's tensors by part, and "peak", about their sum.

    size: bytes of a number in matmuls; fused: compiled, so that fewer activations are kept.
    """
    cfg = with_vocab_size(cfg)
    N, counts = cfg.batch_size * cfg.sequence_length, count_parameters(cfg)
    weights, table = 4 * counts["total"], 4 * cfg.vocab_size * cfg.d_model
    block = N * activation_bytes(cfg, size, fused)
    kept, again = cfg.n_layer * block, 0
    if cfg.gradient_checkpointing:  # a block keeps its input; one at a time is computed again
        kept, again = cfg.n_layer * N * cfg.d_model * size, block
    kept += 0 if size == 4 else 2 * counts["layers"]  # autocast's copies of the weights
    rows = min(N, rows_per_group(cfg.vocab_size, device))
    logits = rows * cfg.vocab_size * (size if fused or size == 4 else size + 17)
    # AdamW keeps two numbers a weight, Muon one
    moments = 2 * weights - (4 * counts["layers"] if cfg.optimizer == "muon" else 0)
    # accumulation and CUDA graphs keep every gradient; else it follows the activations it replaces
    standing = weights if cfg.gradient_accumulation_steps > 1 or device == "cuda" else 0
    forward = kept + max(logits, again) + table + standing
    return {
        "weights (fp32)": weights,
        "gradients (fp32)": weights,
        f"{cfg.optimizer}'s moments (fp32)": moments,
        "activations": kept + again,
        "logits of a group of rows": logits,
        "peak": weights + moments + max(forward, weights + table),
    }


# ----------------------------------------------------------------------------------------------
# Time


def tokens_per_step(cfg, ranks=1):
    return cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length * ranks


def card_seconds(cfg, card):
    """Returns the predicted seconds of an optimizer step on `card`, compiled, in bf16.

    Arithmetic at 61 % of the datasheet's peak, and memory traffic of 8.6 times the activations and
    logits: with these two constants tiny and small come out as measured on an H100; base comes out
    8 % too slow, larger micro-batches up to 20 % (benchmarks/RESULTS.md). Other cards are
    extrapolations. Gradient checkpointing costs a third more, deterministic kernels 9 % (measured
    with tiny).
    """
    kept = cfg.n_layer * activation_bytes(cfg) + 2 * cfg.vocab_size
    seconds = 1.64 * flops_per_token(cfg) / card.flops + 8.6 * kept / card.bandwidth
    slower = (4 / 3 if cfg.gradient_checkpointing else 1) * (1.09 if cfg.deterministic else 1)
    return seconds * slower * tokens_per_step(cfg)


def time_step(cfg, state, loader, loss_fn, world, dtype):
    """Returns (seconds of an optimizer step, rows of a micro-batch that was timed).

    A first step with a single row warms up. Where all rows would take longer than PATIENCE, single
    rows are timed and multiplied.
    """
    all_rows, micros = loader.batch_size, min(2, cfg.gradient_accumulation_steps)

    def run(micros):
        batches = [loader.batch(0, micro, world.rank, micros) for micro in range(micros)]
        count = sum(batch["count"] for batch in batches)
        start = time.perf_counter()
        forward_backward(state, batches, loss_fn, count, world.device, dtype).item()
        middle = time.perf_counter()
        world.sum_gradients(state.parameters)
        state.update(cfg.floor, state.clip(cfg.max_grad_norm), count)
        return middle - start, time.perf_counter() - middle

    loader.batch_size = 1
    run(1)
    computing, _ = run(1)
    if computing * all_rows * micros * (STEPS + 1) < PATIENCE:
        loader.batch_size = all_rows
        run(micros)  # the first of its shape
    else:
        micros = 1
    columns = zip(*(run(micros) for _ in range(STEPS)), strict=True)
    computing, updating = (float(np.median(column)) for column in columns)
    times = cfg.gradient_accumulation_steps / micros * all_rows / loader.batch_size
    return computing * times + updating, loader.batch_size


def forward_backward(state, batches, loss_fn, count, device, dtype):
    """Adds up the gradients of a step as `train.fit` does. Returns its mean loss, ()."""
    total = 0.0
    for batch in batches:
        with autocast(device, dtype):
            loss_sum, _ = loss_fn(state.model, to_device(batch, device))
        loss = loss_sum / max(1, count)
        state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


class RandomTokens:
    """A loader of random ids for a plan without data; .blocks None: passes are unknown."""

    blocks = None

    def __init__(self, cfg):
        self.batch_size = cfg.batch_size
        self.length, self.vocab_size = cfg.sequence_length, with_vocab_size(cfg).vocab_size

    def batch(self, step, micro=0, rank=0, accumulation=1):
        generator = np.random.default_rng([step, micro, rank])
        rows = generator.integers(0, self.vocab_size, (self.batch_size, self.length + 1))
        return {"ids": rows[:, :-1].copy(), "labels": rows[:, 1:].copy(), "count": rows[:, 1:].size}


# ----------------------------------------------------------------------------------------------
# The tables


def row(name, value):
    return f"  {name:<34} {value}"


def size_lines(cfg, ranks=1, total=None, blocks=None):
    """Yields the size of a run: parameters, FLOPs, tokens, steps and passes over the data."""
    counts, tokens = count_parameters(cfg), tokens_per_step(cfg, ranks)
    yield f"plan: {cfg.model_name}"
    yield row("parameters", f"{counts['total']:,}")
    yield row("  blocks", f"{counts['non_embedding']:,}")
    tied = " (the head's too)" if cfg.tie_word_embeddings else ""
    yield row("  embeddings" + tied, f"{counts['embedding']:,}")
    yield row("  head", f"{counts['head']:,}")
    yield row("FLOPs per token", f"{flops_per_token(cfg) / 1e6:,.1f} million")
    product = f"{cfg.batch_size} rows x {cfg.gradient_accumulation_steps} x {cfg.sequence_length:,}"
    product += f" tokens x {ranks} ranks" if ranks > 1 else " tokens"
    yield row("tokens per step", f"{tokens:,} = {product}")
    yield row("steps", step_count(cfg, total))
    if total:
        passes = "passes unknown: there is no data yet"
        if blocks:
            passes = f"{total * tokens / cfg.sequence_length / blocks:.2f} passes"
        yield row("tokens in all", f"{total * tokens:,}, {passes}")


def step_count(cfg, total):
    """Returns the number of steps as text."""
    if total:
        return f"{total:,}"
    if cfg.max_minutes:
        return f"as many as fit in {cfg.max_minutes:g} minutes"
    return "unknown without data or max_steps"


def memory_lines(cfg, *kernels):
    """Yields the predicted memory by part, and the peak with two other settings."""
    parts, other = memory(cfg, *kernels), "adamw" if cfg.optimizer == "muon" else "muon"
    yield from ("", "memory of tensors, predicted, in MB")
    for name, value in parts.items():
        yield row(name if name == "peak" else "  " + name, f"{value / 1e6:>10,.0f}")
    for name, value in (
        ("gradient_checkpointing", not cfg.gradient_checkpointing),
        ("optimizer", other),
    ):
        peak = memory(replace(cfg, **{name: value}), *kernels)["peak"]
        yield row(f"  with {name}={str(value).lower()}", f"{peak / 1e6:>10,.0f}")
    weights, moments = parts["weights (fp32)"], parts[f"{cfg.optimizer}'s moments (fp32)"]
    yield row("a checkpoint on disk", f"{(weights + moments) / 1e6:>10,.0f}")
    yield row("the finished model", f"{weights / 1e6:>10,.0f}")


def hour_lines(cfg, seconds, total):
    """Yields the time of a step and of the run."""
    yield row("seconds a step", f"{seconds:,.2f}")
    if total:
        hours = total * seconds / 3600
        hours = min(hours, cfg.max_minutes / 60) if cfg.max_minutes else hours
        end = datetime.now() + timedelta(hours=hours)
        yield row("hours", f"{hours:,.2f}, without validations; begun now it ends {end:%F %H:%M}")
    elif cfg.max_minutes:
        steps = f"about {60 * cfg.max_minutes / seconds:,.0f} in {cfg.max_minutes:g} minutes"
        yield row("steps", steps)


def local(cfg, model, loader, loss_fn, world):
    """Prints the needs of `train.fit` here: counted, then timed and measured. Writes nothing."""
    model.to(world.device).train()
    dtype, _ = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    total = total_steps(cfg, loader.blocks, world.size) if loader.blocks else cfg.max_steps
    pretraining = isinstance(cfg, ModelConfig)
    if pretraining:
        kernels = world.device.type, dtype.itemsize, compiles(cfg, world.device)
        sizes = [*size_lines(cfg, world.size, total, loader.blocks), *memory_lines(cfg, *kernels)]
    else:
        sizes = tuning_lines(cfg, model, loader.blocks, world.size, total)
    world.say("\n".join(sizes))
    seconds, rows = time_step(cfg, state, loader, loss_fn, world, dtype)
    lines = ["", f"timed on this machine, {rows} of {cfg.batch_size} rows at a time, {STEPS} steps"]
    if pretraining:
        speed = tokens_per_step(cfg, world.size) / seconds
        lines.append(row("tokens a second", f"{speed:,.0f}"))
    if rows == cfg.batch_size:
        peak = f"{memory_used(world.device) / 1e6:,.0f}"
        lines.append(row("peak memory, measured, in MB", peak))
    world.say("\n".join([*lines, *hour_lines(cfg, seconds, total)]))


def tuning_lines(cfg, model, blocks, ranks, total):
    """Returns the size of an SFT or DPO run."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * ranks
    return [
        f"plan: {model.cfg.model_name}",
        row("parameters", f"{parameters:,}, of which {trained:,} are trained"),
        row("rows in a pass, in a step", f"{blocks:,}, {rows:,}"),
        row("steps", step_count(cfg, total)),
    ]


def card_plan(cfg, name):
    """Returns the lines of a plan for a card that is elsewhere; UserError if its data are not
    known.
    """
    cards = datasheets()
    if name not in cards:
        raise UserError(f"plan_gpu: {name!r} is not known; use one of {', '.join(cards)}")
    cfg, card = with_vocab_size(cfg), cards[name]
    seconds, tokens, room = card_seconds(cfg, card), tokens_per_step(cfg), card.memory - RESERVE
    fitting = [
        n for n in (2**k for k in range(11)) if memory(replace(cfg, batch_size=n))["peak"] <= room
    ]
    fits = "yes" if memory(cfg)["peak"] <= room else "NO"
    largest = f"largest power of two: {fitting[-1]}" if fitting else "not even one row"
    mfu = flops_per_token(cfg) * tokens / seconds / card.flops
    datasheet = f"{card.flops / 1e12:.0f} TFLOP/s dense bf16, {card.memory / 1e9:.0f} GB"
    return [
        *size_lines(cfg, total=cfg.max_steps),
        *memory_lines(cfg),
        "",
        f"on {name}, predicted from its datasheet: {datasheet}, {card.bandwidth / 1e9:,.0f} GB/s",
        row("fits", f"{fits}, with 1 GB left to CUDA; rows that fit, {largest}"),
        row("MFU", f"{mfu:.0%}, extrapolated from an H100 (benchmarks/RESULTS.md); compiled"),
        row("tokens a second", f"{tokens / seconds:,.0f}"),
        *hour_lines(cfg, seconds, cfg.max_steps),
    ]
