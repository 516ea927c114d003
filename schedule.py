"""How a training walks: its optimizers, its learning rate at every step, its length in steps or minutes.

The configuration is a `LoopConfig` of train.py. Nothing here knows a model's inside but the names of its
embedding and head.
"""

import math
import time

import torch

from configurator import UserError


def make_optimizers(cfg, model, device):
    """Returns the optimizers of cfg.optimizer over the trainable parameters; only matrices decay."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            embedding = "embed_tokens" in name or (name == "lm_head.weight" and model.cfg.tie_word_embeddings)
            (matrices if p.ndim == 2 and not embedding else rest).append((name, p))
    head = [p for name, p in matrices if name == "lm_head.weight"]
    blocks = [p for name, p in matrices if name != "lm_head.weight"]
    decayed = {"params": head if cfg.optimizer == "muon" else head + blocks, "weight_decay": cfg.weight_decay}
    groups = [decayed, {"params": [p for _, p in rest], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
        fused=device.type in ("cuda", "cpu", "mps"),
    )
    if cfg.optimizer == "adamw":
        return [adamw]
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch 2.9 or later, this is {torch.__version__}")
    # match_rms_adamw: updates of AdamW's usual length, so one learning rate serves both (Liu et al. 2025)
    muon = torch.optim.Muon(
        blocks, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


def lr_at(cfg, step, progress, total):
    """Returns the learning rate of `step` (from 0) of `total` when `progress` (0..1) of the run is behind.

    A linear warmup, then a cosine from its end to the floor at 1. In a time box the warmup is over after a
    tenth of it at the latest, and the cosine begins there, however slow the machine.
    """
    warm = (step + 1) / cfg.warmup_steps if cfg.warmup_steps else 1.0
    begin = cfg.warmup_steps / total if total else 0.0
    if cfg.max_minutes:
        warm, begin = max(warm, progress / 0.1), 0.1
    if warm < 1:
        return cfg.learning_rate * warm
    share = (progress - begin) / (1 - begin) if begin < 1 else 0.0
    return cfg.floor + (cfg.learning_rate - cfg.floor) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, share))))


def total_steps(cfg, rows, world_size):
    """Returns the number of optimizer steps, or None when only the clock ends the run."""
    if cfg.max_steps:
        return cfg.max_steps
    if cfg.max_minutes and not cfg.num_train_epochs:
        return None
    rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    total = max(1, math.ceil((cfg.num_train_epochs or 1) * rows / rows_per_step))
    if cfg.warmup_steps > total and not cfg.max_minutes:
        raise UserError(f"warmup_steps {cfg.warmup_steps} is more than the {total} steps of this run")
    return total


class Clock:
    """Seconds of training, those before a resume included, and the share of the run that is behind."""

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
