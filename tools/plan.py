"""The needs of a training before it begins: parameters, tokens, memory by part, hours.

    python train.py configs/base.json --plan               this machine, with a few timed steps
    python train.py configs/base.json --plan_gpu=rtx4090   a card elsewhere, by its datasheet

Memory is counted from the shapes, within about 20 % of what torch holds. This machine is timed.
For a card elsewhere `card_seconds` knows two limits: arithmetic and bandwidth.
"""

import math
import time
from dataclasses import replace

import numpy as np

from lib.config import UserError
from lib.runtime import autocast, datasheets, memory_used, to_device
from model import LOGITS, ModelConfig, activation_bytes, count_parameters, flops_per_token
from train import State, announce, compiles, total_steps, with_vocab_size

STEPS = 3  # optimizer steps that are timed after the warm-up
PATIENCE = 120  # seconds for them; a slower machine is timed with one row at a time
RESERVE = 1e9  # bytes of a card for CUDA itself and the allocator's fragments: an assumption


# ---- memory


def memory(cfg, device="cuda", size=2, fused=True):
    """Returns the bytes of a training step's tensors by part, and "peak", about their sum.

    size: bytes of a number in matmuls; fused: compiled, with fewer activations kept.
    """
    cfg = with_vocab_size(cfg)
    N, counts = cfg.batch_size * cfg.sequence_length, count_parameters(cfg)
    weights, table = 4 * counts["total"], 4 * cfg.vocab_size * cfg.d_model
    block = N * activation_bytes(cfg, size) * (1 if fused else 1.6)  # measured in eager torch
    kept, again = cfg.n_layer * block, 0
    if cfg.gradient_checkpointing:  # a block keeps its input; one at a time is computed again
        kept, again = cfg.n_layer * N * cfg.d_model * size, block
    kept += 0 if size == 4 else 2 * counts["layers"]  # autocast's copies of the weights
    rows = min(N, max(1, LOGITS[device] // cfg.vocab_size))
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


def fitting_rows(cfg, space):
    """Returns the powers of two of rows, up to 1,024, whose step fits a card of `space` bytes."""
    powers = [2**k for k in range(11)]
    return [n for n in powers if memory(replace(cfg, batch_size=n))["peak"] <= space - RESERVE]


# ---- time


def tokens_per_step(cfg, ranks=1):
    return cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length * ranks


def card_seconds(cfg, card):
    """Returns the predicted seconds of an optimizer step on `card`, compiled, in bf16.

    Arithmetic at 61 % of the peak, and traffic of 8.6 times the activations and logits: fitted to
    tiny and small on an H100; base comes out 8 % too slow, larger micro-batches up to 20 %
    (benchmarks/RESULTS.md). Other cards are extrapolations. Gradient checkpointing costs a third
    more, deterministic kernels 9 % (measured with tiny).
    """
    kept = cfg.n_layer * activation_bytes(cfg) + 2 * cfg.vocab_size
    seconds = 1.64 * flops_per_token(cfg) / card.flops + 8.6 * kept / card.bandwidth
    slower = (4 / 3 if cfg.gradient_checkpointing else 1) * (1.09 if cfg.deterministic else 1)
    return seconds * slower * tokens_per_step(cfg)


def time_step(cfg, state, loader, loss_fn, world, dtype):
    """Returns (seconds of an optimizer step, rows of a micro-batch that was timed, their loss).

    A first step with a single row warms up. Where all rows would take longer than PATIENCE, single
    rows are timed and multiplied.
    """
    all_rows, micros = loader.batch_size, min(2, cfg.gradient_accumulation_steps)

    def run(micros):
        batches = [loader.batch(0, micro, world.rank, micros) for micro in range(micros)]
        count = sum(batch["count"] for batch in batches)
        start = time.perf_counter()
        loss = forward_backward(state, batches, loss_fn, count, world.device, dtype).item()
        middle = time.perf_counter()
        world.sum_gradients(state.parameters)
        state.update(cfg.learning_rate, state.clip(cfg.max_grad_norm), count)
        return middle - start, time.perf_counter() - middle, loss

    loader.batch_size = 1
    run(1)
    computing, *_ = run(1)
    if computing * all_rows * micros * (STEPS + 1) < PATIENCE:
        loader.batch_size = all_rows
        run(micros)  # the first of its shape
    else:
        micros = 1
    columns = zip(*(run(micros) for _ in range(STEPS)), strict=True)
    computing, updating, loss = (float(np.median(column)) for column in columns)
    times = cfg.gradient_accumulation_steps / micros * all_rows / loader.batch_size
    return computing * times + updating, loader.batch_size, loss


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


# ---- the tables


def row(name, value):
    return f"  {name:<34} {value}"


def size_lines(cfg, shape, trained, total, ranks=1, blocks=None):
    """Returns the size of a run of `total` steps (None: unknown). blocks: rows in a pass."""
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * ranks
    product = f"{cfg.batch_size} x {cfg.gradient_accumulation_steps} x {ranks} ranks"
    count = count_parameters(shape)["total"]
    lines = [
        f"plan: {shape.model_name}",
        row("parameters", f"{count:,}, of which {trained:,} are trained"),
        row("FLOPs per token", f"{flops_per_token(shape) / 1e6:,.1f} million"),
        row("rows per step", f"{rows:,} = {product}"),
        row("steps", f"{total:,}" if total else "as many as the data or the clock allow"),
    ]
    if total:
        passes = f"{total * rows / blocks:.2f}" if blocks else "unknown: there is no data yet"
        lines.append(row("passes over the data", passes))
    if total and isinstance(cfg, ModelConfig):
        lines.append(row("tokens in all", f"{total * tokens_per_step(cfg, ranks):,}"))
    return lines


def memory_lines(cfg, *kernels):
    """Returns the predicted memory by part, and the peak with checkpointing turned round."""
    parts, other = memory(cfg, *kernels), not cfg.gradient_checkpointing
    peak = memory(replace(cfg, gradient_checkpointing=other), *kernels)["peak"]
    parts |= {f"peak with gradient_checkpointing={str(other).lower()}": peak}
    rows = [row(name, f"{value / 1e6:>10,.0f}") for name, value in parts.items()]
    return ["", "memory of tensors, predicted, in MB", *rows]


def hour_lines(cfg, seconds, total):
    """Returns the time of a step and of the run."""
    clock = cfg.max_minutes / 60 if cfg.max_minutes else math.inf
    hours = min(clock, total * seconds / 3600 if total else math.inf)
    lines = [row("seconds a step", f"{seconds:,.2f}")]
    if hours < math.inf:
        steps = f"{3600 * hours / seconds:,.0f} steps"
        lines.append(row("hours", f"{hours:,.2f} for {steps}, without validations"))
    return lines


def local(cfg, model, loader, loss_fn, world):
    """Prints the needs of `train.fit` here: counted, then timed and measured. Writes nothing."""
    model.to(world.device).train()
    dtype, _ = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    total = total_steps(cfg, loader.blocks, world.size) if loader.blocks else cfg.max_steps
    trained = sum(p.numel() for p in state.parameters)
    lines = size_lines(cfg, model.cfg, trained, total, world.size, loader.blocks)
    if isinstance(cfg, ModelConfig):
        kernels = world.device.type, dtype.itemsize, compiles(cfg, world.device)
        lines += memory_lines(cfg, *kernels)
    world.say("\n".join(lines))
    seconds, rows, loss = time_step(cfg, state, loader, loss_fn, world, dtype)
    lines = ["", f"timed on this machine, {rows} of {cfg.batch_size} rows at a time, {STEPS} steps"]
    lines.append(row("loss", f"{loss:.4f}"))
    if isinstance(cfg, ModelConfig):
        speed = tokens_per_step(cfg, world.size) / seconds
        lines.append(row("tokens a second", f"{speed:,.0f}"))
    if rows == cfg.batch_size:
        peak = f"{memory_used(world.device) / 1e6:,.0f}"
        lines.append(row("peak memory, measured, in MB", peak))
    world.say("\n".join([*lines, *hour_lines(cfg, seconds, total)]))


def find_card(name, option):
    """Returns the GPU of a name, by its datasheet; `option` is how its user gave it."""
    cards = datasheets()
    if name not in cards:
        raise UserError(f"{option}: {name!r} is not known; use one of {', '.join(cards)}")
    return cards[name]


def card_plan(cfg, name):
    """Returns the lines of a plan for a card that is elsewhere; UserError for an unknown card."""
    cfg, card = with_vocab_size(cfg), find_card(name, "plan_gpu")
    seconds, tokens = card_seconds(cfg, card), tokens_per_step(cfg)
    fits = "yes" if memory(cfg)["peak"] <= card.memory - RESERVE else "NO"
    largest = max(fitting_rows(cfg, card.memory), default=0)
    mfu = flops_per_token(cfg) * tokens / seconds / card.flops
    datasheet = f"{card.flops / 1e12:.0f} TFLOP/s dense bf16, {card.memory / 1e9:.0f} GB"
    return [
        *size_lines(cfg, cfg, count_parameters(cfg)["total"], cfg.max_steps),
        *memory_lines(cfg),
        "",
        f"on {name}, predicted from its datasheet: {datasheet}, {card.bandwidth / 1e9:,.0f} GB/s",
        row("fits", f"{fits}, with 1 GB left to CUDA; at most {largest} rows (a power of two)"),
        row("MFU", f"{mfu:.0%}, extrapolated from an H100 (benchmarks/RESULTS.md); compiled"),
        row("tokens a second", f"{tokens / seconds:,.0f}"),
        *hour_lines(cfg, seconds, cfg.max_steps),
    ]
