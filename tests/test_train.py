"""train.py: schedule, accumulation, clipping, validation, log, skipped steps, what is refused."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import TokenStream
from lib.config import UserError, configure, narrow
from lib.runtime import open_world, tune_cpu
from lib.tokenizer import Tokenizer
from model import Llama, ModelConfig, linear_cross_entropy, load_model, next_token_loss
from tests.runs import (
    Run,
    begin_fit,
    differences,
    losses,
    names,
    records,
    refused,
    tensors,
    training,
    words,
)
from tests.runs import train_to_end as trained
from train import (
    Clock,
    LoopConfig,
    PretrainConfig,
    lr_at,
    total_steps,
    with_steps,
    with_vocab_size,
    with_warmup,
)


def schedule(**knobs):
    return LoopConfig(learning_rate=1.0, min_lr=0.1, **knobs)


# ---- the schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.01),  # 1 / 100
        (49, 0.5),
        (99, 1.0),  # the top of the warmup
        (100, 1.0),  # the cosine's first point
        (325, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the cosine
        (550, 0.55),  # half of it
        (775, 0.1 + 0.9 * 0.5 * (1 - math.sqrt(0.5))),
        (1000, 0.1),
    ],
)
def test_the_learning_rate_rises_to_its_top_and_falls_as_a_cosine_to_its_floor(step, expected):
    cfg = schedule(warmup_steps=100, max_steps=1000)
    assert lr_at(cfg, step, step / 1000, 1000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(49, 0.5), (100, 1.0), (750, 1.0), (800, 0.82), (875, 0.55), (1000, 0.1)],
)
def test_with_wsd_decay_it_stays_at_its_top_and_falls_as_a_line(step, expected):
    cfg = schedule(warmup_steps=100, max_steps=1000, wsd_decay=0.25)
    assert lr_at(cfg, step, step / 1000, 1000) == pytest.approx(expected, abs=1e-12)


def test_the_floor_is_a_tenth_unless_it_is_given_and_no_warmup_starts_at_the_top():
    for knobs, floor in (({}, 0.05), ({"min_lr": 0.0}, 0.0)):
        cfg = LoopConfig(learning_rate=0.5, warmup_steps=20, **knobs)
        assert lr_at(cfg, 200, 1.0, 200) == pytest.approx(floor)
    assert lr_at(schedule(warmup_steps=0, max_steps=10), 0, 0.0, 10) == 1.0
    assert lr_at(schedule(warmup_steps=10, max_steps=10), 9, 0.9, 10) == 1.0


@pytest.mark.parametrize("decay", [None, 0.5, 0.7, 1.0])
def test_the_schedule_never_jumps(decay):
    cfg = schedule(warmup_steps=400, max_steps=1000, wsd_decay=decay)
    rates = [lr_at(cfg, step, step / 1000, 1000) for step in range(1001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 1 / 400 + 1e-9
    assert max(rates) == 1.0


@pytest.mark.parametrize("decay", [None, 0.5, 1.0])
@pytest.mark.parametrize("steps", [7, 500, 100_000], ids="{} steps fit in".format)
def test_a_time_box_warms_up_in_its_first_tenth_and_reaches_its_floor(steps, decay):
    cfg = schedule(warmup_steps=100, max_minutes=5, wsd_decay=decay)
    clock = Clock(cfg, None)
    rates = []
    for step in range(steps):
        progress = clock.progress(step, 300 * step / steps)
        rates.append(lr_at(cfg, step, progress, None))
    assert max(rates) == pytest.approx(1.0, abs=0.02 if steps > 7 else 0.1)
    assert steps == 7 or max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.05
    assert clock.progress(steps, 300.0) == 1.0
    assert lr_at(cfg, steps, 1.0, None) == pytest.approx(0.1)


def test_the_clock_ends_the_run_by_steps_or_by_time_whichever_comes_first():
    both = Clock(schedule(max_minutes=1, max_steps=100), 100)
    assert both.progress(50, 6.0) == 0.5
    assert both.progress(50, 54.0) == 0.9
    assert Clock(schedule(max_steps=10, warmup_steps=0), 10).progress(10, 0.0) == 1.0
    assert Clock(schedule(max_minutes=2), None, before=60.0).seconds >= 60.0  # of before a resume


@pytest.mark.parametrize(
    ("knobs", "ranks", "steps"),
    [
        ({"max_steps": 7}, 2, 7),
        ({"num_train_epochs": 0.5}, 2, 32),  # 500 / 16: a step that is begun counts
        ({}, 1, 125),
        ({"max_minutes": 1}, 1, None),
        ({"max_minutes": 1, "num_train_epochs": 1}, 1, 125),
    ],
)
def test_the_number_of_steps_comes_from_steps_epochs_or_the_clock(knobs, ranks, steps):
    batch = {"batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 0}
    assert total_steps(LoopConfig(**batch, **knobs), 1000, ranks) == steps


def test_tokens_become_steps_of_all_ranks():
    batch = {"batch_size": 4, "gradient_accumulation_steps": 2, "sequence_length": 100}
    cfg = configure(PretrainConfig, [f"--{key}={value}" for key, value in batch.items()])
    for tokens, ranks, steps in (("0.008M", 1, 10), ("8001", 1, 11), ("8000", 2, 5), ("1", 2, 1)):
        asked = [f"--{key}={value}" for key, value in batch.items()] + [f"--tokens={tokens}"]
        assert with_steps(configure(PretrainConfig, asked), ranks).max_steps == steps
    assert with_steps(cfg, 2) == cfg
    for warmup, expected in ((None, None), (0, 0), (3, 3), (1000, 10)):  # of 100 steps
        of_preset = configure(PretrainConfig, [*asked, f"--warmup_steps={warmup}"])
        assert with_steps(dataclasses.replace(of_preset, tokens=80_000)).warmup_steps == expected
    with pytest.raises(UserError, match="leave one out"):
        configure(PretrainConfig, ["--tokens=9", "--max_steps=9"])


@pytest.mark.parametrize(
    ("knobs", "total", "warmup", "line"),
    [
        ({}, 1000, 100, None),
        ({}, 999, 99, "warmup_steps: 99, a tenth of this run, instead of 100"),
        ({}, 9, 0, "warmup_steps: 0, a tenth of this run, instead of 100"),
        ({"warmup_steps": 60}, 60, 60, None),  # a number holds: so older checkpoints resume
        ({"warmup_steps": 61}, 60, 6, "warmup_steps: 6, a tenth of this run, instead of 61"),
        ({"warmup_steps": 0}, 60, 0, None),
        ({"max_minutes": 1}, None, 100, None),  # lr_at ends it after a tenth of the time
        ({"max_minutes": 1, "warmup_steps": 61}, 60, 61, None),
    ],
)
def test_a_warmup_is_a_tenth_of_the_run_at_most_or_as_long_as_asked_for(knobs, total, warmup, line):
    lines = []
    cfg = with_warmup(LoopConfig(max_steps=total, **knobs), total, lines.append)
    assert (cfg.warmup_steps, lines) == (warmup, [line] if line else [])
    assert with_warmup(cfg, total, lines.append) == cfg  # a run.json as a preset
    if not cfg.max_minutes:
        rates = [lr_at(cfg, step, step / total, total) for step in range(total)]
        assert rates.index(max(rates)) == max(0, warmup - 1)


# ---- learning


class Counting:
    """Rows that count upwards from a random number."""

    blocks, period = 64, 0

    def batch(self, step, micro, rank, accumulation):
        start = np.random.RandomState(step).randint(0, 32, size=(4, 1))
        rows = (start + np.arange(17)) % 32
        return {"ids": rows[:, :-1].copy(), "labels": rows[:, 1:].copy(), "count": 64}


def no_validation(model):
    return {}


def fit(out, loader, loss_fn=next_token_loss, validate=no_validation, status=0, **more):
    """Runs `fit` on a loader and a loss of the test's own, expecting an exit status."""
    one = begin_fit(out, loader, loss_fn, validate, **more)
    assert set(one.wait()) == {status}, one.text
    return one


def test_a_model_that_learned_to_count_goes_on_counting(tmp_path):
    fit(tmp_path / "run", Counting(), max_steps=120, save_steps=1000, eval_steps=1000)
    model = load_model(tmp_path / "run" / "final")
    ids = [5]
    while len(ids) < 16:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids == list(range(5, 21))


class Masked:
    """Four rows a step, `batch_size` at a time, of 1, 3, 9 and 16 labels; none in step `empty`."""

    blocks, period = 64, 0

    def __init__(self, batch_size, empty=None):
        self.batch_size, self.empty = batch_size, empty

    def batch(self, step, micro, rank, accumulation):
        rows = np.random.RandomState(step).randint(0, 32, size=(4, 17))
        ids, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
        for row, kept in zip(labels, (0, 0, 0, 0) if step == self.empty else (1, 3, 9, 16)):
            row[kept:] = -100
        mine = slice(micro * self.batch_size, (micro + 1) * self.batch_size)
        return {"ids": ids[mine], "labels": labels[mine], "count": int((labels[mine] >= 0).sum())}


def test_four_batches_of_one_row_train_as_one_batch_of_four_whatever_is_supervised(tmp_path):
    knobs, outs = {"max_steps": 6, "learning_rate": 0.001}, [tmp_path / "whole", tmp_path / "parts"]
    for out, rows in zip(outs, (4, 1), strict=True):
        times = {"batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        fit(out, Masked(rows), **times, **knobs)
    whole, parts = ([r for r in records(out) if "loss" in r] for out in outs)
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["tokens"] == b["tokens"] == 29 * a["step"]
    one, other = (load_model(out / "final").state_dict() for out in outs)
    assert all((one[name] - other[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_clipped_to_max_grad_norm_over_all_ranks(tmp_path, ranks):
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    for limit in (0.01, 1e9, 0):  # 0: no clipping
        out = tmp_path / str(limit)
        fit(out, Counting(), ranks=ranks, max_steps=1, warmup_steps=0, max_grad_norm=limit)
        saved = tensors(out / "step_000001")
        moments = [value for name, value in saved.items() if name.endswith("exp_avg")]
        norm = 10 * torch.cat([moment.flatten() for moment in moments]).norm().item()
        (logged,) = [r["grad_norm"] for r in records(out) if "grad_norm" in r]
        assert logged > 1
        assert norm == pytest.approx(min(limit or 1e9, logged), rel=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_run(tmp_path, tiny_dataset):
    one, again, other = (
        trained(tmp_path / name, data_path=tiny_dataset, dropout=0.1, dtype="bf16", seed=seed)
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    weights = [(out / "final" / "model.safetensors").read_bytes() for out in (one, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert losses(one) == losses(again) != losses(other)


# ---- validation and the log


def draws(model):
    torch.rand(3)
    np.random.rand()
    return {"val_loss": 1.0}


def dropping(model, batch):
    assert model.training  # validation must have given the mode back
    return next_token_loss(model, batch)


def test_validation_changes_nothing_even_if_it_draws_random_numbers(tmp_path, tiny_dataset):
    often, never = tmp_path / "often", tmp_path / "never"
    for out, eval_steps in ((often, 1), (never, 99)):
        knobs = {"max_steps": 6, "dropout": 0.1, "eval_steps": eval_steps}
        fit(out, Counting(), dropping, draws, **knobs)
    assert not differences(often / "final", never / "final")
    assert sum("val_loss" in r for r in records(often)) == 6
    assert sum("val_loss" in r for r in records(never)) == 1

    knobs = {"data_path": tiny_dataset, "dropout": 0.1}
    one = trained(tmp_path / "text-often", eval_steps=1, sample_tokens=8, **knobs)
    other = trained(tmp_path / "text-never", eval_steps=99, sample_tokens=0, **knobs)
    assert not differences(one / "final", other / "final")


class Improving:
    """A validation that is best the second time."""

    def __init__(self):
        self.values = iter([3.0, 1.0, 2.0, 2.5, 2.0, 4.0])

    def __call__(self, model):
        return {"val_loss": next(self.values)}


def test_the_best_checkpoint_outlives_the_last_ones(tmp_path):
    knobs = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "keep_last": 2}
    fit(tmp_path / "out", Counting(), validate=Improving(), **knobs)
    steps = ["step_000004", "step_000010", "step_000012"]
    assert [n for n in names(tmp_path / "out") if n.startswith("step")] == steps
    weights = [load_model(tmp_path / "out" / n).lm_head.weight for n in (*steps, "final")]
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[3])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset):
    out = tmp_path_factory.mktemp("train") / "finished"
    return trained(out, data_path=tiny_dataset, save_steps=2, keep_last=2, eval_rows=100)


def test_the_log_holds_a_line_for_each_step_and_each_validation(finished):
    steps = [r for r in records(finished) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    expected = {"step", "loss", "lr", "grad_norm", "tokens"}
    expected |= {"tokens_per_second", "memory", "seconds"}
    assert all(r.keys() == expected for r in steps)
    assert [r["tokens"] for r in steps] == [32 * n for n in range(1, 9)]
    assert [r["lr"] for r in steps][:3] == pytest.approx([0.005, 0.01, 0.01])
    evaluations = [r for r in records(finished) if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [4, 8]
    assert all(r.keys() == {"step", "val_loss", "val_bits_per_byte", "sample"} for r in evaluations)
    text = finished.with_suffix(".log").read_text()
    assert "tok/s" in text
    assert "sample: 'The" in text
    numbers = {k: v for k, v in evaluations[-1].items() if k.startswith("val_")}
    result = {"steps": 8, "tokens": 256, "loss": steps[-1]["loss"], "output_dir": str(finished)}
    last = json.loads(text.splitlines()[-1])
    assert last.pop("seconds") > 0
    assert last == result | numbers


def test_validation_reads_the_val_shards_and_nothing_else(finished, tiny_dataset):
    model, last = load_model(finished / "final"), records(finished)[-1]
    lengths = torch.from_numpy(Tokenizer.load(finished / "final").token_bytes())

    def score(split):
        batch = TokenStream(tiny_dataset, split, 16, 2).rows(0, 100)
        ids, labels = torch.from_numpy(batch["ids"]), torch.from_numpy(batch["labels"])
        hidden = model.model(ids).detach().flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten(), summed=False)
        nats = loss.double().sum().item()
        return nats / batch["count"], nats / math.log(2) / lengths[labels[labels >= 0]].sum().item()

    assert (last["val_loss"], last["val_bits_per_byte"]) == pytest.approx(score("val"), rel=1e-5)
    assert last["val_loss"] != pytest.approx(score("train")[0], rel=1e-3)


# ---- what is left on the disk


def test_the_output_holds_the_last_checkpoints_the_log_and_the_model(finished):
    assert names(finished) == ["final", "metrics.jsonl", "run.lock", "step_000006", "step_000008"]
    one, other = (finished / name / "model.safetensors" for name in ("final", "step_000008"))
    assert one.read_bytes() == other.read_bytes()


def test_the_final_folder_opens_as_a_model_with_its_tokenizer(finished, tiny_dataset):
    final = finished / "final"
    shape = narrow(configure(PretrainConfig, [str(final / "run.json")]), ModelConfig)
    plain = {"model_name": "custom", "attention_dropout": 0.0, "hidden_dropout": 0.0}
    plain["head_dim"] = shape.head_width
    assert load_model(final).cfg == dataclasses.replace(shape, **plain)
    tokenizers = Tokenizer.load(final), Tokenizer.load(tiny_dataset / "tokenizer.model")
    assert tokenizers[0].sha256 == tokenizers[1].sha256
    assert json.loads((final / "tokenizer_config.json").read_text())["model_max_length"] == 16


@pytest.mark.parametrize("folder", ["step_000006", "final"])
def test_the_run_json_of_a_run_is_a_preset_that_runs_it_again(finished, tmp_path, folder):
    preset = finished / folder / "run.json"
    assert configure(PretrainConfig, [str(preset)]).max_steps == 8
    one = Run(tmp_path / "again.log", again, (preset, tmp_path / "again"))
    assert one.wait() == [0], one.text
    assert not differences(tmp_path / "again" / "step_000008", finished / "step_000008")
    assert losses(tmp_path / "again") == losses(finished)


def again(preset, out):
    training([str(preset), f"--output_dir={out}"])


def test_a_finished_run_that_is_resumed_does_nothing_and_says_so(finished, tmp_path, tiny_dataset):
    out, kept = shutil.copytree(finished, tmp_path / "out"), ("run.lock", "metrics.jsonl")
    files = lambda: [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in kept]
    before = {p: p.stat().st_mtime_ns for p in files()}
    knobs = {"data_path": tiny_dataset, "save_steps": 2, "keep_last": 2, "eval_rows": 100}
    trained(out, resume_from_checkpoint="auto", **knobs)
    text = out.with_suffix(".log").read_text()
    assert "this run is complete" in text
    assert json.loads(text.splitlines()[-1])["val_loss"] == records(finished)[-1]["val_loss"]
    assert losses(out) == losses(finished)
    assert {p: p.stat().st_mtime_ns for p in files()} == before


def test_it_trains_on_a_cpu_with_nothing_said_about_precision(tmp_path, tiny_dataset):
    out = trained(tmp_path / "plain", data_path=tiny_dataset, dtype=None, max_steps=2)
    assert (out / "final" / "model.safetensors").is_file()


def test_the_vocabulary_is_that_of_the_data_unless_one_is_named(tmp_path, tiny_dataset):
    out = trained(tmp_path / "out", data_path=tiny_dataset, vocab_size=None, max_steps=2)
    assert load_model(out / "final").cfg.vocab_size == 384
    assert json.loads((out / "final" / "run.json").read_text())["vocab_size"] == 384
    assert with_vocab_size(configure(PretrainConfig, [])).vocab_size == 32768  # without data
    assert with_vocab_size(PretrainConfig(vocab_size=99), 384).vocab_size == 99


# ---- learning rates


def test_adamw_has_a_learning_rate_of_its_own_beside_muon(tmp_path):
    knobs = {"optimizer": "muon", "max_steps": 1, "warmup_steps": 0, "weight_decay": 0}
    cfg = configure(PretrainConfig, words(vocab_size=32))
    torch.manual_seed(cfg.seed)
    start = dict(Llama(narrow(cfg, ModelConfig)).named_parameters())
    moved = []
    for rate in (None, 0.03):
        out = tmp_path / str(rate)
        fit(out, Counting(), adamw_learning_rate=rate, learning_rate=0.01, **knobs)
        weights = load_model(out / "final").named_parameters()
        moved.append({n: (p - start[n]).abs().max().item() for n, p in weights})
    for name in start:  # AdamW's first step is its learning rate, whatever the gradient
        matrix = "proj" in name
        assert moved[1][name] == pytest.approx(moved[0][name] * (1 if matrix else 3), rel=1e-3)
        assert matrix or moved[0][name] == pytest.approx(0.01, rel=1e-3)


def test_adamw_alone_has_one_learning_rate():
    with pytest.raises(UserError, match="adamw_learning_rate stands beside optimizer=muon"):
        configure(PretrainConfig, ["--adamw_learning_rate=0.01"])


# ---- steps that must not be applied


class PoisonedLoss:
    """The gradient of step `step` is not a number; with `always` nor is any later one."""

    def __init__(self, step, always=False):
        self.step, self.always, self.calls = step, always, 0

    def __call__(self, model, batch):
        self.calls += 1
        loss, stats = next_token_loss(model, batch)
        bad = self.calls == self.step or (self.always and self.calls > self.step)
        return (loss * math.nan if bad else loss), stats


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were(tmp_path, optimizer):
    out, knobs = tmp_path / "run", {"max_steps": 5, "save_steps": 1, "keep_last": 9}
    one = fit(out, Counting(), PoisonedLoss(3), optimizer=optimizer, **knobs)
    assert "warning: step 3 skipped: gradient norm is nan (1 in a row)" in one.text
    changed = differences(out / "step_000002", out / "step_000003")
    counters = ["state.bad_steps", "state.step", "state.tokens"]
    assert sorted(n for n in changed if not n.endswith(".lr")) == counters
    assert differences(out / "step_000003", out / "step_000004", but=("state.", "rng_"))
    assert tensors(out / "step_000004")["state.bad_steps"] == 0
    skipped = [r for r in records(out) if "skipped" in r]
    assert [(r["step"], r["grad_norm"]) for r in skipped] == [(3, None)]
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_too_many_such_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path):
    knobs = {"max_steps": 50, "save_steps": 2, "max_bad_steps": 3, "warmup_steps": 0}
    one = fit(tmp_path / "run", Counting(), PoisonedLoss(6, always=True), status=4, **knobs)
    assert "Traceback" not in one.text
    last, folder = one.text.splitlines()[-1], tmp_path / "run" / "step_000006"
    assert last.startswith("error: 3 steps in a row were skipped, the last because gradient norm")
    assert f"the last good checkpoint is {folder}" in last
    assert all(torch.isfinite(t).all() for t in load_model(folder).state_dict().values())


def poisoned_on_rank_one(model, batch):
    loss, stats = next_token_loss(model, batch)
    return (loss * math.nan if torch.distributed.get_rank() == 1 else loss), stats


def test_a_bad_gradient_on_one_rank_is_skipped_on_all(tmp_path):
    knobs = {"max_steps": 50, "max_bad_steps": 3, "warmup_steps": 0, "save_steps": 1}
    one = fit(tmp_path / "run", Counting(), poisoned_on_rank_one, ranks=2, status=4, **knobs)
    assert "3 steps in a row were skipped" in one.text
    changed = differences(tmp_path / "run" / "step_000001", tmp_path / "run" / "step_000002")
    assert not [name for name in changed if name.startswith("model")]


def test_a_step_without_a_supervised_token_is_skipped_not_divided_by_zero(tmp_path):
    knobs = {"max_steps": 5, "save_steps": 1, "keep_last": 9, "batch_size": 4}
    one, out = fit(tmp_path / "run", Masked(4, empty=2), **knobs), tmp_path / "run"
    assert "warning: step 3 skipped: no token of it is supervised (1 in a row)" in one.text
    weights = [(out / f"step_00000{n}" / "model.safetensors").read_bytes() for n in (2, 3, 4)]
    assert weights[0] == weights[1] != weights[2]
    assert [r["loss"] for r in records(out) if "loss" in r and r["step"] == 3] == [0.0]


# ---- what is refused before anything is trained


REFUSED = {
    "another vocabulary": ({"vocab_size": 512}, "is 512, but .* of 384; use --vocab_size=384"),
    "no GPU": ({"device": "cuda"}, "device=cuda: this machine has no CUDA device; use --device="),
    "fp16 on a CPU": ({"dtype": "fp16"}, "dtype=fp16 needs CUDA; use --dtype=bf16 or --dtype=fp32"),
    "NaN": ({"learning_rate": "nan"}, "learning_rate must be float > 0"),
    "no learning": ({"learning_rate": 0}, "learning_rate must be float > 0"),
    "a high floor": ({"min_lr": 1}, "min_lr 1.0 is more than learning_rate 0.01; lower it"),
    "no such metric": ({"early_stopping_metric": "val_los"}, "must be val_loss.val_bits_per_byte"),
    "no layers": ({"n_layer": 0}, r"n_layer must be int 1\.\.512"),
    "heads that do not divide": ({"d_model": 30}, "d_model 30 is not divisible by n_head 4"),
    "too little data": ({"sequence_length": 100000}, "only [0-9]+ tokens, need at least 100001"),
    "no data": ({"data_path": "/nowhere"}, "/nowhere"),
    "a file as a folder": ({"output_dir": "/dev/null/out"}, "output_dir /dev/null/out: Not a dir"),
    "no output": ({"output_dir": ""}, "output_dir must name a folder, got an empty string"),
    "a text file as data": ({"data_path": __file__}, "test_train.py: no prepared dataset"),
    "a wrong checkpoint": (
        {"resume_from_checkpoint": "step_9"},
        "step_9: .*; name a step_.* or au",
    ),
    "no checkpoints": ({"keep_last": 0}, "keep_last must be"),
}


@pytest.mark.parametrize(("knobs", "message"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_be_is_refused_in_one_line(tmp_path, tiny_dataset, knobs, message):
    if knobs.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    line = refused(tmp_path / "out", **({"data_path": tiny_dataset} | knobs))
    assert re.search(message, line), line
    assert not (tmp_path / "out" / "step_000000").exists()


def test_a_leftover_of_a_cluster_in_the_environment_is_named(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun"
    with pytest.raises(UserError, match=message), open_world(PretrainConfig(device="cpu")):
        pass


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, 1, [8]),
        ({}, 3, [2]),
        ({"OMP_NUM_THREADS": "3"}, 1, []),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2, [4]),  # torchrun's own 1
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "none"}, 2, []),
    ],
)
def test_the_cores_are_shared_out_unless_a_number_of_threads_is_asked_for(
    environment, ranks, expected, monkeypatch
):
    threads = []
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    tune_cpu(ranks)
    assert threads == expected


# ---- beside other processes


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="of Linux")
@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_if_the_machine_is_busy(given):
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    show = "import os, train; print(os.environ.get('OMP_WAIT_POLICY'))"
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        output = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True)
    finally:
        busy.kill()
        busy.wait()
    assert output.stdout.decode().strip() == (given or "PASSIVE")
