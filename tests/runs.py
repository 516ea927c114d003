"""Trainings as real processes: each rank a fork of a server that has imported everything (tests/warm.py).

What a test does to one - a limit, a patched call, a loss of its own - is a function that runs in it first.
"""

import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

import train
from lib.config import run
from tests import ROOT
from tests.conftest import free_port
from tests.warm import Fork

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE = 240  # seconds after which a process counts as hung; nothing else here is timed

SHAPE = {
    "n_layer": 2,
    "d_model": 32,
    "n_head": 4,
    "num_key_value_heads": 2,
    "d_ff": 64,
    "vocab_size": 384,
}
SHAPE |= {
    "sequence_length": 16,
    "device": "cpu",
    "dtype": "fp32",
    "batch_size": 2,
    "learning_rate": 0.01,
}
LENGTH = {"max_steps": 8, "warmup_steps": 2, "save_steps": 4, "eval_steps": 4, "logging_steps": 1}
DEFAULTS = SHAPE | LENGTH | {"eval_rows": 4, "sample_tokens": 2}


def words(**knobs):
    """The command line of a small training; a value None leaves the knob to train.py."""
    texts = {
        k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in (DEFAULTS | knobs).items()
    }
    return [f"--{name}={text}" for name, text in texts.items() if text != "None"]


# ---- what a child does


def call():
    """What a Run has its process do: the function and the arguments that stand pickled on its stdin."""
    function, args = pickle.load(sys.stdin.buffer)
    function(*args)


def training(argv, before=None):
    """`python train.py ARGV`, after `before()`."""
    sys.argv = ["train.py", *argv]
    if before:
        before()
    run(train.main, train.PretrainConfig, train.__doc__)


def fitting(out, loader, loss_fn, validate, knobs):
    """`fit` on a tiny model with nouns of the test's own: no text, no tokenizer; `knobs` as in `words`."""

    def read_model(model, folder):
        train.load_weights(model, folder / "model.safetensors")

    def main(cfg):
        with train.open_world(cfg) as world:
            torch.manual_seed(cfg.seed)
            model = train.Llama(train.narrow(cfg, train.ModelConfig))
            train.fit(cfg, model, loader, loss_fn, world, validate, train.save_model, read_model)

    sys.argv = ["train.py", *words(output_dir=out, **knobs)]
    run(main, train.PretrainConfig)


# ---- what a test does with it


class Run:
    """A process that runs, or one for each of several ranks; what they print is in the file `log`."""

    def __init__(self, log, function, args, ranks=1):
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | ONE_THREAD | {"PYTHONPATH": path}
        world = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.ranks = []
        for rank in range(ranks):
            mine = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with tempfile.TemporaryFile() as said, open(self.log, "ab") as file:
                pickle.dump((function, args), said)
                said.seek(0)
                words = ["-c", "from tests.runs import call; call()"]
                self.ranks.append(Fork(words, env | mine, [said, file, file]))

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def alive(self):
        return any(p.is_alive() for p in self.ranks)

    def wait(self):
        """Returns the exit status of every rank; a rank that hangs fails the test."""
        end = time.monotonic() + PATIENCE
        for p in self.ranks:
            p.join(max(0, end - time.monotonic()))
        if self.alive:
            self.kill()
            raise AssertionError(f"hung: {self.text}")
        return [p.exitcode for p in self.ranks]

    def kill(self):
        for p in self.ranks:
            p.kill()
        for p in self.ranks:
            p.join()

    def signal(self, number, rank=0):
        os.kill(self.ranks[rank].pid, number)

    def until(self, ready):
        """Waits for ready() while the run lives. Returns itself."""
        end = time.monotonic() + PATIENCE
        while not ready():
            assert self.alive, f"ended too early: {self.text}"
            assert time.monotonic() < end, f"hung: {self.text}"
            time.sleep(0.002)
        return self


def begin(out, ranks=1, before=None, **knobs):
    """Starts a training into `out`. Returns the Run; its log lies beside."""
    argv = words(**({"output_dir": out} | knobs))
    return Run(Path(out).with_suffix(".log"), training, (argv, before), ranks)


def train_to_end(out, ranks=1, before=None, **knobs):
    """Trains into `out`, which it returns; the test fails if the training does."""
    one = begin(out, ranks, before, **knobs)
    assert one.wait() == [0] * ranks, one.text
    return Path(out)


def refused(out, ranks=1, before=None, **knobs):
    """Trains, expecting exit status 2 and no traceback; returns the line that says why, which is the last."""
    one = begin(out, ranks, before, **knobs)
    codes, text = one.wait(), one.text
    assert codes[0] == 2, (codes, text)
    assert "Traceback" not in text, text
    assert text.splitlines()[-1].startswith("error: "), text
    return text.splitlines()[-1]


# ---- what a run left behind


def tensors(folder):
    """Every tensor and number of a checkpoint by name: weights, optimizers, counters, random states."""
    found = dict(safetensors.torch.load_file(folder / "model.safetensors"))
    nested = (dict, list, tuple, torch.Tensor)

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)) and any(isinstance(v, nested) for v in value):
            for number, inner in enumerate(value):
                walk(f"{name}.{number}", inner)
        else:
            found[name] = value

    for path in sorted(folder.glob("train_state/*.pt")):
        walk(path.stem, torch.load(path, weights_only=True))
    found.pop("state.seconds", None)  # the only thing that no two runs share
    return found


def differences(one, other, but=()):
    """Returns the names of what differs between two checkpoints, bit for bit; `but` are names' beginnings."""
    a, b = (
        {k: v for k, v in tensors(Path(p)).items() if not k.startswith(tuple(but))}
        for p in (one, other)
    )
    assert a.keys() == b.keys()
    same = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return [name for name, equal in zip(a, same) if not equal]


def records(out):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out, after=0):
    """Returns those lines past step `after`, without what is measured and not computed."""
    measured = ("tokens_per_second", "memory", "seconds")
    return [
        {k: v for k, v in r.items() if k not in measured} for r in records(out) if r["step"] > after
    ]


def names(out):
    """Returns what lies in an output folder, but for the picture of its curves."""
    return sorted(p.name for p in Path(out).iterdir() if p.stem != "curves")
