"""What a run reports: a line for people, a record for programs, an alarm, and curves.

Every log step prints one line and appends one JSON object to OUTPUT_DIR/metrics.jsonl; wandb and
tensorboard get the same records on request. When a run ends, its curves are drawn into its folder.

    python train.py curves checkpoints/pretrain/a checkpoints/pretrain/b --x=minutes --output=ab.png
"""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import threading
import time
from inspect import cleandoc
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from lib.config import UserError, run
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


# ---- curves


# title, column of the log steps, of the validations, scale; a panel without data is left out
PANELS = (
    ("Loss", "loss", "val_loss", "linear"),
    ("Bits per byte", None, "val_bits_per_byte", "linear"),
    ("Accuracy", "rewards/accuracies", "val_rewards/accuracies", "linear"),
    ("Margin", "rewards/margins", "val_rewards/margins", "linear"),
    ("Learning rate", "lr", None, "linear"),
    ("Gradient norm", "grad_norm", None, "log"),
    ("Tokens per second", "tokens_per_second", None, "linear"),
)


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    """What to draw of the runs."""

    x: Literal["tokens", "steps", "minutes"] = "tokens"  # what the curves are drawn over
    output: str = "curves.png"  # the picture: .png or .svg


def read_run(path, x):
    """Returns {column: (x (N,), y (N,))} of a metrics.jsonl, or of the output folder it lies in.

    Nulls are left out, as is a last line that is still being written. A validation lies at the x of
    the log step before it. Raises UserError for a file that is missing, damaged, or without a step.
    """
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    key = {"tokens": "tokens", "steps": "step", "minutes": "seconds"}[x]
    columns, at, number = {}, 0.0, 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            number += 1
            record = json.loads(line) if line.endswith("\n") else {"step": None}
            at = record[key] / (60 if x == "minutes" else 1) if key in record else at
            for name, value in ({"step": record["step"]} | record).items():
                if isinstance(value, (int, float)):
                    columns.setdefault(name, []).append((at, value))
    except OSError as problem:
        hint = "name an output folder of a training"
        raise UserError(f"{path}: {problem.strerror}; {hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} line {number}: not a record of a training's step") from None
    if "loss" not in columns or key not in columns:
        raise UserError(f"{path}: holds no step with a loss and {key} yet; try --x=steps")
    return {name: np.array(points, float).T for name, points in columns.items()}


def figure_of(runs, x):
    """Returns matplotlib's Figure of {name: run}: a panel for each column, a colour for each run.

    Thin lines are the single log steps, thick ones their running mean, dots validations. The thin
    ones do not count for the range of an axis: the first losses would hide all others.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once
    from matplotlib.lines import Line2D

    panels = [p for p in PANELS if any(column in run for run in runs.values() for column in p[1:3])]
    rows = math.ceil(len(panels) / 3)
    figure = Figure((12, 1 + 2.7 * rows), layout="constrained")
    for number, (title, steps, validation, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 3, number, xlabel=x, yscale=scale)
        axes.set_title(title, loc="left", size="medium")
        axes.grid(alpha=0.3)
        for colour, columns in zip(COLOURS, runs.values()):
            if steps in columns:
                at, y = columns[steps]
                axes.add_artist(Line2D(at, y, color=colour, linewidth=0.5, alpha=0.4))
                axes.plot(at, running_mean(y), color=colour, marker="." if len(y) < 9 else "")
            if validation in columns:
                axes.plot(*columns[validation], color=colour, marker="o", markersize=3)
    handles = [figure.axes[0].plot([], [], color=colour)[0] for colour in COLOURS[: len(runs)]]
    labels = [f"{name}: {how_far(columns)}" for name, columns in runs.items()]
    figure.legend(handles, labels, loc="outside upper left", frameon=False)
    return figure


COLOURS = [f"C{n}" for n in range(8)]  # of matplotlib; more runs could not be told apart


def running_mean(y):
    """Returns the means of y (N,) over windows of N / 40 points, narrower at the ends."""
    window = np.ones(max(1, len(y) // 40))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def how_far(columns):
    """Returns how far a run has come, in words."""
    last = {name: y[-1] for name, (_, y) in columns.items()}
    done = f"{last['step']:,.0f} steps, {last.get('tokens', 0):,.0f} tokens"
    best = f", best val_loss {columns['val_loss'][1].min():.4f}" if "val_loss" in columns else ""
    return f"{done}, {last.get('seconds', 0) / 60:.1f} minutes, last loss {last['loss']:.4f}{best}"


def draw_curves(paths, x, output):
    """Draws the runs at `paths` to `output`, a .png or .svg. Returns {path: run}."""
    if len(paths) > len(COLOURS):
        most = f"can't be told apart; give at most {len(COLOURS)}"
        raise UserError(f"{len(paths)} runs in one picture {most}")
    runs = {str(path): read_run(path, x) for path in paths}
    picture = io.BytesIO()
    figure_of(runs, x).savefig(picture, format=Path(output).suffix.strip("."))
    with writing(output):
        replace_file(Path(output), picture.getvalue())
    return runs


def curves_command(argv):
    """Draw the curves of runs: python train.py curves RUN [RUN ...] [--key=value]

    A run is an output folder or a metrics.jsonl; a summary of each is printed.
    """
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))

    def main(cfg):
        if not paths:
            raise UserError("curves needs a run: python train.py curves checkpoints/pretrain/demo")
        if not cfg.output.endswith((".png", ".svg")):
            raise UserError(f"output {cfg.output}: must end in .png or .svg")
        for path, columns in draw_curves(paths, cfg.x, cfg.output).items():
            print(f"{path}: {how_far(columns)}")
        print(f"wrote {cfg.output}")

    run(main, CurvesConfig, cleandoc(curves_command.__doc__), argv=argv[len(paths) :])
