"""Sessions: the ordinary commands one after another within some minutes, with a log and a table.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session is a function below that runs commands; each is printed before it runs and can be typed
as it stands. The same session started again skips complete stages and resumes a training.
"""

import filecmp
import io
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.config import PositiveFloat, UserError, configure, dispatch, read_object
from tools.workspace import SESSIONS, Training, command, newest, next_command

LOGS = 20  # logs that are kept
RESERVED = 0.1  # share of the minutes that trainings leave to the commands after them
START = 0.3  # minutes that trainings need to start, to validate and to save
DOCUMENTATION = "configs/datasets/docstrings.json"


@dataclass(frozen=True)
class SessionConfig:
    """How long."""

    minutes: PositiveFloat | None = None  # the time box; none = as documented


@dataclass(frozen=True)
class ModelSessionConfig(SessionConfig):
    """A session that looks at a model."""

    model_path: str = ""  # the model; empty = the newest


@dataclass(frozen=True)
class PresetSessionConfig(SessionConfig):
    """A session that looks at presets."""

    config: str = ""  # a preset of yours


@dataclass(frozen=True)
class TrainingSessionConfig(PresetSessionConfig):
    """A session that trains; `config` is applied after the session's own presets."""

    data: str = DOCUMENTATION  # the preset of a dataset


# ---- commands against a clock


class Session:
    """A session while it runs: its clock, its log, the outcome of each stage.

    At its end it prints the table and exits with 0, with 1 if a stage failed, or with 128 + the
    number of a signal.
    """

    def __init__(self, name, minutes, *notes):
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
        self.print(*notes)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind not in (None, UserError):
            return
        self.print(f"\n{self.name}: {self.spent:.1f} minutes")
        self.print(*(f"  {name:<16}{m:6.1f} min  {outcome}" for name, m, outcome in self.rows))
        if self.stopped:
            self.print("stopped; the same session again goes on where it was")
        elif error:
            self.print(f"error: {error}")
        todo, reason = next_command()
        self.print(f"log: {self.log.name}", f"next ({reason}):", f"  {todo}")
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
        self.print(f"\n=== {stage} | {self.spent:.1f} of {self.minutes:g} min | {command(*words)}")
        start, env = self.spent, os.environ | {"PYTHONUNBUFFERED": "1"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        streams |= {"stderr": subprocess.STDOUT, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, *map(str, words)], env=env, **streams)
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
            minutes += training.last.get("seconds", 0) / 60 if training.checkpoint else 0
            words += [f"--max_minutes={minutes:.3f}", "--allow_config_change"]
        return self.run(stage, *words)


# ---- sessions that train


def text_to_chat(cfg, name, minutes, *presets, adapters=False, fast=False):
    """Runs every stage from text to an answer. presets: of train.py; minutes inf: without a clock.

    adapters: SFT and DPO train LoRA adapters, else all weights. fast: evaluation is quick, too.
    """
    from corpus.prepare import DataConfig, output_folder

    folder = output_folder(configure(DataConfig, [cfg.data]))
    presets = [*presets, *filter(None, [cfg.config])]
    base, sft, dpo = (Path(f"checkpoints/{kind}/{name}") for kind in ("pretrain", "sft", "dpo"))
    results = f"evaluation_results/{name}"
    pretrain = ["train.py", *presets, f"--data_path={folder}", "--vocab_size=none"]  # the data's
    with Session(name, cfg.minutes or minutes, f"data: {cfg.data}") as session:
        if (folder / "manifest.json").is_file():
            session.rows.append(("data", 0.0, "done before"))
        else:
            session.run("data", "data.py", cfg.data)
        if not fast and not (base / "final").is_dir():
            session.run("plan", *pretrain, f"--output_dir={base}", "--plan")
        session.train("pretrain", 0.7, base, *pretrain)
        session.run("samples", "data.py", "create_sample_datasets")
        for kind, share, start, output in (("sft", 2 / 3, base, sft), ("dpo", 1, sft, dpo)):
            if (start / "final").is_dir():
                preset = f"configs/{'' if adapters else 'demo_'}{kind}.json"
                rows = f"data/samples/{kind}"
                paths = [f"--dataset_path={rows}_train.jsonl", f"--val_path={rows}_val.jsonl"]
                words = [f"{kind}.py", preset, f"--model_path={start}", *paths]
                session.train(kind, share, output, *words)
        model = next((path for path in (dpo, sft, base) if (path / "final").is_dir()), base)
        evaluate = ["eval.py", "--detailed_output", f"--perplexity_path={folder}/val_00000.jsonl"]
        evaluate += ["--fast_mode", "--skip_boolq"] if fast else []
        session.run("evaluate", *evaluate, f"--model_path={model}", f"--output_dir={results}")
        if model != base:
            paths = [f"--model_path={base}", f"--output_dir={results}_base"]
            session.run("evaluate base", *evaluate, *paths)
            session.run("compare", "eval.py", "compare", f"{results}_base", results)
        session.run("assess", "eval.py", "assess", results)
        question = ["--chat", "--prompt=What is the plural of tree?", "--temperature=0"]
        session.run("ask", "sample.py", f"--model_path={model}", *question, "--max_new_tokens=24")


def quick(cfg):
    """30 minutes: documentation -> a small model -> SFT -> DPO -> its numbers, and one answer."""
    text_to_chat(cfg, "quick", 30, "configs/demo.json", fast=True)


def on_this_machine(preset):
    """Returns a model's preset, and without CUDA the one that trains it on smaller batches."""
    import torch

    return [preset] if torch.cuda.is_available() else [preset, "configs/sessions/cpu.json"]


def prototype(cfg):
    """2 hours: a tiny model, complete."""
    text_to_chat(cfg, "prototype", 120, *on_this_machine("configs/tiny.json"))


def experiment(cfg):
    """4 hours: a small model and its fine-tuning with adapters; wants a GPU."""
    text_to_chat(cfg, "experiment", 240, *on_this_machine("configs/small.json"), adapters=True)


def full(cfg):
    """The prototype without a clock: trainings see all their data; --minutes sets a limit."""
    presets = *on_this_machine("configs/tiny.json"), "configs/sessions/full.json"
    text_to_chat(cfg, "full", math.inf, *presets)


# ---- sessions that look


def evaluation(cfg):
    """1 hour: the newest model, or --model_path: measured in full, assessed, sampled."""
    model = Path(cfg.model_path) if cfg.model_path else newest()
    results = f"evaluation_results/{model.parent.name if model.name == 'final' else model.name}"
    with Session("evaluation", cfg.minutes or 60, f"model: {model}") as session:
        paths = (f"--model_path={model}", f"--output_dir={results}")
        session.look("evaluate", "eval.py", *paths, "--detailed_output")
        session.look("assess", "eval.py", "assess", results)
        samples = ("--prompt=The", "--num_samples=3", "--seed=1")
        session.look("samples", "sample.py", f"--model_path={model}", *samples)


TOY = "--n_layer=2 --d_model=32 --n_head=2 --d_ff=64 --sequence_length=32 --eval_rows=8"
TOY += " --max_steps=20 --save_steps=10 --eval_steps=20 --warmup_steps=2"
TOY_DATA = "--max_docs=80 --min_length=50 --vocab_size=400 --sequence_length=32"


def debug(cfg):
    """A minute or two: environment, 20 toy steps, the proof that a resume is exact, a sample."""
    toys = SESSIONS / time.strftime("debug_%Y%m%d_%H%M%S")
    data, whole, half = toys / "data", toys / "whole", toys / "half"
    train = ["train.py", f"--data_path={data}", *TOY.split()]
    with Session("debug", cfg.minutes or 30) as session:
        session.look("environment", "-m", "tools.workspace", "check-env")
        paths = (f"--output_dir={data}", f"--tokenizer_path={toys / 'tokenizer.model'}")
        session.look("data", "data.py", DOCUMENTATION, *TOY_DATA.split(), *paths)
        session.look("20 steps", *train, f"--output_dir={whole}")
        resume = f"--resume_from_checkpoint={whole / 'step_000010'}"
        session.look("10 + resume + 10", *train, f"--output_dir={half}", resume)
        session.look("sample", "sample.py", f"--model_path={whole}", "--max_new_tokens=8")
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


SESSION_COMMANDS = {
    "quick": (quick, TrainingSessionConfig),
    "prototype": (prototype, TrainingSessionConfig),
    "experiment": (experiment, TrainingSessionConfig),
    "full": (full, TrainingSessionConfig),
    "evaluation": (evaluation, ModelSessionConfig),
    "debug": (debug, SessionConfig),
    "architecture": (architecture, PresetSessionConfig),
}

if __name__ == "__main__":
    dispatch(SESSION_COMMANDS, sys.argv[1:], __doc__)
