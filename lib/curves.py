"""The curves of one or several runs as one picture, drawn from their metrics.jsonl.

    python train.py curves checkpoints/pretrain/a checkpoints/pretrain/b --x=minutes --output=ab.svg

A run is an output folder or a metrics.jsonl. A .png is drawn by matplotlib; an .svg needs no package. Thin
lines are the single log steps, thick ones their running mean, dots validations; one colour is one run.
"""

import importlib.util
import json
import math
import os
from collections import deque
from dataclasses import dataclass
from html import escape
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lib.config import UserError, run

COLOURS = ("#2563a8", "#d1602b", "#2a8f6d", "#9d5aa8", "#b8901f", "#4aa3c7", "#8a6d5b", "#5b6470")
INK, GREY, GRID, AXIS = "#1c2430", "#6d7684", "#edeff2", "#c9ced6"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class CurvesConfig:
    """What to draw of the runs."""

    x: Literal["tokens", "steps", "minutes"] = "tokens"  # what the curves are drawn over
    output: str | None = None  # .png or .svg; none = curves.png, without matplotlib curves.svg


# ---- what a run has recorded


class Record(NamedTuple):
    """One run: its log steps and its validations, each {name: array}, "x" being where they are drawn."""

    name: str
    steps: dict
    validations: dict


def read_run(place, name, x):
    """Returns the Record of a folder or a metrics.jsonl; a last line that is still being written is skipped.

    Raises UserError for a file that is missing, damaged, or without a logged step.
    """
    path = Path(place) / "metrics.jsonl" if Path(place).is_dir() else Path(place)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as problem:
        raise UserError(
            f"{path}: {problem.strerror}; name an output folder of a training"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8, so not a metrics.jsonl") from None
    records = [
        read_line(path, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")
    ]
    logged = [r for r in records if "loss" in r]
    if not logged:
        raise UserError(f"{path}: holds no step yet")
    key = {"tokens": "tokens", "steps": "step", "minutes": "seconds"}[x]
    if any(key not in r for r in logged):
        raise UserError(f"{path}: its records have no {key!r}; use --x=steps")
    steps = columns(logged)
    steps["x"] = steps[key] / (60 if x == "minutes" else 1)
    validations = columns([r for r in records if any(k.startswith("val_") for k in r)])
    validations["x"] = between(validations["step"], steps["step"], steps["x"])
    return Record(name, steps, validations)


def read_line(path, number, line):
    """Returns one record: step, and numbers or null by name; UserError for anything else."""
    try:
        record = json.loads(line)
        int(record["step"])
        return record
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} line {number}: not a record of a step: {line.strip()[:60]!r}"
        ) from None


def columns(records):
    """Returns {name: array} of the numbers in records; NaN where one has null, or nothing of that name."""
    names = {k: None for r in records for k, v in r.items() if isinstance(v, (int, float))} | {
        "step": None
    }
    number = lambda v: float(v) if isinstance(v, (int, float)) else math.nan
    return {name: np.array([number(r.get(name)) for r in records]) for name in names}


def between(at, steps, values):
    """Returns `values`, known at `steps`, at the steps `at`: linear, from 0 at step 0 to beyond the last."""
    inside = np.interp(at, [0, *steps], [0, *values])
    return np.where(at > steps[-1], values[-1] * at / steps[-1], inside)


def short_names(places):
    """Returns names that tell the places apart: as few of their last folders as that takes."""
    parts = [Path(p).resolve().parts for p in places]
    parts = [p[:-1] if p[-1] == "metrics.jsonl" else p for p in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{places[0]}: given twice; name each run once")


# ---- what is drawn of it


class Line(NamedTuple):
    """One curve of a panel. kind: raw, mean or dots."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    kind: str


class Panel(NamedTuple):
    """One small picture: its lines, the range and scale of its values, the last values as text."""

    title: str
    lines: list
    low: float
    high: float
    log: bool
    last: list  # of (text, colour)


# title, column of the log steps, of the validations, scale; a panel without data is left out
PANELS = (
    ("Loss", "loss", "val_loss", "fitted"),
    ("Bits per byte", None, "val_bits_per_byte", "fitted"),
    ("Accuracy", "rewards/accuracies", "val_rewards/accuracies", "fitted"),
    ("Margin", "rewards/margins", "val_rewards/margins", "fitted"),
    ("Learning rate", "lr", None, "zero"),
    ("Gradient norm", "grad_norm", None, "log"),
    ("Tokens per second", "tokens_per_second", None, "zero"),
)


def panels_of(runs):
    """Returns the panels that some run has data for, the loss first."""
    return list(filter(None, (panel(runs, *wanted) for wanted in PANELS)))


def panel(runs, title, column, validation, scale):
    lines, last = [], []
    for record, colour in zip(runs, COLOURS):
        for part, name in ((record.steps, column), (record.validations, validation)):
            y = part.get(name, np.empty(0))
            known = np.isfinite(y) & ((y > 0) | (scale != "log"))
            if known.any():
                kind = "dots" if part is record.validations else "mean"
                lines += curve(part["x"][known], y[known], colour, kind, title != "Learning rate")
                last.append(
                    (
                        ("validation " if kind == "dots" and column else "") + short(y[known][-1]),
                        colour,
                    )
                )
    if not lines:
        return None
    return Panel(
        title, lines, *value_range(lines, scale), scale == "log", last if len(runs) == 1 else []
    )


def curve(x, y, colour, kind, scatters):
    """Returns the lines of one column: log steps as they are and, where they are many, their mean."""
    if kind == "dots" or len(y) < 30 or not scatters:
        return [Line(*extremes(x, y), colour, kind)]
    mean = running_mean(y, len(y) / 80)
    thin = slice(None, None, max(1, len(y) // 600))
    return [Line(*extremes(x, y), colour, "raw"), Line(x[thin], mean[thin], colour, "mean")]


def running_mean(y, width):
    """Returns y smoothed by a Gaussian with a standard deviation of `width` points, cut off at the ends."""
    reach = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    weights = np.exp(-0.5 * (reach / width) ** 2)
    total, mass = (np.convolve(part, weights) for part in (y, np.ones_like(y)))
    start = len(reach) // 2
    return (total / mass)[start : start + len(y)]


def extremes(x, y, buckets=600):
    """Returns (x, y) thinned to the least and the greatest point of each bucket, which keeps the outline."""
    if len(y) <= 2 * buckets:
        return x, y
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    ends = [(at + y[at:to].argmin(), at + y[at:to].argmax()) for at, to in pairwise(edges)]
    kept = np.unique(ends)
    return x[kept], y[kept]


def value_range(lines, scale):
    """Returns (low, high) that hold all means and dots, and the log steps but for 1 % at either end."""
    raw = [np.percentile(one.y, (1, 99)) for one in lines if one.kind == "raw"]
    values = np.concatenate([one.y for one in lines if one.kind != "raw"] + raw)
    low, high = values.min(), values.max()
    if scale == "log":
        return low / 1.1, high * 1.1
    spare = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (min(0.0, low), high + spare) if scale == "zero" else (low - spare, high + spare)


# ---- axes


def ticks(low, high, count):
    """Returns about `count` round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low, high):
    """Returns 1, 2 and 5 times every power of ten in between, or only the powers if those are many."""
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [m * p for p in powers for m in (1, 2, 5) if low <= m * p <= high]
    if len(inside) > 6:
        inside = [p for p in powers if low <= p <= high]
    return inside if len(inside) > 1 else ticks(low, high, 5)


def short(value):
    """Returns a number in few characters: 12.5M, 3,200, 0.034, 3e-4."""
    size = abs(value)
    for unit, mark in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if mark == "k" else unit
            return f"{value / scale:.{0 if size >= 100 * scale else 1}f}".removesuffix(".0") + mark
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:.3g}" if size < 1 else f"{value:.4g}"


class Place(NamedTuple):
    """Where a panel's curves lie in the picture, in pixels; to_x and to_y turn data into pixels."""

    left: float
    top: float
    width: float
    height: float
    end: float  # the greatest x of all panels
    panel: Panel

    def to_x(self, x):
        return self.left + np.asarray(x) / self.end * self.width

    def to_y(self, y):
        scale = np.log if self.panel.log else np.asarray
        low, high, value = (scale(v) for v in (self.panel.low, self.panel.high, y))
        return self.top + (1 - (value - low) / (high - low)) * self.height

    def y_ticks(self):
        low, high = self.panel.low, self.panel.high
        return log_ticks(low, high) if self.panel.log else ticks(low, high, 5)


WIDTH, HEAD, CELL, MARGIN, GAP = 1200, 92, 268, 36, 28  # pixels
LEFT, TOP, BOTTOM = 46, 36, 34  # of a cell, around its curves


def layout(panels):
    """Returns (places, height): three columns, the first panel so wide that the last row is full."""
    width = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
    end = max(one.x.max() for panel in panels for one in panel.lines) or 1.0
    places, at = [], 0
    for number, panel in enumerate(panels):
        span = 1 if number else 3 - (len(panels) - 1) % 3
        row, column = divmod(at, 3)
        left, top = MARGIN + column * (width + GAP) + LEFT, HEAD + row * CELL + TOP
        size = (span * width + (span - 1) * GAP - LEFT, CELL - TOP - BOTTOM)
        places.append(Place(left, top, *size, end, panel))
        at += span
    return places, HEAD + math.ceil(at / 3) * CELL + 12


# ---- the picture without a package


def svg(runs, x):
    """Returns the picture as the text of an SVG file."""
    places, height = layout(panels_of(runs))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="{FONT}" font-size="11" role="img">',
        f"<title>{escape('training curves of ' + ', '.join(r.name for r in runs))}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *svg_head(runs, x),
    ]
    for number, place in enumerate(places):
        parts += [*svg_axes(place, x), *svg_lines(place, number)]
    return "\n".join([*parts, "</svg>", ""])


def words(x, y, content, size=11, fill=GREY, anchor="start", weight=400):
    """Returns a text element; `content` is escaped or marked up already."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}" font-weight="{weight}">{content}</text>'


def heading(record):
    """Returns how far a run has come, in words."""
    tokens = f", {short(record.steps['tokens'][-1])} tokens" if "tokens" in record.steps else ""
    seconds = record.steps.get("seconds", [0])[-1]
    time = (
        f", {seconds / 60:.0f} minutes"
        if seconds >= 90
        else f", {seconds:.0f} seconds"
        if seconds
        else ""
    )
    return f"{int(record.steps['step'][-1]):,} steps{tokens}{time}"


def svg_head(runs, x):
    """Yields the names of the runs, with their colours if they are several, and the legend of strokes."""
    if len(runs) == 1:
        yield words(MARGIN, 44, escape(runs[0].name), 20, INK, weight=600)
        yield words(MARGIN, 66, heading(runs[0]), 12)
    else:
        for number, (record, colour) in enumerate(zip(runs, COLOURS)):
            left, top = MARGIN + number % 4 * 215, 40 + number // 4 * 28
            name = record.name if len(record.name) <= 26 else "..." + record.name[-24:]
            yield f'<circle cx="{left + 5}" cy="{top - 4}" r="5" fill="{colour}"/>'
            yield words(left + 17, top, escape(name), 13, INK, weight=600)
            yield words(left + 17, top + 13, heading(record), 10)
    at, mark = WIDTH - MARGIN, GREY if len(runs) > 1 else COLOURS[0]
    for name, width, stroke in (
        ("validation", 52, 1.2),
        ("running mean", 72, 2.2),
        ("log step", 44, 1.0),
    ):
        yield words(at - width, 24, name)
        faint = ' opacity="0.4"' if name == "log step" else ""
        yield f'<path d="M{at - width - 26} 20h18" stroke="{mark}" stroke-width="{stroke}"{faint}/>'
        if name == "validation":
            yield f'<circle cx="{at - width - 17}" cy="20" r="2.8" fill="{mark}"/>'
        at -= width + 48


def svg_axes(place, x):
    """Yields a panel's title, its last values, grid lines and the numbers along both axes."""
    left, top, right, bottom = (
        place.left,
        place.top,
        place.left + place.width,
        place.top + place.height,
    )
    yield words(left - LEFT, top - 16, place.panel.title, 13, INK, weight=600)
    last = " &#160; ".join(f'<tspan fill="{c}">{text}</tspan>' for text, c in place.panel.last)
    yield words(right, top - 16, last, 12, anchor="end", weight=600)
    for value in place.y_ticks():
        y = float(place.to_y(value))
        yield f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{GRID}"/>'
        yield words(left - 8, y + 4, short(value), anchor="end")
    yield f'<path d="M{left:.1f} {bottom:.1f}H{right:.1f}" stroke="{AXIS}"/>'
    for value in ticks(0, place.end, max(5, place.width // 90)):
        at = float(place.to_x(value))
        yield f'<path d="M{at:.1f} {bottom:.1f}v4" stroke="{AXIS}"/>'
        if value:
            yield words(at, bottom + 17, short(value), anchor="middle")
        else:
            yield words(at - 3, bottom + 17, f"0 {x}")


def svg_lines(place, number):
    """Yields a panel's curves, the faint ones first, cut off at its edges."""
    edges = f'x="{place.left:.1f}" y="{place.top - 3:.1f}" '
    edges += f'width="{place.width + 4:.1f}" height="{place.height + 4:.1f}"'
    yield f'<clipPath id="panel{number}"><rect {edges}/></clipPath><g clip-path="url(#panel{number})">'
    order = ("raw", "mean", "dots")
    for line in sorted(place.panel.lines, key=lambda one: order.index(one.kind)):
        points = list(zip(place.to_x(line.x), place.to_y(line.y)))
        path = "M" + " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        width, opacity = {"raw": (1, 0.22), "mean": (1.9, 1), "dots": (1.1, 0.85)}[line.kind]
        yield (
            f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="{width}" '
            f'opacity="{opacity}" stroke-linejoin="round"/>'
        )
        for a, b in (
            points if len(points) == 1 or (line.kind == "dots" and len(points) <= 60) else ()
        ):
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.4" fill="{line.colour}" stroke="#fff"/>'
    yield "</g>"


# ---- the picture by matplotlib


def png(runs, x, path):
    """Writes the same picture with matplotlib, without its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, height = layout(panels_of(runs))
    figure = Figure((WIDTH / 100, height / 100), facecolor="white")
    for number, (record, colour) in enumerate(zip(runs, COLOURS)):
        at = (MARGIN / WIDTH + number % 4 * 0.24, 1 - (38 + number // 4 * 26) / height)
        figure.text(*at, record.name, color=colour, size=12, weight="bold")
        figure.text(at[0], at[1] - 14 / height, heading(record), color=GREY, size=7)
    for place in places:
        box = (place.left / WIDTH, 1 - (place.top + place.height) / height)
        axes = figure.add_axes((*box, place.width / WIDTH, place.height / height))
        axes.set_title(place.panel.title, loc="left", size=9, weight="bold", color=INK)
        axes.set_title(
            "   ".join(text for text, _ in place.panel.last), loc="right", size=8, color=COLOURS[0]
        )
        axes.set_yscale("log" if place.panel.log else "linear")
        axes.set(xlim=(0, place.end), ylim=(place.panel.low, place.panel.high))
        axes.set_xticks(
            marks := ticks(0, place.end, max(5, place.width // 90)), list(map(short, marks))
        )
        axes.set_yticks(marks := place.y_ticks(), list(map(short, marks)))
        axes.minorticks_off()
        axes.set_xlabel(x, loc="right", size=7, color=GREY)
        axes.tick_params(colors=GREY, labelsize=7, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[:].set_visible(False)
        for line in place.panel.lines:
            style = {
                "raw": {"lw": 0.6, "alpha": 0.3},
                "mean": {"lw": 1.5},
                "dots": {"lw": 0.8, "marker": "o"},
            }
            axes.plot(line.x, line.y, color=line.colour, markersize=3, **style[line.kind])
    FigureCanvasAgg(figure).print_png(path)


# ---- files


def draw(places, x, output):
    """Writes the picture of the runs at `places` to `output`, whole or not at all. Returns their Records."""
    if len(places) > len(COLOURS):
        raise UserError(
            f"{len(places)} runs in one picture can't be told apart; give at most {len(COLOURS)}"
        )
    runs = [
        read_run(place, name, x) for place, name in zip(places, short_names(places), strict=True)
    ]
    output = Path(output)
    part = output.with_name(f".{output.name}.tmp")
    try:
        if output.suffix == ".png":
            png(runs, x, part)
        else:
            part.write_text(svg(runs, x), encoding="utf-8")
        os.replace(part, output)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise UserError(f"{output}: not written ({problem.strerror})") from None
    return runs


def default_name():
    return "curves.png" if importlib.util.find_spec("matplotlib") else "curves.svg"


def draw_run(folder, say):
    """Draws the curves of a run into its folder; whatever fails is one warning and no more."""
    if not (Path(folder) / "metrics.jsonl").is_file():
        return
    try:
        draw([folder], "tokens", Path(folder) / default_name())
    except Exception as problem:  # matplotlib's and the disk's troubles are not the training's
        say(f"warning: no curves drawn ({problem!s:.120})")


def curves(places, cfg):
    """Draw the curves of runs: python train.py curves RUN [RUN ...] [--key=value]

    A run is an output folder or a metrics.jsonl; a summary of each is printed.
    """
    if not places:
        raise UserError("curves needs a run: python train.py curves checkpoints/pretrain/demo")
    output = Path(cfg.output or default_name())
    if output.suffix not in (".png", ".svg"):
        raise UserError(f"output {output}: must end in .png or .svg")
    if output.suffix == ".png" and not importlib.util.find_spec("matplotlib"):
        raise UserError(
            f"output {output}: a .png needs matplotlib: pip install matplotlib; .svg does not"
        )
    for record in draw(places, cfg.x, output):
        best = record.validations.get("val_loss", np.empty(0))
        best = f", best val_loss {np.nanmin(best):.4f}" if np.isfinite(best).any() else ""
        print(f"{record.name}: {heading(record)}, last loss {record.steps['loss'][-1]:.4f}{best}")
    print(f"wrote {output}")


def command_line(argv):
    """Runs `python train.py curves ARGV`."""
    places, flags, rest = [], [], deque(argv)
    while rest:
        word = rest.popleft()
        (flags if word.startswith("-") else places).append(word)
        if word.startswith("--") and "=" not in word and rest:
            flags.append(rest.popleft())  # its value, standing apart
    run(lambda cfg: curves(places, cfg), CurvesConfig, cleandoc(curves.__doc__), argv=flags)
