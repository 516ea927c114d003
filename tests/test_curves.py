"""What a run tells: its curves as a picture, its alarm, and the logs of other people's programs."""

import functools
import importlib.util
import json
import math
import re
import statistics
import struct
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.checkpoint import checkpoints
from lib.config import UserError
from lib.curves import command_line, draw, running_mean, short, ticks
from lib.log import spike_limit
from model import next_token_loss
from tests import ROOT
from tests.blows import after_save, die
from tests.runs import Run, fitting, losses, names, records, refused
from tests.runs import train_to_end as trained
from tests.test_train import Counting, no_validation
from tests.warm import python

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder, steps=200, every=1, dpo=False, seed=0, minutes=True):
    """A metrics.jsonl as trainings write it. Returns the folder."""
    chance, lines = np.random.RandomState(seed), []
    for step in range(every, steps + 1, every):
        loss = 2 + 6 / (1 + step / 20) + 0.1 * chance.randn()
        line = {
            "step": step,
            "loss": loss,
            "lr": 3e-4 * (1 - step / steps),
            "grad_norm": 0.5 + chance.rand(),
        }
        line |= {"tokens": 512 * step, "tokens_per_second": 1e4, "memory": 10**9}
        line |= {"seconds": step * 1.5} if minutes else {}
        line |= {"rewards/accuracies": 0.6, "rewards/margins": 0.1 * step} if dpo else {}
        lines.append(line)
        if step % (10 * every) == 0:
            lines.append(
                {"step": step, "val_loss": loss - 0.1, "val_bits_per_byte": loss / 3, "sample": "a"}
            )
            lines[-1] |= {"val_rewards/accuracies": 0.7} if dpo else {}
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def picture(places, output, x="tokens"):
    """The root of the SVG drawn of `places`; nothing in it is not a number."""
    draw(places, x, output)
    text = output.read_text(encoding="utf-8")
    assert "nan" not in text.lower()
    assert "inf" not in re.sub("info|Inter", "", text)
    return ET.fromstring(text)


def texts(root):
    return ["".join(element.itertext()) for element in root.iter(SVG + "text")]


def points(path):
    """The corners of a path of straight lines, in pixels."""
    return np.array([[float(n) for n in pair.split(",")] for pair in path.get("d")[1:].split(" ")])


# ---- the picture


def test_the_curve_passes_through_what_was_logged_as_its_own_axes_say(tmp_path):
    """Read as a person would: the value of a corner from the two nearest grid lines and their numbers."""
    lines = [(10, 5.0), (20, 4.5), (30, 3.0), (40, 2.5), (50, 2.0)]
    records = [{"step": n, "loss": y, "tokens": x} for n, (x, y) in enumerate(lines, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    root = picture([tmp_path], tmp_path / "out.svg")
    marks = [t for t in root.iter(SVG + "text") if t.get("font-size") == "11"]
    numbers = [t for t in marks if re.fullmatch(r"[\d.]+", "".join(t.itertext()))]
    value = lambda t: float("".join(t.itertext()).split()[0])
    on_y = sorted(
        (float(t.get("y")) - 4, value(t)) for t in numbers if t.get("text-anchor") == "end"
    )
    on_x = sorted(
        (float(t.get("x")), value(t)) for t in numbers if t.get("text-anchor") == "middle"
    )
    (curve,) = (points(path) for path in root.iter(SVG + "path") if "," in path.get("d"))
    for axis, marks in enumerate((on_x, on_y)):
        assert len(marks) >= 3
        slope, start = np.polyfit(*zip(*marks, strict=True), 1)
        read = slope * curve[:, axis] + start
        assert read == pytest.approx([line[axis] for line in lines], rel=0.01)


def test_every_kind_of_training_has_its_panels(tmp_path):
    plain, dpo = write_run(tmp_path / "plain"), write_run(tmp_path / "dpo", dpo=True)
    common = {"Loss", "Bits per byte", "Learning rate", "Gradient norm", "Tokens per second"}
    assert common <= set(texts(picture([plain], tmp_path / "a.svg")))
    assert not {"Accuracy", "Margin"} & set(texts(picture([plain], tmp_path / "a.svg")))
    assert common | {"Accuracy", "Margin"} <= set(texts(picture([dpo], tmp_path / "b.svg")))


def test_nothing_leaves_the_picture_and_panels_do_not_overlap(tmp_path):
    root = picture(
        [write_run(tmp_path / "a", 3000), write_run(tmp_path / "b", 90)], tmp_path / "ab.svg"
    )
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [box for box in root.iter(SVG + "rect") if box.get("x")]
    boxes = [[float(box.get(k)) for k in ("x", "y", "width", "height")] for box in boxes]
    assert len(boxes) == 5
    for x, y, w, h in boxes:
        assert 0 < x < x + w <= width
        assert 0 < y < y + h <= height
        others = [b for b in boxes if b[:2] != [x, y]]
        assert all(
            b[0] >= x + w or x >= b[0] + b[2] or b[1] >= y + h or y >= b[1] + b[3] for b in others
        )


def test_twenty_thousand_steps_are_a_small_file_that_shows_the_one_peak(tmp_path):
    folder = write_run(tmp_path / "long", 20_000)
    path, lines = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if '"step": 12001,' in line)
    lines[at] = json.dumps(json.loads(lines[at]) | {"loss": 50.0})
    path.write_text("\n".join(lines) + "\n")
    root = picture([folder], tmp_path / "long.svg")
    assert (tmp_path / "long.svg").stat().st_size < 200_000
    raw = next(points(p) for p in root.iter(SVG + "path") if p.get("opacity") == "0.22")
    peak = raw[raw[:, 1].argmin()]
    axis = raw[:, 0].min(), raw[:, 0].max()
    assert (peak[0] - axis[0]) / (axis[1] - axis[0]) == pytest.approx(0.6, abs=0.01)


def test_several_runs_have_their_names_and_their_colours(tmp_path):
    places = [write_run(tmp_path / "one" / "run"), write_run(tmp_path / "two" / "run", seed=1)]
    root = picture([places[0], places[1] / "metrics.jsonl"], tmp_path / "both.svg", "minutes")
    assert {"one/run", "two/run", "0 minutes"} <= set(texts(root))
    assert len({p.get("stroke") for p in root.iter(SVG + "path") if "," in p.get("d")}) == 2


def test_names_and_nulls_do_no_harm(tmp_path):
    folder = write_run(tmp_path / "<&\">'")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(
            '{"step": 201, "loss": null, "lr": 0, "grad_norm": null, "tokens": 1e5, "seconds": 400}\n'
        )
        f.write('{"step": 201, "skipped": "gradient norm is nan", "grad_norm": null}\n')
        f.write('{"step": 202, "los')  # being written
    assert "<&\">'" in texts(picture([folder], tmp_path / "out.svg"))


@pytest.mark.parametrize(
    ("content", "x", "says"),
    [
        (
            None,
            "tokens",
            "metrics.jsonl: No such file or directory; name an output folder of a training",
        ),
        (b"", "tokens", "holds no step yet"),
        (b'{"step": 4, "val_loss": 3}\n', "tokens", "holds no step yet"),
        (
            b'{"step": 1, "loss": 3, "tokens": 9}\nnonsense\n{"step": 2}\n',
            "tokens",
            "line 2: not a record",
        ),
        (b"[1]\n", "tokens", "line 1: not a record of a step: '[1]'"),
        (b'{"loss": 1}\n', "tokens", "line 1: not a record"),
        (b"\xff\xfe\n", "tokens", "not UTF-8, so not a metrics.jsonl"),
        (b'{"step": 1, "loss": 3, "tokens": 9}\n', "minutes", "no 'seconds'; use --x=steps"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_one_line(tmp_path, content, x, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(says)):
        draw([tmp_path], x, tmp_path / "out.svg")
    assert not (tmp_path / "out.svg").exists()


def test_too_many_runs_and_one_twice_are_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="given twice"):
        draw([folder, folder], "tokens", tmp_path / "out.svg")
    with pytest.raises(
        UserError, match="9 runs in one picture can't be told apart; give at most 8"
    ):
        draw([folder] * 9, "tokens", tmp_path / "out.svg")


def test_a_running_mean_leaves_a_straight_line_and_its_length_alone():
    line = np.linspace(3, 5, 301)
    assert running_mean(line, 4)[20:-20] == pytest.approx(line[20:-20])
    assert running_mean(np.full(50, 7.0), 3) == pytest.approx(np.full(50, 7.0))
    bump = running_mean(
        np.eye(101)[50], 2
    )  # the Gaussian itself, as the normal distribution has it
    assert bump[48:53] == pytest.approx(
        [statistics.NormalDist(0, 2).pdf(n) for n in range(-2, 3)], rel=1e-2
    )


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9), st.integers(3, 9))
def test_ticks_are_few_even_round_and_inside(low, spread, count):
    marks = ticks(low, low + spread, count)
    assert 1 <= len(marks) <= count + 1
    assert all(low - 1e-6 * spread - 1e-9 <= m <= low + spread * (1 + 1e-6) + 1e-9 for m in marks)
    if len(marks) > 1:
        step = (marks[-1] - marks[0]) / (len(marks) - 1)
        power = 10 ** math.floor(math.log10(step) + 1e-6)
        rounding = (
            1e-15 * (abs(low) + spread) / power
        )  # far from zero a narrow range has few digits left
        assert min(abs(step / power - m) for m in (1, 2, 5, 10)) < 1e-3 + rounding


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3e-4, "3e-4"),
        (1.5e-5, "1.5e-5"),
        (0.003, "0.003"),
        (2.5, "2.5"),
        (950, "950"),
        (3200, "3,200"),
    ]
    + [
        (12_500, "12.5k"),
        (200_000, "200k"),
        (1_500_000, "1.5M"),
        (250e6, "250M"),
        (1e10, "10B"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_png_by_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    draw(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", dpo=True)],
        "steps",
        tmp_path / "out.png",
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.png").stat().st_size > 20_000


def test_the_command_draws_and_says_in_a_line_how_far_each_run_came(tmp_path):
    write_run(tmp_path / "a")
    call = [python(), ROOT / "train.py", "curves"]
    done = subprocess.run(
        [*call, "a", "--output=a.svg"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.match(
        r"a: 200 steps, 102k tokens, 5 minutes, last loss \d.\d{4}, best val_loss", done.stdout
    )
    assert ET.parse(tmp_path / "a.svg")
    done = subprocess.run(
        [*call, "--output=a.pdf", "a"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: output a.pdf: must end in .png or .svg\n")


def test_the_command_takes_values_that_stand_apart(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    picture = tmp_path / "ab.svg"
    command_line(
        [str(tmp_path / "a"), "--x", "minutes", str(tmp_path / "b"), "--output", str(picture)]
    )
    assert "0 minutes" in picture.read_text()


# ---- at the end of a training


def test_a_training_leaves_its_curves(tmp_path, tiny_dataset):
    out = trained(tmp_path / "out", data_path=tiny_dataset)
    png, svg = out / "curves.png", out / "curves.svg"
    assert png.exists() == bool(importlib.util.find_spec("matplotlib")) != svg.exists()


def test_curves_that_cannot_be_written_are_a_warning(tmp_path, tiny_dataset):
    for name in ("curves.png", "curves.svg"):
        (tmp_path / "out" / name).mkdir(parents=True)
    out = trained(tmp_path / "out", data_path=tiny_dataset)
    text = out.with_suffix(".log").read_text()
    assert "warning: no curves drawn (" in text
    assert names(out) == ["final", "metrics.jsonl", "run.lock", "step_000004", "step_000008"]


# ---- the alarm


def test_the_limit_by_hand():
    assert spike_limit([3.0] * 19)[1] == math.inf
    assert spike_limit([3.0] * 20) == pytest.approx((3.0, 4.5))  # no scatter: half as large again
    recent = [
        2.0,
        4.0,
        8.0,
    ] * 10  # median 4, deviations factors of 2, 1, 2: their median 2, six times 2**6
    assert spike_limit(recent) == pytest.approx((4.0, 256.0))


class Spiking:
    """The loss of some steps is five times what it is."""

    def __init__(self, *steps):
        self.steps, self.calls = steps, 0

    def __call__(self, model, batch):
        self.calls += 1
        loss, stats = next_token_loss(model, batch)
        return loss * (5 if self.calls in self.steps else 1), stats


KNOBS = {
    "vocab_size": 32,
    "max_steps": 60,
    "logging_steps": 10,
    "save_steps": 25,
    "eval_steps": 100,
}


def test_a_spike_between_two_log_lines_is_said_once_and_nothing_else_happens(tmp_path):
    run = lambda name, *args: Run(
        tmp_path / f"{name}.log", fitting, (tmp_path / name, Counting(), *args)
    )
    knobs = KNOBS | {"learning_rate": 1e-5}
    one = run(
        "spiking", Spiking(5, 33, 34, 35, 48), no_validation, knobs
    )  # 5 is too early to be told
    other = run("calm", next_token_loss, no_validation, knobs)
    assert [one.wait(), other.wait()] == [[0], [0]], one.text
    spikes = [r for r in records(tmp_path / "spiking") if "spike" in r]
    assert [r["step"] for r in spikes] == [33, 48]
    assert all(4.5 < r["spike"] / r["median"] < 5.5 for r in spikes)
    assert one.text.count("warning: loss spike at step") == 2
    assert "loss spike" not in other.text
    assert [r["step"] for r in records(tmp_path / "spiking") if "loss" in r] == [
        1,
        10,
        20,
        30,
        40,
        50,
        60,
    ]


class Scaled(Counting):
    """Batches that say how much their loss counts, five times as much at step 28: as pure as any loader."""

    def batch(self, step, micro, rank, accumulation):
        scale = np.array(5.0 if step + 1 == 28 else 1.0, np.float32)
        return super().batch(step, micro, rank, accumulation) | {"scale": scale}


def scaled_loss(model, batch):
    loss, stats = next_token_loss(model, batch)
    return loss * batch["scale"], stats


def dying_fit(*args):
    after_save(25, die)  # in the middle between two log lines
    fitting(*args)


def test_a_resumed_run_is_alarmed_like_the_straight_one(tmp_path):
    knobs = KNOBS | {"learning_rate": 1e-4}
    run = lambda name, what, **more: Run(
        tmp_path / f"{name}.log",
        what,
        (tmp_path / name, Scaled(), scaled_loss, no_validation, knobs | more),
    ).wait()
    assert run("straight", fitting) == [0]
    assert run("parts", dying_fit) == [9]
    assert run("parts", fitting, resume_from_checkpoint="auto") == [0]
    assert [r["step"] for r in records(tmp_path / "straight") if "spike" in r] == [28]
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    state = lambda name: torch.load(checkpoints(tmp_path / name)[0] / "train_state" / "state.pt")[
        "recent"
    ]
    assert state("parts") == state("straight")
    assert len(state("straight")) == 60


# ---- wandb and tensorboard


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_not_there_is_named_before_training(tmp_path, tiny_dataset, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    line = refused(tmp_path / "out", data_path=tiny_dataset, report_to=name)
    assert (
        line
        == f"error: report_to={name}: needs a package that is not installed: pip install {name}"
    )
    assert names(tmp_path / "out") == ["run.lock"]


def told(out):
    """What metrics.jsonl says, as {(step, name): number}."""
    numbers = [(r["step"], k, v) for r in records(out) for k, v in r.items() if k != "step"]
    return {(step, k): v for step, k, v in numbers if isinstance(v, (int, float))}


def test_tensorboard_reads_what_metrics_jsonl_says_after_a_resume_too(tmp_path, tiny_dataset):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    knobs = {"data_path": tiny_dataset, "report_to": "tensorboard"}
    out = trained(tmp_path / "out", **knobs)
    for name in ("final", "step_000008"):
        (out / name / "manifest.json").unlink()
    (out / "final").rename(tmp_path / "gone")
    trained(out, resume_from_checkpoint="auto", **knobs)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    read = {(e.step, tag): e.value for tag in tags for e in events.Scalars(tag)}
    assert read == pytest.approx(told(out), rel=1e-6)
    assert len([tag for tag in events.Tags()["tensors"] if tag.startswith("sample")]) == 1


def test_a_tracker_that_fails_is_one_warning(tmp_path, tiny_dataset):
    pytest.importorskip("tensorboard")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("a file where a folder is to be")
    out = trained(tmp_path / "out", data_path=tiny_dataset, report_to="tensorboard")
    text = out.with_suffix(".log").read_text()
    assert text.count("warning: tensorboard failed (") == 1
    assert "training goes on without it" in text
    assert "Traceback" not in text


def offline():
    import os

    os.environ["WANDB_MODE"] = "offline"


def messages(path):
    """What a .wandb file holds: LevelDB's log, blocks of 32 KiB, pieces of (crc, length, kind) in front."""
    content, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, at + 4)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
        if kind in (1, 4):  # whole, or its last piece
            yield message
            message = b""


def test_wandb_offline_holds_what_metrics_jsonl_says(tmp_path, tiny_dataset):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    out = trained(tmp_path / "out", data_path=tiny_dataset, report_to="wandb", before=offline)
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    read = {}
    for message in messages(path):
        row = {
            (".".join(i.nested_key) or i.key): i.value_json
            for i in Record.FromString(message).history.item
        }
        row = {k: json.loads(v) for k, v in row.items()}
        read |= {(row["step"], k): v for k, v in row.items() if (row["step"], k) in told(out)}
    assert read == pytest.approx(told(out))


def unreachable(folder):
    """An account whose server does not answer."""
    import os

    os.environ |= {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }
    os.environ |= {"HOME": str(folder), "WANDB_INIT_TIMEOUT": "5"}


def test_wandb_without_its_server_is_one_warning(tmp_path, tiny_dataset):
    pytest.importorskip("wandb")
    before = functools.partial(unreachable, tmp_path)
    out = trained(tmp_path / "out", data_path=tiny_dataset, report_to="wandb", before=before)
    text = Path(out).with_suffix(".log").read_text()
    assert text.count("warning: wandb") == 1, text
    assert "Traceback" not in text
