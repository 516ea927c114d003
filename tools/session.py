"""Sessions: the ordinary commands one after another within some minutes, with a log and a table.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session prototype --minutes=90     a tiny model, complete
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session is a function below that runs commands. Each is printed before it runs and can be typed
as it stands. Data and evaluation take the time they need; the trainings share the rest as
`--max_minutes`. Ctrl-C ends the command as it would alone, and then the session. The same session
started again skips complete stages and resumes the training that is not complete.
"""

import filecmp
import importlib.util
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
from tools.workspace import (
    SESSIONS,
    command,
    datasets,
    machine_memory,
    newest,
    next_command,
    read_training,
    trainings,
)

LOGS = 20  # logs that are kept
RESERVED = 0.1  # share of the minutes that trainings leave to the commands after them
START = 0.3  # minutes that trainings need to start, to validate and to save
SHORTEST = 0.01  # minutes of the shortest training worth its start
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
    """A session that trains; `config` is applied after the session's own preset."""

    data: str = ""  # a dataset preset in place of the session's


# ----------------------------------------------------------------------------------------------
# Commands against a clock


class Ended(Exception):
    """A command failed or a signal came: the session ends with its table."""


class Session:
    """A session while it runs: its clock, its log, the outcome of each stage.

    At its end it prints the table and exits with 0, with 1 if a stage failed, or with 128 + the
    number of a signal.
    """

    def __init__(self, name, minutes, *notes):
        self.name, self.minutes, self.start = name, minutes, time.monotonic()
        self.rows = []  # (stage, minutes, outcome)
        self.stopped, self.process = 0, None  # the number of the signal; the running command
        self.log = open_log()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # no SIGHUP on Windows
                signal.signal(getattr(signal, name), self.stop)
        self.print(*notes)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is UserError:
            self.print(f"error: {error}")
        elif kind not in (None, Ended):
            return
        failed = any(outcome.startswith("failed") for *_, outcome in self.rows) or kind is UserError
        self.print(f"\n{self.name}: {self.spent:.1f} minutes")
        self.print(*(f"  {name:<16}{m:6.1f} min  {outcome}" for name, m, outcome in self.rows))
        if self.stopped:
            self.print("stopped; the same session again goes on where it was")
        elif failed:
            self.print("failed; the last lines above say why")
        todo, reason = next_command([(t, t.problem) for t in trainings()])
        self.print(f"log: {self.log.name}", f"next ({reason}):", f"  {todo}")
        raise SystemExit(128 + self.stopped if self.stopped else int(failed))

    @property
    def spent(self):
        return (time.monotonic() - self.start) / 60

    def print(self, *lines):
        self.write("".join(f"{line}\n" for line in lines).encode())

    def write(self, data):
        """Writes bytes to the log and to the terminal, which may have gone."""
        self.log.write(data)
        self.log.flush()
        with suppress(BrokenPipeError):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def stop(self, number, frame=None):
        """Handles a signal: the command has a process group of its own and is told once."""
        self.stopped = number
        if self.process and self.process.poll() is None and os.name == "posix":
            self.process.send_signal(number)

    def run(self, stage, *words):
        """Runs `python WORDS`, its output to terminal and log. Raises Ended if it fails."""
        self.print(f"\n=== {stage} | {self.spent:.1f} of {self.minutes:g} min | {command(*words)}")
        start = self.spent
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        if self.stopped:  # between two commands
            self.stop(self.stopped)
        with self.process.stdout as pipe:
            while data := pipe.read1():
                self.write(data)
        code = self.process.wait()
        outcome = "stopped" if self.stopped else f"failed: status {code}" if code else "done"
        self.rows.append((stage, self.spent - start, outcome))
        if outcome != "done":
            raise Ended

    def look(self, stage, *words):
        """Runs a command unless the minutes are over."""
        if self.spent >= self.minutes:
            self.rows.append((stage, 0.0, "skipped: no time left"))
        else:
            self.run(stage, *words)

    def train(self, stage, share, folder, *words):
        """Runs a training, resumed if there is a checkpoint, in `share` of the minutes left.

        share None: the training has its own length.
        """
        run = read_training(Path(folder))
        if run.folder.is_dir() and not run.problem:
            return self.rows.append((stage, 0.0, "done before"))
        words = [*words, f"--output_dir={folder}", "--resume_from_checkpoint=auto"]
        if share:
            minutes = (self.minutes * (1 - RESERVED) - self.spent - START) * share
            if minutes < SHORTEST:
                return self.rows.append((stage, 0.0, "skipped: no time left"))
            minutes += run.last.get("seconds", 0) / 60 if run.steps else 0
            words += [f"--max_minutes={minutes:.3f}", "--allow_config_change"]
        return self.run(stage, *words)


def open_log():
    """Opens sessions/YYYYMMDD_HHMMSS.log and deletes all but the newest logs."""
    SESSIONS.mkdir(exist_ok=True)
    while (path := SESSIONS / f"{time.strftime('%Y%m%d_%H%M%S')}.log").exists():
        time.sleep(0.2)
    log = path.open("xb")
    for old in sorted(SESSIONS.glob("[0-9]*_[0-9]*.log"))[:-LOGS]:
        old.unlink()
    return log


# ----------------------------------------------------------------------------------------------
# Sessions that train


def hub_problem():
    """Returns the reason why hf: datasets cannot be fetched, None if they can."""
    if importlib.util.find_spec("datasets") is None:
        return "the package `datasets` is not installed"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    import requests  # comes with datasets

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        requests.head(address, timeout=5)
    except requests.RequestException as error:
        return f"{address} is out of reach ({error})"
    return None


def dataset_folder(preset):
    """Returns the folder of the dataset that a preset prepares."""
    folder = read_object(preset).get("output_dir")
    if not folder:
        raise UserError(f"{preset}: has no output_dir, which a session needs; add it")
    return Path(folder)


def choose_data(cfg, preset=DOCUMENTATION):
    """Returns (dataset preset, a line on it): documentation where the hub is out of reach."""
    if cfg.data or preset == DOCUMENTATION:
        return cfg.data or preset, f"data: {cfg.data or preset}"
    if (dataset_folder(preset) / "manifest.json").is_file():
        return preset, f"data: {preset}, prepared before"
    if problem := hub_problem():
        note = f"this Python's documentation, in place of {preset}: {problem}"
        return DOCUMENTATION, f"data: {DOCUMENTATION}, {note}"
    return preset, f"data: {preset}, from the hub"


FULL = {"sft": "configs/demo_sft.json", "dpo": "configs/demo_dpo.json"}  # all weights
LORA = {"sft": "configs/sft.json", "dpo": "configs/dpo.json"}


def text_to_chat(session, data, preset, tuning, timed=True, fast=False):
    """Runs every stage from text to an answer. preset: words of train.py; tuning: FULL or LORA."""
    name, folder = session.name, dataset_folder(data)
    base, sft, dpo = (Path(f"checkpoints/{kind}/{name}") for kind in ("pretrain", "sft", "dpo"))
    results = f"evaluation_results/{name}"
    held_out = ["--skip_boolq", f"--perplexity_path={folder / 'val_00000.jsonl'}"]
    limits = ["--fast_mode", *held_out] if fast else held_out if hub_problem() else []
    pretrain = ["train.py", *preset, f"--data_path={folder}", "--vocab_size=none"]  # the data's

    if (folder / "manifest.json").is_file():
        session.rows.append(("data", 0.0, "done before"))
    else:
        session.run("data", "data.py", data)
    if not fast and not (base / "final").is_dir():
        session.run("plan", *pretrain, f"--output_dir={base}", "--plan")
    session.train("pretrain", timed and 0.7, base, *pretrain)
    session.run("samples", "data.py", "create_sample_datasets")
    for kind, share, start, output in (("sft", 2 / 3, base, sft), ("dpo", 1, sft, dpo)):
        if (start / "final").is_dir():
            rows = [f"--{key}_path=data/samples/{kind}_{part}.jsonl"
                    for key, part in (("dataset", "train"), ("val", "val"))]  # fmt: skip
            words = [f"{kind}.py", tuning[kind], f"--model_path={start}", *rows]
            session.train(kind, timed and share, output, *words)
    model = next((path for path in (dpo, sft, base) if (path / "final").is_dir()), base)
    evaluate = ["eval.py", *limits, "--detailed_output"]
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
    data, note = choose_data(cfg)
    preset = ["configs/demo.json", *filter(None, [cfg.config])]
    with Session("quick", cfg.minutes or 30, note) as session:
        text_to_chat(session, data, preset, FULL, fast=True)


CPU = "--sequence_length=256 --batch_size=8 --gradient_accumulation_steps=1 --learning_rate=1e-3"
CPU += " --warmup_steps=100 --eval_steps=250 --save_steps=250"


def long_session(cfg, name, minutes, preset, tuning, timed=True):
    """Runs a session on WikiText where the hub can be reached, else on documentation."""
    import torch

    data, note = choose_data(cfg, "configs/datasets/demo_tiny.json")
    words = [preset, *filter(None, [cfg.config])]
    notes = [note, f"model: {' '.join(words)}"]
    if not torch.cuda.is_available() and not cfg.config:
        words += CPU.split()
        notes.append(f"no CUDA here: the CPU trains it with {CPU}; the plan says how far")
    words += [] if timed else length_without_clock(cfg.config)
    with Session(name, minutes, *notes) as session:
        text_to_chat(session, data, words, tuning, timed)


def length_without_clock(config):
    """Returns the length of a training without a clock, except what the preset `config` says."""
    given = read_object(config) if config else {}
    length = {"num_train_epochs": 3, "warmup_steps": 20}
    return [f"--{key}={value}" for key, value in length.items() if key not in given]


def prototype(cfg):
    """2 hours: a tiny model, complete, on WikiText-2, or without network on documentation."""
    long_session(cfg, "prototype", cfg.minutes or 120, "configs/tiny.json", FULL)


def experiment(cfg):
    """4 hours: a small model and its fine-tuning with adapters; wants a GPU."""
    long_session(cfg, "experiment", cfg.minutes or 240, "configs/small.json", LORA)


def full(cfg):
    """The prototype without a clock: trainings see all their data; --minutes sets a limit."""
    timed = cfg.minutes is not None
    long_session(cfg, "full", cfg.minutes or math.inf, "configs/tiny.json", FULL, timed)


# ----------------------------------------------------------------------------------------------
# Sessions that look


def evaluation(cfg):
    """1 hour: the newest model, or --model_path: measured in full, assessed, sampled."""
    model = Path(cfg.model_path) if cfg.model_path else newest()
    results = f"evaluation_results/{model.parent.name if model.name == 'final' else model.name}"
    text, note = [], "text: WikiText-2 and BoolQ from the hub"
    if problem := hub_problem():
        text = [f"--perplexity_path={folder / 'val_00000.jsonl'}" for folder in datasets()[:1]]
        note = f"text: {' '.join(text) or 'none, prompts only'}: {problem}"
        text += ["--skip_boolq"]
    with Session("evaluation", cfg.minutes or 60, f"model: {model}", note) as session:
        paths = (f"--model_path={model}", f"--output_dir={results}")
        session.look("evaluate", "eval.py", *paths, *text, "--detailed_output")
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
        files = [folder / "final" / "model.safetensors" for folder in (whole, half)]
        equal = filecmp.cmp(*files, shallow=False)
        outcome = "done" if equal else "failed: a resume changed them"
        session.rows.append(("the same weights", 0.0, outcome))
        session.look("sample", "sample.py", f"--model_path={whole}", "--max_new_tokens=8")


def architecture(cfg):
    """30 minutes: the report of every preset; a forward and backward pass of each that fits."""
    presets = [p for p in sorted(Path("configs").glob("*.json")) if "n_layer" in read_object(p)]
    presets += [Path(cfg.config)] if cfg.config else []
    with Session("architecture", cfg.minutes or 30) as session:
        for preset in presets:
            session.look(f"{preset.stem} report", "model.py", preset)
            session.look(f"{preset.stem} pass", "-m", "tools.session", "smoke", preset)


@dataclass(frozen=True)
class SmokeConfig:
    """A preset."""

    path: str  # a preset of a model


def smoke(cfg):
    """Run a preset forward and backward on random ids."""
    import torch

    from model import Llama, ModelConfig, count_parameters

    shape = configure(ModelConfig, [cfg.path], foreign_keys=True)
    count, machine = count_parameters(shape)["total"], machine_memory()
    if machine and 12 * count > machine[1]:  # weights, gradients, and as much again for the rest
        print(f"{cfg.path}: {count:,} parameters; not run, it needs {12 * count / 1e9:.1f} GB")
        return
    torch.manual_seed(0)
    model = Llama(shape)
    ids = torch.randint(shape.vocab_size, (1, min(32, shape.sequence_length)))
    logits = model(ids).flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(logits, ids.flatten().roll(-1))
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.isfinite().all():
            raise UserError(f"{cfg.path}: no gradient, or none that is finite, at {name}")
    uniform = f"ln {shape.vocab_size:,} = {math.log(shape.vocab_size):.4f}"
    print(f"{cfg.path}: {count:,} parameters, loss {loss.item():.4f} ({uniform}), gradients finite")


SESSION_COMMANDS = {
    "quick": (quick, TrainingSessionConfig),
    "prototype": (prototype, TrainingSessionConfig),
    "experiment": (experiment, TrainingSessionConfig),
    "full": (full, TrainingSessionConfig),
    "evaluation": (evaluation, ModelSessionConfig),
    "debug": (debug, SessionConfig),
    "architecture": (architecture, PresetSessionConfig),
    "smoke": (smoke, SmokeConfig),
}

if __name__ == "__main__":
    dispatch(SESSION_COMMANDS, sys.argv[1:], __doc__)
