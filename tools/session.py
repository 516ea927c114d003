"""Sessions: the ordinary commands one after another within some minutes, with a log and a table.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session is a function below that runs commands; each is printed before it runs and can be typed
as it stands. The same session started again skips complete trainings and resumes the next.
"""

import filecmp
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.config import PositiveFloat, UserError, configure, dispatch, read_object
from tools.workspace import SESSIONS, Training, newest, next_command

LOGS = 20  # logs that are kept
RESERVED = 0.1  # share of the minutes that trainings leave to the commands after them
START = 0.3  # minutes that trainings need to start, to validate and to save
DOCUMENTATION = "configs/datasets/docstrings.json"
CPU = "configs/sessions/cpu.json"  # smaller batches and shorter rows, where there is no CUDA


@dataclass(frozen=True)
class SessionConfig:
    """The options of all sessions; each uses those that concern it."""

    minutes: PositiveFloat | None = None  # the time box; none = as documented
    config: str = ""  # trainings: a preset applied after the session's own; architecture: one more
    data: str = DOCUMENTATION  # trainings: the preset of a dataset
    model_path: str = ""  # evaluation: the model; empty = the newest


# ---- commands against a clock


class Session:
    """A session while it runs: its clock, its log, the outcome of each stage.

    At its end it prints the table and exits with 0, with 1 if a stage failed, or with 128 + the
    number of a signal.
    """

    def __init__(self, name, minutes):
        self.name, self.minutes, self.start = name, minutes, time.monotonic()
        self.rows = []  # (stage, minutes, outcome)
        self.stopped, self.process = 0, None  # the number of the signal; the running command
        SESSIONS.mkdir(exist_ok=True)
        self.log = io.FileIO(SESSIONS / time.strftime("%Y%m%d_%H%M%S.log"), "a")
        for old in sorted(SESSIONS.glob("[0-9]*_[0-9]*.log"))[:-LOGS]:
            old.unlink()
        for number in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, number):  # no SIGHUP on Windows
                signal.signal(getattr(signal, number), self.stop)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind not in (None, UserError):
            return
        rows = (f"  {name:<16}{m:6.1f} min  {outcome}" for name, m, outcome in self.rows)
        self.print(f"\n{self.name}: {self.spent:.1f} minutes", *rows)
        if self.stopped:
            self.print("stopped; the same session again goes on where it was")
        elif error:
            self.print(f"error: {error}")
        self.print(f"log: {self.log.name}", "next:", f"  {next_command()}")
        raise SystemExit(128 + self.stopped if self.stopped else int(error is not None))

    @property
    def spent(self):
        return (time.monotonic() - self.start) / 60

    def print(self, *lines):
        self.write("".join(f"{line}\n" for line in lines).encode())

    def write(self, data):
        """Writes bytes to the log and to the terminal, which may have gone."""
        self.log.write(data)
        with suppress(BrokenPipeError):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def stop(self, number, frame=None):
        """Handles a signal: the command has a process group of its own and is told once."""
        self.stopped = number
        if self.process and self.process.poll() is None and os.name == "posix":
            self.process.send_signal(number)

    def run(self, stage, *words):
        """Runs `python WORDS`, its output to terminal and log. Raises UserError if it fails."""
        words = [*map(str, words)]
        line = f"{self.spent:.1f} of {self.minutes:g} min | python {shlex.join(words)}"
        self.print(f"\n=== {stage} | {line}")
        start, env = self.spent, os.environ | {"PYTHONUNBUFFERED": "1"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        streams |= {"stderr": subprocess.STDOUT, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, *words], env=env, **streams)
        if self.stopped:  # between two commands
            self.stop(self.stopped)
        with self.process.stdout as pipe:
            while data := pipe.read1():
                self.write(data)
        code = self.process.wait()
        outcome = "stopped" if self.stopped else f"failed: status {code}" if code else "done"
        self.rows.append((stage, self.spent - start, outcome))
        if outcome != "done":
            raise UserError(f"{stage} {outcome}; its last lines above say why")

    def look(self, stage, *words):
        """Runs a command unless the minutes are over."""
        if self.spent < self.minutes:
            return self.run(stage, *words)
        return self.rows.append((stage, 0.0, "skipped: no time left"))

    def train(self, stage, share, folder, *words):
        """Runs a training, resumed if there is a checkpoint, in `share` of the minutes left."""
        training = Training(Path(folder))
        if not training.problem:
            return self.rows.append((stage, 0.0, "done before"))
        words = [*words, f"--output_dir={folder}", "--resume_from_checkpoint=auto"]
        if self.minutes < math.inf:
            minutes = (self.minutes * (1 - RESERVED) - self.spent - START) * share
            if minutes < 0.01:
                return self.rows.append((stage, 0.0, "skipped: no time left"))
            if training.checkpoint and training.columns:  # what it took before counts, too
                minutes += training.columns["seconds"][1][-1] / 60
            words += [f"--max_minutes={minutes:.3f}", "--allow_config_change"]
        return self.run(stage, *words)


# ---- sessions that train


def text_to_chat(cfg, name, minutes, *presets, tune="configs/demo_{}.json", fast=False):
    """Runs every stage from text to an answer. presets: of train.py; minutes inf: without a clock.

    tune: the presets of sft and dpo, by default all weights; fast: a part of the evaluation.
    """
    import torch

    from corpus.prepare import DataConfig, output_folder

    folder = output_folder(configure(DataConfig, [cfg.data]))
    presets = [*presets, cfg.config] if cfg.config else [*presets]
    if CPU in presets and torch.cuda.is_available():
        presets.remove(CPU)
    base, sft, dpo = (Path(f"checkpoints/{kind}/{name}") for kind in ("pretrain", "sft", "dpo"))
    results = f"evaluation_results/{name}"
    with Session(name, cfg.minutes or minutes) as session:
        session.run("data", "data.py", cfg.data)
        words = [*presets, f"--data_path={folder}", "--vocab_size=none"]  # the data's vocabulary
        session.train("pretrain", 0.7, base, "train.py", *words)
        session.run("samples", "data.py", "create_sample_datasets")
        for kind, share, start, output in (("sft", 2 / 3, base, sft), ("dpo", 1, sft, dpo)):
            if (start / "final").is_dir():
                rows = f"data/samples/{kind}"
                words = [f"--dataset_path={rows}_train.jsonl", f"--val_path={rows}_val.jsonl"]
                words = [f"{kind}.py", tune.format(kind), f"--model_path={start}", *words]
                session.train(kind, share, output, *words)
        model = next((path for path in (dpo, sft, base) if (path / "final").is_dir()), base)
        evaluate = ["eval.py", "--detailed_output", f"--perplexity_path={folder}/val_00000.jsonl"]
        evaluate += ["--fast_mode", "--skip_boolq"] if fast else []
        session.run("evaluate", *evaluate, f"--model_path={model}", f"--output_dir={results}")
        session.run("assess", "eval.py", "assess", results)
        question = ["--chat", "--prompt=What is the plural of tree?", "--temperature=0"]
        session.run("ask", "sample.py", f"--model_path={model}", *question, "--max_new_tokens=24")


def quick(cfg):
    """30 minutes: documentation -> a small model -> SFT -> DPO -> its numbers, and one answer."""
    text_to_chat(cfg, "quick", 30, "configs/demo.json", fast=True)


def prototype(cfg):
    """2 hours: a tiny model, complete."""
    text_to_chat(cfg, "prototype", 120, "configs/tiny.json", CPU)


def experiment(cfg):
    """4 hours: a small model and its fine-tuning with adapters; wants a GPU."""
    text_to_chat(cfg, "experiment", 240, "configs/small.json", CPU, tune="configs/{}.json")


def full(cfg):
    """The prototype without a clock: trainings see all their data; --minutes sets a limit."""
    text_to_chat(cfg, "full", math.inf, "configs/tiny.json", CPU, "configs/sessions/full.json")


# ---- sessions that look


def evaluation(cfg):
    """1 hour: the newest model, or --model_path: measured in full, assessed, sampled."""
    model = Path(cfg.model_path) if cfg.model_path else newest()
    results = f"evaluation_results/{model.parent.name if model.name == 'final' else model.name}"
    paths = (f"--model_path={model}", f"--output_dir={results}")
    with Session("evaluation", cfg.minutes or 60) as session:
        session.look("evaluate", "eval.py", *paths, "--detailed_output")
        session.look("assess", "eval.py", "assess", results)
        session.look("samples", "sample.py", paths[0], "--prompt=The", "--num_samples=3")


TOY = "--n_layer=2 --d_model=32 --n_head=2 --d_ff=64 --sequence_length=32 --eval_rows=8"
TOY += " --max_steps=20 --save_steps=10 --eval_steps=20 --warmup_steps=2"
TOY_DATA = "--max_docs=80 --min_length=50 --vocab_size=400 --sequence_length=32"


def debug(cfg):
    """A minute or two: environment, 20 toy steps, the proof that a resume is exact, a sample."""
    toys = SESSIONS / time.strftime("debug_%Y%m%d_%H%M%S")
    data, whole, half = toys / "data", toys / "whole", toys / "half"
    train = ["train.py", f"--data_path={data}", *TOY.split()]
    with Session("debug", cfg.minutes or 30) as session:
        session.run("environment", "-m", "tools.workspace", "check-env")
        paths = (f"--output_dir={data}", f"--tokenizer_path={toys / 'tokenizer.model'}")
        session.run("data", "data.py", DOCUMENTATION, *TOY_DATA.split(), *paths)
        session.run("20 steps", *train, f"--output_dir={whole}")
        resume = f"--resume_from_checkpoint={whole / 'step_000010'}"
        session.run("10 + resume + 10", *train, f"--output_dir={half}", resume)
        session.run("sample", "sample.py", f"--model_path={whole}", "--max_new_tokens=8")
        files = [folder / "final" / "model.safetensors" for folder in (whole, half)]
        if not filecmp.cmp(*files, shallow=False):
            raise UserError(f"{files[1]}: a resume changed the weights; report it")
        session.rows.append(("the same weights", 0.0, "done"))


def architecture(cfg):
    """30 minutes: the report of every preset, and a few timed steps of each on short rows."""
    presets = [p for p in sorted(Path("configs").glob("*.json")) if "n_layer" in read_object(p)]
    presets += [Path(cfg.config)] if cfg.config else []
    short = "--sequence_length=32 --batch_size=1 --gradient_accumulation_steps=1"
    steps = [*short.split(), "--plan", "--data_path=none"]
    with Session("architecture", cfg.minutes or 30) as session:
        for preset in presets:
            session.look(f"{preset.stem} report", "model.py", preset)
            session.look(f"{preset.stem} steps", "train.py", preset, *steps)


SESSION_COMMANDS = (quick, prototype, experiment, full, evaluation, debug, architecture)

if __name__ == "__main__":
    commands = {function.__name__: (function, SessionConfig) for function in SESSION_COMMANDS}
    dispatch(commands, sys.argv[1:], __doc__)
