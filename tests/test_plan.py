"""The plan against tensors that torch holds, an H100's measurements, and a run of the command."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lib.config import UserError, configure
from lib.runtime import datasheets
from model import Llama, ModelConfig, choose_attention, next_token_loss
from tests import ROOT
from tools.plan import card_plan, card_seconds, memory, tokens_per_step
from train import PretrainConfig, make_optimizers

SHAPE = {"d_model": 64, "n_head": 4, "d_ff": 160, "vocab_size": 128, "sequence_length": 32}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_moments_are_those_that_the_optimizers_hold(optimizer):
    cfg = PretrainConfig(**SHAPE, n_layer=2, optimizer=optimizer, batch_size=2)
    model, held = Llama(ModelConfig(**SHAPE, n_layer=2)), 0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for each in make_optimizers(cfg, model):
        each.step()
        held += sum(4 * t.numel() for s in each.state.values() for t in s.values() if t.ndim)
    parts = memory(cfg, "cpu", 4, False)
    assert parts[f"{optimizer}'s moments (fp32)"] == pytest.approx(held, rel=0.01)
    assert parts["weights (fp32)"] == sum(4 * p.numel() for p in model.parameters())


def peak_of_a_step(cfg, dtype):
    """The most bytes that tensors held in a training step, by torch's profiler."""
    model = Llama(ModelConfig(**SHAPE, n_layer=cfg.n_layer)).train()
    model.use_attention(choose_attention(torch.device("cpu"), 32, dtype)[0])
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    ids = torch.zeros(cfg.batch_size, 32, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = next_token_loss(model, {"ids": ids, "labels": ids})
        loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return 4 * sum(p.numel() for p in model.parameters()) + peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_is_near_that_of_a_real_step(dtype, checkpointing):
    cfg = PretrainConfig(**SHAPE, n_layer=8, batch_size=64, gradient_checkpointing=checkpointing)
    parts = memory(cfg, "cpu", dtype.itemsize, False)
    predicted = parts["peak"] - parts["adamw's moments (fp32)"]
    assert predicted == pytest.approx(peak_of_a_step(cfg, dtype), rel=0.2)


# benchmarks/RESULTS.md, H100, compiled, bf16: rows, tokens per second, peak bytes
H100 = [
    ("tiny", 16, 1_987_641, 1.62e9),
    ("small", 8, 628_084, 3.22e9),
    ("small", 32, 756_028, 9.65e9),
    ("base", 4, 204_947, 9.39e9),
    ("base", 16, 233_846, 28.55e9),
]


@pytest.mark.parametrize(("name", "rows", "speed", "peak"), H100)
def test_what_an_h100_measured_is_predicted(name, rows, speed, peak):
    words = ["--optimizer=adamw", "--adamw_learning_rate=none", "--vocab_size=32768"]
    cfg = configure(PretrainConfig, [str(ROOT / f"configs/{name}.json"), *words])
    step = cfg.gradient_accumulation_steps * cfg.batch_size
    cfg = replace(cfg, batch_size=rows, gradient_accumulation_steps=step // rows)
    cfg = replace(cfg, deterministic=False)
    # larger pieces are faster than predicted, which knows nothing of launches
    seconds = card_seconds(cfg, datasheets()["h100"])
    assert 0.78 * speed < tokens_per_step(cfg) / seconds < 1.02 * speed
    assert memory(cfg)["peak"] == pytest.approx(peak, rel=0.2)


def test_a_plan_for_a_card_says_whether_it_fits_and_which_cards_are_known():
    base = configure(PretrainConfig, [str(ROOT / "configs/base.json"), "--max_steps=5000"])
    plans = {card: card_plan(base, card) for card in datasheets()}
    assert re.search(r"fits +NO", plans["rtx3070"])  # 8 GB, and base needs 11
    assert re.search(r"fits +yes", plans["h100"])
    assert " 655,360,000\n" in plans["h100"]
    with pytest.raises(UserError, match=r"plan_gpu: 'h101' is not known; use one of .*rtx4090"):
        card_plan(base, "h101")


def test_a_plan_without_data_times_this_machine_and_writes_nothing(tmp_path):
    words = "--n_layer=2 --d_model=32 --n_head=2 --d_ff=64 --vocab_size=128 --tokens=0.0256M"
    words += " --sequence_length=32 --batch_size=4 --data_path=nowhere --plan --device=cpu"
    command = [sys.executable, str(ROOT / "train.py"), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = ["25,600", "4 of 4 rows", "measured", "hours"]
    assert [text for text in expected if text not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []
