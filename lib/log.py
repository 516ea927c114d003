"""What a run reports: a line for people, a record for programs, and curves.

Every log step prints one line and appends one JSON object to OUTPUT_DIR/metrics.jsonl; trackers get
the same records on request. When a run ends, its curves are drawn into its folder.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import time
from pathlib import Path

from lib.config import UserError, refusing, write_whole
from lib.runtime import memory_used, peak_flops


def read_records(output_dir):
    """Returns the lines of a run's metrics.jsonl as dicts; none before the first."""
    path = Path(output_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


class Log:
    """The log of one run, written by rank 0; entered while the run lasts."""

    def __init__(self, cfg, flops_per_token, world, state):
        self.world, self.flops, self.every = world, flops_per_token, cfg.logging_steps
        self.peak = peak_flops(world.device)
        self.path = Path(cfg.output_dir) / "metrics.jsonl"
        self.mark = (time.monotonic(), state.tokens)  # where tokens per second are counted from
        self.unlogged = None  # the arguments of the last step, until it is logged
        self.trackers = {}  # {name: (function that takes a record, function that closes)}
        if world.rank == 0 and self.path.exists():
            self._drop_after(state)
        for name in cfg.report_to if world.rank == 0 else ():
            if importlib.util.find_spec(name) is None:
                missing = "needs a package that is not installed"
                raise UserError(f"report_to={name}: {missing}: pip install {name}")
            with self._warning(name):
                self.trackers[name] = TRACKERS[name](cfg, state)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.world.rank or kind is KeyboardInterrupt:  # a second Ctrl-C means: at once
            return
        for name, (_, close) in list(self.trackers.items()):
            with self._warning(name):
                close()
        with self._warning("curves.png"):
            if self.path.is_file():
                from lib.curves import draw_curves  # which imports matplotlib

                draw_curves([self.path.parent], "tokens", self.path.with_name("curves.png"))

    @contextlib.contextmanager
    def _warning(self, name):
        """Turns a failure of foreign code into one warning, and the end of that tracker."""
        try:
            yield
        except Exception as problem:  # matplotlib's and the network's troubles must end no run
            self.trackers.pop(name, None)
            line = (str(problem).splitlines() or [type(problem).__name__])[0]
            self.world.say(f"warning: {name} failed ({line:.120}); training goes on without it")

    def _drop_after(self, state):
        """Removes what a run that died logged after its checkpoint: those steps come again."""
        lines = []
        with writing(self.path):
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                    record = json.loads(line)
                    last = state.step if "grad_norm" in record else state.evaluated
                    if record["step"] <= last and line.endswith("\n"):
                        lines.append(line)
            write_whole(self.path, "".join(lines).encode())

    def write(self, record):
        """Appends one line, NaN and infinity as null: JSON has neither."""
        bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
        record = record | dict.fromkeys(bad)
        if self.world.rank == 0:
            with writing(self.path), open(self.path, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps(record) + "\n")
        for name, (send, _) in list(self.trackers.items()):
            with self._warning(name):
                send(record)

    def step(self, state, clock, stats, lr, grad_norm):
        """Logs the first step and every multiple of logging_steps; stats: {"loss": mean, ...}."""
        self.unlogged = state, clock, stats, lr, grad_norm
        if state.step == 1 or state.step % self.every == 0:
            self.last_step()

    def last_step(self):
        """Logs the step that came last, unless that is done."""
        if not self.unlogged:
            return
        (state, clock, stats, lr, grad_norm), self.unlogged = self.unlogged, None
        loss, now, seconds = stats["loss"], time.monotonic(), clock.seconds
        rate = (state.tokens - self.mark[1]) / max(1e-9, now - self.mark[0])
        self.mark, memory = (now, state.tokens), memory_used(self.world.device)
        record = {"step": state.step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        record |= {"tokens": state.tokens} | stats  # `loss` keeps its place
        measured = {"tokens_per_second": rate, "memory": memory, "seconds": round(seconds, 3)}
        self.write(record | measured)
        done = min(1, clock.progress(state.step, seconds))
        left = int(seconds * (1 - done) / done) if done else 0
        mfu = f" | mfu {self.flops * rate / self.world.size / self.peak:5.1%}" if self.peak else ""
        self.world.say(
            f"step {state.step:>7,}{f'/{clock.total:,}' if clock.total else ''} | loss {loss:7.4f} "
            f"| lr {lr:.2e} | norm {grad_norm:6.3f} | {rate:>9,.0f} tok/s{mfu} "
            f"| {memory / 1e9:5.2f} GB | {done:4.0%}, {left // 60}:{left % 60:02d} left"
        )
        if others := [f"{k} {v:.4f}" for k, v in stats.items() if k != "loss"]:
            self.world.say("    " + " | ".join(others))

    def evaluation(self, state, metrics):
        """Logs a validation: numbers on one line, texts quoted below it."""
        self.write({"step": state.step} | metrics)
        numbers = " | ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.world.say(f"  eval {state.step:>6,} | {numbers or 'nothing is held out'}")
        for name, text in metrics.items():
            if isinstance(text, str):
                self.world.say(f"    {name}: {text!r}")
        self.mark = (time.monotonic(), state.tokens)


def writing(path):
    """Turns what a disk refuses into a UserError."""
    return refusing(OSError, f"{path}: not written", "make room, or choose another place")


# ---- trackers: each opens with (cfg, state), and returns (send a record, close)


def open_tensorboard(cfg, state):
    """Events go to OUTPUT_DIR/tensorboard; a resume purges those of the steps to come."""
    from torch.utils.tensorboard import SummaryWriter

    folder = f"{cfg.output_dir}/tensorboard"
    writer = SummaryWriter(folder, purge_step=state.step + 1 if state.step else None)

    def send(record):
        for name, value in record.items():
            if isinstance(value, str):
                writer.add_text(name, value, record["step"])
            elif value is not None and name != "step":
                writer.add_scalar(name, value, record["step"])

    return send, writer.close


def open_wandb(cfg, state):
    """The project is WANDB_PROJECT or mini-llm; WANDB_MODE is respected."""
    import wandb

    os.environ.setdefault("WANDB_PROJECT", "mini-llm")
    quiet, config = wandb.Settings(silent=True, console="off"), dataclasses.asdict(cfg)
    session = wandb.init(name=cfg.output_dir, dir=cfg.output_dir, config=config, settings=quiet)
    session.define_metric("*", step_metric="step")  # wandb's own step refuses to go back
    return session.log, session.finish


def open_trackio(cfg, state):
    """Runs stay on this machine, in TRACKIO_DIR; `trackio show --project=mini-llm` draws them."""
    import trackio

    resume, config = "allow" if state.step else "never", dataclasses.asdict(cfg)
    session = trackio.init("mini-llm", name=cfg.output_dir, config=config, resume=resume)

    def send(record):
        numbers = {name: value for name, value in record.items() if name != "step"}
        session.log(numbers, step=record["step"])

    return send, session.finish


TRACKERS = {"wandb": open_wandb, "tensorboard": open_tensorboard, "trackio": open_trackio}
