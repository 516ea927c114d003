"""How a training proceeds: its optimizers, its learning rate at every step, its length in steps or minutes.

The configuration is a `LoopConfig` of train.py. Of the model only the names of its embedding and head are
known here.
"""

import math
import time

import torch

from lib.config import UserError


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
