"""Trainings as real processes, without the three seconds that Python and torch take to start.

A server process imports torch once, before any thread of its own runs; each rank of a training is a fork of it
(multiprocessing's `forkserver`). It has a pid, signals, limits and an exit status like a process started by hand.
What a test does to it - a limit, a patched system call, a loss of its own - is a function of some test module that
runs in the child first.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest  # noqa: F401 - what the children would else import one by one
import safetensors.torch
import torch
import torch._dynamo
import torch.distributed

import train
from configurator import configure, run

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.runs"])
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE = 240  # seconds after which a process counts as hung; nothing else here is timed

SHAPE = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 64, "vocab_size": 384}
SHAPE |= {"sequence_length": 16, "device": "cpu", "dtype": "fp32", "batch_size": 2, "learning_rate": 0.01}
LENGTH = {"max_steps": 8, "warmup_steps": 2, "save_steps": 4, "eval_steps": 4, "logging_steps": 1}
DEFAULTS = SHAPE | LENGTH | {"eval_rows": 4, "sample_tokens": 2}


def words(**knobs):
    """The command line of a small training; a value None leaves the knob to train.py."""
    knobs = DEFAULTS | knobs
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in knobs.items() if v is not None}
    return [f"--{name}={text}" for name, text in texts.items()]


def start_server():
    """Start the server with the path and the thread count that its children inherit."""
    before = dict(os.environ)
    os.environ.update(
        ONE_THREAD, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), before.get("PYTHONPATH")]))
    )
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(log, env, function, args):
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    function(*args)


def training(argv, before=None):
    """What `python train.py ARGV` does, after `before()`."""
    sys.argv = ["train.py", *argv]
    if before:
        before()
    run(train.main, train.PretrainConfig, train.__doc__)


def fitting(out, loader, loss_fn, validate, knobs):
    """`fit` on a tiny model with nouns of the test's own: no text, no tokenizer; `knobs` as in `words`."""
    knobs = {k: v for k, v in knobs.items() if k not in ("eval_rows", "sample_tokens")}
    cfg = configure(
        train.PretrainConfig, [*words(output_dir=out, eval_rows=None, sample_tokens=None, **knobs)]
    )

    def main(cfg):
        with train.open_world(cfg) as world:
            torch.manual_seed(cfg.seed)
            model = train.Llama(train.narrow(cfg, train.ModelConfig))
            read = lambda model, folder: train.load_weights(model, folder / "model.safetensors")
            train.fit(cfg, model, loader, loss_fn, world, validate, train.save_model, read)

    sys.argv = ["fit"]
    with exit_two():
        main(cfg)


@contextlib.contextmanager
def exit_two():
    try:
        yield
    except train.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Run:
    """A training that runs, on one rank or several."""

    def __init__(self, log, function, args, ranks=1):
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = []
        for rank in range(ranks):
            env = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self.ranks.append(CONTEXT.Process(target=_child, args=(self.log, env, function, args)))
            self.ranks[-1].start()

    @property
    def pid(self):
        return self.ranks[0].pid

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def alive(self):
        return any(p.is_alive() for p in self.ranks)

    def wait(self):
        """The exit status of every rank; a rank that hangs fails the test."""
        end = time.monotonic() + PATIENCE
        for p in self.ranks:
            p.join(max(0.1, end - time.monotonic()))
        if self.alive:
            self.kill()
            raise AssertionError(f"hung: {self.text}")
        return [p.exitcode for p in self.ranks]

    def kill(self):
        for p in self.ranks:
            p.kill()
        for p in self.ranks:
            p.join()

    def until(self, ready):
        """Waits for ready() while the run lives."""
        end = time.monotonic() + PATIENCE
        while not ready():
            assert self.alive and time.monotonic() < end, f"ended or hung too early: {self.text}"
            time.sleep(0.002)
        return self


def begin(out, ranks=1, before=None, **knobs):
    """Starts a training of `out` and returns the Run."""
    argv = words(output_dir=out, **knobs)
    return Run(Path(out).with_suffix(".log"), training, (argv, before), ranks)


def train_to_end(out, ranks=1, before=None, **knobs):
    """Trains and returns the output folder; the test fails if the training does."""
    one = begin(out, ranks, before, **knobs)
    assert one.wait() == [0] * ranks, one.text
    return Path(out)


def refused(out, ranks=1, before=None, code=2, **knobs):
    """Trains, expecting exit status 2 and a single line of error, which it returns; what stands above is lost."""
    one = begin(out, ranks, before, **knobs)
    codes, text = one.wait(), one.text
    assert codes[0] == code, (codes, text)
    assert "Traceback" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert errors, text
    assert text.splitlines()[-1].startswith("error: "), text
    return errors[0]


# ---- what a run left behind


def tensors(folder):
    """Every tensor and number of a checkpoint by name: weights, optimizers, counters, random states; no times."""
    found = dict(safetensors.torch.load_file(folder / "model.safetensors"))

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)) and any(
            isinstance(v, (dict, list, torch.Tensor)) for v in value
        ):
            for number, inner in enumerate(value):
                walk(f"{name}.{number}", inner)
        else:
            found[name] = value

    for path in sorted((folder / "train_state").iterdir()) if (folder / "train_state").exists() else ():
        walk(path.stem, torch.load(path, weights_only=True))
    found.pop("state.seconds", None)
    return found


def differences(one, other, but=()):
    """The names of what differs between two checkpoints, bit for bit."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [name for name in a if not equal(a[name], b[name]) and not name.startswith(tuple(but))]


def records(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out, after=0):
    """What was computed at each logged step, without what was only measured (times, memory)."""
    measured = ("tokens_per_second", "memory")
    return [{k: v for k, v in r.items() if k not in measured} for r in records(out) if r["step"] > after]


def names(out):
    return sorted(p.name for p in Path(out).iterdir())
