"""What a run reports while it lasts: a line for people, a record for programs, an alarm.

Every log step prints one aligned line and appends one JSON object to metrics.jsonl; wandb and tensorboard get
the same records on request. The loss of every step is watched, but stays on its device until the next log
step: reading it would make the CPU wait for the GPU. When the run ends, its curves are drawn.
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
from lib.curves import draw_run
from lib.runtime import memory_used, peak_flops

WINDOW, ENOUGH = (
    100,
    20,
)  # steps whose losses a new one is compared with; with fewer than ENOUGH, no alarm
PATIENCE = 60  # seconds that an upload may take when the run is over


class Log:
    """The log of one run, on rank 0, to which the others add their shares. Entered while the run lasts."""

    def __init__(self, cfg, flops_per_token, world, state):
        self.world, self.flops = world, flops_per_token
        self.peak, self.logging_steps = peak_flops(world.device), cfg.logging_steps
        self.path = Path(cfg.output_dir) / "metrics.jsonl"
        self.trackers = []
        if world.rank == 0:
            try:
                self._drop_after(state)
            except OSError as problem:
                why = f"cannot be rewritten ({problem.strerror})"
                raise UserError(
                    f"{self.path}: {why}; mend that, or choose another --output_dir"
                ) from None
            self.trackers = [
                Tracker(name, cfg, state, world.say) for name in installed(cfg.report_to)
            ]
        self.mark = (time.monotonic(), state.tokens)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.world.rank == 0 and kind is not KeyboardInterrupt:  # a second Ctrl-C means: at once
            for tracker in self.trackers:
                tracker.close()
            draw_run(self.path.parent, self.world.say)

    def _drop_after(self, state):
        """Removes what a run that died logged after its checkpoint: those steps are about to come again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(
                ValueError, KeyError, TypeError
            ):  # a full disk leaves half a line
                record = json.loads(line)
                known = record["step"] <= (state.step if "grad_norm" in record else state.evaluated)
                if known and line.endswith("\n"):
                    kept.append(line)
        tmp = self.path.with_name(".tmp-metrics.jsonl")
        tmp.write_text("".join(kept), encoding="utf-8", newline="\n")
        os.replace(tmp, self.path)

    def write(self, record):
        """Appends one line, NaN and infinity as null: JSON has neither."""
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        if self.world.rank == 0:
            try:
                with open(self.path, "a", encoding="utf-8", newline="\n") as f:
                    f.write(json.dumps(plain, allow_nan=False) + "\n")
            except OSError as problem:
                raise UserError(f"{self.path}: could not be written ({problem.strerror})") from None
        for tracker in self.trackers:
            tracker.send(plain)

    def _alarm(self, state, step, loss, norm):
        middle, limit = spike_limit(state.recent)
        if loss > limit >= state.recent[-1]:  # reported once, not at every step that it lasts
            self.write({"step": step, "spike": loss, "median": middle, "grad_norm": norm})
            self.world.say(
                f"warning: loss spike at step {step:,}: {loss:.4f}, with a median of {middle:.4f} in the "
                f"{len(state.recent)} steps before; gradient norm {norm:.3f}"
            )

    def step(self, state, clock, stats, lr, norm):
        """Takes one optimizer step, its stats summed over ranks; logs it every `logging_steps`.

        The loss is compared with those of the steps before. These are part of `state`, so a resumed run
        raises the alarms that the uninterrupted one would have.
        """
        loss = stats["loss"]
        if 0 < norm < math.inf:  # otherwise the step was not applied, which is reported elsewhere
            self._alarm(state, state.step, loss, norm)
            state.recent = [*state.recent, loss][-WINDOW:]
        if state.step % self.logging_steps and state.step > 1:
            return
        stats = {name: value for name, value in stats.items() if name != "loss"}
        (then, tokens), now = self.mark, time.monotonic()
        rate = (state.tokens - tokens) / max(1e-9, now - then)
        self.mark = (now, state.tokens)
        record = {
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": state.tokens,
        }
        memory = memory_used(self.world.device)
        measured = {"tokens_per_second": rate, "memory": memory, "seconds": round(clock.seconds, 3)}
        self.write(record | stats | measured)
        seconds = clock.seconds  # state.seconds is from before this step
        done = min(1, clock.progress(state.step, seconds))
        left = int(seconds * (1 - done) / done) if done else 0
        mfu = f" | mfu {self.flops * rate / self.world.size / self.peak:5.1%}" if self.peak else ""
        self.world.say(
            f"step {state.step:>7,}{f'/{clock.total:,}' if clock.total else ''} | loss {loss:7.4f} "
            f"| lr {lr:.2e} | norm {norm:6.3f} | {rate:>9,.0f} tok/s{mfu} "
            f"| {memory / 1e9:5.2f} GB | {done:4.0%}, {left // 60}:{left % 60:02d} left"
        )
        if stats:
            self.world.say("    " + " | ".join(f"{k} {v:.4f}" for k, v in stats.items()))

    def evaluation(self, state, metrics):
        """Logs a validation: numbers on one line, texts quoted below it."""
        self.write({"step": state.step} | metrics)
        numbers = " | ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.world.say(f"  eval {state.step:>6,} | {numbers or 'nothing is held out'}")
        for name, text in metrics.items():
            if isinstance(text, str):
                self.world.say(f"    {name}: {text!r}")
        self.mark = (time.monotonic(), state.tokens)


def spike_limit(recent):
    """Returns (median of the losses `recent`, what a loss has to exceed to be called a spike).

    A spike is more than one and a half times the median, and further above it than six median absolute
    deviations, about four standard deviations. In logarithms, because losses near 0 scatter by factors.
    """
    if len(recent) < ENOUGH:
        return None, math.inf
    logs = [math.log(max(loss, 1e-9)) for loss in recent]
    middle = median(logs)
    return math.exp(middle), math.exp(
        middle + max(math.log(1.5), 6 * median(abs(x - middle) for x in logs))
    )


# ---- other people's logs


def installed(names):
    """Returns `names`; UserError, before anything is trained, if the package of one is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"report_to={name}: needs a package that is not installed: pip install {name}"
            )
    return names


class Tracker:
    """wandb or tensorboard, given every record; after its first failure, one warning and nothing more."""

    def __init__(self, name, cfg, state, say):
        self.name, self.say = name, say
        opener = {"wandb": open_wandb, "tensorboard": open_tensorboard}[name]
        self.send_, self.close_ = self._try(opener, cfg, state) or (None, None)

    def _try(self, call, *args):
        try:
            return call(*args)
        except Exception as problem:  # foreign code, over a network: nothing in it may end a run
            self.send_ = None
            lines = str(problem).splitlines() or [type(problem).__name__]
            self.say(f"warning: {self.name} failed ({lines[0]:.120}); training goes on without it")

    def send(self, record):
        if self.send_:
            self._try(self.send_, record)

    def close(self):
        """Waits for what was sent to arrive, for a minute at most."""
        if self.send_:
            thread = threading.Thread(target=self._try, args=(self.close_,), daemon=True)
            thread.start()
            thread.join(PATIENCE)
            if thread.is_alive():
                self.say(
                    f"warning: {self.name} did not finish within {PATIENCE} seconds; not waiting longer"
                )


def open_tensorboard(cfg, state):
    """Returns (send, close); events go to OUTPUT_DIR/tensorboard, those that a resume repeats are purged."""
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
    """Returns (send, close); the project is WANDB_PROJECT or mini-llm, WANDB_MODE=offline stays local."""
    import wandb

    os.environ.setdefault("WANDB_PROJECT", "mini-llm")
    quiet = wandb.Settings(silent=True, console="off")
    config = dataclasses.asdict(cfg)
    one = wandb.init(name=cfg.output_dir, dir=cfg.output_dir, config=config, settings=quiet)
    one.define_metric("*", step_metric="step")  # wandb's own step refuses to stand still or go back
    return one.log, one.finish
