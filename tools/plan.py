"""The needs of a training before it begins: parameters, tokens, memory by part, hours.

    python train.py configs/base.json --plan               this machine, with a few timed steps
    python train.py configs/base.json --plan_gpu=rtx4090   a card elsewhere, by its datasheet

Memory is counted from the shapes, within about 20 % of what torch holds. This machine is timed.
For a card elsewhere `card_seconds` knows two limits: arithmetic and bandwidth.
"""

import time
from dataclasses import asdict, replace

import numpy as np

from lib.config import UserError
from lib.runtime import autocast, datasheets, memory_used, to_device
from model import CACHED, LOGITS, ModelConfig, count_parameters, flops_per_token
from train import (
    PretrainConfig,
    State,
    announce,
    rows_per_step,
    tokens_per_step,
    total_steps,
    with_vocab_size,
)

STEPS = 3  # optimizer steps that are timed after the warm-up
PATIENCE = 120  # seconds for them; a slower machine is timed with one row at a time
RESERVE = 1e9  # bytes of a card for CUDA itself and the allocator's fragments: an assumption


# ---- memory


def activation_bytes(cfg, size=2):
    """Returns the bytes that a training step keeps of a token in a block, `size` bytes a number."""
    # norms' inputs and outputs; q, k, v, attention's output; gate, up and their product
    heads = 2 * cfg.n_head + 2 * cfg.kv_heads + (cfg.n_head + cfg.kv_heads) * cfg.qk_norm
    return size * (4 * cfg.d_model + heads * cfg.head_width + 3 * cfg.d_ff)


def memory(cfg, device="cuda", size=2, fused=True):
    """Returns the bytes of a training step's tensors by part, and "peak", about their sum.

    size: bytes of a number in matmuls; fused: compiled, with fewer activations kept.
    """
    cfg = with_vocab_size(cfg)
    N, counts = cfg.batch_size * cfg.sequence_length, count_parameters(cfg)
    weights, table = 4 * counts["total"], 4 * cfg.vocab_size * cfg.d_model
    block = N * activation_bytes(cfg, size) * (1 if fused else 1.6)  # measured in eager torch
    if device == "cpu" and size == 2 and cfg.sequence_length <= 512:  # two matmuls attend there
        block += 2 * N * cfg.n_head * cfg.sequence_length  # their weights
    kept, again = cfg.n_layer * block, 0
    if cfg.gradient_checkpointing:  # a block keeps its input; one at a time is computed again
        kept, again = cfg.n_layer * N * cfg.d_model * size, block
    kept += 0 if size == 4 else 2 * counts["layers"]  # autocast's copies of the weights
    made, worked_on = (
        min(N, max(1, numbers[device] // cfg.vocab_size)) * cfg.vocab_size
        for numbers in (LOGITS, CACHED)
    )
    logits = made * size + (0 if fused or size == 4 else worked_on * 17)
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
    """Returns (seconds of an optimizer step, rows of a micro-batch that was timed).

    A micro-batch is timed, and an update. Single rows warm up, and are timed and multiplied where
    a micro-batch would take longer than PATIENCE.
    """

    def run():
        start = time.perf_counter()
        batch = loader.batch(0, 0, world.rank, 1)
        forward_backward(state, batch, loss_fn, batch["count"], world.device, dtype).item()
        middle = time.perf_counter()
        state.gradients.sum()
        state.update(cfg.learning_rate, state.clip(cfg.max_grad_norm), batch["count"])
        return middle - start, time.perf_counter() - middle

    rows, loader.batch_size = loader.batch_size, 1
    run()
    if run()[0] * rows * (STEPS + 1) < PATIENCE:
        loader.batch_size = rows
        run()  # the first of its shape
    computing, updating = np.median([run() for _ in range(STEPS)], axis=0)
    times = cfg.gradient_accumulation_steps * rows / loader.batch_size
    return computing * times + updating, loader.batch_size


def forward_backward(state, batch, loss_fn, count, device, dtype):
    """Adds the gradients of a batch as `train.fit` does. Returns its share of a step's loss, ()."""
    with autocast(device, dtype):
        loss_sum, _ = loss_fn(state.model, to_device(batch, device))
    loss = loss_sum / max(1, count)
    state.scaler.scale(loss).backward()
    return loss.detach()


class RandomTokens:
    """A loader of random ids for a plan without data; .blocks None: its size is unknown."""

    blocks = None

    def __init__(self, cfg):
        self.batch_size = cfg.batch_size
        self.length, self.vocab_size = cfg.sequence_length, with_vocab_size(cfg).vocab_size

    def batch(self, step, micro=0, rank=0, accumulation=1):
        generator = np.random.default_rng([step, micro, rank])
        rows = generator.integers(0, self.vocab_size, (self.batch_size, self.length + 1))
        return {"ids": rows[:, :-1].copy(), "labels": rows[:, 1:].copy(), "count": rows[:, 1:].size}


# ---- the tables


def table(title, rows):
    """Returns a title and a line for each {name: value}."""
    return "\n".join([title, *(f"  {name:<34} {value}" for name, value in rows.items()), ""])


def needs(cfg, shape, trained, total, ranks=1, *kernels):
    """Returns the tables of a run of `total` steps (None: unknown): its size, and its memory.

    The memory, with the peak if checkpointing is turned round, is that of a PretrainConfig only.
    """
    size, micros = cfg.batch_size, cfg.gradient_accumulation_steps
    rows = {
        "parameters": f"{count_parameters(shape)['total']:,}, of which {trained:,} are trained",
        "FLOPs per token": f"{flops_per_token(shape) / 1e6:,.1f} million",
        "rows per step": f"{rows_per_step(cfg, ranks):,} = {size} x {micros} x {ranks} ranks",
        "steps": f"{total:,}" if total else "as many as the data or the clock allow",
    }
    title, other = f"plan: {shape.model_name}", not cfg.gradient_checkpointing
    if not isinstance(cfg, ModelConfig):
        return table(title, rows)
    rows |= {"tokens in all": f"{total * tokens_per_step(cfg, ranks):,}"} if total else {}
    peak = f"peak with gradient_checkpointing={str(other).lower()}"
    turned = memory(replace(cfg, gradient_checkpointing=other), *kernels)["peak"]
    parts = memory(cfg, *kernels) | {peak: turned}
    parts = {name: f"{value / 1e6:>10,.0f}" for name, value in parts.items()}
    return table(title, rows) + "\n" + table("memory of tensors, predicted, in MB", parts)


def time_rows(cfg, seconds, total, ranks=1):
    """Returns {name: value} of the time of a step and of the run, without validations."""
    rows = {"seconds a step": f"{seconds:,.2f}"}
    if isinstance(cfg, ModelConfig):
        rows["tokens a second"] = f"{tokens_per_step(cfg, ranks) / seconds:,.0f}"
    hours = [total * seconds / 3600] if total else []
    hours += [cfg.max_minutes / 60] if cfg.max_minutes else []
    if hours:
        rows["hours"] = f"{min(hours):,.2f} for {3600 * min(hours) / seconds:,.0f} steps"
    return rows


def local(cfg, model, loader, loss_fn, world):
    """Prints the needs of `train.fit` here: counted, then timed and measured. Writes nothing."""
    model.to(world.device).train()
    dtype, compiled = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    total = total_steps(cfg, loader.blocks, world.size) if loader.blocks else cfg.max_steps
    trained = sum(p.numel() for p in state.parameters)
    kernels = world.device.type, dtype.itemsize, compiled
    world.say(needs(cfg, model.cfg, trained, total, world.size, *kernels))
    seconds, timed = time_step(cfg, state, loader, loss_fn, world, dtype)
    rows = time_rows(cfg, seconds, total, world.size)
    if timed == cfg.batch_size:
        rows["peak memory, measured, in MB"] = f"{memory_used(world.device) / 1e6:,.0f}"
    title = f"timed on this machine, {timed} of {cfg.batch_size} rows at a time, {STEPS} steps"
    world.say(table(title, rows))


def find_card(name, option):
    """Returns the GPU of a name, by its datasheet; `option` is how its user gave it."""
    cards = datasheets()
    if name not in cards:
        raise UserError(f"{option}: {name!r} is not known; use one of {', '.join(cards)}")
    return cards[name]


def card_plan(cfg, name):
    """Returns the plan for a card that is elsewhere; UserError for an unknown card."""
    cfg, card = with_vocab_size(cfg), find_card(name, "plan_gpu")
    fits = "yes" if memory(cfg)["peak"] <= card.memory - RESERVE else "NO"
    largest = max(fitting_rows(cfg, card.memory), default=0)
    rows = {
        "datasheet": f"{card.flops / 1e12:.0f} TFLOP/s dense bf16, {card.memory / 1e9:.0f} GB",
        "fits": f"{fits}, with 1 GB left to CUDA; at most {largest} rows (a power of two)",
        **time_rows(cfg, card_seconds(cfg, card), cfg.max_steps),
    }
    title = f"on {name}, compiled: extrapolated from an H100 (benchmarks/RESULTS.md)"
    tables = needs(cfg, cfg, count_parameters(cfg)["total"], cfg.max_steps)
    return tables + "\n" + table(title, rows)


def architecture(shape):
    """Returns the report of `python model.py PRESET`, of a ModelConfig."""
    D, L, T, V = shape.head_width, shape.n_layer, shape.sequence_length, shape.vocab_size
    cfg = PretrainConfig(**(asdict(shape) | {"qkv_bias": False}))  # which it refuses
    counts = count_parameters(shape) | {"training FLOPs per token": flops_per_token(shape)}
    parts = memory(cfg) | {"KV cache of one full row (16 bit)": 4 * L * shape.kv_heads * D * T}
    heads = f"{shape.n_head} heads of {D}, {shape.kv_heads} for keys and values"
    name = f"{shape.model_name}: {L} layers x {shape.d_model}, {heads}, d_ff {shape.d_ff}"
    title = f"{name}, vocabulary {V}, context {T}"
    tables = table(title, {part: f"{count:>15,}" for part, count in counts.items()})
    title = f"memory of a training step of {cfg.batch_size} rows, predicted"
    tables += "\n" + table(title, {part: f"{n / 1e6:>12,.1f} MB" for part, n in parts.items()})
    for name, step in {"vocab_size": 64, "d_model": 64, "d_ff": 64, "head_width": 32}.items():
        if (size := getattr(shape, name)) % step:
            tables += f"warning: {name} {size} is no multiple of {step}: its kernels are slower\n"
    return tables.rstrip()
