"""What a run reports: a line for people, a record for programs, an alarm, and curves.

Every log step prints one line and appends one JSON object to OUTPUT_DIR/metrics.jsonl; wandb and
tensorboard get the same records on request. When a run ends, its curves are drawn into its folder.

    python train.py curves checkpoints/pretrain/a checkpoints/pretrain/b --x=minutes --output=ab.png
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import threading
import time
from pathlib import Path
from statistics import median

from lib.config import UserError
from lib.runtime import memory_used, peak_flops

WINDOW, ENOUGH = 100, 20  # losses that a new one is compared with; no alarm with fewer than ENOUGH
UPLOAD_SECONDS = 60  # that an upload may take when the run is over


class Log:
    """The log of one run, written by rank 0; entered while the run lasts."""

    def __init__(self, cfg, flops_per_token, world, state):
        self.world, self.flops, self.every = world, flops_per_token, cfg.logging_steps
        self.peak = peak_flops(world.device)
        self.path = Path(cfg.output_dir) / "metrics.jsonl"
        self.mark = (time.monotonic(), state.tokens)  # where tokens per second are counted from
        self.trackers = []
        if world.rank == 0:
            self._drop_after(state)
            self.trackers = open_trackers(cfg, state, world.say)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.world.rank or kind is KeyboardInterrupt:  # a second Ctrl-C means: at once
            return
        for tracker in self.trackers:
            tracker.close()
        try:
            if self.path.is_file():
                from lib.curves import draw_curves  # which imports matplotlib

                draw_curves([self.path.parent], "tokens", self.path.with_name("curves.png"))
        except Exception as problem:  # matplotlib's and the disk's troubles are not the training's
            self.world.say(f"warning: no curves drawn ({problem!s:.120})")

    def _drop_after(self, state):
        """Removes what a run that died logged after its checkpoint: those steps come again."""
        if not self.path.exists():
            return
        lines = []
        with writing(self.path):
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                    record = json.loads(line)
                    last = state.step if "grad_norm" in record else state.evaluated
                    if record["step"] <= last and line.endswith("\n"):
                        lines.append(line)
            replace_file(self.path, "".join(lines).encode())

    def write(self, record):
        """Appends one line, NaN and infinity as null: JSON has neither."""
        bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
        record = record | dict.fromkeys(bad)
        if self.world.rank == 0:
            with writing(self.path), open(self.path, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.send(record)

    def step(self, state, clock, stats, lr, grad_norm):
        """Watches the loss of a step; logs every step that is a multiple of logging_steps.

        stats: {"loss": mean, ...}. The losses of before are part of `state`, so a resumed run
        raises the same alarms as the uninterrupted one.
        """
        loss, now, seconds = stats["loss"], time.monotonic(), clock.seconds
        if 0 < grad_norm < math.inf:  # else the step was not applied, which is reported elsewhere
            self._alarm(state, loss, grad_norm)
            state.recent = [*state.recent, loss][-WINDOW:]
        if state.step % self.every and state.step > 1:
            return
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
        if len(stats) > 1:
            others = [f"{k} {v:.4f}" for k, v in stats.items() if k != "loss"]
            self.world.say("    " + " | ".join(others))

    def _alarm(self, state, loss, grad_norm):
        middle, limit = spike_limit(state.recent)
        if loss > limit >= state.recent[-1]:  # reported once, not at every step that it lasts
            spike = {"spike": loss, "median": middle, "grad_norm": grad_norm}
            self.write({"step": state.step} | spike)
            before = f"a median of {middle:.4f} in the {len(state.recent)} steps before"
            self.world.say(
                f"warning: loss spike at step {state.step:,}: {loss:.4f}, with {before}; "
                f"gradient norm {grad_norm:.3f}"
            )

    def evaluation(self, state, metrics):
        """Logs a validation: numbers on one line, texts quoted below it."""
        self.write({"step": state.step} | metrics)
        numbers = " | ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.world.say(f"  eval {state.step:>6,} | {numbers or 'nothing is held out'}")
        for name, text in metrics.items():
            if isinstance(text, str):
                self.world.say(f"    {name}: {text!r}")
        self.mark = (time.monotonic(), state.tokens)


@contextlib.contextmanager
def writing(path):
    """Turns what a disk refuses into a UserError, and leaves no half of a file."""
    try:
        yield
    except OSError as problem:
        hidden_twin(path).unlink(missing_ok=True)
        why = f"could not be written ({problem.strerror}); make room"
        raise UserError(f"{path}: {why}, or choose another place") from None


def replace_file(path, content):
    """Writes bytes beside `path` first: a kill leaves the old file or the new one."""
    hidden_twin(path).write_bytes(content)
    os.replace(hidden_twin(path), path)


def hidden_twin(path):
    return Path(path).with_name(f".tmp-{Path(path).name}")


def spike_limit(recent):
    """Returns (median of the losses `recent`, what a loss has to exceed to be called a spike).

    More than one and a half times the median, and further above it than six median absolute
    deviations, about four standard deviations. In logarithms: losses near 0 scatter by factors.
    """
    if len(recent) < ENOUGH:
        return None, math.inf
    logs = [math.log(max(loss, 1e-9)) for loss in recent]
    middle = median(logs)
    spread = max(math.log(1.5), 6 * median(abs(x - middle) for x in logs))
    return math.exp(middle), math.exp(middle + spread)


# ---- wandb and tensorboard


def open_trackers(cfg, state, say):
    """Returns the Trackers of cfg.report_to; UserError if the package of one is not installed."""
    for name in cfg.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"report_to={name}: needs a package that is not installed: pip install {name}"
            )
    return [Tracker(name, cfg, state, say) for name in cfg.report_to]


class Tracker:
    """wandb or tensorboard, given every record; its first failure is one warning and its end."""

    def __init__(self, name, cfg, state, say):
        self.name, self.say, self.failed = name, say, False
        opener = {"wandb": open_wandb, "tensorboard": open_tensorboard}[name]
        self._send, self._close = self._attempt(opener, cfg, state) or (None, None)

    def _attempt(self, call, *args):
        try:
            return None if self.failed else call(*args)
        except Exception as problem:  # foreign code, over a network: nothing in it may end a run
            self.failed = True
            line = (str(problem).splitlines() or [type(problem).__name__])[0]
            self.say(f"warning: {self.name} failed ({line:.120}); training goes on without it")

    def send(self, record):
        self._attempt(self._send, record)

    def close(self):
        """Waits for what was sent to arrive, for a minute at most."""
        thread = threading.Thread(target=self._attempt, args=(self._close,), daemon=True)
        thread.start()
        thread.join(UPLOAD_SECONDS)
        if thread.is_alive():
            late = f"did not finish within {UPLOAD_SECONDS} seconds; not waiting longer"
            self.say(f"warning: {self.name} {late}")


def open_tensorboard(cfg, state):
    """Returns (send, close); events go to OUTPUT_DIR/tensorboard, a resume purges those to come."""
    from torch.utils.tensorboard import SummaryWriter

    folder = str(Path(cfg.output_dir) / "tensorboard")
    writer = SummaryWriter(folder, purge_step=state.step + 1 if state.step else None)

    def send(record):
        for name, value in record.items():
            if isinstance(value, str):
                writer.add_text(name, value, record["step"])
            elif value is not None and name != "step":
                writer.add_scalar(name, value, record["step"])

    return send, writer.close


def open_wandb(cfg, state):
    """Returns (send, close). The project is WANDB_PROJECT or mini-llm; WANDB_MODE is respected."""
    import wandb

    os.environ.setdefault("WANDB_PROJECT", "mini-llm")
    quiet, config = wandb.Settings(silent=True, console="off"), dataclasses.asdict(cfg)
    session = wandb.init(name=cfg.output_dir, dir=cfg.output_dir, config=config, settings=quiet)
    session.define_metric("*", step_metric="step")  # wandb's own step refuses to go back
    return session.log, session.finish
