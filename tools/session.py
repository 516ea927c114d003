"""Sessions: the ordinary commands one after another within some minutes, with a log and a table.

    python -m tools.session quick                      30 minutes: everything once, small
    python -m tools.session evaluation --model_path=checkpoints/dpo

A session is a preset in configs/sessions, applied on top of quick.json: minutes and stages, each a
command, which is printed before it runs and can be typed as it stands. The same session started
again skips complete trainings and resumes the next.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.config import PositiveFloat, configure, dispatch, read_object, refusing
from tools.workspace import SESSIONS, Training, newest_folder, next_command

PRESETS = Path(__file__).parents[1] / "configs/sessions"
LOGS = 20  # logs that are kept
RESERVED = 0.1  # share of the minutes that trainings leave to the commands after them
START = 0.3  # minutes that trainings need to start, to validate and to save
SHARES = {"pretrain": 0.7, "sft": 2 / 3, "dpo": 1.0}  # of the minutes left: the stages that train


@dataclass(frozen=True)
class SessionConfig:
    """A session, and what stands for {train} and other words in its commands."""

    minutes: PositiveFloat | None = None  # the time box; none = no clock
    stages: dict = field(default_factory=dict)  # {name: command}, for python
    train: str = ""  # the presets of trainings
    sft: str = ""  # the preset of sft.py
    dpo: str = ""  # the preset of dpo.py
    cpu: str = ""  # a preset on top of train's, where there is no CUDA
    evaluate: str = ""  # flags for eval.py
    config: str = ""  # a preset of yours on top of those; architecture: one more
    data: str = "configs/datasets/docstrings.json"  # the preset of a dataset
    model_path: str = ""  # evaluation: the model; empty = the newest


class Session:
    """A session while it runs: its clock, its log and the signal that ends it."""

    def __init__(self, name, cfg):
        self.name, self.cfg, self.start = name, cfg, time.monotonic()
        self.minutes = cfg.minutes or math.inf
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

    def run(self):
        """Runs the stages until one fails, prints the table and what to do next, and exits.

        The status is 0, 1 if a stage failed, or 128 + the number of a signal.
        """
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # no SIGHUP on Windows
            signal.signal(getattr(signal, name), self.stop)
        table, problem, words = "", "", self.words()
        for stage, command in self.cfg.stages.items():
            words |= self.model_words() if "{model}" in command else {}
            with refusing((LookupError, ValueError), f"{self.name}: {stage}: {command}"):
                command = shlex.split(command.format(**words))
            start, outcome = self.spent, self.outcome_of(stage, command)
            table += f"  {stage:<16}{self.spent - start:6.1f} min  {outcome}\n"
            if outcome.startswith(("stopped", "failed")):
                problem = f"error: {stage} {outcome}; its last lines above say why\n"
                break
        if self.stopped:
            problem = "stopped; the same session again goes on where it was\n"
        table = f"\n{self.name}: {self.spent:.1f} minutes\n{table}{problem}"
        self.write(f"{table}log: {self.log.name}\nnext:\n  {next_command()}\n".encode())
        raise SystemExit(128 + self.stopped if self.stopped else int(bool(problem)))

    def words(self):
        """Returns what stands for {name} and others in a command, as a shell reads it."""
        import torch

        from corpus.prepare import DataConfig, output_folder

        folder = shlex.quote(str(output_folder(configure(DataConfig, [self.cfg.data]))))
        words = asdict(self.cfg) | {"name": self.name, "folder": folder}
        words["log"] = self.log.name.with_suffix("")  # a folder beside it, for toys
        words |= {key: words[key] and shlex.quote(words[key]) for key in ("config", "data")}
        return words | ({"cpu": ""} if torch.cuda.is_available() else {})

    def model_words(self):
        """Returns {model}: --model_path, the last complete training here, or the newest model."""
        folders = [Path(f"checkpoints/{kind}/{self.name}") for kind in SHARES]
        model = next((path for path in folders[::-1] if (path / "final").is_dir()), folders[0])
        if self.cfg.model_path or "pretrain" not in self.cfg.stages:
            model = Path(self.cfg.model_path or newest_folder())
        name = model.parent.name if model.name == "final" else model.name
        words = {"model": str(model), "results": f"evaluation_results/{name}"}
        return {key: shlex.quote(word) for key, word in words.items()}

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
                if training.checkpoint:  # what it took before counts, too
                    minutes += training.newest.get("seconds", 0) / 60
                words += [f"--max_minutes={minutes:.3f}", "--allow_config_change"]
        elif "pretrain" not in self.cfg.stages and self.spent >= self.minutes:
            return "skipped: no time left"  # a session that trains measures its model in any case
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


def command_of(path):
    """Returns the command of a session's preset, as config.dispatch calls it."""

    def command(cfg):
        Session(path.stem, cfg).run()

    command.__doc__ = read_object(path).get("_why", path.name)
    return command


if __name__ == "__main__":
    presets = [p for p in sorted(PRESETS.glob("*.json")) if "minutes" in read_object(p)]
    commands = {path.stem: (command_of(path), SessionConfig) for path in presets}
    name, *words = sys.argv[1:] or ["--help"]
    if name in commands:
        words = [str(PRESETS / "quick.json"), str(PRESETS / f"{name}.json"), *words]
    dispatch(commands, [name, *words], __doc__)
