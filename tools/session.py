"""Sessions: the ordinary commands one after another within some minutes, with a log and a table.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session is a script below. Each command is printed before it runs and can be typed as it stands.
The same session started again skips complete trainings and resumes the next.
"""

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

from lib.config import PositiveFloat, configure, dispatch, read_object
from tools.workspace import SESSIONS, Training, newest, next_command

LOGS = 20  # logs that are kept
RESERVED = 0.1  # share of the minutes that trainings leave to the commands after them
START = 0.3  # minutes that trainings need to start, to validate and to save
CPU = "configs/sessions/cpu.json"  # smaller batches and shorter rows, where there is no CUDA
SHARES = {"pretrain": 0.7, "sft": 2 / 3, "dpo": 1.0}  # of the minutes left: the stages that train

# A line is a stage: its name, and its command for python.
TEXT_TO_CHAT = """
data: data.py {data}
pretrain: train.py {presets} --data_path={folder} --vocab_size=none
samples: data.py create_sample_datasets
sft: sft.py {sft} --model_path=checkpoints/pretrain/{name} \
 --dataset_path=data/samples/sft_train.jsonl --val_path=data/samples/sft_val.jsonl
dpo: dpo.py {dpo} --model_path=checkpoints/sft/{name} \
 --dataset_path=data/samples/dpo_train.jsonl --val_path=data/samples/dpo_val.jsonl
evaluate: eval.py --detailed_output --perplexity_path={folder}/val_00000.jsonl {fast} \
 --model_path={model} --output_dir=evaluation_results/{name}
assess: eval.py assess evaluation_results/{name}
ask: sample.py --model_path={model} --chat --prompt="What is the plural of tree?" \
 --temperature=0 --max_new_tokens=24
"""
EVALUATION = """
evaluate: eval.py --detailed_output --model_path={model} --output_dir={results}
assess: eval.py assess {results}
samples: sample.py --model_path={model} --prompt=The --num_samples=3
"""
DEBUG = """
environment: -m tools.workspace check-env
data: data.py configs/datasets/docstrings.json --max_docs=80 --min_length=50 --vocab_size=400 \
 --sequence_length=32 --output_dir={toys}/data --tokenizer_path={toys}/tokenizer.model
20 steps: train.py configs/sessions/toy.json --data_path={toys}/data --output_dir={toys}/whole
10 + resume + 10: train.py configs/sessions/toy.json --data_path={toys}/data \
 --output_dir={toys}/half --resume_from_checkpoint={toys}/whole/step_000010
the same weights: -c "import filecmp, sys; sys.exit(not filecmp.cmp(*sys.argv[1:], False))" \
 {toys}/whole/final/model.safetensors {toys}/half/final/model.safetensors
sample: sample.py --model_path={toys}/whole --max_new_tokens=8
"""
ARCHITECTURE = """
{stem} report: model.py {preset}
{stem} steps: train.py {preset} --plan --data_path=none --sequence_length=32 --batch_size=1 \
 --gradient_accumulation_steps=1
"""


@dataclass(frozen=True)
class SessionConfig:
    """The options of all sessions; each uses those that concern it."""

    minutes: PositiveFloat | None = None  # the time box; none = as documented
    config: str = ""  # trainings: a preset applied after the session's own; architecture: one more
    data: str = "configs/datasets/docstrings.json"  # trainings: the preset of a dataset
    model_path: str = ""  # evaluation: the model; empty = the newest


# ---- a script against a clock


class Session:
    """A session while it runs: its clock, its log and the signal that ends it."""

    def __init__(self, name, minutes):
        self.name, self.minutes, self.start = name, minutes, time.monotonic()
        self.stopped, self.process = 0, None  # the number of the signal; the running command
        SESSIONS.mkdir(exist_ok=True)
        self.log = io.FileIO(SESSIONS / time.strftime("%Y%m%d_%H%M%S.log"), "a")
        for old in sorted(SESSIONS.glob("[0-9]*_[0-9]*.log"))[:-LOGS]:
            old.unlink()

    @property
    def spent(self):
        return (time.monotonic() - self.start) / 60

    def write(self, data):
        """Writes bytes to the log and to the terminal, which may have gone."""
        self.log.write(data)
        with suppress(BrokenPipeError):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def stop(self, number, frame=None):
        """Handles a signal: the running command, in a process group of its own, gets a Ctrl-C."""
        self.stopped = number
        if self.process and os.name == "posix":
            self.process.send_signal(signal.SIGINT)

    def run(self, script, **words):
        """Runs a script until a stage fails, prints the table and what to do next, and exits.

        words: what {name} and others stand for. The status is 0, 1 if a stage failed, or 128 + the
        number of a signal.
        """
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # no SIGHUP on Windows
            signal.signal(getattr(signal, name), self.stop)
        table, problem = "", ""
        for line in script.strip().splitlines():
            given = {"name": self.name, "model": last_model(self.name)} | words
            stage, _, command = line.format(**given).partition(": ")
            start, outcome = self.spent, self.outcome_of(stage, shlex.split(command))
            table += f"  {stage:<16}{self.spent - start:6.1f} min  {outcome}\n"
            if outcome.startswith(("stopped", "failed")):
                problem = f"error: {stage} {outcome}; its last lines above say why\n"
                break
        if self.stopped:
            problem = "stopped; the same session again goes on where it was\n"
        table = f"\n{self.name}: {self.spent:.1f} minutes\n{table}{problem}"
        self.write(f"{table}log: {self.log.name}\nnext:\n  {next_command()}\n".encode())
        raise SystemExit(128 + self.stopped if self.stopped else int(bool(problem)))

    def outcome_of(self, stage, words):
        """Runs a command if there is reason and time to. Returns what the table says of it."""
        if stage in SHARES:
            training = Training(Path(f"checkpoints/{stage}/{self.name}"))
            if not training.problem:
                return "done before"
            words += [f"--output_dir={training.folder}", "--resume_from_checkpoint=auto"]
            if self.minutes < math.inf:
                left = self.minutes * (1 - RESERVED) - self.spent - START
                if left < 0.02:  # a second
                    return "skipped: no time left"
                minutes = left * SHARES[stage]
                if training.checkpoint and training.columns:  # what it took before counts, too
                    minutes += training.columns["seconds"][1][-1] / 60
                words += [f"--max_minutes={minutes:.3f}", "--allow_config_change"]
        code = self.execute(stage, words)
        return "stopped" if self.stopped else f"failed: status {code}" if code else "done"

    def execute(self, stage, words):
        """Runs `python WORDS`, its output to terminal and log. Returns its exit status."""
        line = f"{self.spent:.1f} of {self.minutes:g} min | python {shlex.join(words)}"
        self.write(f"\n=== {stage} | {line}\n".encode())
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        streams |= {"stderr": subprocess.STDOUT, "start_new_session": True}
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen([sys.executable, *words], env=env, **streams)
        if self.stopped:  # between two commands
            self.stop(self.stopped)
        with self.process.stdout as pipe:
            while data := pipe.read1():
                self.write(data)
        return self.process.wait()


def last_model(name):
    """Returns the folder of a session's last training that is complete, else of its first."""
    folders = [Path(f"checkpoints/{kind}/{name}") for kind in SHARES]
    return next((folder for folder in folders[::-1] if (folder / "final").is_dir()), folders[0])


# ---- the sessions


def text_to_chat(cfg, name, minutes, presets, tune="configs/demo_{}.json", fast=""):
    """Runs every stage from text to an answer. minutes inf: without a clock.

    presets: of train.py; tune: of sft and dpo, by default all weights; fast: flags for eval.py.
    """
    import torch

    from corpus.prepare import DataConfig, output_folder

    folder = output_folder(configure(DataConfig, [cfg.data]))
    presets = [*presets, *filter(None, [cfg.config])]
    if CPU in presets and torch.cuda.is_available():
        presets.remove(CPU)
    words = {"presets": shlex.join(presets), "data": shlex.quote(cfg.data), "fast": fast}
    words |= {"folder": shlex.quote(str(folder))}
    words |= {kind: tune.format(kind) for kind in ("sft", "dpo")}
    Session(name, cfg.minutes or minutes).run(TEXT_TO_CHAT, **words)


def quick(cfg):
    """30 minutes: documentation -> a small model -> SFT -> DPO -> its numbers, and one answer."""
    text_to_chat(cfg, "quick", 30, ["configs/demo.json"], fast="--fast_mode --skip_boolq")


def prototype(cfg):
    """2 hours: a tiny model, complete."""
    text_to_chat(cfg, "prototype", 120, ["configs/tiny.json", CPU])


def experiment(cfg):
    """4 hours: a small model and its fine-tuning with adapters; wants a GPU."""
    text_to_chat(cfg, "experiment", 240, ["configs/small.json", CPU], tune="configs/{}.json")


def full(cfg):
    """The prototype without a clock: trainings see all their data; --minutes sets a limit."""
    presets = ["configs/tiny.json", CPU, "configs/sessions/full.json"]
    text_to_chat(cfg, "full", math.inf, presets)


def evaluation(cfg):
    """1 hour: the newest model, or --model_path: measured in full, assessed, sampled."""
    model = Path(cfg.model_path) if cfg.model_path else newest()
    name = model.parent.name if model.name == "final" else model.name
    words = {"model": model, "results": Path("evaluation_results", name)}
    words = {key: shlex.quote(str(path)) for key, path in words.items()}
    Session("evaluation", cfg.minutes or 60).run(EVALUATION, **words)


def debug(cfg):
    """A minute or two: environment, 20 toy steps, the proof that a resume is exact, a sample."""
    toys = SESSIONS / time.strftime("debug_%Y%m%d_%H%M%S")
    Session("debug", cfg.minutes or 30).run(DEBUG, toys=toys)


def architecture(cfg):
    """30 minutes: the report of every preset, and a few timed steps of each on short rows."""
    presets = [p for p in sorted(Path("configs").glob("*.json")) if "n_layer" in read_object(p)]
    presets += [Path(cfg.config)] if cfg.config else []
    scripts = [ARCHITECTURE.format(stem=p.stem, preset=shlex.quote(str(p))) for p in presets]
    Session("architecture", cfg.minutes or 30).run("".join(scripts))


SESSION_COMMANDS = (quick, prototype, experiment, full, evaluation, debug, architecture)

if __name__ == "__main__":
    commands = {function.__name__: (function, SessionConfig) for function in SESSION_COMMANDS}
    dispatch(commands, sys.argv[1:], __doc__)
