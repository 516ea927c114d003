"""The curves of runs as a picture, from their metrics.jsonl.

python train.py curves checkpoints/a checkpoints/b --x=minutes --output=both.png
"""

import dataclasses
import io
import itertools
import json
import math
from inspect import cleandoc
from pathlib import Path
from typing import Literal

import numpy as np

from lib.config import UserError, run, write_whole
from lib.log import writing

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
    key, unit = {"tokens": ("tokens", 1), "steps": ("step", 1), "minutes": ("seconds", 60)}[x]
    columns, at = {}, 0.0
    try:
        for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            record = json.loads(line)
            at = record[key] / unit if key in record else at
            for name, value in ({"step": record["step"]} | record).items():
                if isinstance(value, (int, float)):
                    columns.setdefault(name, []).append((at, value))
    except OSError as problem:
        raise UserError(f"{path}: {problem.strerror}; name a training's output folder") from None
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(f"{path}: not what a training logs: {problem!r:.80}") from None
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
    for place, (title, steps, validation, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 3, place, xlabel=x, yscale=scale)
        axes.set_title(title, loc="left", size="medium")
        axes.grid(alpha=0.3)
        for number, (name, columns) in enumerate(runs.items()):
            colour, label = f"C{number}", f"{name}: {how_far(columns)}"
            if steps in columns:
                at, y = columns[steps]
                axes.add_artist(Line2D(at, y, color=colour, linewidth=0.5, alpha=0.4))
                marker = "." if len(y) < 9 else ""
                axes.plot(at, running_mean(y), color=colour, marker=marker, label=label)
            if validation in columns:
                axes.plot(*columns[validation], color=colour, marker="o", markersize=3)
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper left", frameon=False)
    return figure


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
    runs, picture = {str(path): read_run(path, x) for path in paths}, io.BytesIO()
    figure_of(runs, x).savefig(picture, format=Path(output).suffix.strip("."))
    with writing(output):
        write_whole(output, picture.getvalue())
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
