"""Trainings as real processes: each rank a fork of a server that has imported everything (warm.py).

A test changes a training - a limit, a patched call, a loss of its own, a kill in the middle of
something - by a function that runs in it first: `before`.
"""

import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import dpo
import grpo
import model
import sft
import train
from lib import curves
from lib.config import narrow, run
from tests import ROOT
from tests.conftest import free_port
from tests.warm import Fork

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE = 240  # seconds after which a process counts as hung; nothing else here is timed

DRAW_CURVES = curves.draw_curves

PROGRAMS = {
    "train": (train, train.PretrainConfig),
    "sft": (sft, sft.SFTConfig),
    "dpo": (dpo, dpo.DPOConfig),
    "grpo": (grpo, grpo.GRPOConfig),
}
LENGTH = {"device": "cpu", "dtype": "fp32", "batch_size": 2, "max_steps": 8, "warmup_steps": 2}
LENGTH |= {"save_steps": 4, "eval_steps": 4, "logging_steps": 1}
SHAPE = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 64}
SHAPE |= {"vocab_size": 384, "sequence_length": 16}
DEFAULTS = SHAPE | LENGTH | {"learning_rate": 0.01, "eval_rows": 4, "sample_tokens": 2}
TUNING = LENGTH | {"lora_r": 4, "learning_rate": 0.005}
BASE = SHAPE | {"d_model": 64, "d_ff": 128, "sequence_length": 64, "initializer_range": 0.125}


def words(program="train", **knobs):
    """The command line of a small training; a value None leaves the knob to the program."""
    knobs = (DEFAULTS if program == "train" else TUNING) | knobs
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in knobs.items()}
    return [f"--{name}={text}" for name, text in texts.items() if text != "None"]


def make_base(folder, tokenizer, template=None, seed=0, **shape):
    """Writes a base of random weights that an adapter can teach something. Returns `folder`."""
    torch.manual_seed(seed)
    cfg = model.ModelConfig(**(BASE | shape))
    Path(folder).mkdir(parents=True)
    base = model.Llama(cfg)
    with torch.no_grad():
        base.model.embed_tokens.weight *= 2  # a head this small could not say anything for sure
    model.save_model(base, folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


def as_tensors(batch):
    return {k: torch.from_numpy(v) for k, v in batch.items() if isinstance(v, np.ndarray)}


# ---- in the process of a training


def call():
    """What a Run has its process do: the function and the arguments pickled on its stdin."""
    curves.draw_curves = lambda *args: None  # the picture takes four times as long as the training
    function, args = pickle.load(sys.stdin.buffer)
    function(*args)


def with_curves():
    curves.draw_curves = DRAW_CURVES


def training(argv, before=None, program="train"):
    """`python PROGRAM.py ARGV`, after `before()`."""
    module, config = PROGRAMS[program]
    sys.argv = [f"{program}.py", *argv]
    if before:
        before()
    run(module.main, config, module.__doc__)


def fitting(out, loader, loss_fn, validate, knobs, before=None):
    """`fit` on a tiny model with a loader and a loss of the test's own: no text, no tokenizer."""

    def main(cfg):
        with train.open_world(cfg) as world:
            torch.manual_seed(cfg.seed)
            llama, files = (
                model.Llama(narrow(cfg, model.ModelConfig)),
                (model.save_model, model.load_weights),
            )
            train.fit(cfg, llama, loader, loss_fn, world, validate, *files)

    sys.argv = ["train.py", *words(output_dir=out, **({"vocab_size": 32} | knobs))]
    if before:
        before()
    run(main, train.PretrainConfig)


PHASES = {
    "forward": (model.Decoder, "forward"),
    "backward": (torch.Tensor, "backward"),
    "update": (train.State, "update"),
    "evaluation": (train, "evaluate"),
    "checkpoint": (train.State, "save"),
}


def strike(phase, passage, at, act, rank=None):
    """In the `passage`-th time of a phase, act() comes at the `at`-th call or return in it."""
    owner, name = PHASES[phase]
    original, left = getattr(owner, name), [passage]

    def patched(*args, **kwargs):
        left[0] -= 1
        if left[0] or rank not in (None, int(os.environ.get("RANK", 0))):
            return original(*args, **kwargs)
        count = [0]

        def profile(frame, event, argument):
            count[0] += 1
            if count[0] == at:
                act()

        sys.setprofile(profile)
        try:
            return original(*args, **kwargs)
        finally:
            sys.setprofile(None)
            os.write(1, f"{phase} took {count[0]} events\n".encode())

    setattr(owner, name, patched)


def die():
    """Ends the process as kill -9 would, but that it shows: with status 9."""
    os._exit(9)


def after_save(step, act):
    """Has act() come right after the checkpoint of that step."""
    save = train.State.save

    def patched(self, *args):
        save(self, *args)
        if self.step == step:
            act()

    train.State.save = patched


# ---- in the test


class Run:
    """A process that runs, or one for each rank; what they print is in the file `log`."""

    def __init__(self, log, function, args, ranks=1):
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | ONE_THREAD | {"PYTHONPATH": path}
        if ranks > 1:
            env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(free_port())}
        self.ranks = []
        for rank in range(ranks):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with tempfile.TemporaryFile() as stdin, open(self.log, "ab") as file:
                pickle.dump((function, args), stdin)
                stdin.seek(0)
                code = ["-c", "from tests.runs import call; call()"]
                files = [stdin.fileno(), file.fileno(), file.fileno()]
                self.ranks.append(Fork(code, env | numbers, files))

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


def begin(out, ranks=1, before=None, program="train", **knobs):
    """Starts a training into `out`. Returns the Run; its log lies beside."""
    argv = words(program, **({"output_dir": out} | knobs))
    return Run(Path(out).with_suffix(".log"), training, (argv, before, program), ranks)


def train_to_end(out, ranks=1, before=None, **knobs):
    """Trains into `out`, which it returns; the test fails if the training does."""
    process = begin(out, ranks, before, **knobs)
    assert process.wait() == [0] * ranks, process.text
    return Path(out)


def refused(out, ranks=1, before=None, **knobs):
    """Trains, expecting exit status 2; returns the last line, which says why."""
    process = begin(out, ranks, before, **knobs)
    codes, text = process.wait(), process.text
    assert codes[0] == 2, (codes, text)
    assert "Traceback" not in text, text
    assert text.splitlines()[-1].startswith("error: "), text
    return text.splitlines()[-1]


def begin_fit(out, loader, loss_fn, validate, ranks=1, before=None, **knobs):
    """Starts `fit` with a loader, a loss and a validation of the test's own."""
    args = (out, loader, loss_fn, validate, knobs, before)
    return Run(Path(out).with_suffix(".log"), fitting, args, ranks)


# ---- what a run left behind


def tensors(folder):
    """Every tensor and number of a checkpoint by name, the weights, counters and random states."""
    leaves = dict(safetensors.torch.load_file(folder / "model.safetensors"))
    nested = (dict, list, tuple, torch.Tensor)

    def add(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)) and any(isinstance(v, nested) for v in value):
            for number, inner in enumerate(value):
                add(f"{name}.{number}", inner)
        else:
            leaves[name] = value

    for path in sorted(folder.glob("train_state/*.pt")):
        add(path.stem, torch.load(path, weights_only=True))
    leaves.pop("state.seconds", None)  # the only thing that no two runs share
    return leaves


def differences(one, other, but=()):
    """Returns the names of what differs between two checkpoints; `but` are names' beginnings."""
    a, b = (
        {k: v for k, v in tensors(Path(p)).items() if not k.startswith(tuple(but))}
        for p in (one, other)
    )
    assert a.keys() == b.keys()
    same = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return [name for name, equal in zip(a, same) if not equal]


def same_weights(out, straight):
    """Returns whether `out` has every file of weights that `straight` has, byte for byte."""
    paths = [path.relative_to(straight) for path in straight.rglob("*.safetensors")]
    return paths and all((out / p).read_bytes() == (straight / p).read_bytes() for p in paths)


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
