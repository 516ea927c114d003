"""What `fit` promises holds for each of its users: at a stop, in a plan, in a time box."""

import functools
import os
import re
import signal

import pytest
import torch

import model
from lib.checkpoint import checkpoints
from tests import align, runs
from tests.conftest import write_rows
from tests.runs import differences, losses, records

PAIRS = [
    {"prompt": f"what is {n}?", "chosen": f"a {n}", "rejected": "I won't say"} for n in range(40)
]
CHATS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
USERS = ("pretraining", "sft", "dpo")


@pytest.fixture(scope="module")
def begin(tmp_path_factory, tiny_dataset, tiny_tokenizer):
    """begin[user](out, ranks=1, before=None, **knobs) starts 8 steps of 4 rows."""
    folder = tmp_path_factory.mktemp("users")
    base = align.make_base(folder / "base", tiny_tokenizer, "chatml")
    chats = write_rows(folder / "c.jsonl", CHATS)
    pairs = write_rows(folder / "p.jsonl", PAIRS)
    text = {"data_path": tiny_dataset, "batch_size": 4, "eval_rows": 24, "sample_tokens": 0}
    tuning = {"model_path": base, "val_ratio": 0.4, "batch_size": 4, "max_steps": 8}
    chats = {"dataset_path": chats, "packing": False, "sample_tokens": 0} | tuning
    return {
        "pretraining": functools.partial(runs.begin, dropout=0.1, **text),
        "sft": functools.partial(align.begin, "sft", **chats),
        "dpo": functools.partial(align.begin, "dpo", dataset_path=pairs, **tuning),
    }


def finished(start, out, ranks=1, **knobs):
    one = start(out, ranks=ranks, **knobs)
    assert one.wait() == [0] * ranks, one.text
    return out


def at_validation(act, rank):
    """Has act(number) called in each forward pass that validates, from 1."""
    seen = []

    def hook(module, inputs, output):
        if (
            isinstance(module, model.Decoder)
            and not torch.is_grad_enabled()
            and not module.training
        ):
            seen.append(1)
            act(len(seen))

    if rank == int(os.environ.get("RANK", 0)):
        torch.nn.modules.module.register_module_forward_hook(hook)


# ---- a stop


def stop_and_tell(number):
    """A signal in the second batch of the validation; the one after the next must not come."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    if number == 4:
        os.write(1, b"the validation went on")


@pytest.mark.parametrize(("user", "ranks"), [*((user, 1) for user in USERS), ("pretraining", 2)])
@pytest.mark.parametrize("eval_steps", [4, 100], ids=["amid the run", "at its end"])
def test_a_stop_ends_a_validation_which_then_comes_again(tmp_path, begin, user, ranks, eval_steps):
    out, step = tmp_path / "out", 4 if eval_steps == 4 else 8
    knobs = {"ranks": ranks, "eval_steps": eval_steps, "batch_size": 4 // ranks}
    before = functools.partial(at_validation, stop_and_tell, ranks - 1)
    one = begin[user](out, before=before, **knobs)
    assert one.wait() == [143] * ranks, one.text
    last = one.text.splitlines()[-1]
    assert last == f"stopped at step {step}, saved; continue with --resume_from_checkpoint=auto"
    assert "went on" not in one.text
    assert checkpoints(out)[0].name == f"step_00000{step}"
    assert not any("val_loss" in r for r in records(out))
    finished(begin[user], out, resume_from_checkpoint="auto", **knobs)
    straight = finished(begin[user], tmp_path / "straight", **knobs)
    assert losses(out) == losses(straight)
    for folder in [straight / "final", *checkpoints(straight)]:
        for path in folder.rglob("*.safetensors"):
            assert path.read_bytes() == (out / path.relative_to(straight)).read_bytes(), path
        if folder.name != "final" and user == "pretraining":
            names = differences(out / folder.name, folder)
            assert not [name for name in names if not name.endswith(".lr")]  # set before updates


# ---- a plan, a time box


@pytest.mark.parametrize("user", ["sft", "dpo"])
def test_a_plan_times_some_steps_and_writes_nothing(tmp_path, begin, user):
    out = tmp_path / "out"
    one = begin[user](out, plan=True)
    assert one.wait() == [0], one.text
    assert re.search(r"of which [\d,]+ are trained", one.text)
    assert re.search(r"seconds a step +\d", one.text)
    assert not out.exists()


@pytest.mark.parametrize("user", ["sft", "dpo"])
def test_a_time_box_ends_with_a_model_whose_learning_rate_came_down(tmp_path, begin, user):
    knobs = {"max_minutes": 0.03, "max_steps": None, "num_train_epochs": None}
    out = finished(begin[user], tmp_path / "out", **knobs, save_steps=1000, eval_steps=1000)
    rates = [r["lr"] for r in records(out) if "lr" in r]
    assert rates[-1] < 0.5 * max(rates)  # a busy machine takes few steps in so short a box
    assert (out / "final" / "config.json").is_file()
    finished(begin[user], out, resume_from_checkpoint="auto", **knobs)
    assert "this run is complete" in out.with_suffix(".log").read_text()
