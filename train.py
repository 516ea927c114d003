"""One training loop, `fit`, and its first user: pretraining.

    python train.py configs/tiny.json --data_path=data/processed/docstrings --output_dir=checkpoints/tiny
    torchrun --nproc_per_node=2 train.py configs/tiny.json --batch_size=8
    python train.py configs/tiny.json --resume_from_checkpoint=auto
    python train.py configs/base.json --plan         needs and hours; --plan_gpu=rtx4090 for a card elsewhere
    python train.py curves checkpoints/a checkpoints/b

Read from the top: the configuration, the training state, `fit`, pretraining.
Data parallelism is done by hand - weights broadcast once, gradients summed each step - so there is no wrapper
around the model; losses are sums, divided by the count of supervised tokens of the whole step, so that
neither accumulation nor the number of ranks changes the result.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import TokenStream, unigram_bits_per_byte
from lib.checkpoint import (
    FINAL_FILES,
    checkpoints,
    find_checkpoint,
    locked,
    problem_with,
    prune,
    read_tensors,
    whole_folder,
    write_tensors,
)
from lib.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UserError,
    narrow,
    run,
)
from lib.curves import command_line as draw_curves
from lib.log import Log
from lib.runtime import (
    autocast,
    choose_dtype,
    open_world,
    rng_state,
    seed_everything,
    set_rng_state,
    to_device,
)
from lib.survival import (
    Stopped,
    StopSignals,
    Walk,
    attempt,
    enough_memory,
    smaller_batches,
    smaller_update,
)
from lib.tokenizer import Tokenizer
from model import (
    KVCache,
    LinearCrossEntropy,
    Llama,
    ModelConfig,
    choose_attention,
    flops_per_token,
    load_weights,
    nats_and_gradient,
    next_token_loss,
    save_model,
    score_batch,
)

# ----------------------------------------------------------------------------------------------
# How a training proceeds: its optimizers, its learning rate at every step, its length in steps or minutes.
#
# The configuration is a `LoopConfig` of train.py. Of the model only the names of its embedding and head are
# known here.


def make_optimizers(cfg, model, device, dtype=torch.float32):
    """Returns the optimizers of cfg.optimizer over the trainable parameters; only matrices decay.

    muon: Muon, computing in `dtype`, for the blocks' matrices, AdamW for embedding, head and norms. Both take
    the same learning_rate, as in Moonlight (Liu et al. 2025), because Muon's updates are scaled to the size
    of AdamW's.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            embedding = "embed_tokens" in name or (
                name == "lm_head.weight" and model.cfg.tie_word_embeddings
            )
            (matrices if p.ndim == 2 and not embedding else rest).append((name, p))
    head = [p for name, p in matrices if name == "lm_head.weight"]
    blocks = [p for name, p in matrices if name != "lm_head.weight"]
    decayed = {
        "params": head if cfg.optimizer == "muon" else head + blocks,
        "weight_decay": cfg.weight_decay,
    }
    groups = [decayed, {"params": [p for _, p in rest], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
        fused=device.type in ("cuda", "cpu", "mps"),
    )
    muon = (
        [Muon(blocks, cfg.learning_rate, cfg.weight_decay, dtype)]
        if cfg.optimizer == "muon"
        else []
    )
    return [*muon, adamw]


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized Nesterov momentum (Jordan et al. 2024), with decoupled decay.

    An update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's, so
    one learning rate serves both (Liu et al. 2025). Matrices of one shape are orthogonalized together, in a
    few kernels instead of hundreds, and in `dtype`: float32 where bfloat16 would be emulated, at several
    times the cost. Nothing waits for the device.
    """

    TOGETHER = 1 << 24  # numbers at most in a batch, of which memory holds several copies at once

    def __init__(self, params, lr, weight_decay, dtype=torch.float32, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                self._update(batch, group)

    def _batches(self, params):
        """Yields lists of parameters of one shape that have a gradient, in a fixed order."""
        shapes = {}
        for p in params:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, alike in shapes.items():
            most = max(1, self.TOGETHER // shape.numel())
            yield from (alike[at : at + most] for at in range(0, len(alike), most))

    def _update(self, params, group):
        grads, momentum = [p.grad for p in params], group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's
        updates = orthogonalized(ahead.to(self.dtype)).to(ahead.dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_add_(params, list(updates), alpha=-group["lr"] * scale)


def orthogonalized(x, steps=5):
    """Returns x (N, rows, columns) with every matrix's singular values replaced by values of about 1.

    A Newton-Schulz iteration of degree five. Its coefficients (Jordan 2024) are steepest at 0; they leave
    singular values between 0.7 and 1.2 instead of converging, which works as well.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(
        min=1e-7
    )  # the largest singular value is 1 at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def lr_at(cfg, step, progress, total):
    """Returns the learning rate of `step` (from 0) of `total` when `progress` (0..1) of the run is done.

    A linear warmup, then a cosine down to the floor at progress 1. In a time box the warmup ends after a
    tenth of it at the latest and the cosine begins there, however slow the machine.
    """
    warm = (step + 1) / cfg.warmup_steps if cfg.warmup_steps else 1.0
    begin = cfg.warmup_steps / total if total else 0.0
    if cfg.max_minutes:
        warm, begin = max(warm, progress / 0.1), 0.1
    if warm < 1:
        return cfg.learning_rate * warm
    share = (progress - begin) / (1 - begin) if begin < 1 else 0.0
    return cfg.floor + (cfg.learning_rate - cfg.floor) * 0.5 * (
        1 + math.cos(math.pi * min(1, max(0, share)))
    )


def total_steps(cfg, rows, world_size):
    """Returns the number of optimizer steps, or None when only the clock ends the run."""
    if cfg.max_steps:
        return cfg.max_steps
    if cfg.max_minutes and not cfg.num_train_epochs:
        return None
    rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    total = max(1, math.ceil((cfg.num_train_epochs or 1) * rows / rows_per_step))
    if cfg.warmup_steps > total and not cfg.max_minutes:
        raise UserError(
            f"warmup_steps {cfg.warmup_steps} is more than the {total} steps of this run; use a time box "
            f"(--max_minutes=30), a shorter warmup (--warmup_steps={total // 10}) or more data"
        )
    return total


class Clock:
    """Seconds of training, those before a resume included, and the share of the run that is done."""

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


@dataclass(frozen=True)
class LoopConfig:
    """What every training shares. Nothing changes it after `configure`."""

    output_dir: str = "checkpoints/run"  # checkpoints, metrics.jsonl and final/ go here
    # auto = the newest sound one in output_dir; or a folder
    resume_from_checkpoint: str | None = None
    # resume although the configuration differs from the checkpoint's
    allow_config_change: bool = False
    # resume on another number of ranks, at the same global batch
    allow_world_size_change: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = cuda, else mps, else cpu
    # of matmuls; weights and optimizer stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # torch.compile; none = on CUDA only, where it pays for its start-up soonest
    compile: bool | None = None
    flash_attn: bool = True  # use the flash-attn package where it is installed and supported
    # recompute blocks in the backward: less memory, a quarter slower
    gradient_checkpointing: bool = False
    deterministic: bool = True  # refuse kernels whose result changes from run to run
    seed: int = 42  # initial weights, data order and dropout
    # say what the run would need and take, after a few timed steps, and write nothing
    plan: bool = False

    batch_size: PositiveInt = 8  # rows per micro-batch and rank
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per step and rank
    # optimizer steps; none = as num_train_epochs or max_minutes say
    max_steps: PositiveInt | None = None
    # passes over the data; 1 when nothing else ends the run
    num_train_epochs: PositiveFloat | None = None
    # time box: the schedule follows the clock and ends with it
    max_minutes: PositiveFloat | None = None

    # muon: Muon on the blocks' matrices, AdamW on the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-4  # at the top of the schedule
    min_lr: NonNegativeFloat | None = None  # at its end; none = a tenth of learning_rate
    warmup_steps: NonNegativeInt = 100  # linear rise to the top (a tenth of a time box at most)
    weight_decay: NonNegativeFloat = 0.1  # on matrices only, not on embeddings and norms
    beta1: Fraction = 0.9  # AdamW's memory of the gradient
    beta2: Fraction = 0.95  # AdamW's memory of its square
    max_grad_norm: PositiveFloat = 1.0  # gradients longer than this are scaled down to it
    # stop after so many steps in a row with a gradient that is not finite
    max_bad_steps: PositiveInt = 10

    logging_steps: PositiveInt = 10  # steps between log lines
    eval_steps: PositiveInt = 500  # steps between validations
    save_steps: PositiveInt = 500  # steps between checkpoints
    # checkpoints kept beside the best validated one; older ones are deleted
    keep_last: PositiveInt = 3
    # stop after so many validations without a better one
    early_stopping_patience: PositiveInt | None = None
    # better is lower, of accuracies higher; final/ is then the best
    early_stopping_metric: str = "val_loss"
    report_to: tuple[
        Literal["wandb", "tensorboard"], ...
    ] = ()  # who else is told what metrics.jsonl is

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir must name a folder, got an empty string")
        if self.max_steps and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}; "
                f"use a shorter warmup (--warmup_steps={self.max_steps // 10})"
            )
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr {self.min_lr} is more than learning_rate {self.learning_rate}; "
                "leave it out for a tenth of that"
            )

    @property
    def floor(self):
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr


# Keys that may differ between a checkpoint and the run that resumes it: they do not change what is learned.
FREE_ON_RESUME = {
    *(
        "output_dir",
        "resume_from_checkpoint",
        "allow_config_change",
        "allow_world_size_change",
        "device",
    ),
    *(
        "compile",
        "flash_attn",
        "deterministic",
        "max_bad_steps",
        "logging_steps",
        "eval_steps",
        "save_steps",
    ),
    *("keep_last", "eval_rows", "sample_prompt", "sample_tokens", "report_to", "plan", "plan_gpu"),
    # these may move; what they hold is compared instead, see check_data
    *("data_path", "dataset_path", "model_path"),
}


# ----------------------------------------------------------------------------------------------
# The state of a training


def check_same_run(cfg, world, folder):
    """Raises UserError if the run that wrote `folder` had another configuration, where that matters."""
    then = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    size_then = then.pop("_world_size")
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    changed = [k for k in now if k not in FREE_ON_RESUME and then.get(k) != now[k]]
    rows_then = then["batch_size"] * then["gradient_accumulation_steps"] * size_then
    rows_now = cfg.batch_size * cfg.gradient_accumulation_steps * world.size
    if world.size != size_then:
        if not cfg.allow_world_size_change:
            raise UserError(
                f"{folder}: was made with {size_then} ranks, now {world.size}; "
                "use as many, or --allow_world_size_change at the same global batch"
            )
        if rows_then != rows_now:
            raise UserError(
                f"{folder}: global batch was {rows_then} rows, now {rows_now}; it must stay"
            )
    if rows_then == rows_now:  # in smaller pieces, as after running out of memory: the same steps
        changed = [k for k in changed if k not in ("batch_size", "gradient_accumulation_steps")]
    if changed and not cfg.allow_config_change:
        each = [f"{k} was {json.dumps(then.get(k))}, now {json.dumps(now[k])}" for k in changed[:5]]
        raise UserError(f"{folder}: made with {', '.join(each)}; --allow_config_change accepts it")


class State:
    """Everything a resume needs: model, optimizers, scaler, counters; a rank's random numbers lie beside."""

    def __init__(self, cfg, model, world, dtype):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        native = choose_dtype("auto", world.device)[0]  # Muon's matmuls are not autocast's
        low = dtype == native == torch.bfloat16
        self.optimizers = make_optimizers(cfg, model, world.device, dtype if low else torch.float32)
        self.fixed_gradients = (
            world.device.type == "cuda"
        )  # a CUDA graph adds to them where they are
        for p in self.parameters if self.fixed_gradients else ():
            p.grad = torch.zeros_like(p)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.step, self.seconds, self.tokens, self.bad_steps, self.evaluated = 0, 0.0, 0, 0, 0
        self.best, self.best_step, self.stale = None, 0, 0  # of the validations: see judge
        self.recent = []  # losses of the last steps: see Log.read
        self.saved_at = None  # the step of the checkpoint that holds all this

    def counters(self):
        names = "step seconds tokens bad_steps evaluated best best_step stale recent"
        return {k: getattr(self, k) for k in names.split()}

    def judge(self, cfg, metrics):
        """Notes whether a validation is the best so far, or counts how many there have been since the best.

        With early stopping every new best is saved; without it only steps that are saved anyway can be best.
        """
        name = cfg.early_stopping_metric
        if not cfg.early_stopping_patience and (self.step % cfg.save_steps or name not in metrics):
            return
        value = -metrics[name] if name.endswith("accuracies") else metrics[name]
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1

    def to_be_saved(self, cfg):
        return self.step > 0 and (self.step % cfg.save_steps == 0 or self.step == self.best_step)

    def enough(self, cfg):
        return bool(cfg.early_stopping_patience) and self.stale >= cfg.early_stopping_patience

    def check_space(self, output_dir):
        """Raises UserError if the disk has no room for a checkpoint: weights, two moments, 10 % to spare."""
        numbers = [
            p.numel() for p in (*self.model.parameters(), *self.parameters, *self.parameters)
        ]
        needed, free = 1.1 * 4 * sum(numbers), shutil.disk_usage(output_dir).free
        if free < needed:
            raise UserError(
                f"{output_dir}: a checkpoint needs {needed / 1e6:,.1f} MB, free are {free / 1e6:,.1f} MB; "
                "make room, or choose another --output_dir"
            )

    def save(self, folder, cfg, world, write_model):
        """Writes this state as checkpoint `folder`, whole or not at all, then deletes old ones.

        Every rank calls it.
        """
        self.check_space(folder.parent)
        with enough_memory(f"while {folder} was written"), whole_folder(folder, cfg, world) as tmp:
            own = tmp / "train_state"
            own.mkdir(exist_ok=True)
            write_tensors(rng_state(world.device), own / f"rng_{world.rank:05d}.pt")
            if world.rank == 0:
                write_model(self.model, tmp)
                state = self.counters() | {"scaler": self.scaler.state_dict()}
                state["optimizers"] = [o.state_dict() for o in self.optimizers]
                write_tensors(state, own / "state.pt")
        self.saved_at = self.step
        if world.rank == 0:
            prune(folder.parent, cfg.keep_last, self)

    def load(self, folder, world):
        """Restores optimizers, scaler, counters and this rank's random numbers, but not the weights."""
        path = folder / "train_state" / "state.pt"
        own = path.with_name(f"rng_{world.rank:05d}.pt")
        state = read_tensors(path)
        try:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            self.scaler.load_state_dict(state["scaler"])
            for name in self.counters():
                setattr(self, name, state[name])
            self.saved_at = self.step
            if (
                own.is_file()
            ):  # a rank that did not exist then keeps the random numbers it was seeded with
                set_rng_state(read_tensors(own), world.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as problem:
            raise UserError(
                f"{path}: does not fit this model and optimizer ({problem!r:.200})"
            ) from None

    def update(self, cfg, lr, world, count):
        """Sums the gradients over ranks, applies them and clears them. Returns their norm.

        Nothing is applied when the norm is not finite - which it then is on every rank, because it is taken
        of the sum - or when `count`, the supervised terms of the step, is 0.
        """
        with enough_memory(f"in the update of step {self.step + 1:,}", smaller_update(cfg, self)):
            world.sum_gradients(self.parameters)
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
                for group in optimizer.param_groups:
                    group["lr"] = lr
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.max_grad_norm).item()
            self.bad_steps = 0 if count and math.isfinite(norm) else self.bad_steps + 1
            if self.bad_steps == 0:
                for optimizer in self.optimizers:
                    self.scaler.step(optimizer)
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.fixed_gradients)
        return norm


def load_optimizer(optimizer, saved):
    """Restores the moments, checking their shapes as torch does not; settings stay those of today's cfg."""
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for p, moments in optimizer.state.items():
        for name, tensor in moments.items():
            if tensor.ndim and tensor.shape != p.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the parameter {tuple(p.shape)}")


# ----------------------------------------------------------------------------------------------
# The loop


class Diverged(UserError):
    """The run has stopped learning, and starting it again as it is would not help."""

    exit_code = 4


def fit(cfg, model, loader, loss_fn, world, validate, write_model, read_model, write_final=None):
    """Trains `model` in place as cfg says and leaves OUTPUT_DIR/final/. Returns the last validation's dict.

    loader        .batch(step, micro, rank, accumulation) -> dict of numpy arrays; "count", the supervised
                  terms in them; and "tokens", if that is another number. A pure function of its arguments,
                  so a resume has nothing to rewind. .blocks: rows in one pass; .batch_size: rows in a batch,
                  which fit lowers if memory runs out
    loss_fn       (model, batch of tensors) -> (sum over the supervised terms, {name: sum of what to log});
                  fit divides by the count of the whole step over all ranks
    validate      (model, walk) -> dict of floats and texts to log. It may draw random numbers: they are put
                  back. walk (survival.Walk) takes it over the held-out rows on all ranks, in batches that
                  memory allows, and ends it when a stop is asked for; a resumed run then repeats it
    write_model   (model, folder): writes what a checkpoint holds besides the training state; read_model is
                  its inverse, and write_final writes final/ where that is to hold something else

    Raises UserError for what its user can mend. SIGINT or SIGTERM end it with a checkpoint and SystemExit,
    128 + the signal's number as shells count: status 0 means that final/ is there.
    """
    if cfg.plan:
        return say_plan(cfg, model, loader, loss_fn, world)
    with locked(cfg.output_dir, world), StopSignals() as stop, contextlib.ExitStack() as until_end:
        state, dtype, clock = begin(cfg, model, loader, world, read_model)
        output, accumulation = Path(cfg.output_dir), cfg.gradient_accumulation_steps
        complete = clock.progress(state.step, state.seconds) >= 1 or state.enough(cfg)
        if complete and problem_with(output / "final", FINAL_FILES) is None:
            world.say(f"this run is complete: its model is in {output / 'final'}; nothing to do")
            return {}
        log = until_end.enter_context(Log(cfg, flops_per_token(model.cfg), world, state))
        walk, metrics = Walk("the validation", cfg.batch_size, world, stop), {}

        def checkpoint():
            log.read(state)
            state.save(output / f"step_{state.step:06d}", cfg, world, write_model)

        def batches_of(step):
            return [loader.batch(step, m, world.rank, accumulation) for m in range(accumulation)]

        batches = batches_of(state.step)
        while True:
            if state.step % cfg.eval_steps == 0 and state.evaluated != state.step:
                metrics = evaluate(cfg, state, validate, walk, dtype, world, log)
            if state.saved_at != state.step and state.to_be_saved(cfg):
                checkpoint()
            count, tokens, stopping, state.seconds = agree(batches, stop, clock, world)
            progress = clock.progress(state.step, state.seconds)
            if stopping or progress >= 1 or state.enough(cfg):
                break
            lr = lr_at(cfg, state.step, progress, clock.total)
            work = (batches, loss_fn, max(1, count), world.device, dtype)
            shares = attempt(state, world, forward_backward, *work)
            if shares is None:  # memory ran out
                accumulation = smaller_batches(cfg, loader, accumulation, state, world)
                batches = batches_of(state.step)
                continue
            batches = batches_of(state.step + 1)  # while a GPU still computes
            norm = state.update(cfg, lr, world, count)
            state.step, state.tokens = state.step + 1, state.tokens + int(tokens)
            log.watch(state, shares["loss"], norm)
            check_applied(cfg, state, norm, count, log)
            if state.step % cfg.logging_steps == 0 or state.step == 1:
                log.step(state, clock, shares, lr, norm)

        if state.saved_at != state.step or (clock.limit and state.seconds >= clock.limit):
            checkpoint()  # again when time is up: the one from before that would be resumed, not complete
        if not stopping and state.evaluated != state.step:
            metrics = evaluate(cfg, state, validate, walk, dtype, world, log)
            if world.rank == 0:
                prune(output, cfg.keep_last, state)  # this one may be the best now
        if stopping or metrics is None:
            world.say(
                f"stopped at step {state.step:,}, saved; continue with --resume_from_checkpoint=auto"
            )
            raise SystemExit(stop.status)
        take_best(cfg, state, world, read_model)
        finish(cfg, model, world, write_final or write_model)
        return metrics


def begin(cfg, model, loader, world, read_model):
    """Returns (state, dtype of matmuls, clock) of a run: fresh, or resumed from the checkpoint cfg names."""
    model.to(world.device)
    dtype, _ = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    seed_everything(cfg.seed + world.rank)  # dropout differs between ranks
    total = total_steps(cfg, loader.blocks, world.size)
    state.check_space(cfg.output_dir)
    resume(cfg, state, world, read_model)
    world.broadcast(model.parameters())
    return state, dtype, Clock(cfg, total, state.seconds)


def say_plan(cfg, model, loader, loss_fn, world):
    """Says what `fit` would need and take: counted, then timed on a few steps. Nothing is written."""
    model.to(world.device).train()
    dtype, backend = announce(cfg, model, world)
    state = State(cfg, model, world, dtype)
    from tools.plan import Means, framework_bytes, local_plan, time_lines, timed

    means = Means(world.device.type, dtype, backend, compiles(cfg, world.device))
    total = total_steps(cfg, loader.blocks, world.size) if loader.blocks else cfg.max_steps
    weights = 4 * sum(p.numel() for p in model.parameters())
    framework = framework_bytes(world.device, weights, cfg.gradient_checkpointing)
    world.say("\n".join(local_plan(cfg, model, means, world, total, loader.blocks, framework)))

    def one_step(micros):
        batches = [loader.batch(0, m, world.rank, micros) for m in range(micros)]
        count, began = sum(b["count"] for b in batches), time.perf_counter()
        work = (batches, loss_fn, max(1, count), world.device, dtype)
        shares = attempt(state, world, forward_backward, *work)
        if shares is None:
            raise UserError(
                f"a micro-batch of {loader.batch_size} rows does not fit into this machine's memory; "
                "use a smaller --batch_size"
            )
        shares["loss"].item()  # waits for a GPU
        middle = time.perf_counter()
        state.update(cfg, cfg.floor, world, count)
        return middle - began, time.perf_counter() - middle

    seconds, rows = timed(one_step, loader, cfg.gradient_accumulation_steps)
    world.say("\n".join(time_lines(cfg, seconds, total, world, rows)))
    return {}


def announce(cfg, model, world):
    """Chooses precision, attention and compilation and says so, with reasons. Returns (dtype, backend)."""
    dtype, why = choose_dtype(cfg.dtype, world.device)
    backend, reason = choose_attention(
        world.device, model.cfg.sequence_length, dtype, cfg.flash_attn
    )
    model.use_attention(backend)
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    name = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else world.device.type
    )
    threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    compiled = compiles(cfg, world.device)
    if compiled:
        compile_model(model)
    world.say(
        f"device {name}{threads}, {world.size} rank{'s' * (world.size > 1)} | {str(dtype)[6:]} ({why}) | "
        f"attention {backend} ({reason}) | torch.compile {'on' if compiled else 'off'}"
    )
    return dtype, backend


def compile_model(model):
    """Compiles the decoder and the loss kernel in place; no wrapper, so no prefix on any name.

    On CUDA the decoder becomes a CUDA graph: launched one by one, the kernels of a small model leave the GPU
    waiting. Its gradients must then keep their place in memory (train.State sees to that).
    """
    if torch.are_deterministic_algorithms_enabled():
        import torch._inductor.config as inductor

        if hasattr(
            inductor, "deterministic"
        ):  # kernels picked by a stopwatch would differ from run to run
            inductor.deterministic = True
    cuda = model.lm_head.weight.device.type == "cuda"
    model.model.compile(mode="reduce-overhead" if cuda else None)
    LinearCrossEntropy.kernel = staticmethod(torch.compile(nats_and_gradient))


def compiles(cfg, device):
    return device.type == "cuda" if cfg.compile is None else cfg.compile


def resume(cfg, state, world, read_model):
    """Restores `state` from the checkpoint that cfg names, if any, after checking that it is this run's."""
    folder = find_checkpoint(cfg, world.say)
    if folder is None:
        if cfg.resume_from_checkpoint:
            world.say(f"nothing to resume in {cfg.output_dir}; starting at step 0")
        return
    check_same_run(cfg, world, folder)
    read_model(state.model, folder)
    state.load(folder, world)
    if world.rank == 0:
        prune(cfg.output_dir, cfg.keep_last, state)  # a kill may have come before it
    world.say(f"resumed from {folder} at step {state.step:,}")


def forward_backward(state, batches, loss_fn, count, device, dtype):
    """Adds up the gradients of the step's mean loss.

    Returns this rank's shares of that mean, "loss", and of the means of what else loss_fn sums up.
    """
    shares = {"loss": torch.zeros((), device=device)}
    for batch in batches:
        with autocast(device, dtype):
            loss_sum, stats = loss_fn(state.model, to_device(batch, device))
        loss = loss_sum / count
        state.scaler.scale(loss).backward()
        shares["loss"] += loss.detach()
        for name, value in stats.items():
            shares[name] = shares.get(name, 0.0) + value.detach() / count
    return shares


def agree(batches, stop, clock, world):
    """Returns what the ranks must know alike: the step's count and tokens, how many were asked to stop, the
    seconds on rank 0's clock.
    """
    count, tokens = (
        sum(b["count"] for b in batches),
        sum(b.get("tokens", b["count"]) for b in batches),
    )
    return world.sum(count, tokens, stop.asked > 0, clock.seconds * (world.rank == 0))


def check_applied(cfg, state, norm, count, log):
    """Reports a step that was not applied (see State.update); raises Diverged after too many in a row."""
    if state.bad_steps == 0:
        return
    why = f"gradient norm is {norm}" if count else "no token of it is supervised"
    log.write({"step": state.step, "skipped": why, "grad_norm": norm})
    log.world.say(f"warning: step {state.step:,} skipped: {why} ({state.bad_steps} in a row)")
    if state.bad_steps >= cfg.max_bad_steps:
        last = next(iter(checkpoints(cfg.output_dir)), None)
        raise Diverged(
            f"{state.bad_steps} steps in a row were skipped, the last because {why}; "
            f"the last good checkpoint is {last or 'none'}; lower --learning_rate or use --dtype=fp32"
        )


def evaluate(cfg, state, validate, walk, dtype, world, log):
    """Logs and returns validate(model, walk), with dropout off and the training's random numbers untouched.

    Returns None if a stop was asked for meanwhile; then nothing is logged.
    """
    numbers, metrics = rng_state(world.device), None
    state.model.eval()
    memory = enough_memory(f"in {walk.what} of step {state.step:,}")
    with contextlib.suppress(Stopped), memory, torch.no_grad(), autocast(world.device, dtype):
        metrics = validate(state.model, walk)
    state.model.train()
    set_rng_state(numbers, world.device)
    if metrics is None:
        return None
    state.evaluated, state.saved_at = state.step, None
    log.evaluation(state, metrics)
    state.judge(cfg, metrics)
    return metrics


def take_best(cfg, state, world, read_model):
    """Gives the model the weights of the best validation, if early stopping is on and the last is another."""
    if not cfg.early_stopping_patience or state.best_step in (0, state.step):
        return
    folder = Path(cfg.output_dir) / f"step_{state.best_step:06d}"
    if problem := problem_with(folder):
        world.say(f"warning: {folder}, the best, is lost ({problem}); going on with the last")
        return
    read_model(state.model, folder)
    name, value = cfg.early_stopping_metric, abs(state.best)
    world.say(
        f"the best validation was that of step {state.best_step:,} ({name} {value:.4f}); going back"
    )


def finish(cfg, model, world, write_model):
    """Writes OUTPUT_DIR/final/, the model folder that everything else reads."""
    final = Path(cfg.output_dir) / "final"
    with enough_memory(f"while {final} was written"), whole_folder(final, cfg, world) as tmp:
        if world.rank == 0:
            write_model(model, tmp)
    world.say(f"model in {final}")


# ----------------------------------------------------------------------------------------------
# Pretraining


@dataclass(frozen=True)
class PretrainConfig(LoopConfig, ModelConfig):
    """Pretraining: the loop's knobs, the model's shape, and the data."""

    output_dir: str = "checkpoints/pretrain/custom"  # checkpoints, metrics.jsonl and final/ go here
    data_path: tuple[str, ...] = (
        "data/processed/docstrings",
    )  # prepared datasets, comma separated
    data_weights: tuple[float, ...] | None = None  # their shares of the tokens; none = by size
    # tokens look at their own document only, positions restart with each
    document_mask: bool = False
    eval_rows: PositiveInt = 128  # rows of the validation set that are scored at each evaluation
    sample_prompt: str = "The"  # continued greedily at each evaluation
    sample_tokens: Annotated[int, Range(0, 1000)] = 48  # length of that continuation; 0 = none
    # decides which is best
    early_stopping_metric: Literal["val_loss", "val_bits_per_byte"] = "val_loss"
    # say what the run would need on such a card, as h100; nothing is trained
    plan_gpu: str | None = None

    def __post_init__(self):
        LoopConfig.__post_init__(self)
        ModelConfig.__post_init__(self)


def main(cfg):
    if cfg.plan_gpu:
        from tools.plan import card_plan

        print("\n".join(card_plan(cfg, cfg.plan_gpu)))
        return
    with open_world(cfg) as world:
        if cfg.plan and not all((Path(path) / "manifest.json").is_file() for path in cfg.data_path):
            model = Llama(narrow(cfg, ModelConfig))
            from tools.plan import RandomTokens

            return fit(cfg, model, RandomTokens(cfg), next_token_loss, world, None, None, None)
        stream = TokenStream(
            cfg.data_path, "train", cfg.sequence_length, cfg.batch_size, cfg.seed, world.size,
            weights=cfg.data_weights, document_mask=cfg.document_mask,
        )  # fmt: skip
        tokenizer = Tokenizer.load(stream.tokenizer)
        if cfg.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"vocab_size is {cfg.vocab_size}, but {cfg.data_path[0]} was made with a tokenizer of "
                f"{tokenizer.vocab_size}; use --vocab_size={tokenizer.vocab_size}"
            )
        torch.manual_seed(cfg.seed)
        model = Llama(narrow(cfg, ModelConfig))
        baseline = unigram_bits_per_byte(cfg.data_path)  # knowing only how often each token occurs
        data = {str(source.folder): fingerprint(source.manifest) for source in stream.sources}
        world.say(
            f"{stream.tokens:,} training tokens; unigram baseline {baseline:.4f} bits per byte"
        )

        def write_model(model, folder):
            save_model(model, folder)
            tokenizer.save(folder, cfg.sequence_length)
            what = json.dumps(data, indent=2) + "\n"
            (folder / "data.json").write_text(what, encoding="utf-8")  # what it was trained on

        def read_model(model, folder):
            check_tokenizer(tokenizer, folder)
            check_data(cfg, data, folder)
            load_weights(model, folder / "model.safetensors")

        validate = language_validation(cfg, world, tokenizer)
        fit(cfg, model, stream, next_token_loss, world, validate, write_model, read_model)


def check_tokenizer(tokenizer, folder):
    other = Tokenizer.load(folder)
    if other.sha256 != tokenizer.sha256:
        raise UserError(
            f"{folder}: its tokenizer is {other.sha256[:12]}.., the data's is {tokenizer.sha256[:12]}..; "
            "they do not belong together"
        )


def fingerprint(manifest):
    """Returns the sha256 of a dataset's tokens: the hash of the hashes of its shards."""
    shards = [
        entry["bin_sha256"]
        for _, entries in sorted(manifest["splits"].items())
        for entry in entries
    ]
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def check_data(cfg, data, folder):
    """Raises UserError if `folder` was trained on datasets of other contents, wherever they lay."""
    path = folder / "data.json"
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if list(then.values()) != list(data.values()) and not cfg.allow_config_change:
        was, now = (", ".join(f"{k} ({v[:8]}..)" for k, v in d.items()) for d in (then, data))
        raise UserError(f"{folder}: its data is {was}, now {now}; --allow_config_change accepts it")


def language_validation(cfg, world, tokenizer):
    """Returns validate(model, walk): nats per token and bits per byte of the first rows, and a sample."""
    stream = TokenStream(
        cfg.data_path, "val", cfg.sequence_length, cfg.batch_size, document_mask=cfg.document_mask
    )
    rows, token_bytes = min(cfg.eval_rows, stream.blocks), torch.from_numpy(tokenizer.token_bytes())

    def validate(model, walk):
        def scored(batch):
            return score_batch(model, to_device(batch, world.device), token_bytes)

        nats, count, size = walk.total(scored, stream, rows, 3)
        metrics = {
            "val_loss": nats / max(1, count),
            "val_bits_per_byte": nats / math.log(2) / max(1, size),
        }
        if cfg.sample_tokens:
            more = continuation(model, tokenizer, cfg.sample_prompt, cfg.sample_tokens)
            metrics["sample"] = cfg.sample_prompt + more
        return metrics

    return validate


def continuation(model, tokenizer, prompt, count):
    """Returns the greedy continuation of `prompt`: a glimpse; sample.py does it properly."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return tokenizer.decode(greedy(model, ids, count, [tokenizer.eos_id]))


def greedy(model, ids, count, stop_ids):
    """Returns up to `count` ids, each the likeliest after `ids` and those before it, ending at a stop id.

    Fewer where the context is full.
    """
    device, fresh = model.lm_head.weight.device, []
    capacity = min(len(ids) + count, model.cfg.sequence_length)
    cache = KVCache(model.cfg, 1, capacity, device)
    step = torch.tensor([ids], device=device)
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        while len(ids) + len(fresh) < capacity:
            hidden = model.model(step, cache=cache)
            fresh.append(int(model.lm_head(hidden[:, -1]).argmax()))
            if fresh[-1] in stop_ids:
                break
            step = torch.tensor([fresh[-1:]], device=device)
    return fresh


if __name__ == "__main__":
    if sys.argv[1:2] == ["curves"]:
        draw_curves(sys.argv[2:])
    else:
        run(main, PretrainConfig, __doc__)
