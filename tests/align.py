"""Shared by the tests of sft.py and dpo.py: a small base, and runs as processes."""

import sys
from pathlib import Path

import numpy as np
import torch

import dpo
import sft
from lib.config import run
from model import Llama, ModelConfig, save_model
from tests.runs import Run

PROGRAMS = {"sft": (sft, sft.SFTConfig), "dpo": (dpo, dpo.DPOConfig)}
SHAPE = {"n_layer": 2, "d_model": 64, "n_head": 4, "num_key_value_heads": 2, "d_ff": 128}
SHAPE |= {"vocab_size": 384, "sequence_length": 64, "initializer_range": 0.125}
SMALL = {"device": "cpu", "dtype": "fp32", "batch_size": 2, "lora_r": 4, "learning_rate": 0.005}
SMALL |= {"max_steps": 8, "save_steps": 4, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 2}


def make_base(folder, tokenizer, template=None, seed=0, **shape):
    """Writes a base of random weights that an adapter can teach something. Returns `folder`."""
    torch.manual_seed(seed)
    cfg = ModelConfig(**(SHAPE | shape))
    Path(folder).mkdir(parents=True)
    model = Llama(cfg)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2  # a head this small could not say anything for sure
    save_model(model, folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


def tensors(batch):
    return {k: torch.from_numpy(v) for k, v in batch.items() if isinstance(v, np.ndarray)}


def running(name, argv, before=None):
    """`python NAME.py ARGV`, after `before()`."""
    module, config = PROGRAMS[name]
    sys.argv = [f"{name}.py", *argv]
    if before:
        before()
    run(module.main, config, module.__doc__)


def begin(name, out, ranks=1, before=None, **knobs):
    """Starts `name` into `out`; a knob None is left to the program. Returns the Run."""
    values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in (SMALL | knobs).items()}
    argv = [f"--{key}={value}" for key, value in values.items() if value is not None]
    argv = [*argv, f"--output_dir={out}"]
    return Run(Path(out).with_suffix(".log"), running, (name, argv, before), ranks)


def finished(name, out, ranks=1, **knobs):
    """Runs `name` into `out`, which it returns, to a good end."""
    process = begin(name, out, ranks, **knobs)
    assert process.wait() == [0] * ranks, process.text
    return Path(out)


def refused(name, out, **knobs):
    """Runs `name`, expecting one line that says why not and exit status 2; returns the line."""
    process = begin(name, out, **knobs)
    codes, lines = process.wait(), process.text.splitlines()
    assert codes == [2], process.text
    assert lines[-1].startswith("error: "), process.text
    assert "Traceback" not in process.text
    return lines[-1]
