"""The curves of runs as a picture, from their metrics.jsonl.

python train.py curves checkpoints/a checkpoints/b --x=minutes --output=both.png
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np

from lib.config import UserError, refusing


@dataclasses.dataclass(frozen=True)
class CurvesConfig:
    """What to draw of which runs."""

    runs: tuple[str, ...]  # their output folders
    x: Literal["tokens", "steps", "minutes"] = "tokens"  # what the curves are drawn over
    output: str = "curves.png"  # the picture, of a kind that matplotlib writes: .png, .svg, .pdf


def read_run(folder, x):
    """Returns {column: (x (N,), y (N,))} of a training's metrics.jsonl.

    Nulls are left out, as is a last line that is still being written. A validation lies at the x of
    the log step before it. Raises UserError for a file that is missing, damaged, or without a step.
    """
    path = Path(folder) / "metrics.jsonl"
    key, unit = {"tokens": ("tokens", 1), "steps": ("step", 1), "minutes": ("seconds", 60)}[x]
    columns, at = {}, 0.0
    errors = OSError, ValueError, AttributeError, TypeError, RecursionError
    with refusing(errors, f"{path}: not what a training logs", "name a training's output folder"):
        for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            record = json.loads(line)
            at = record[key] / unit if key in record else at
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    columns.setdefault(name, []).append((at, value))
    if "loss" not in columns or key not in columns:
        raise UserError(f"{path}: holds no step with a loss and {key} yet; try --x=steps")
    return {name: np.array(points, float).T for name, points in columns.items()}


def figure_of(runs, x):
    """Returns the Figure of {name: run}: a panel for each column, a colour for each run.

    Thin lines are the single log steps, thick ones their running mean, dots validations.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once

    columns = dict.fromkeys(name.removeprefix("val_") for run in runs.values() for name in run)
    panels = [column for column in columns if column not in ("step", "tokens", "seconds")]
    rows = math.ceil(len(panels) / 3)
    figure = Figure((12, 1 + 2.7 * rows), layout="constrained")
    for place, column in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 3, place, title=column, xlabel=x)
        axes.grid(alpha=0.3)
        for number, (name, points) in enumerate(runs.items()):
            if column in points:
                (at, y), colour = points[column], f"C{number}"
                axes.plot(at, y, color=colour, linewidth=0.5, alpha=0.4)
                axes.plot(at, running_mean(y), color=colour, label=name)
            if f"val_{column}" in points:
                axes.plot(*points[f"val_{column}"], color=f"C{number}", marker="o", markersize=3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def running_mean(y):
    """Returns the means of y (N,) over windows of N / 40 points, narrower at the ends."""
    window = np.ones(max(1, len(y) // 40))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def draw_curves(folders, x, output):
    """Draws the runs in `folders` to `output`; its suffix says in which format."""
    figure = figure_of({str(folder): read_run(folder, x) for folder in folders}, x)
    with refusing((OSError, ValueError), f"output {output}: not drawn", "name a .png or .svg"):
        figure.savefig(output)


def curves(cfg):
    """Draw the curves of runs, by their output folders: python train.py curves RUN [RUN ...]"""
    draw_curves(cfg.runs, cfg.x, cfg.output)
    print(f"wrote {cfg.output}")
