"""Time boxes: the ordinary commands one after another against a clock, with a log and a table at the end.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session prototype --minutes=90     a tiny model, complete
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session runs nothing that could not be typed: every stage is one command, printed before it runs. Data and
evaluation take what they take, the trainings share what is left of the box (`--max_minutes`). Ctrl-C ends a
stage as Ctrl-C ends its command - trainings save - and then the session, with its table; the same session
started again finds what is complete and goes on.
"""

import functools
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.config import PositiveFloat, UserError, configure, dispatch, read_object
from lib.folders import read_manifest
from tools.host import memory
from tools.workspace import (
    SESSIONS,
    command,
    datasets,
    evaluations,
    newest,
    newest_steps,
    next_command,
    read_training,
    trainings,
)

LOGS_KEPT = 20
RESERVED = 0.1  # of a box: what trainings leave to the stages after them
LEAST = 0.01  # minutes that are worth a training
STARTING = 0.1  # minutes that a training takes to start, to validate and to save
SAMPLES = Path("data/samples")
QUESTION = "What is the plural of tree?"


@dataclass(frozen=True)
class BoxConfig:
    """A session of trainings."""

    minutes: PositiveFloat | None = None  # the box; none = its usual length
    config: str = ""  # a preset of yours for the pretraining, after the session's own
    data: str = ""  # a dataset preset in place of the session's


@dataclass(frozen=True)
class LookConfig:
    """A session that trains nothing to keep."""

    minutes: PositiveFloat | None = None  # the box: no stage begins after it


@dataclass(frozen=True)
class EvaluationConfig(LookConfig):
    """A session that looks at a model."""

    model_path: str = ""  # which; empty = the newest


@dataclass(frozen=True)
class ArchitectureConfig(LookConfig):
    """A session that looks at presets."""

    config: str = ""  # one of yours, beside those in configs/


# ----------------------------------------------------------------------------------------------
# Stages and their clock


class Stage(NamedTuple):
    """One command of a session."""

    name: str
    words: (
        Callable  # () -> the words after `python`, when its turn has come; None: it is done already
    )
    needs: tuple[str, ...] = ()  # stages without which it makes no sense
    share: float = 0.0  # of the minutes that the trainings have among them


class Box:
    """A session while it runs: its clock, its log, what became of its stages."""

    def __init__(self, name, minutes, stages=()):
        self.name, self.minutes, self.stages = name, minutes, list(stages)
        self.began, self.rows = time.monotonic(), []  # rows: (stage, outcome, minutes)
        self.stopped, self.process = None, None  # the signal's number; what runs now
        self.log = open_log()

    @property
    def spent(self):
        return (time.monotonic() - self.began) / 60

    @property
    def limit(self):
        return "no limit" if self.minutes == float("inf") else f"{self.minutes:g} minutes"

    def outcome(self, name):
        return next((outcome for stage, outcome, _ in self.rows if stage == name), None)

    def training_minutes(self):
        """Returns the next stage's share of the minutes that are left to trainings."""
        coming = [stage.share for stage in self.stages[len(self.rows) :] if stage.share]
        left = self.minutes * (1 - RESERVED) - self.spent - STARTING * len(coming)
        return left * coming[0] / sum(coming)

    def say(self, text):
        """Prints a line and logs it."""
        self.write(f"{text}\n".encode())

    def write(self, data):
        self.log.write(data)
        self.log.flush()
        with suppress(BrokenPipeError):  # the reader is gone; the log stays
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def stop(self, number, frame):
        """Handles a signal: the stage gets it too, once, for it runs in a group of its own."""
        self.stopped = number
        self.forward()

    def forward(self):
        runs = self.process and self.process.poll() is None
        if runs and os.name == "posix":  # on Windows the console tells every process itself
            self.process.send_signal(self.stopped)

    def run(self, stage):
        """Runs a stage, if there is reason to, and notes what became of it."""
        began, outcome = self.spent, self.reason_to_skip(stage)
        if outcome is None:
            try:
                words = stage.words()
                outcome = "done before" if words is None else self.execute(stage.name, words)
            except UserError as error:
                self.say(f"error: {error}")
                outcome = "failed"
        self.rows.append((stage.name, outcome, self.spent - began))

    def reason_to_skip(self, stage):
        lacking = [
            name for name in stage.needs if not (self.outcome(name) or "").startswith("done")
        ]
        if self.stopped:
            return "skipped: stopped"
        if lacking:
            return f"skipped: needs {', '.join(lacking)}"
        trainings = any(each.share for each in self.stages)
        if (
            self.training_minutes() < LEAST
            if stage.share
            else not trainings and self.spent >= self.minutes
        ):
            return "skipped: no time left"  # beside trainings, what is short runs over rather than not at all
        return None

    def execute(self, name, words):
        """Runs one command, its output to terminal and log. Returns the outcome."""
        self.say(f"\n=== {name} | {self.spent:.1f} of {self.limit} | {command(*words)}")
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        if self.stopped:  # between the last look and now
            self.forward()
        with self.process.stdout as pipe:
            while data := pipe.read1():
                self.write(data)
        code = self.process.wait()
        if self.stopped:
            return "stopped"
        return "done" if code == 0 else f"failed: status {code}"

    def close(self):
        """Prints the table and what to do next. Returns the exit status."""
        width = max(len(name) for name, *_ in self.rows)
        self.say(f"\n{self.name}: {self.spent:.1f} of {self.limit}")
        for name, outcome, minutes in self.rows:
            self.say(f"  {name:<{width}}  {minutes:6.1f} min  {outcome}")
        found = trainings()
        todo, why = next_command(found, [one for one in found if not one.problem], evaluations())
        failed = [name for name, outcome, _ in self.rows if outcome.startswith("failed")]
        if self.stopped:
            self.say("stopped; the same session again goes on where it was")
        elif failed:
            self.say(f"failed: {', '.join(failed)}; its last lines above say why")
        self.say(f"log: {self.log.name}\nnext ({why}):\n  {todo}")
        self.log.close()
        return 128 + self.stopped if self.stopped else int(bool(failed))


def open_log():
    """Opens sessions/YYYYMMDD_HHMMSS.log and deletes all but the newest of the others."""
    SESSIONS.mkdir(exist_ok=True)
    while True:
        with suppress(FileExistsError):
            log = open(SESSIONS / f"{time.strftime('%Y%m%d_%H%M%S')}.log", "xb")  # noqa: SIM115 - until the end
            break
        time.sleep(0.2)  # another began within this second
    for old in sorted(SESSIONS.glob("[0-9]*_[0-9]*.log"))[:-LOGS_KEPT]:
        old.unlink()
    return log


def run_box(name, minutes, stages, notes=()):
    """Runs stages within minutes and leaves the process with 0, 1 if one failed, 128 + a signal's number."""
    box = Box(name, minutes)
    box.stages += stages(box) if callable(stages) else stages
    signals = [getattr(signal, each, None) for each in ("SIGINT", "SIGTERM", "SIGHUP")]
    old = {number: signal.signal(number, box.stop) for number in signals if number is not None}
    for note in notes:
        box.say(note)
    for stage in box.stages:
        box.run(stage)
    status = box.close()
    for number, handler in old.items():
        signal.signal(number, handler)
    raise SystemExit(status)


# ----------------------------------------------------------------------------------------------
# Sessions that train


def hub():
    """Returns None if hf: datasets can be fetched, else why not."""
    if importlib.util.find_spec("datasets") is None:
        return "the package `datasets` is not installed"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return f"{address} is out of reach ({error})"
    return None


def folder_of(preset):
    """Returns the folder that a dataset preset is prepared into."""
    folder = read_object(preset).get("output_dir")
    if not folder:
        raise UserError(
            f"{preset}: a session wants to know its output_dir; write it into the preset"
        )
    return Path(folder)


def choose_data(cfg, wanted=None):
    """Returns (dataset preset, a line that says which and why)."""
    fallback = "configs/datasets/docstrings.json"
    if cfg.data or not wanted:
        return cfg.data or fallback, f"data: {cfg.data or fallback}"
    if (folder_of(wanted) / "manifest.json").is_file():
        return wanted, f"data: {wanted}, prepared before"
    why = hub()
    if why:
        return (
            fallback,
            f"data: {fallback}, this Python's documentation, in place of {wanted}: {why}",
        )
    return wanted, f"data: {wanted}, from the hub"


def training(box, out, boxed, *words):
    """Returns the words of a training that goes on where it was; None if it is complete.

    One that was interrupted keeps the box it began with where that still fits: then its schedule is what it
    would have been. Otherwise it gets what is left, which is a change of its configuration.
    """
    one = read_training(Path(out))
    if one.folder.is_dir() and not one.problem:
        return None
    words = [*words, f"--output_dir={out}", "--resume_from_checkpoint=auto"]
    if not boxed:
        return words
    minutes, spent = box.training_minutes(), one.last.get("seconds", 0) / 60
    if not newest_steps(one.folder):
        return [*words, f"--max_minutes={minutes:.3f}"]
    planned = one.config.get("max_minutes") or minutes
    if planned - spent <= minutes:
        return [*words, f"--max_minutes={planned}"]
    return [*words, f"--max_minutes={spent + minutes:.3f}", "--allow_config_change"]


CPU = (
    "--sequence_length=256",
    "--batch_size=8",
    "--gradient_accumulation_steps=1",
    "--learning_rate=1e-3",
)
CPU += ("--warmup_steps=100", "--eval_steps=250", "--save_steps=250")


def chain(box, name, data, pretrain, tuning, boxed=True, fast=False):
    """Returns the stages from text to an answer. pretrain: words of train.py; tuning: presets of SFT, DPO."""
    folder = folder_of(data)
    base, sft, dpo = (f"checkpoints/{kind}/{name}" for kind in ("pretrain", "sft", "dpo"))
    results = f"evaluation_results/{name}"

    def pretraining():
        vocab = f"--vocab_size={read_manifest(folder)['vocab_size']}"
        return training(box, base, boxed, "train.py", *pretrain, f"--data_path={folder}", vocab)

    def plan():
        words = pretraining()
        return words and [*words, "--plan"]

    def tune(kind, model, out):
        files = (f"--{key}_path={SAMPLES / f'{kind}_{part}.jsonl'}" for key, part in PARTS.items())
        return training(
            box, out, boxed, f"{kind}.py", tuning[kind], f"--model_path={model}", *files
        )

    def best():
        return next(p for p in (dpo, sft, base) if (Path(p) / "final").is_dir())

    def evaluate(model, results):
        text = f"--perplexity_path={folder / 'val_00000.jsonl'}"
        flags = ("--fast_mode", "--skip_boolq", text) if fast else text_and_questions(folder, hub())
        return [
            "eval.py",
            f"--model_path={model}",
            *flags,
            "--detailed_output",
            f"--output_dir={results}",
        ]

    def compare():
        return ["eval.py", "compare", f"{results}_base", results]

    def ask():
        words = ("--chat", f"--prompt={QUESTION}", "--temperature=0", "--max_new_tokens=24")
        return ["sample.py", f"--model_path={best()}", *words]

    return [
        Stage("data", lambda: None if (folder / "manifest.json").is_file() else ["data.py", data]),
        *([] if fast else [Stage("plan", plan, ("data",))]),
        Stage("pretrain", pretraining, ("data",), 0.7),
        Stage("samples", lambda: ["data.py", "create_sample_datasets"], ("pretrain",)),
        Stage("sft", lambda: tune("sft", base, sft), ("pretrain", "samples"), 0.2),
        Stage("dpo", lambda: tune("dpo", sft, dpo), ("sft",), 0.1),
        Stage("evaluate base", lambda: evaluate(base, f"{results}_base"), ("sft",)),
        Stage("evaluate", lambda: evaluate(best(), results), ("pretrain",)),
        Stage("compare", compare, ("evaluate base", "evaluate")),
        Stage("assess", lambda: ["eval.py", "assess", results], ("evaluate",)),
        Stage("ask", ask, ("pretrain",)),
    ]


PARTS = {"dataset": "train", "val": "val"}
DEMO = {"sft": "configs/demo_sft.json", "dpo": "configs/demo_dpo.json"}
LORA = {"sft": "configs/sft.json", "dpo": "configs/dpo.json"}


def text_and_questions(folder, away):
    """Returns what to evaluate on: the hub's texts, or if those are `away` what a dataset holds out."""
    return (
        ("--skip_boolq", f"--perplexity_path={folder / 'val_00000.jsonl'}")
        if away and folder
        else ()
    )


def quick(cfg):
    """30 minutes: documentation -> a small model -> SFT -> DPO -> its numbers, and one question answered."""
    data, note = choose_data(cfg)
    pretrain = ["configs/demo.json", *filter(None, [cfg.config])]
    minutes = cfg.minutes or 30
    run_box(
        "quick", minutes, lambda box: chain(box, "quick", data, pretrain, DEMO, fast=True), [note]
    )


def long_session(cfg, name, minutes, preset, tuning, boxed=True):
    """A session on real text: WikiText where the hub can be reached, else documentation; it says which."""
    data, note = choose_data(cfg, wanted="configs/datasets/demo_tiny.json")
    import torch

    pretrain = [preset, *filter(None, [cfg.config])]
    notes = [note, f"model: {' '.join(pretrain)}"]
    if not torch.cuda.is_available():
        pretrain += [] if cfg.config else CPU
        sized = f", with {' '.join(CPU)}" if not cfg.config else ""
        notes.append(
            f"no CUDA here: the CPU trains it{sized}; it will not get far; the plan before it says how far"
        )
    pretrain += [] if boxed else unboxed(cfg.config)
    run_box(name, minutes, lambda box: chain(box, name, data, pretrain, tuning, boxed), notes)


def unboxed(config):
    """Returns what a run without a clock is told of its length, but for what a user's preset says itself."""
    own, length = read_object(config) if config else {}, {"num_train_epochs": 3, "warmup_steps": 20}
    return [f"--{key}={value}" for key, value in length.items() if key not in own]


def prototype(cfg):
    """2 hours: a tiny model, complete, on WikiText-2, or without network on documentation."""
    long_session(cfg, "prototype", cfg.minutes or 120, "configs/tiny.json", DEMO)


def experiment(cfg):
    """4 hours: a small model and its fine-tuning with adapters; wants a GPU."""
    long_session(cfg, "experiment", cfg.minutes or 240, "configs/small.json", LORA)


def full(cfg):
    """The prototype without a clock: trainings end when they have seen their data; --minutes sets a limit."""
    boxed = cfg.minutes is not None
    long_session(cfg, "full", cfg.minutes or float("inf"), "configs/tiny.json", DEMO, boxed)


# ----------------------------------------------------------------------------------------------
# Sessions that look


def evaluation(cfg):
    """1 hour: the newest model, or --model_path, measured in full, held against its size, sampled."""
    model = cfg.model_path or str(newest())
    out = f"evaluation_results/{Path(model).name if Path(model).name != 'final' else Path(model).parent.name}"
    folder, why = next(iter(datasets()), None), hub()
    flags = (f"--model_path={model}", f"--output_dir={out}", *text_and_questions(folder, why))
    note = "text: WikiText-2, BoolQ, from the hub"
    if why and folder:
        note = f"text: held out of {folder}, no questions: {why}"
    elif why:
        note = f"text: none, prompts only: {why}"
    prompts = ("--prompt=The", "--num_samples=3", "--seed=1")
    stages = [
        Stage("evaluate", lambda: ["eval.py", *flags, "--detailed_output"]),
        Stage("assess", lambda: ["eval.py", "assess", out], ("evaluate",)),
        Stage("samples", lambda: ["sample.py", f"--model_path={model}", *prompts]),
    ]
    run_box("evaluation", cfg.minutes or 60, stages, [f"model: {model}", note])


TOY = ("--vocab_size=400", "--sequence_length=32")
TOY_DATA = ("--max_docs=80", "--min_length=50", *TOY)
TOY_SHAPE = ("--n_layer=2", "--d_model=32", "--n_head=2", "--d_ff=64", *TOY)
TOY_STEPS = (
    "--max_steps=20",
    "--save_steps=10",
    "--eval_steps=20",
    "--warmup_steps=2",
    "--eval_rows=8",
)


def debug(cfg):
    """A minute or two: environment, 20 toy steps, the proof that a resume changes nothing, a sample."""
    toys = SESSIONS / time.strftime("debug_%Y%m%d_%H%M%S")
    data = (f"--output_dir={toys / 'data'}", f"--tokenizer_path={toys / 'tokenizer.model'}")
    train = ("train.py", f"--data_path={toys / 'data'}", *TOY_SHAPE, *TOY_STEPS)
    whole, half = toys / "whole", toys / "half"
    resume = f"--resume_from_checkpoint={whole / 'step_000010'}"
    stages = [
        Stage("environment", lambda: ["-m", "tools.host", "check-env"]),
        Stage("data", lambda: ["data.py", "configs/datasets/docstrings.json", *TOY_DATA, *data]),
        Stage("train 20 steps", lambda: [*train, f"--output_dir={whole}"], ("data",)),
        Stage(
            "10 + resume + 10",
            lambda: [*train, f"--output_dir={half}", resume],
            ("train 20 steps",),
        ),
        Stage(
            "the same weights",
            lambda: ["-m", "tools.session", "same", whole, half],
            ("10 + resume + 10",),
        ),
        Stage(
            "sample",
            lambda: ["sample.py", f"--model_path={whole}", "--max_new_tokens=8"],
            ("train 20 steps",),
        ),
    ]
    run_box("debug", cfg.minutes or 30, stages)


def architecture(cfg):
    """30 minutes: the report of every preset; a forward and backward pass of each that fits the memory."""
    found = [
        path
        for path in sorted(Path("configs").glob("*.json"))
        if "n_layer" in path.read_text("utf-8")
    ]
    presets = [*found, *([Path(cfg.config)] if cfg.config else [])]
    stages = [
        Stage(f"report {path.stem}", functools.partial(list, ["model.py", path]))
        for path in presets
    ]
    stages += [
        Stage(f"pass {path.stem}", functools.partial(list, ["-m", "tools.session", "smoke", path]))
        for path in presets
    ]
    run_box("architecture", cfg.minutes or 30, stages)


@dataclass(frozen=True)
class SameConfig:
    """What is compared."""

    one: str  # a training's folder
    other: str  # another's


def same(cfg):
    """Are the final weights of two trainings the same, bit for bit? python -m tools.session same A B"""
    first, second = (
        Path(folder) / "final" / "model.safetensors" for folder in (cfg.one, cfg.other)
    )
    for path in (first, second):
        if not path.is_file():
            raise UserError(f"{path}: not found; name the folders of two finished trainings")
    if first.read_bytes() != second.read_bytes():
        raise UserError(f"{first} and {second} differ: a resume changed the result")
    print(f"{first} and {second}: the same, bit for bit")


@dataclass(frozen=True)
class SmokeConfig:
    """Which preset."""

    path: str  # a preset of a model


def smoke(cfg):
    """A forward and backward pass of a preset on random ids: python -m tools.session smoke configs/tiny.json"""
    import torch

    from model import Llama, ModelConfig, count_parameters

    shape = configure(ModelConfig, [cfg.path], foreign_keys=True)
    count, there = count_parameters(shape)["total"], memory()
    if (
        there and 3 * 4 * count > there[1]
    ):  # weights, gradients and as much again for everything else
        print(
            f"{cfg.path}: {count:,} parameters; not run, it needs about {12 * count / 1e9:.1f} GB"
        )
        return
    torch.manual_seed(0)
    model = Llama(shape)
    ids = torch.randint(shape.vocab_size, (1, min(32, shape.sequence_length)))
    loss = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1).float(), ids.flatten().roll(-1)
    )
    loss.backward()
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    if bad:
        raise UserError(f"{cfg.path}: no gradient, or none that is finite, at {bad[0]}")
    told = f"loss {loss.item():.4f} (ln {shape.vocab_size:,} = {math.log(shape.vocab_size):.4f})"
    print(f"{cfg.path}: {count:,} parameters, {told}, a gradient at every one")


COMMANDS = {
    "quick": (quick, BoxConfig),
    "prototype": (prototype, BoxConfig),
    "experiment": (experiment, BoxConfig),
    "full": (full, BoxConfig),
    "evaluation": (evaluation, EvaluationConfig),
    "debug": (debug, LookConfig),
    "architecture": (architecture, ArchitectureConfig),
    "same": (same, SameConfig),
    "smoke": (smoke, SmokeConfig),
}

if __name__ == "__main__":
    dispatch(COMMANDS, sys.argv[1:], __doc__)
