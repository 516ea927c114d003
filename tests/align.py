"""What the tests of sft.py and dpo.py share: a small base, and runs as processes (see tests/runs.py)."""

import sys
from pathlib import Path

import torch

import dpo
import sft
from lib.config import run
from model import Llama, ModelConfig, save_model
from tests.runs import Run

PROGRAMS = {"sft": (sft, sft.SFTConfig), "dpo": (dpo, dpo.DPOConfig)}
SMALL = {
    "device": "cpu",
    "dtype": "fp32",
    "batch_size": 2,
    "warmup_steps": 2,
    "logging_steps": 1,
    "lora_r": 4,
}
SMALL |= {"max_steps": 8, "save_steps": 4, "eval_steps": 4, "learning_rate": 0.005}


def make_base(folder, tokenizer, template=None, seed=0, **shape):
    """Writes a base model of random weights, large enough to be taught by an adapter. Returns `folder`."""
    shape = {
        "n_layer": 2,
        "d_model": 64,
        "n_head": 4,
        "num_key_value_heads": 2,
        "d_ff": 128,
    } | shape
    torch.manual_seed(seed)
    cfg = ModelConfig(
        **({"vocab_size": 384, "sequence_length": 64, "initializer_range": 0.125} | shape)
    )
    Path(folder).mkdir(parents=True)
    model = Llama(cfg)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2  # a head this small could not say anything for sure
    save_model(model, folder)
    tokenizer.save(folder, cfg.sequence_length, template)
    return folder


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
    return Run(
        Path(out).with_suffix(".log"),
        running,
        (name, [*argv, f"--output_dir={out}"], before),
        ranks,
    )


def finished(name, out, ranks=1, **knobs):
    """Runs `name` into `out`, which it returns, to a good end."""
    one = begin(name, out, ranks, **knobs)
    assert one.wait() == [0] * ranks, one.text
    return Path(out)


def refused(name, out, **knobs):
    """Runs `name`, expecting one line that says why not and exit status 2; returns the line."""
    one = begin(name, out, **knobs)
    codes, lines = one.wait(), one.text.splitlines()
    assert codes == [2], one.text
    assert lines[-1].startswith("error: "), one.text
    assert "Traceback" not in one.text
    return lines[-1]
