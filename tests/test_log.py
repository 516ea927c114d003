"""What a run reports: its curves as a picture, and what trackers hold of it."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import sqlite3
import struct
import subprocess

import numpy as np
import pytest

from lib.config import UserError
from lib.curves import draw_curves, figure_of, read_run
from tests import ROOT
from tests.runs import names, records, refused, with_curves
from tests.runs import train_to_end as trained
from tests.warm import python

# ---- curves


def write_run(folder, steps=200, dpo=False, seed=0):
    """A metrics.jsonl as trainings write it: every step, a validation after each tenth."""
    chance, lines = np.random.RandomState(seed), []
    for step in range(1, steps + 1):
        loss = 2 + 6 / (1 + step / 20) + 0.1 * chance.randn()
        line = {"step": step, "loss": loss, "lr": 3e-4 * (1 - step / steps)}
        line |= {"grad_norm": 0.5 + chance.rand(), "tokens": 512 * step, "memory": 10**9}
        line |= {"tokens_per_second": 1e4, "seconds": step * 1.5}
        line |= {"rewards/accuracies": 0.6, "rewards/margins": 0.1 * step} if dpo else {}
        lines.append(line)
        if step % 10 == 0:
            line = {"step": step, "val_loss": loss - 0.1, "val_bits_per_byte": loss / 3}
            line |= {"val_rewards/accuracies": 0.7} if dpo else {}
            lines.append(line | {"sample": "a"})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(*folders, x="tokens"):
    """{title: [(x, y) of every line]} of the figure of some runs."""
    figure = figure_of({str(folder): read_run(folder, x) for folder in folders}, x)
    return {axes.get_title(): [line.get_data() for line in axes.lines] for axes in figure.axes}


@pytest.mark.parametrize(("x", "scale"), [("tokens", 512), ("steps", 1), ("minutes", 1.5 / 60)])
def test_the_curves_pass_through_what_was_logged(tmp_path, x, scale):
    folder = write_run(tmp_path / "run")
    (raw, mean, dots), steps = drawn(folder, x=x)["loss"], np.arange(1, 201)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert raw[0] == pytest.approx(steps * scale)
    assert raw[1] == pytest.approx([r["loss"] for r in logged if "loss" in r])
    assert mean[1][50:] == pytest.approx(raw[1][50:], abs=0.3)
    assert dots[0] == pytest.approx(steps[9::10] * scale)
    assert dots[1] == pytest.approx([r["val_loss"] for r in logged if "val_loss" in r])


def test_every_kind_of_training_has_its_panels_and_every_run_its_name(tmp_path):
    plain, dpo = write_run(tmp_path / "plain"), write_run(tmp_path / "<&>", dpo=True, seed=1)
    common = {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "memory"}
    assert drawn(plain).keys() == common
    assert drawn(dpo).keys() == common | {"rewards/accuracies", "rewards/margins"}
    assert [len(lines) for lines in drawn(plain, dpo).values()] == [6, 4, 4, 4, 4, 2, 3, 2]
    figure = figure_of({f.name: read_run(f, "steps") for f in (plain, dpo)}, "steps")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "<&>"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_nulls_and_a_line_that_is_being_written_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 201, "loss": null, "lr": 0, "grad_norm": null, "tokens": 1e5}\n')
        f.write('{"step": 201, "skipped": "gradient norm is nan", "grad_norm": null}\n')
        f.write('{"step": 202, "los')
    run = read_run(folder, "tokens")
    assert len(run["loss"][1]) == 200
    assert len(run["lr"][1]) == 201
    assert all(np.isfinite(points).all() for points in run.values())


@pytest.mark.parametrize(
    ("content", "x", "message"),
    [
        (None, "tokens", "No such file or directory"),
        (b"", "tokens", "holds no step with a loss and tokens yet"),
        (b'{"step": 4, "val_loss": 3}\n', "tokens", "holds no step with a loss and tokens yet"),
        (b'{"step": 1, "loss": 3, "tokens": 9}\nnonsense\n', "tokens", "not what a training logs"),
        (b"[1]\n", "tokens", "not what a training logs"),
        (b"\xff\xfe\n", "tokens", "not what a training logs"),
        (b'{"step": 1, "loss": 3, "tokens": 9}\n', "minutes", "and seconds yet; try --x=steps"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_one_line(tmp_path, content, x, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        draw_curves([tmp_path], x, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_the_command_draws(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", dpo=True)
    call = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    for output, magic in (("ab.png", b"\x89PNG"), ("ab.svg", b"<?xml")):
        words = ["curves", "a", "b", "--x", "minutes", f"--output={output}"]
        done = call([python(), ROOT / "train.py", *words])
        assert (done.returncode, done.stdout) == (0, f"wrote {output}\n"), done.stderr
        assert (tmp_path / output).read_bytes().startswith(magic)
    done = call([python(), ROOT / "train.py", "curves", "a", "--output=a.xyz"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: output a.xyz: not drawn: ValueError: Format 'xyz' is not" in done.stderr


def test_a_training_leaves_its_curves_or_a_warning(tmp_path, tiny_dataset):
    out = trained(tmp_path / "out", before=with_curves, data_path=tiny_dataset)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "two" / "curves.png").mkdir(parents=True)
    out = trained(tmp_path / "two", before=with_curves, data_path=tiny_dataset)
    assert "warning: curves.png failed (" in out.with_suffix(".log").read_text()
    assert {"final", "step_000008"} <= set(names(out))


# ---- trackers


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
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
    os.environ["WANDB_MODE"] = "offline"


def messages(path):
    """What a .wandb file holds: LevelDB's log, 32 KiB blocks of (crc, length, kind) and pieces."""
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


def keep_runs_in(folder):
    os.environ["TRACKIO_DIR"] = str(folder)


def test_trackio_holds_what_metrics_jsonl_says_after_a_resume_too(tmp_path, tiny_dataset):
    pytest.importorskip("trackio")
    knobs = {"data_path": tiny_dataset, "report_to": "trackio"}
    knobs["before"] = functools.partial(keep_runs_in, tmp_path / "runs")
    out = trained(tmp_path / "out", **knobs, max_steps=4)
    trained(out, resume_from_checkpoint="auto", allow_config_change=True, **knobs)
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / "mini-llm.db")) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, *_ in rows} == {str(out)}
    read = {(step, k): v for _, step, row in rows for k, v in json.loads(row).items()}
    assert {key: read[key] for key in told(out)} == pytest.approx(told(out))
    assert [value for (_, name), value in read.items() if name == "sample"]


@pytest.mark.parametrize(("every", "steps"), [(1, [*range(1, 9)]), (3, [1, 3, 6, 8]), (99, [1, 8])])
def test_the_first_and_the_last_step_are_logged_and_those_between_as_asked(
    tmp_path, tiny_dataset, every, steps
):
    out = trained(tmp_path / "out", data_path=tiny_dataset, logging_steps=every)
    assert [r["step"] for r in records(out) if "loss" in r] == steps
    trained(out, data_path=tiny_dataset, logging_steps=every, resume_from_checkpoint="auto")
    assert [r["step"] for r in records(out) if "loss" in r] == steps
