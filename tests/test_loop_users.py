"""What `fit` promises holds for each of its users: a kill, a stop, ranks, a plan, a time box."""

import functools
import os
import re
import signal

import pytest
import torch

import model
from lib.checkpoint import checkpoints
from tests.conftest import write_rows
from tests.runs import after_save, begin, die, losses, make_base, records, same_weights
from tests.runs import train_to_end as trained

PAIRS = [
    {"prompt": f"what is {n}?", "chosen": f"a {n} and {7 * n}", "rejected": "I won't say"}
    for n in range(40)
]
CHATS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
TASKS = [row | {"answer": row["response"]} for row in CHATS]
SCORE = 'score = lambda prompt, answer, row: answer.count("e") - len(answer) / 8'
USERS = ("train", "sft", "dpo", "grpo")


@pytest.fixture(scope="module")
def users(tmp_path_factory, tiny_dataset, tiny_tokenizer):
    """{program: knobs} of 8 steps of 4 rows."""
    folder = tmp_path_factory.mktemp("users")
    base = make_base(folder / "base", tiny_tokenizer, "chatml")
    rows = {
        "sft": write_rows(folder / "c.jsonl", CHATS),
        "dpo": write_rows(folder / "p.jsonl", PAIRS),
    }
    rows["grpo"] = write_rows(folder / "t.jsonl", TASKS)
    (folder / "my.py").write_text(SCORE)
    text = {"data_path": tiny_dataset, "dropout": 0.1, "eval_rows": 24}
    shared = {"batch_size": 4, "sample_tokens": 0}
    tuning = shared | {"model_path": base, "val_ratio": 0.4}
    knobs = {"train": shared | text} | {
        name: tuning | {"dataset_path": rows[name]} for name in rows
    }
    knobs["grpo"] |= {"reward": f"{folder / 'my.py'}:score", "eval_rows": 8}
    knobs["grpo"] |= {"num_generations": 4, "max_new_tokens": 6}
    return {name: {"program": name} | knobs[name] for name in USERS}


@pytest.mark.parametrize(
    ("user", "knobs"),
    [
        ("sft", {}),
        ("sft", {"lora_r": 0}),
        ("dpo", {}),
        ("dpo", {"precompute_ref": False}),
        ("dpo", {"lora_r": 0}),
        ("grpo", {}),
        ("grpo", {"num_iterations": 2, "lora_r": 0}),
        ("grpo", {"beta": 0.1, "lora_r": 0, "redraws": 1}),
    ],
    ids=str,
)
def test_a_run_in_two_parts_is_the_run(tmp_path, users, user, knobs):
    knobs = users[user] | knobs
    whole, parts = trained(tmp_path / "whole", **knobs), tmp_path / "parts"
    assert begin(parts, before=functools.partial(after_save, 4, die), **knobs).wait() == [9]
    trained(parts, resume_from_checkpoint="auto", **knobs)
    assert same_weights(parts, whole)
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("user", ["sft", "dpo"])
def test_two_ranks_and_accumulation_are_one_rank(tmp_path, users, user):
    knobs = users[user] | ({"packing": False, "lora_dropout": 0} if user == "sft" else {})
    one = trained(tmp_path / "one", **knobs | {"batch_size": 8})
    parts = {"ranks": 2, "batch_size": 2, "gradient_accumulation_steps": 2}
    two = trained(tmp_path / "two", **knobs | parts)
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


# ---- a stop


def stop_and_tell(number):
    """A signal in the second batch of the validation; the one after the next must not come."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    if number == 4:
        os.write(1, b"the validation went on")


def at_validation(act, rank):
    """Has act(number) called in each forward pass that validates, from 1."""
    seen = []

    def hook(module, inputs, output):
        learning = torch.is_grad_enabled() or module.training
        if isinstance(module, model.Decoder) and not learning:
            seen.append(1)
            act(len(seen))

    if rank == int(os.environ.get("RANK", 0)):
        torch.nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize(("user", "ranks"), [*((user, 1) for user in USERS[:3]), ("train", 2)])
@pytest.mark.parametrize("eval_steps", [4, 100], ids=["amid the run", "at its end"])
def test_a_stop_ends_a_validation_which_then_comes_again(tmp_path, users, user, ranks, eval_steps):
    out, step = tmp_path / "out", 4 if eval_steps == 4 else 8
    knobs = users[user] | {"ranks": ranks, "eval_steps": eval_steps, "batch_size": 4 // ranks}
    knobs |= {"packing": False} if user == "sft" else {}
    one = begin(out, before=functools.partial(at_validation, stop_and_tell, ranks - 1), **knobs)
    assert one.wait() == [143] * ranks, one.text
    last = one.text.splitlines()[-1]
    assert last == f"stopped at step {step}, saved; continue with --resume_from_checkpoint=auto"
    assert "went on" not in one.text
    assert checkpoints(out)[0].name == f"step_00000{step}"
    assert not any("val_loss" in r for r in records(out))
    trained(out, resume_from_checkpoint="auto", **knobs)
    straight = trained(tmp_path / "straight", **knobs)
    assert losses(out) == losses(straight)
    assert same_weights(out, straight)


# ---- a plan, a time box


@pytest.mark.parametrize("user", USERS)
def test_a_plan_times_some_steps_and_writes_nothing(tmp_path, users, user):
    one = begin(tmp_path / "out", **users[user], plan=True)
    assert one.wait() == [0], one.text
    assert re.search(r"seconds a step +\d", one.text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("user", USERS)
def test_a_time_box_ends_with_a_model_whose_learning_rate_came_down(tmp_path, users, user):
    minutes = 0.1 if user == "grpo" else 0.02  # it validates before the first step, too
    knobs = {"max_minutes": minutes, "max_steps": None, "save_steps": 10_000, "eval_steps": 10_000}
    knobs |= users[user] | {"num_train_epochs": None}
    out = trained(tmp_path / "out", **knobs)
    rates = [r["lr"] for r in records(out) if "lr" in r]
    assert rates[-1] < 0.5 * max(rates)  # a busy machine takes few steps in so short a box
    before = (out / "final" / "manifest.json").stat().st_mtime_ns
    trained(out, resume_from_checkpoint="auto", **knobs)
    assert "this run is complete" in out.with_suffix(".log").read_text()
    assert (out / "final" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("user", USERS)
def test_a_used_folder_is_refused_before_any_work(tmp_path, users, user):
    (tmp_path / "out" / "final").mkdir(parents=True)
    run = begin(tmp_path / "out", **users[user])
    assert run.wait() == [2], run.text
    line = f"error: {tmp_path / 'out'} already holds a run; continue it with"
    assert run.text.splitlines()[-1].startswith(line)
    assert user == "train" or run.text.startswith(line)
