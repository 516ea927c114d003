"""grpo.py: losses against tables and trl, rewards, answers, whole runs."""

import functools
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
from corpus import rewards
from lib.config import UserError, configure
from lib.conversation import render
from lib.runtime import World
from lib.tokenizer import Tokenizer
from model import load_model
from sample import Request, Sampling, generate
from tests.conftest import write_rows
from tests.runs import (
    as_tensors,
    begin,
    losses,
    make_base,
    records,
    refused,
    same_weights,
)
from tests.runs import train_to_end as trained

TASKS = [
    {"prompt": f"what is {n}?", "response": f"a {n}", "check": {"kind": "word", "answer": f"a {n}"}}
    for n in range(24)
]
SCORE = """
def score(prompt, answer, row):
    return sum(answer.count(letter) for letter in "eo") - 0.2 * len(answer)

def broken(prompt, answer, row):
    return 1 / 0

def worded(prompt, answer, row):
    return "good"
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    return make_base(tmp_path_factory.mktemp("grpo") / "base", tiny_tokenizer, "chatml")


@pytest.fixture(scope="module")
def knobs(tmp_path_factory, base):
    """Of 8 steps of 4 questions with 4 answers each, whose letters score."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "my.py").write_text(SCORE)
    rows = write_rows(folder / "tasks.jsonl", TASKS)
    knobs = {"program": "grpo", "model_path": base, "dataset_path": rows, "val_ratio": 0.3}
    knobs |= {"batch_size": 4, "num_generations": 4, "max_new_tokens": 6, "eval_rows": 4}
    return knobs | {"reward": f"{folder / 'my.py'}:score"}


def config(knobs, **more):
    options = knobs | {"lora_r": 0, "device": "cpu", "dtype": "fp32"} | more
    words = [f"--{k}={v}" for k, v in options.items() if k != "program"]
    return configure(grpo.GRPOConfig, words)


def rollouts(knobs, **more):
    """Returns Rollouts of 4 questions a step, outside of a training."""
    cfg = config(knobs, **more)
    tokenizer, model = Tokenizer.load(cfg.model_path), load_model(cfg.model_path)
    questions = rewards.read_questions(cfg.dataset_path, None, tokenizer, checked=True)
    functions = {name: rewards.load_reward(name) for name in cfg.reward}
    world = World(0, 1, torch.device("cpu"))
    return grpo.Rollouts(cfg, questions, model.train(), tokenizer, functions, world)


# ---- the pure functions


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [3.0, 1, 3, 1]])
    plain = grpo.advantages(rewards, scaled=False)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [1.0, -1, 1, -1]]
    scaled = grpo.advantages(rewards, scaled=True)
    assert scaled[0, 0].item() == pytest.approx(0.75 / (0.5 + 1e-4))
    assert scaled[1].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 1.0, -1.28, True),  # has grown enough
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),  # has fallen enough
        (0.5, 1.0, -0.5, False),
    ],
)
def test_a_token_beyond_its_bound_has_no_gradient(ratio, advantage, loss, clipped):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    value, is_clipped = grpo.clipped_loss(log_ratio, torch.tensor([advantage]), 0.2, 0.28)
    assert value.item() == pytest.approx(loss)
    assert is_clipped.item() is clipped
    value.sum().backward()
    assert (log_ratio.grad.item() == 0) is clipped


def test_the_estimate_of_kl_has_its_mean():
    torch.manual_seed(0)
    pi, ref = torch.randn(2, 50).log_softmax(-1)
    drawn = torch.multinomial(pi.exp(), 200_000, replacement=True)
    estimate = grpo.kl_estimate((ref - pi)[drawn])
    assert estimate.min() >= 0
    assert estimate.mean().item() == pytest.approx((pi.exp() * (pi - ref)).sum().item(), rel=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("grpo", {"scale_rewards": True, "beta": 0.3}),
        ("dr_grpo", {"scale_rewards": False}),
        ("dapo", {"scale_rewards": True}),
    ],
)
def test_trl_computes_the_same(tmp_path, base, knobs, loss, more):
    """Advantages, loss and gradient of one batch of trl's own, the policy moved meanwhile."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "beta": 0.0}
    settings |= {"per_device_train_batch_size": 16, "num_generations": 4, "num_iterations": 2}
    settings |= {"max_completion_length": 6, "gradient_checkpointing": False, "epsilon": 0.2}
    settings |= {"epsilon_high": 0.28, "loss_type": loss, "output_dir": str(tmp_path)} | more
    score = lambda ids: sum(ids) % 7 / 7
    scores = lambda completion_ids, **_: [score(ids) for ids in completion_ids]
    trainer = trl.GRPOTrainer(
        transformers.LlamaForCausalLM.from_pretrained(base),
        reward_funcs=scores,
        args=trl.GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TASKS]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    torch.manual_seed(1)
    old = inputs["old_per_token_logps"]
    inputs["old_per_token_logps"] = old + 0.3 * torch.randn_like(old)
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    ours = rollouts(knobs, num_iterations=2, loss=loss, save_steps=4, eval_steps=4, **more)
    answers = []
    for n in range(16):
        ids, mask = inputs["completion_ids"][n], inputs["completion_mask"][n].bool()
        prompt = inputs["prompt_ids"][n][inputs["prompt_mask"][n].bool()].tolist()
        own = inputs["old_per_token_logps"][n][mask].tolist()
        answer = grpo.Answer(prompt, 6, question={}, ids=ids[mask].tolist())
        answer.logprobs = [(value, []) for value in own]
        answer.reward = score(answer.ids)
        answer.rewards = (answer.reward,)
        answers.append(answer)
    # trl shuffles what it has scored: a group are those of one prompt
    order = sorted(range(16), key=lambda n: answers[n].prompt)
    answers = [answers[n] for n in order]
    marks = torch.tensor([answer.reward for answer in answers]).view(4, 4)
    gains = grpo.advantages(marks, more["scale_rewards"]).flatten()
    torch.testing.assert_close(gains, inputs["advantages"][order], atol=1e-5, rtol=1e-5)
    for answer, gain in zip(answers, gains.tolist()):
        answer.advantage = gain
    mean = sum(len(a.ids) for a in answers) / 16
    batch = ours.batch_of(answers, mean)
    assert batch["count"] == 16
    loss_fn = grpo.policy_loss(ours.cfg, load_model(base))
    total, sums = loss_fn(ours.model, as_tensors(batch))
    assert total.item() / 16 == pytest.approx(expected.item(), abs=1e-5)
    (total / 16).backward()
    own = dict(ours.model.named_parameters())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(own[name].grad, p.grad, atol=1e-5, rtol=1e-3)
    assert 0 < sums["clipped"].item() / 16 < 1


# ---- rewards


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        ({"check": {"kind": "number", "answer": "7"}}, "It is 7.", True),
        ({"check": {"kind": "word", "answer": "Yes"}}, "yes", True),
        ({"answer": "Tom has 3 + 4 apples.\n#### 1,007"}, "so 3\n#### 1007", True),
        ({"answer": "#### 7"}, "3 and 4 make 7", True),
        ({"answer": "#### 7"}, "7, or is it 8", False),
        ({"answer": "#### -7.50"}, "$-7.5", True),
        ({"answer": "7"}, "none", False),
        ({"answer": 7}, "7.0", True),
        ({"answer": "Paris"}, "Paris.", True),
        ({"answer": "Paris"}, "paris", False),
        ({"check": None, "answer": "7"}, "7", True),
    ],
)
def test_right_answers(row, text, expected):
    assert rewards.right(None, text, row) is expected


def test_a_row_without_anything_to_check_is_refused_unless_a_function_scores(tmp_path, knobs):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {n}"} for n in range(9)])
    line = refused(tmp_path / "out", **knobs | {"dataset_path": rows, "reward": "right"})
    assert "0 usable rows of 9" in line
    assert 'nothing checks an answer; add "check" or "answer", or use --reward' in line
    tokenizer = Tokenizer.load(knobs["model_path"])
    questions = rewards.read_questions(rows, None, tokenizer, checked=False)
    assert [q["prompt"][-1]["content"] for q in questions] == [f"say {n}" for n in range(9)]
    assert not any(q["checkable"] for q in questions)


def test_a_reward_that_cannot_be_had_is_one_line(tmp_path, knobs):
    path = knobs["reward"].removesuffix(":score")
    (tmp_path / "bad.py").write_text("import no_such_module")
    cases = {
        f"{path}:nothing": "KeyError: 'nothing'",
        f"{tmp_path}/none.py:score": "No such file",
        f"{tmp_path}/bad.py:score": "No module named 'no_such_module'",
        f"{path}:broken": "ZeroDivisionError",
        f"{path}:worded": "expected a finite number, got 'good'",
    }
    for name, part in cases.items():
        line = refused(tmp_path / "out", **knobs | {"reward": name})
        assert line.startswith(f"error: reward {name}") or name in line
        assert part in line
        assert name.endswith((":broken", ":worded")) == ("tasks.jsonl" in line)  # it names the row


def test_what_grpo_refuses(tmp_path, knobs, tiny_tokenizer):
    plain = make_base(tmp_path / "plain", tiny_tokenizer)
    free = write_rows(tmp_path / "free.jsonl", [{"prompt": f"say {n}"} for n in range(9)])
    unchecked = "early_stopping_metric=val_accuracy: nothing checks the answers to held-out"
    cases = [
        ({"dataset_path": free, "early_stopping_patience": 3}, unchecked),
        ({"num_generations": 1}, "num_generations must be int >= 2"),
        ({"num_iterations": 3}, "must be multiples of num_iterations 3"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"model_path": plain}, "names no chat template; train it with sft.py first"),
        ({"max_new_tokens": 60}, "no row is left to train on, see above"),
    ]
    for more, part in cases:
        assert part in refused(tmp_path / "out", **knobs | more)


# ---- answers


def test_an_answer_is_what_the_engine_gives_it_alone(knobs):
    ours = rollouts(knobs)
    weights = {p.data_ptr() for p in ours.model.parameters()}
    batch = ours.batch(5)
    assert {p.data_ptr() for p in ours.engine.model.parameters()} == weights  # no second copy
    assert ours.model.training
    again = rollouts(knobs).batch(5)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    answers = ours.draw(range(20, 24))
    assert len({tuple(answer.ids) for answer in answers}) > 8
    ours.model.eval()
    for answer in answers:
        request = Request(answer.prompt, 6, answer.sampling, ours.ends, top_logprobs=0)
        for _ in generate(ours.model, [request]):
            pass
        size = len(request.ids)
        assert answer.ids[:size] == request.ids
        assert answer.ids[size:] == [] or (
            answer.ids[size] in ours.ends and answer.finish == "stop"
        )
        ids = torch.tensor([answer.prompt + answer.ids])
        log_p = ours.model(ids)[0].log_softmax(-1)[len(answer.prompt) - 1 : -1]
        expected = log_p.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        own = torch.tensor([value for value, _ in answer.logprobs])
        torch.testing.assert_close(own, expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_question_is_all_before_the_last_answer(tmp_path, knobs):
    message = lambda role, content: {"role": role, "content": content}
    messages = [message("system", "be brief"), message("user", "7?"), message("assistant", "7")]
    messages += [message("user", "and 8?"), message("assistant", "8")]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "answer": "8"}])
    tokenizer = Tokenizer.load(knobs["model_path"])
    (question,) = rewards.read_questions(path, None, tokenizer, checked=True)
    assert question["prompt"] == messages[:-1]
    ids, _ = render(tokenizer, messages[:-1], "chatml", add_generation_prompt=True)
    assert question["ids"] == ids


@pytest.mark.filterwarnings("error")  # torch warns of the deviation of no numbers
def test_groups_without_signal_make_way_for_others(knobs):
    answers = {}
    for redraws in (0, 3, 30):  # after some of 30 no group is without signal
        ours = rollouts(knobs, redraws=redraws, scale_rewards=True)
        odd = lambda prompt, text, row: float(int(row["check"]["answer"][2:]) % 2 and len(text) % 2)
        ours.functions = {"odd": odd}  # questions with even numbers have no signal
        answers[redraws] = ours.draw(range(12))
    shares = {n: np.mean([a.advantage != 0 for a in answers[n]]) for n in answers}
    assert shares[0] < 0.7 < shares[3]
    kept = [a.question["where"] for a in answers[0] if a.advantage]
    assert set(kept) <= {a.question["where"] for a in answers[3]}  # others stay as they were


def test_answers_without_a_gradient_are_left_out_of_the_batch_and_count(knobs):
    ours = rollouts(knobs)
    ours.functions = {"none": lambda prompt, text, row: 1.0}
    batch = ours.batch(0)
    assert len(batch["ids"]) == 1
    assert batch["count"] == 16
    total, sums = grpo.policy_loss(ours.cfg, None)(ours.model, as_tensors(batch))
    assert total.item() == 0
    assert sums["no_signal"].item() == sums["reward"].item() == 16


# ---- whole runs


def test_the_reward_rises_and_is_shown(tmp_path, knobs):
    more = {"lora_r": 0, "max_steps": 30, "eval_steps": 30, "batch_size": 8, "learning_rate": 0.003}
    out = trained(tmp_path / "out", **knobs | more)
    before, after = [r for r in records(out) if "val_reward" in r]
    assert before["step"] == 0
    assert after["val_reward"] > before["val_reward"] + 0.3
    assert before["val_accuracy"] == 0  # nobody can know "a 7"
    steps = [r for r in records(out) if "lr" in r]
    assert {*grpo.MEANS, "clipped", f"reward/{Path(knobs['reward']).name}"} < steps[0].keys()
    assert after["answers"].count(" | ") == 4
    text = out.with_suffix(".log").read_text()
    assert "warning: the reward rose by" in text  # and accuracy stayed 0


def test_kl_is_measured_from_the_model_before(tmp_path, knobs):
    """With an adapter, turned off, as with a copy: of a policy that has not moved yet it is 0."""
    for lora_r in (4, 0):
        out = trained(tmp_path / f"out{lora_r}", **knobs | {"beta": 0.1, "lora_r": lora_r})
        first, *_, last = [r["kl"] for r in records(out) if "kl" in r]
        assert abs(first) < 1e-6 < last


def stop_in_round(step):
    """SIGTERM in the update of this step, from 1."""
    update, steps = grpo.fit.__globals__["State"].update, []

    def patched(self, *args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *args)

    grpo.fit.__globals__["State"].update = patched


def test_a_stop_waits_for_the_end_of_a_round_of_answers(tmp_path, knobs):
    knobs = knobs | {"num_iterations": 4}
    run = begin(tmp_path / "parts", before=functools.partial(stop_in_round, 1), **knobs)
    assert run.wait() == [143], run.text
    assert "stopped at step 4, saved" in run.text
    trained(tmp_path / "parts", resume_from_checkpoint="auto", **knobs)
    whole = trained(tmp_path / "whole", **knobs)
    assert same_weights(tmp_path / "parts", whole)
    clipped = [r["clipped"] for r in records(whole) if "clipped" in r]
    assert clipped[0] == 0  # the policy is still the one that drew


@pytest.mark.parametrize("loss", ["dapo", "dr_grpo"])
def test_two_ranks_and_accumulation_are_one_rank(tmp_path, knobs, loss):
    knobs = knobs | {"loss": loss, "max_steps": 3}
    one = trained(tmp_path / "one", **knobs)
    parts = {"ranks": 2, "batch_size": 1, "gradient_accumulation_steps": 2}
    two = trained(tmp_path / "two", **knobs | parts)
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a.get("answers") == b.get("answers")
        a, b = ({k: v for k, v in r.items() if not isinstance(v, str)} for r in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_warning_needs_a_rise(tmp_path, knobs):
    lines = [{"step": n, "reward": 0.1 * (n % 2)} for n in range(1, 9)]
    write_rows(tmp_path / "metrics.jsonl", [{"step": 0, "val_accuracy": 0.5}, *lines])
    cfg, said = config(knobs, output_dir=tmp_path), []
    world = World(0, 1, torch.device("cpu"))
    world.say = said.append
    grpo.watch_accuracy(cfg, 0.4, world)
    assert said == []
    lines = [{"step": n, "reward": 0.1 * n} for n in range(1, 9)]
    write_rows(tmp_path / "metrics.jsonl", [{"step": 0, "val_accuracy": 0.5}, *lines])
    grpo.watch_accuracy(cfg, 0.6, world)
    assert said == []
    grpo.watch_accuracy(cfg, 0.5, world)
    assert "the reward rose by 0.600, held-out accuracy did not: 50.0%" in said[0]


def test_an_unfit_reward_is_an_error_of_its_row():
    question = {"prompt": [], "row": {}, "where": "rows.jsonl line 3"}
    with pytest.raises(UserError, match="line 3, answer 'x': expected a finite number, got nan"):
        rewards.reward_of("f", lambda *_: math.nan, "x", question)
    assert rewards.reward_of("f", lambda *_: True, "x", question) == 1.0
    assert Sampling(temperature=0).temperature == 0
