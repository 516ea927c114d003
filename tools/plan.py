"""What a training would need and take, before it is paid for: parameters, tokens, memory by part, hours.

    python train.py configs/base.json --plan               this machine, with a few timed steps
    python train.py configs/base.json --plan_gpu=rtx4090   a card that is elsewhere, by its datasheet

Memory is counted, not guessed: `block_bytes` lists what autograd keeps of a block, `memory` adds what else is
held in the moments that can be the fullest, and tests compare both with what torch really does. This machine
is timed; for a card that is elsewhere, `card_seconds` knows two limits, arithmetic and bandwidth.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import torch

from lib.config import UserError
from lib.runtime import CARDS, autocast, memory_used, to_device
from model import Llama, ModelConfig, count_parameters, flops_per_token, group_rows
from train import Muon, State, announce, compiles, total_steps, with_vocab_size

TIMED = 3  # optimizer steps that are timed after the warm-up
PATIENCE = 120  # seconds that these may take; a slower machine is timed with one row at a time
RESERVE = 1e9  # bytes of a card that CUDA itself and the allocator's fragments take: an assumption


@dataclass(frozen=True)
class Means:
    """What a step is computed with, as `train.announce` chooses it; what has to be kept depends on it."""

    device: str  # cpu, cuda or mps
    dtype: torch.dtype  # of matmuls
    attention: str  # math, sdpa or flash
    compiled: bool

    @property
    def size(self):
        return 4 if self.dtype == torch.float32 else 2


# ---- memory


def block_bytes(cfg, means):
    """Returns the bytes that autograd keeps per token of one block, until the backward pass has reached it.

    C = d_model, D = head width, F = d_ff, H heads, T positions; s = 4 bytes, 2 in 16 bit.
    Each RMSNorm keeps its input, the normalized rows and its output, C each, and 1 / rms: the first two in
    float32, of which 16 bit needs a copy of its input in any case. Attention keeps (rotated) q, k, v and its
    output; `math` has repeated k and v for all heads and keeps H T probabilities, in float32 and as they were
    multiplied; SDPA keeps a logsumexp per head instead. SwiGLU keeps gate, silu(gate), up and their product.
    Dropout keeps its noise. A compiler that fuses kernels keeps the matmuls' inputs and recomputes the rest.
    """
    C, F, H, T, s = cfg.d_model, cfg.d_ff, cfg.n_head, cfg.sequence_length, means.size
    kv, cpu = cfg.kv_heads * cfg.head_dim, means.device == "cpu"
    documents = getattr(cfg, "document_mask", False)
    explicit = means.attention == "math" or (cpu and cfg.p_attention > 0)  # no dropout in its SDPA
    if explicit:
        probabilities = 4 if s == 4 else 6
        probabilities += (8 if s == 4 else 4) * (cfg.p_attention > 0)
        attention = 4 * C * s + H * T * probabilities + T * documents
    else:
        attention = (2 * C + 2 * kv) * s + 4 * H + T * s * documents
        attention += C * s * cpu  # there its output is laid out anew for the next matmul
    if means.compiled:
        return (4 * C + 3 * F) * s + attention
    norms = 2 * ((3 * C * 4 if s == 4 else 10 * C) + 4)
    noise = 2 * C * (s if cpu else 1) * (cfg.p_hidden > 0)
    return norms + attention + 4 * F * s + noise


def end_bytes(cfg, means):
    """Returns as much for what lies around the blocks: ids, embedding dropout, the last norm."""
    norm = (3 * cfg.d_model * 4 if means.size == 4 else 10 * cfg.d_model) + 4
    return 8 + norm + 4 * cfg.d_model * (cfg.dropout > 0)


def moment_bytes(cfg):
    """Returns the bytes of the optimizer's state: AdamW keeps two numbers per weight, Muon (blocks) one."""
    matrices = count_parameters(cfg)["layers"] - 2 * cfg.n_layer * cfg.d_model
    return 8 * count_parameters(cfg)["total"] - 4 * matrices * (cfg.optimizer == "muon")


def memory(cfg, means, framework=0):
    """Returns the bytes of a training step by part, and "peak", their sum in the fullest of three moments.

    head: all activations are held, and the logits of a group of rows (losses.group_rows), the gradient of the
    head's weight and that of its input; in 16 bit, where no compiler fuses them, also four float32 copies of
    the logits and a mask. backward: the gradient of the head's weight is scaled into another copy, or the
    last block is computed again and its gradients begin. update: no activation is left, every weight has its
    gradient, and Muon holds a batch of matrices four times. The gradients are there in the other two moments
    as well if accumulation adds to them or a CUDA graph needs them to keep their place. `framework` is given
    for a process on a CPU: see `heap_holes`.
    """
    cfg = with_vocab_size(cfg)
    N, s, counts = cfg.batch_size * cfg.sequence_length, means.size, count_parameters(cfg)
    total, table = counts["total"], cfg.vocab_size * cfg.d_model
    block, stream = N * block_bytes(cfg, means), N * cfg.d_model * s
    kept = block if not cfg.gradient_checkpointing else stream
    saved = cfg.n_layer * kept + N * end_bytes(cfg, means)
    low = 0 if s == 4 else 2 * counts["layers"]  # autocast's copies of the weights
    rows = min(N, group_rows(cfg.vocab_size, means.device))
    logits = rows * cfg.vocab_size * (s if s == 4 or means.compiled else s + 4 * 4 + 1)
    head = 4 * table + stream + (0 if s == 4 else 2 * table)
    again = block + N * cfg.d_ff * s if cfg.gradient_checkpointing else 0
    flight = stream + 4 * table + max(4 * table, again)
    standing = 4 * total * (cfg.gradient_accumulation_steps > 1 or means.device == "cuda")
    always = 4 * total + moment_bytes(cfg)
    together = min(Muon.TOGETHER, 2 * cfg.n_layer * cfg.d_ff * cfg.d_model)  # gate and up
    muon = 16 * together * (cfg.optimizer == "muon")
    moments = {
        "head": saved + low + logits + head + standing,
        "backward": saved + low + flight + standing,
        "update": 4 * total + max(4 * table, muon),
    }
    fullest = max(moments, key=moments.get)
    tensors = always + moments[fullest]
    holes = heap_holes(tensors, again, total) if framework else 0
    return {
        "weights (fp32)": 4 * total,
        "gradients (fp32)": 4 * total,
        f"{cfg.optimizer}'s moments (fp32)": moment_bytes(cfg),
        "activations": saved + low,
        "logits of a group of rows": logits,
        "gradients on their way": head if fullest == "head" else flight,
        "framework": framework,
        "holes in the heap": holes,
        "fullest": fullest,
        "peak": tensors + framework + holes,
    }


def heap_holes(tensors, again, total):
    """Returns how many bytes of a CPU process's heap, which never shrinks (world.tune_cpu), are unused holes.

    Fitted to measurements (benchmarks/RESULTS.md), not derived: glibc before 2.38 cannot reuse the place of
    an aligned block for another of its size once the few bytes cut off it are in use. A third of the tensors;
    where blocks are computed `again`, each in the holes that the one before left, twice what a block takes
    and one and a half times the gradients.
    """
    return 2 * again + 6 * total if again else tensors / 3


def framework_bytes(device, others, checkpointing=False):
    """Returns the bytes that this process takes beside `others`, those of the model that it holds already.

    A toy is trained for a step first, because libraries load their kernels on first use, and torch its
    compiler with the first optimizer. 0 on a GPU, where torch counts tensors only.
    """
    if device.type != "cpu":
        return 0
    toy = Llama(ModelConfig(n_layer=1, vocab_size=512, sequence_length=256)).train()
    toy.model.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(toy.parameters(), fused=True)
    toy(torch.zeros(1, 256, dtype=torch.long)).sum().backward()
    torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
    optimizer.step()
    with suppress(OSError, ValueError), open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") - others
    return memory_used(device) - others


class RandomTokens:
    """A loader of random ids, for a plan before there is any data; .blocks is None, as passes are unknown."""

    blocks = None

    def __init__(self, cfg):
        self.batch_size, self.length, self.vocab_size = (
            cfg.batch_size,
            cfg.sequence_length,
            cfg.vocab_size,
        )

    def batch(self, step, micro=0, rank=0, accumulation=1):
        shape = (self.batch_size, self.length + 1)
        rows = np.random.default_rng([step, micro, rank]).integers(
            0, self.vocab_size, shape, dtype=np.int64
        )
        return {"ids": rows[:, :-1].copy(), "labels": rows[:, 1:].copy(), "count": rows[:, 1:].size}


# ---- time


def card_seconds(cfg, card):
    """Returns predicted seconds of an optimizer step on `card`, compiled, in bf16.

    Arithmetic at 61 % of the datasheet's peak, and memory traffic of 8.6 times what autograd keeps and the
    logits, in 16 bit: with these two constants tiny and small come out as measured on an H100
    (benchmarks/RESULTS.md). base, also measured, comes out 8 % too slow, larger micro-batches up to 20 %.
    For other cards it is an extrapolation. Computing blocks again costs a third more; deterministic kernels
    9 %, as measured with tiny.
    """
    means = Means("cuda", torch.bfloat16, "sdpa", True)
    kept = cfg.n_layer * block_bytes(cfg, means) + 2 * cfg.vocab_size
    seconds = 1.64 * flops_per_token(cfg) / card.flops + 8.6 * kept / card.bandwidth
    slower = (4 / 3 if cfg.gradient_checkpointing else 1) * (1.09 if cfg.deterministic else 1)
    return seconds * slower * tokens_per_step(cfg)


def tokens_per_step(cfg, ranks=1):
    return cfg.batch_size * cfg.gradient_accumulation_steps * cfg.sequence_length * ranks


def timed(one_step, loader, accumulation):
    """Returns (seconds of an optimizer step, rows in a micro-batch that was timed).

    one_step(micros) computes so many micro-batches and an update, and returns the seconds of each. The first
    call, with a single row, warms up. If all rows would take longer than PATIENCE, single rows are timed.
    """
    rows, micros = loader.batch_size, min(2, accumulation)
    loader.batch_size = 1
    one_step(1)
    computing, _ = one_step(1)
    if computing * rows * micros * (TIMED + 1) < PATIENCE:
        loader.batch_size = rows
        one_step(micros)  # the first of its shape
    else:
        micros = 1
    times = [one_step(micros) for _ in range(TIMED)]
    computing, updating = (float(np.median(column)) for column in zip(*times, strict=True))
    return (
        computing / micros * accumulation * rows / loader.batch_size + updating,
        loader.batch_size,
    )


# ---- the tables


def title(text):
    return ["", text]


def size_lines(cfg, ranks=1, total=None, blocks=None):
    """Yields what the run is: parameters, FLOPs, tokens, steps and passes over the data."""
    counts = count_parameters(cfg)
    tied = " (the head's too)" if cfg.tie_word_embeddings else ""
    yield f"plan: {cfg.model_name}"
    yield row("parameters", f"{counts['total']:,}")
    yield row("  blocks", f"{counts['non_embedding']:,}")
    yield row("  embeddings" + tied, f"{counts['embedding']:,}")
    yield row("  head", f"{counts['head']:,}")
    yield row("FLOPs per token", f"{flops_per_token(cfg) / 1e6:,.1f} million")
    rows = f"{cfg.batch_size} rows x {cfg.gradient_accumulation_steps} x {cfg.sequence_length:,} tokens"
    tokens = tokens_per_step(cfg, ranks)
    yield row("tokens per step", f"{tokens:,} = {rows}{f' x {ranks} ranks' if ranks > 1 else ''}")
    box = (
        f"what {cfg.max_minutes:g} minutes hold"
        if cfg.max_minutes
        else "unknown without data or max_steps"
    )
    yield row("steps", f"{total:,}" if total else box)
    if total:
        passes = (
            f"{total * tokens / cfg.sequence_length / blocks:.2f} passes"
            if blocks
            else "passes unknown"
        )
        yield row(
            "tokens in all",
            f"{total * tokens:,}, {passes}{'' if blocks else ': there is no data yet'}",
        )


def row(name, value):
    return f"  {name:<34} {value}"


def memory_lines(cfg, means, framework=0):
    """Yields the predicted memory by part, and the peak with two other settings."""
    parts = memory(cfg, means, framework)
    yield f"memory, predicted, in MB ({means.device}, {str(means.dtype)[6:]}, attention {means.attention})"
    for name, value in parts.items():
        if name not in ("fullest", "peak"):
            yield row("  " + name, f"{value / 1e6:>10,.0f}")
    yield row("peak", f"{parts['peak'] / 1e6:>12,.0f}   the fullest moment: {parts['fullest']}")
    others = {
        f"gradient_checkpointing={'false' if cfg.gradient_checkpointing else 'true'}":
            replace(cfg, gradient_checkpointing=not cfg.gradient_checkpointing),
        f"optimizer={'adamw' if cfg.optimizer == 'muon' else 'muon'}":
            replace(cfg, optimizer="adamw" if cfg.optimizer == "muon" else "muon"),
    }  # fmt: skip
    for name, other in others.items():
        yield row(f"  with {name}", f"{memory(other, means, framework)['peak'] / 1e6:>10,.0f}")
    counts = 4 * count_parameters(cfg)["total"]
    yield row("a checkpoint on disk, in MB", f"{(counts + moment_bytes(cfg)) / 1e6:>12,.0f}")
    yield row("the finished model", f"{counts / 1e6:>12,.0f}")


def local(cfg, model, loader, loss_fn, world):
    """Says what `train.fit` would need and take here: counted, then timed. Writes nothing."""
    model.to(world.device).train()
    dtype, attention = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    means = Means(world.device.type, dtype, attention, compiles(cfg, world.device))
    total = total_steps(cfg, loader.blocks, world.size) if loader.blocks else cfg.max_steps
    weights = 4 * sum(p.numel() for p in model.parameters())
    framework = framework_bytes(world.device, weights, cfg.gradient_checkpointing)
    world.say("\n".join(local_plan(cfg, model, means, world, total, loader.blocks, framework)))

    def one_step(micros):
        began = time.perf_counter()
        batches = [loader.batch(0, micro, world.rank, micros) for micro in range(micros)]
        count = sum(batch["count"] for batch in batches)
        forward_backward(state, batches, loss_fn, count, world.device, dtype).item()
        middle = time.perf_counter()
        world.sum_gradients(state.parameters)
        state.update(cfg.floor, state.clip(cfg.max_grad_norm), count)
        return middle - began, time.perf_counter() - middle

    seconds, rows = timed(one_step, loader, cfg.gradient_accumulation_steps)
    world.say("\n".join(time_lines(cfg, seconds, total, world, rows)))


def forward_backward(state, batches, loss_fn, count, device, dtype):
    """Adds up the gradients of a step as `train.fit` does. Returns its mean loss, (), on `device`."""
    total = 0.0
    for batch in batches:
        with autocast(device, dtype):
            loss_sum, _ = loss_fn(state.model, to_device(batch, device))
        loss = loss_sum / max(1, count)
        state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def local_plan(cfg, model, means, world, total, blocks, framework):
    """Returns the lines of a plan for this machine that need no timing, for the `cfg` of any training."""
    if isinstance(cfg, ModelConfig):
        return [
            *size_lines(cfg, world.size, total, blocks),
            "",
            *memory_lines(cfg, means, framework),
        ]
    numbers = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * world.size
    return [
        f"plan: {model.cfg.model_name}",
        row("parameters", f"{sum(numbers):,}, of which {trained:,} are trained"),
        row("rows in a pass, in a step", f"{blocks:,}, {rows:,}"),
        row("steps", f"{total:,}" if total else f"what {cfg.max_minutes:g} minutes hold"),
    ]


def time_lines(cfg, seconds, total, world, rows):
    """Yields what was measured here: speed, memory so far, and hours from them."""
    yield from title(
        f"timed on this machine, {rows} of {cfg.batch_size} rows at a time, {TIMED} steps"
    )
    if isinstance(cfg, ModelConfig):
        yield row("tokens a second", f"{tokens_per_step(cfg, world.size) / seconds:,.0f}")
    if rows == cfg.batch_size:
        yield row("peak memory so far, in MB", f"{memory_used(world.device) / 1e6:,.0f}")
    yield from hour_lines(cfg, seconds, total)


def hour_lines(cfg, seconds, total):
    yield row("seconds a step", f"{seconds:,.2f}")
    if total is None and cfg.max_minutes:
        yield row(
            "steps", f"about {60 * cfg.max_minutes / seconds:,.0f} in {cfg.max_minutes:g} minutes"
        )
    elif total:
        hours = total * seconds / 3600
        hours = min(hours, cfg.max_minutes / 60) if cfg.max_minutes else hours
        end = datetime.now() + timedelta(hours=hours)
        yield row(
            "hours", f"{hours:,.2f}, without validations; begun now it ends {end:%Y-%m-%d %H:%M}"
        )


def card_plan(cfg, name):
    """Returns the lines of a plan for a card that need not be here; UserError if it is not in world.CARDS."""
    if name not in CARDS:
        raise UserError(f"plan_gpu: {name!r} is not known; use one of {', '.join(CARDS)}")
    cfg = with_vocab_size(cfg)
    card, means = CARDS[name], Means("cuda", torch.bfloat16, "sdpa", cfg.compile is not False)
    seconds, tokens, total = card_seconds(cfg, card), tokens_per_step(cfg), cfg.max_steps
    room = card.memory - RESERVE
    fitting = [
        n
        for n in (2**k for k in range(11))
        if memory(replace(cfg, batch_size=n), means)["peak"] <= room
    ]
    peak = memory(cfg, means)["peak"]
    largest = (
        f"the largest batch_size that does is {fitting[-1]}" if fitting else "no batch_size does"
    )
    mfu = flops_per_token(cfg) * tokens / seconds / card.flops
    return [
        *size_lines(cfg, total=total),
        *title(f"on {name}: a prediction from its datasheet, {card.flops / 1e12:.0f} TFLOP/s dense bf16, "
               f"{card.memory / 1e9:.0f} GB, {card.bandwidth / 1e9:,.0f} GB/s"),
        *memory_lines(cfg, means),
        row("fits", f"{'yes' if peak <= room else 'NO'}, 1 GB left to CUDA; of powers of two {largest}"),
        row("MFU", f"{mfu:.0%}, extrapolated from an H100 (benchmarks/RESULTS.md); compiled"),
        row("tokens a second", f"{tokens / seconds:,.0f}"),
        *hour_lines(cfg, seconds, total),
    ]  # fmt: skip
