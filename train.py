"""One training loop, `fit`, and its first user: pretraining.

    python train.py configs/tiny.json --data_path=data/processed/docstrings --max_minutes=30
    torchrun --nproc_per_node=2 train.py configs/tiny.json --batch_size=8
    python train.py configs/tiny.json --resume_from_checkpoint=auto
    python train.py configs/base.json --plan       needs and hours; --plan_gpu=rtx4090 for a card
    python train.py curves checkpoints/a checkpoints/b     watch checkpoints: a live page

Two rules keep the numbers right. A loss is a sum, divided by the count of supervised tokens of the
whole step over all ranks: neither accumulation nor the number of ranks changes the result. A batch
is a pure function of (seed, step, micro-step, rank): a resumed run sees what the straight one would
have seen, bit for bit.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

# OpenMP's threads spin while they wait for each other. Beside a busy process one of them is off its
# core at times, and the other would spin for it: they sleep instead if the machine is busy now.
# That changes no result. OpenMP reads it once, when torch loads it.
with contextlib.suppress(OSError):  # Linux has the file
    load = Path("/proc/loadavg").read_text(encoding="ascii")
    if int(load.split()[3].partition("/")[0]) > 1:  # processes that run now, this one included
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import model as llama
from data import TokenStream
from lib import checkpoint, config, runtime
from lib.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UserError,
)
from lib.log import Log, read_records
from lib.runtime import autocast, choose_dtype, open_world, rng_state, set_rng_state, to_device
from lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoopConfig:
    """What every training shares. Nothing changes it after `configure`."""

    output_dir: str = "checkpoints/run"  # checkpoints, metrics.jsonl and final/ go here
    resume_from_checkpoint: str | None = None  # a folder, or auto: the newest sound one
    allow_config_change: bool = False  # resume although the configuration differs
    allow_world_size_change: bool = False  # resume on other ranks, at the same global batch
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = cuda, else mps, else cpu
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of matmuls; weights stay fp32
    compile: bool | None = None  # torch.compile; none = on CUDA only, where it pays soonest
    flash_attn: bool = True  # use the flash-attn package where it is installed and supported
    gradient_checkpointing: bool = False  # recompute blocks: less memory, a quarter slower
    deterministic: bool = True  # refuse kernels whose result changes from run to run
    seed: int = 42  # initial weights, data order and dropout
    plan: bool = False  # say what the run would need and take; write nothing

    batch_size: PositiveInt = 8  # rows per micro-batch and rank
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per step and rank
    max_steps: PositiveInt | None = None  # none = as num_train_epochs or max_minutes say
    num_train_epochs: PositiveFloat | None = None  # passes over the data; 1 if nothing else ends it
    max_minutes: PositiveFloat | None = None  # time box: the schedule follows the clock

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the blocks' matrices, AdamW elsewhere
    learning_rate: PositiveFloat = 3e-4  # at the top of the schedule
    adamw_learning_rate: PositiveFloat | None = None  # beside muon; none = learning_rate
    min_lr: NonNegativeFloat | None = None  # at its end; none = a tenth of learning_rate
    # the last share of the run, in which it falls linearly (warmup-stable-decay); none = a cosine
    wsd_decay: Annotated[float, Range(0, 1, open_low=True)] | None = None
    # linear rise to the top; none = 100 (fine-tuning: 10), or a tenth of the run if that is less
    warmup_steps: NonNegativeInt | None = None
    weight_decay: NonNegativeFloat = 0.1  # on matrices only, not on embeddings and norms
    beta1: config.Fraction = 0.9  # AdamW's memory of the gradient
    beta2: config.Fraction = 0.95  # AdamW's memory of its square
    max_grad_norm: NonNegativeFloat = 1.0  # longer gradients are scaled down to it; 0: none are
    max_bad_steps: PositiveInt = 10  # stop after so many steps in a row without a finite gradient

    logging_steps: PositiveInt = 10  # steps between log lines
    eval_steps: PositiveInt = 500  # steps between validations
    save_steps: PositiveInt = 500  # steps between checkpoints
    keep_last: PositiveInt = 3  # checkpoints kept beside the best validated one
    early_stopping_patience: PositiveInt | None = None  # validations without a better one
    early_stopping_metric: str = "val_loss"  # lower is better, of accuracies higher
    report_to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()  # get the log, too

    WARMUP = 100  # steps, where warmup_steps is none and the run is long enough
    EVALUATES_START = False  # validate before the first step, too

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir must name a folder, got an empty string")
        if None not in (self.min_lr, self.learning_rate) and self.min_lr > self.learning_rate:
            limit = f"learning_rate {self.learning_rate}"
            raise UserError(f"min_lr {self.min_lr} is more than {limit}; lower it")
        if self.adamw_learning_rate and self.optimizer != "muon":
            remedy = "set it to none and give learning_rate"
            raise UserError(f"adamw_learning_rate stands beside optimizer=muon; {remedy}")


# what a run that resumes may have changed; of data and models `model_files` compares the contents
FREE_ON_RESUME = {
    *("output_dir", "resume_from_checkpoint", "allow_config_change", "allow_world_size_change"),
    *("device", "compile", "flash_attn", "gradient_checkpointing", "deterministic", "keep_last"),
    *("max_bad_steps", "logging_steps", "eval_steps", "save_steps", "eval_rows", "sample_prompt"),
    *("sample_tokens", "report_to", "plan", "plan_gpu", "data_path", "dataset_path", "model_path"),
}

# ---- The schedule: how many steps, and the learning rate at each of them


def lr_at(cfg, step, progress, total):
    """Returns the learning rate of `step` (from 0) when `progress` (0..1) of the run is done.

    A linear warmup, then a cosine down to min_lr at progress 1. With wsd_decay it stays at its top
    until that last share of the run, and falls linearly (Hu et al. 2024). In a time box, where
    nobody knows how many steps there will be, the warmup ends after a tenth of the time at most.
    """
    warm = (step + 1) / cfg.warmup_steps if cfg.warmup_steps else 1.0
    begin = cfg.warmup_steps / total if total else 0.0  # progress at which it begins to fall
    if cfg.max_minutes:
        warm, begin = max(warm, progress / 0.1), 0.1
    if warm < 1:
        return cfg.learning_rate * warm
    if cfg.wsd_decay:
        begin = max(begin, 1 - cfg.wsd_decay)
    share = min(1, max(0, (progress - begin) / (1 - begin))) if begin < 1 else 0.0  # of the fall
    height = 1 - share if cfg.wsd_decay else 0.5 * (1 + math.cos(math.pi * share))  # 1 to 0
    floor = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    return floor + (cfg.learning_rate - floor) * height


def rows_per_step(cfg, world_size):
    return cfg.batch_size * cfg.gradient_accumulation_steps * world_size


def tokens_per_step(cfg, world_size=1):
    return rows_per_step(cfg, world_size) * cfg.sequence_length


def total_steps(cfg, rows, world_size):
    """Returns the number of optimizer steps, or None when only the clock ends the run."""
    if cfg.max_steps:
        return cfg.max_steps
    if cfg.max_minutes and not cfg.num_train_epochs:
        return None
    passes = cfg.num_train_epochs or 1
    return max(1, math.ceil(passes * rows / rows_per_step(cfg, world_size)))


def with_warmup(cfg, total, say):
    """Returns cfg with the number of its warmup steps, once the `total` of the run is known.

    It is a tenth of the run at most, unless another number is asked for and the run is longer than
    that. In a time box `lr_at` sees to it. Says what is shortened.
    """
    warmup = cfg.WARMUP if cfg.warmup_steps is None else cfg.warmup_steps
    most = total if cfg.warmup_steps else (total or 0) // 10
    if total and not cfg.max_minutes and warmup > most:
        say(f"warmup_steps: {total // 10}, a tenth of this run, instead of {warmup}")
        warmup = total // 10
    return replace(cfg, warmup_steps=warmup)


class Clock:
    """Seconds of training, those before a resume included, and the share that is done."""

    def __init__(self, cfg, total, before=0.0):
        self.total, self.limit = total, cfg.max_minutes and 60 * cfg.max_minutes
        self.began = time.monotonic() - before

    @property
    def seconds(self):
        return time.monotonic() - self.began

    def progress(self, step, seconds):
        """Returns 0..1, by steps or by time, whichever is further; 1 ends the run."""
        by_step = step / self.total if self.total else 0.0
        by_time = seconds / self.limit if self.limit else 0.0
        return max(by_step, by_time)


# ---- The optimizers


def make_optimizers(cfg, model, dtype=torch.float32):
    """Returns the optimizers of cfg.optimizer over the trainable parameters; only matrices decay.

    adamw: AdamW for everything. muon: Muon, computing in `dtype`, for the blocks' matrices, AdamW
    for embedding, head and norms, whose learning rate is adamw_learning_rate / learning_rate times
    the schedule's, its `scale`.
    """
    blocks, head, rest = [], [], []
    for name, p in model.named_parameters():  # a tied head has the name of the embedding
        group = rest if p.ndim == 1 or "embed_tokens" in name else blocks
        if p.requires_grad:
            (head if name == "lm_head.weight" else group).append(p)
    muon, rate = cfg.optimizer == "muon", cfg.learning_rate
    scale = (cfg.adamw_learning_rate or rate) / rate if muon else 1.0
    groups = [
        {"params": head if muon else head + blocks, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group | {"scale": scale} for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    return [Muon(blocks, rate, cfg.weight_decay, dtype), adamw] if muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized momentum (Jordan et al. 2024), with decoupled decay.

    A gradient matrix is dominated by a few directions. Orthogonalized, all its directions are
    stepped along equally far. An update is scaled by 0.2 sqrt(max(rows, columns)), which gives it
    the root mean square of AdamW's, so one learning rate serves both (Liu et al. 2025).
    """

    MOMENTUM = 0.95
    # Matrices of one shape are orthogonalized together, in a few kernels instead of hundreds; at
    # most so many numbers, of which memory holds several copies at once.
    TOGETHER = 1 << 24

    def __init__(self, params, lr, weight_decay, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": 1.0})
        self.dtype = dtype  # of the iteration: float32 where bfloat16 would be emulated

    @torch.no_grad()
    def step(self):
        (group,), shapes = self.param_groups, {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, params in shapes.items():
            most = max(1, self.TOGETHER // shape.numel())
            for start in range(0, len(params), most):
                self._update(params[start : start + most], group["lr"], group["weight_decay"])

    def _update(self, params, lr, weight_decay):
        """Updates N parameters of one shape (rows, columns). Nothing in it waits for the device."""
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - self.MOMENTUM)  # 0.95 buffer + 0.05 gradient
        # Nesterov: a step ahead along the momentum, (N, rows, columns)
        ahead = torch.stack(torch._foreach_lerp(grads, buffers, self.MOMENTUM))
        updates = orthogonalized(ahead.to(self.dtype)).to(ahead.dtype)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_add_(params, list(updates), alpha=-lr * scale)


# (a, b, c) of each step: of the polynomials a s + b s^3 + c s^5, the nearest to 1 on what the steps
# before it make of the singular values from 0.01 to 1
POLYNOMIALS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalized(x):
    """Returns x (N, rows, columns) with all singular values of each matrix brought to about 1.

    x <- a x + (b g + c g g) x with g = x x^T applies a polynomial to every singular value and
    leaves the singular vectors. With the best polynomial for each step (Amsel et al. 2025) three
    suffice: values from a hundredth of the matrix's norm on end between 0.73 and 1.27.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # for the smaller of the two Gram matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is <= 1
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# ---- The state: everything that a resumed run needs


class State:
    """Model, optimizers, scaler, counters: with every rank's random numbers, a checkpoint.

    The weights are float32, as are the moments; `dtype` is that of the matmuls. In float16 the
    scaler multiplies the loss, so that small gradients do not become 0, and divides the gradients
    before they are clipped; in other types it does nothing.
    """

    COUNTERS = "step", "seconds", "tokens", "bad_steps", "evaluated", "best", "best_step", "stale"

    def __init__(self, cfg, model, world, dtype):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        native = choose_dtype("auto", world.device)[0]  # Muon's matmuls are not autocast's
        low = dtype == native == torch.bfloat16
        self.optimizers = make_optimizers(cfg, model, dtype if low else torch.float32)
        self.gradients = runtime.Gradients(self.parameters, world)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.step, self.seconds, self.tokens, self.bad_steps = 0, 0.0, 0, 0
        self.evaluated = -1 if cfg.EVALUATES_START else 0  # the step of the last validation
        self.best, self.best_step, self.stale = None, 0, 0  # of the validations, see `judge`
        self.saved_at = None  # the step of the checkpoint that holds all this

    def clip(self, limit):
        """Scales the gradients down to a norm of at most `limit`, if not 0; returns what it was."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit or math.inf).item()

    def update(self, lr, grad_norm, count):
        """Applies the gradients unless their norm, that of the sum, is not finite, or `count` 0."""
        self.bad_steps = 0 if count and math.isfinite(grad_norm) else self.bad_steps + 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            if self.bad_steps == 0:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=not self.gradients.fixed)
        self.scaler.update()

    def judge(self, cfg, metrics):
        """Notes whether a validation is the best so far, or counts those since the best.

        A new best is saved with early stopping; else only steps that are saved anyway can be best.
        """
        name = cfg.early_stopping_metric
        if not cfg.early_stopping_patience and (self.step % cfg.save_steps or name not in metrics):
            return
        higher_is_better = name.endswith(("accuracies", "accuracy", "reward"))
        value = -metrics[name] if higher_is_better else metrics[name]
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1

    def should_save(self, cfg):
        due = self.step % cfg.save_steps == 0 or self.step == self.best_step
        return self.step > 0 and due and self.saved_at != self.step

    def is_stale(self, cfg):
        return bool(cfg.early_stopping_patience) and self.stale >= cfg.early_stopping_patience

    def final_step(self, cfg):
        """Returns whose weights final/ holds: with early stopping the best validated step's."""
        return (cfg.early_stopping_patience and self.best_step) or self.step

    def check_space(self, output_dir):
        """Raises UserError if the disk has no room for a checkpoint and 10 % more."""
        tensors = *self.model.parameters(), *self.parameters, *self.parameters  # two moments each
        needed, free = 4.4 * sum(t.numel() for t in tensors), shutil.disk_usage(output_dir).free
        if free < needed:
            sizes = f"a checkpoint needs {needed / 1e6:,.1f} MB, free are {free / 1e6:,.1f} MB"
            raise UserError(f"{output_dir}: {sizes}; make room, or choose another --output_dir")

    def save(self, cfg, world, write_model):
        """Writes the checkpoint of this step, whole or not at all, and deletes old ones."""
        folder = Path(cfg.output_dir) / f"step_{self.step:06d}"
        with checkpoint.whole_folder(folder, cfg, world) as hidden:
            folder = hidden / "train_state"
            folder.mkdir(exist_ok=True)
            checkpoint.write_tensors(rng_state(world.device), folder / f"rng_{world.rank:05d}.pt")
            if world.rank == 0:
                write_model(self.model, hidden)
                state = {name: getattr(self, name) for name in self.COUNTERS}
                state["scaler"] = self.scaler.state_dict()
                state["optimizers"] = [o.state_dict() for o in self.optimizers]
                checkpoint.write_tensors(state, folder / "state.pt")
        self.saved_at = self.step
        if world.rank == 0:
            checkpoint.prune(cfg.output_dir, cfg.keep_last, self)

    def load(self, folder, world):
        """Restores all but the weights: optimizers, scaler, counters, random numbers."""
        path = folder / "train_state" / "state.pt"
        numbers = path.with_name(f"rng_{world.rank:05d}.pt")
        state = checkpoint.read_tensors(path)
        errors = AttributeError, KeyError, RuntimeError, TypeError, ValueError
        with config.refusing(errors, f"{path}: does not fit this model and optimizer"):
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                today = optimizer.state_dict()["param_groups"]  # learning rate, decay, betas
                optimizer.load_state_dict(saved | {"param_groups": today})
            self.scaler.load_state_dict(state["scaler"])
            for name in self.COUNTERS:
                setattr(self, name, state[name])
            self.saved_at = self.step
            if numbers.is_file():  # a rank that is new keeps the numbers it was seeded with
                set_rng_state(checkpoint.read_tensors(numbers), world.device)


def check_same_run(cfg, world, folder):
    """Raises UserError if the run that wrote `folder` differs where that changes what is learned.

    A key that it did not know counts as today's default: a new knob refuses no older checkpoint.
    """
    plain = lambda values: json.loads(json.dumps(values))  # tuples become lists, as in the file
    before = plain({f.name: f.default for f in fields(cfg) if f.default is not MISSING})
    before |= json.loads((folder / "run.json").read_text(encoding="utf-8"))
    now = plain(asdict(cfg)) | {"_world_size": world.size}
    size, accumulation, ranks = "batch_size", "gradient_accumulation_steps", "_world_size"
    rows, rows_before = (run[size] * run[accumulation] * run[ranks] for run in (now, before))
    if now[ranks] != before[ranks] and not (cfg.allow_world_size_change and rows == rows_before):
        made = f"{before[ranks]} ranks and {rows_before} rows a step, now {now[ranks]} and {rows}"
        same = "use as many ranks, or --allow_world_size_change with as many rows"
        raise UserError(f"{folder}: was made with {made}; {same}")
    # the same rows in smaller pieces, as after running out of memory, are the same steps
    free = FREE_ON_RESUME | {ranks} | ({size, accumulation} if rows == rows_before else set())
    changed = [k for k in now if k not in free and before.get(k) != now[k]]
    if changed and not cfg.allow_config_change:
        each = [f"{k} was {json.dumps(before.get(k))}, now {json.dumps(now[k])}" for k in changed]
        made = f"made with {', '.join(each[:5])}"
        raise UserError(f"{folder}: {made}; --allow_config_change accepts it")


# ---- The loop


def fit(cfg, model, loader, loss_fn, world, validate, write_model, read_model, write_final=None):
    """Trains `model` in place and writes OUTPUT_DIR/final/.

    loader       .batch(step, micro, rank, accumulation) -> dict of numpy arrays; "count", the
                 supervised terms in them; and "tokens", if that is another number. A pure function
                 of its arguments, so a resume has nothing to rewind. .blocks: rows in one pass.
                 With .period n > 0 also of the weights, those before each round of n steps;
                 a run is stopped between rounds only
    loss_fn      (model, batch of tensors) -> (sum over the supervised terms, {name: sum to log});
                 both are divided by the count of the whole step over all ranks
    validate     (model) -> dict of floats and texts to log; it takes its rows from world.batches
    write_model  (model, folder): writes what a checkpoint holds besides the training state;
                 read_model is its inverse; write_final writes final/ where it holds something else

    SIGINT or SIGTERM end it with a checkpoint and SystemExit, 128 + the signal's number as shells
    count: status 0 means that final/ is there, and what `result` says is printed.
    """
    if cfg.plan:
        from tools import plan

        return plan.local(cfg, model, loader, loss_fn, world)
    with checkpoint.locked(cfg.output_dir, world), runtime.stop_signals(world):
        cfg, state, dtype, clock = prepare(cfg, model, loader, world, read_model)
        final = Path(cfg.output_dir) / "final"
        ended = clock.progress(state.step, state.seconds) >= 1 or state.is_stale(cfg)
        if ended and checkpoint.problem_with(final, checkpoint.FINAL_FILES) is None:
            world.say(f"this run is complete: its model is in {final}; nothing to do")
            world.say(result(cfg, state))
            return
        device, rank, accumulation = world.device, world.rank, cfg.gradient_accumulation_steps
        micros = lambda step: range(0 if step == clock.total else accumulation)  # none past the end
        batches_of = lambda step: [loader.batch(step, m, rank, accumulation) for m in micros(step)]
        batches = batches_of(state.step)
        with Log(cfg, llama.flops_per_token(model.cfg), world, state) as log:
            while True:
                if state.step % cfg.eval_steps == 0 and state.evaluated != state.step:
                    evaluate(cfg, state, validate, dtype, world, log)
                if state.should_save(cfg):
                    state.save(cfg, world, write_model)
                # ranks decide alike: by the whole step's size, anybody's signal, rank 0's clock
                count, tokens, stopping, state.seconds = world.sum(
                    sum(batch["count"] for batch in batches),
                    sum(batch.get("tokens", batch["count"]) for batch in batches),
                    world.stop_signal > 0 and state.step % (loader.period or 1) == 0,
                    clock.seconds * (world.rank == 0),
                )
                progress = clock.progress(state.step, state.seconds)
                if stopping or progress >= 1 or state.is_stale(cfg):
                    break

                stats = {}  # this rank's shares of the means over the step
                for batch in batches:
                    with autocast(device, dtype):  # matmuls in 16 bits, sums and the loss in 32
                        loss_sum, sums = loss_fn(model, to_device(batch, device))
                    loss = loss_sum / max(1, count)  # so that all gradients add up to the mean's
                    state.gradients.send_early(batch is batches[-1])  # while backward goes on
                    state.scaler.scale(loss).backward()  # adds to every p.grad
                    for name, value in ({"loss": loss_sum} | sums).items():
                        stats[name] = stats.get(name, 0.0) + value.detach() / max(1, count)
                del loss, loss_sum, sums, value  # and with them what their graph holds
                if not loader.period:
                    batches = batches_of(state.step + 1)  # read while a GPU still computes

                state.gradients.sum()  # over ranks: data parallelism, by hand
                grad_norm = state.clip(cfg.max_grad_norm)
                lr = lr_at(cfg, state.step, progress, clock.total)
                state.update(lr, grad_norm, count)
                state.step, state.tokens = state.step + 1, state.tokens + int(tokens)
                if loader.period:
                    batches = batches_of(state.step)  # drawn from the new weights

                stats = dict(zip(stats, world.sum(*(value.item() for value in stats.values()))))
                if state.bad_steps:
                    report_skipped(cfg, state, grad_norm, count, log)
                log.step(state, clock, stats, lr, grad_norm)

            if not stopping:
                log.last_step()
            # saved again when time is up: resumed from the state of before, the run would go on
            if state.saved_at != state.step or (clock.limit and state.seconds >= clock.limit):
                state.save(cfg, world, write_model)
            if not stopping and state.evaluated != state.step:
                evaluate(cfg, state, validate, dtype, world, log)
        if stopping or state.evaluated != state.step:
            resume_flag = "--resume_from_checkpoint=auto"
            world.say(f"stopped at step {state.step:,}, saved; continue with {resume_flag}")
            # a rank without a signal of its own exits as with torchrun's SIGTERM
            raise SystemExit(128 + (world.stop_signal or signal.SIGTERM))
        write_finished(cfg, state, world, read_model, write_final or write_model)
        world.say(result(cfg, state))


def prepare(cfg, model, loader, world, read_model):
    """Returns (cfg with its warmup, state, dtype of matmuls, clock), fresh or resumed."""
    model.to(world.device)
    dtype, _ = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    runtime.seed_everything(cfg.seed + world.rank)  # dropout differs between ranks
    total = total_steps(cfg, loader.blocks, world.size)
    cfg = with_warmup(cfg, total, world.say)
    state.check_space(cfg.output_dir)
    if folder := checkpoint.find_checkpoint(cfg, world.say):
        check_same_run(cfg, world, folder)
        read_model(model, folder)
        state.load(folder, world)
        world.say(f"resumed from {folder} at step {state.step:,}")
    elif cfg.resume_from_checkpoint:
        world.say(f"nothing to resume in {cfg.output_dir}; starting at step 0")
    world.broadcast(model.parameters())
    return cfg, state, dtype, Clock(cfg, total, state.seconds)


def announce(cfg, model, world):
    """Chooses (dtype of matmuls, whether to compile), and attention; says why."""
    device, length = world.device, model.cfg.sequence_length
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    dtype, why = choose_dtype(cfg.dtype, device)
    attention, reason = llama.choose_attention(device, length, dtype, cfg.flash_attn, compiled)
    model.use_attention(attention)
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    if compiled:
        compile_model(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    why_not = ""
    if device.type == "cpu":
        asleep = " that sleep while they wait" * (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE")
        name += f", {torch.get_num_threads()} threads{asleep}"
        why_not = " (a CPU gains little by it)" * (cfg.compile is None)
    world.say(
        f"device {name}, {world.size} rank{'s' * (world.size > 1)} | "
        f"{str(dtype)[6:]} ({why}) | attention {attention} ({reason}) | "
        f"torch.compile {'on' if compiled else 'off'}{why_not}"
    )
    return dtype, compiled


def compile_model(model):
    """Compiles the decoder and the loss kernel in place; no wrapper, so no prefix on any name.

    On CUDA the decoder becomes a CUDA graph: launched singly, small kernels leave the GPU waiting.
    """
    if torch.are_deterministic_algorithms_enabled():
        import torch._inductor.config as inductor

        inductor.deterministic = True  # kernels picked by timing them would differ between runs
    cuda = model.lm_head.weight.device.type == "cuda"
    model.model.compile(mode="reduce-overhead" if cuda else None)
    llama.LinearCrossEntropy.kernel = staticmethod(torch.compile(llama.nats_and_gradient))


def evaluate(cfg, state, validate, dtype, world, log):
    """Logs validate(model), unless a stop is asked for meanwhile: then it comes again.

    There is no dropout, and random numbers stay the training's.
    """
    numbers, metrics = rng_state(world.device), None
    state.model.eval()
    with contextlib.suppress(runtime.Stopped), torch.no_grad(), autocast(world.device, dtype):
        metrics = validate(state.model)
    state.model.train()
    set_rng_state(numbers, world.device)
    if metrics is not None:
        state.evaluated, state.saved_at = state.step, None
        log.evaluation(state, metrics)
        state.judge(cfg, metrics)


def report_skipped(cfg, state, grad_norm, count, log):
    """Reports a step that was not applied; UserError, with status 4, after too many in a row."""
    why = f"gradient norm is {grad_norm}" if count else "no token of it is supervised"
    log.write({"step": state.step, "skipped": why, "grad_norm": grad_norm})
    log.world.say(f"warning: step {state.step:,} skipped: {why} ({state.bad_steps} in a row)")
    if state.bad_steps >= cfg.max_bad_steps:
        many = f"{state.bad_steps} steps in a row were skipped, the last because {why}"
        last = next(iter(checkpoint.checkpoints(cfg.output_dir)), "none")
        remedy = "lower --learning_rate or use --dtype=fp32 or --no_compile"
        raise UserError(f"{many}; the last good checkpoint is {last}; {remedy}", exit_code=4)


def write_finished(cfg, state, world, read_model, write_final):
    """Writes OUTPUT_DIR/final/: with early stopping the best validated weights, else the last."""
    output, step = Path(cfg.output_dir), state.final_step(cfg)
    if step != state.step:
        best = output / f"step_{step:06d}"
        if problem := checkpoint.problem_with(best):
            remedy = "to end with the last, --early_stopping_patience=none --allow_config_change"
            raise UserError(f"{best}: {problem}; put the best one back, or {remedy}")
        read_model(state.model, best)
        value = f"{cfg.early_stopping_metric} {abs(state.best):.4f}"
        world.say(f"back to the best validation, that of step {step:,} ({value})")
    with checkpoint.whole_folder(output / "final", cfg, world) as hidden:
        if world.rank == 0:
            write_final(state.model, hidden)
    if world.rank == 0:  # the last validation may have been the best, or a kill come before it
        checkpoint.prune(output, cfg.keep_last, state)
    world.say(f"model in {output / 'final'}")


def result(cfg, state):
    """Returns what a run came to, a line of JSON: its length, the losses of the model in final/."""
    last, step = {}, state.final_step(cfg)
    for record in read_records(cfg.output_dir):
        last |= record if record["step"] <= step else {}
    losses = {name: n for name, n in last.items() if name == "loss" or name.startswith("val_")}
    length = {"steps": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens}
    return json.dumps(length | losses | {"output_dir": cfg.output_dir})


# ---- Pretraining


@dataclass(frozen=True)
class PretrainConfig(LoopConfig, llama.ModelConfig):
    """Pretraining: the options of the loop, the model's shape, and the data."""

    output_dir: str = "checkpoints/pretrain/custom"  # checkpoints, metrics.jsonl and final/ go here
    vocab_size: Annotated[int, config.Range(8, 1 << 20)] | None = None  # none = the data's or 32768
    data_path: tuple[str, ...] = ("data/processed/docstrings",)  # prepared, comma separated
    data_weights: tuple[float, ...] | None = None  # their shares of the tokens; none = by size
    document_mask: bool = False  # tokens see their own document only, positions restart with each
    eval_rows: PositiveInt = 128  # rows of the validation set that are scored at each evaluation
    sample_prompt: str = "The"  # continued greedily at each evaluation
    sample_tokens: Annotated[int, config.Range(0, 1000)] = 48  # length of what follows; 0 = none
    # decides which is best
    early_stopping_metric: Literal["val_loss", "val_bits_per_byte"] = "val_loss"
    # instead of max_steps: train on so many, as 300M or 1.5B, at most a tenth of them in the warmup
    tokens: PositiveInt | None = None
    plan_gpu: str | None = None  # say what the run would need on such a card, as h100

    def __post_init__(self):
        LoopConfig.__post_init__(self)
        if self.tokens and self.max_steps:
            raise ValueError("tokens, max_steps: both say how long to train; leave one out")
        if self.qkv_bias:
            theirs = "transformers takes the tokenizer of such a folder for Qwen2's"
            raise ValueError(f"qkv_bias is for models of others: {theirs}; use qk_norm")
        llama.ModelConfig.__post_init__(with_vocab_size(self) if self.vocab_size is None else self)


def with_vocab_size(cfg, default=llama.ModelConfig.vocab_size):
    """Returns the PretrainConfig with a vocabulary: its own, else of `default` ids."""
    return replace(cfg, vocab_size=cfg.vocab_size or default)


def with_steps(cfg, ranks=1):
    """Returns the PretrainConfig with the max_steps that its `tokens` make, if it has any."""
    if cfg.tokens is None:
        return cfg
    steps = math.ceil(cfg.tokens / tokens_per_step(cfg, ranks))
    warmup = cfg.warmup_steps and min(cfg.warmup_steps, steps // 10)
    return replace(cfg, tokens=None, max_steps=steps, warmup_steps=warmup)


def main(cfg):
    if cfg.plan_gpu:
        from tools.plan import card_plan

        print(card_plan(with_steps(cfg), cfg.plan_gpu))
        return
    with open_world(cfg) as world:
        cfg = with_steps(cfg, world.size)
        if cfg.plan and not all((Path(p) / "manifest.json").is_file() for p in cfg.data_path):
            from tools import plan  # before there is any data: random ids

            cfg = with_vocab_size(cfg)
            model = llama.Llama(config.narrow(cfg, llama.ModelConfig))
            plan.local(cfg, model, plan.RandomTokens(cfg), llama.next_token_loss, world)
        else:
            pretrain(cfg, world)


def pretrain(cfg, world):
    sizes = cfg.sequence_length, cfg.batch_size, cfg.seed, world.size
    stream = TokenStream(cfg.data_path, "train", *sizes, cfg.data_weights, cfg.document_mask)
    tokenizer = Tokenizer.load(stream.tokenizer)
    cfg = with_vocab_size(cfg, tokenizer.vocab_size)
    if cfg.vocab_size != (size := tokenizer.vocab_size):
        made = f"{cfg.data_path[0]} was made with a tokenizer of {size}"
        raise UserError(f"vocab_size is {cfg.vocab_size}, but {made}; use --vocab_size={size}")
    torch.manual_seed(cfg.seed)
    model = llama.Llama(config.narrow(cfg, llama.ModelConfig))
    world.say(f"{stream.tokens:,} training tokens")
    hashes = {}  # of each dataset, the hash of the hashes of its shards
    for source in stream.sources:
        splits = sorted(source.manifest["splits"].items())
        shards = "".join(shard["bin_sha256"] for _, shards in splits for shard in shards)
        hashes[str(source.folder)] = hashlib.sha256(shards.encode()).hexdigest()

    validate = language_validation(cfg, world, tokenizer)
    files = model_files(cfg, tokenizer, hashes)
    fit(cfg, model, stream, llama.next_token_loss, world, validate, *files)


def language_validation(cfg, world, tokenizer):
    """Returns validate(model): nats per token and bits per byte of the first rows, and a sample."""
    sizes = cfg.sequence_length, cfg.batch_size
    stream = TokenStream(cfg.data_path, "val", *sizes, document_mask=cfg.document_mask)
    rows, token_bytes = min(cfg.eval_rows, stream.blocks), tokenizer.token_bytes()

    def validate(model):
        sums = np.zeros(3)  # nats of so many tokens, whose text has so many UTF-8 bytes
        for _, batch in world.batches(stream, rows, cfg.batch_size):
            loss, _ = llama.next_token_loss(model, to_device(batch, world.device))
            labels = batch["labels"][batch["labels"] >= 0]
            sums += [loss.item(), len(labels), token_bytes[labels].sum()]
        nats, count, size = world.sum(*sums.tolist())
        metrics = {"val_loss": nats / max(1, count)}
        metrics["val_bits_per_byte"] = nats / math.log(2) / max(1, size)
        if cfg.sample_tokens:  # a glimpse; sample.py does it properly
            ids = [tokenizer.bos_id, *tokenizer.encode(cfg.sample_prompt)]
            ids = greedy(model, ids, cfg.sample_tokens, [tokenizer.eos_id])
            metrics["sample"] = cfg.sample_prompt + tokenizer.decode(ids)
        return metrics

    return validate


def greedy(model, ids, count, stop_ids):
    """Returns up to `count` ids, each the likeliest next; a stop id or a full context ends them."""
    device, fresh = model.lm_head.weight.device, []
    capacity = min(len(ids) + count, model.cfg.sequence_length)
    cache = llama.KVCache(model.cfg, 1, capacity, device)
    step = torch.tensor([ids], device=device)  # (B = 1, T): the prompt first, then one id a time
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        while len(ids) + len(fresh) < capacity:
            hidden = model.model(step, cache=cache)
            fresh.append(int(model.lm_head(hidden[:, -1]).argmax()))
            if fresh[-1] in stop_ids:
                break
            step = torch.tensor([fresh[-1:]], device=device)
    return fresh


def model_files(cfg, tokenizer, data, template=None, stop_ids=None, base=None):
    """Returns (write_model, read_model, write_final) for `fit`.

    A folder holds the model, or its adapter on `base`, the tokenizer with the template's name, and
    in data.json `data`, the {path: sha256} of what it was trained from: read_model refuses another.
    """

    def write_model(model, folder, merge=False):
        if merge and llama.adapters(model):
            (folder / "adapter").mkdir()
            write_model(model, folder / "adapter")
            llama.merge_lora(model)
        llama.save_model(model, folder, stop_ids, base)
        tokenizer.save(folder, model.cfg.sequence_length, template)
        llama.write_json(folder / "data.json", data)

    def read_model(model, folder):
        before = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if base and base.sha256 not in before.values():
            other = f"was trained on another model than {cfg.model_path}; name that one"
            raise UserError(f"{folder}: {other}")
        ours, theirs = tokenizer.sha256[:12], Tokenizer.load(folder).sha256[:12]
        if theirs != ours:
            differ = f"its tokenizer is {theirs}.., the data's is {ours}.."
            raise UserError(f"{folder}: {differ}; they do not belong together")
        if list(before.values()) != list(data.values()) and not cfg.allow_config_change:
            was, now = (", ".join(f"{k} ({v[:8]}..)" for k, v in d.items()) for d in (before, data))
            accept = "--allow_config_change accepts it"
            raise UserError(f"{folder}: its data is {was}, now {now}; {accept}")
        llama.load_weights(model, folder)

    return write_model, read_model, partial(write_model, merge=base and cfg.merge)


def command(argv):
    """Runs the command that the first word names; without one it trains."""
    from lib.curves import CurvesConfig, curves

    commands = {"curves": (curves, CurvesConfig)}
    if argv[:1] == ["watch"]:
        from tools.watch import WatchConfig, watch

        commands["watch"] = watch, WatchConfig
    config.dispatch(commands, argv, __doc__, default=(main, PretrainConfig))


if __name__ == "__main__":
    command(sys.argv[1:])
