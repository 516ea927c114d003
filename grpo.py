"""Reinforcement learning with rewards that a program checks: GRPO (Shao et al. 2024).

    python grpo.py configs/grpo.json --model_path=checkpoints/sft/demo --dataset_path=tasks.jsonl
    python grpo.py configs/grpo.json ... --reward=my_rewards.py:score
    python grpo.py configs/grpo.json ... --loss=grpo --redraws=0 --beta=0.04 --num_iterations=2

A row is a question and what an answer is checked by: `check` as in the sample tasks, or `answer`.
The model draws a group of answers to each question; those above the group's mean reward become
likelier, the others less likely. The engine of sample.py runs on the very weights that are trained.
An answer is a function of weights, seed, step, question and number: a resumed run draws the same.
"""

import copy
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from corpus.rewards import load_reward, read_questions, reward_of, right
from data import ExampleStream, supervised_rows
from lib import config
from lib.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from lib.conversation import stop_ids
from lib.folders import hash_fraction
from lib.log import read_records
from lib.runtime import autocast, choose_dtype, open_world
from model import label_nats, lora_off
from sample import Engine, Request, Sampling
from sft import FineTuningConfig, for_rows, open_base, open_tokenizer, read_split
from train import fit

SLOTS = 128  # answers that are written side by side; one that ends makes room for the next
REDRAW = 1 << 30  # rows of the stream to the questions that replace those without signal
MEANS = "reward", "reward_std", "no_signal", "length", "entropy"  # logged, with each reward's mean


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(FineTuningConfig):
    """Reinforcement learning on questions whose answers can be checked."""

    # an answer's reward is the sum of these. right: 1 for a right answer by the row's check or
    # answer, else 0. FILE.py:FUNCTION: function(prompt, answer, row) -> number, of yours
    reward: tuple[str, ...] = ("right",)
    num_generations: Annotated[int, config.Range(2)] = 8  # answers to a question, G: a group
    max_new_tokens: PositiveInt = 32  # of an answer
    loss: Literal["dr_grpo", "grpo", "dapo"] = "dapo"  # what a token counts, see token_weight
    scale_rewards: bool = True  # divide advantages by the group's deviation; Dr. GRPO does not
    epsilon: PositiveFloat = 0.2  # a probability falls by this share at most ...
    epsilon_high: PositiveFloat = 0.28  # ... and grows by this, over the updates of num_iterations
    num_iterations: PositiveInt = 1  # updates with the same answers
    redraws: NonNegativeInt = 2  # other questions tried where the answers to one are all alike
    beta: NonNegativeFloat = 0.0  # weight of the KL divergence from the model before; 0 = none
    output_dir: str = "checkpoints/grpo"  # checkpoints, metrics.jsonl and final/ go here
    learning_rate: PositiveFloat = 1e-4  # at the top of the schedule
    batch_size: PositiveInt = 16  # questions per micro-batch and rank
    compile: bool = False  # torch.compile; batches come in many shapes
    eval_steps: PositiveInt = 50  # steps between validations
    eval_rows: PositiveInt = 128  # held-out questions that each validation asks
    early_stopping_metric: Literal["val_accuracy", "val_reward"] = "val_accuracy"  # of the best

    PASSES, STEPS, EVALUATES_START, DROPOUT = 1, 100, True, False

    def __post_init__(self):
        super().__post_init__()
        if self.save_steps % self.num_iterations or self.eval_steps % self.num_iterations:
            steps = f"multiples of num_iterations {self.num_iterations}"
            raise ValueError(f"save_steps and eval_steps must be {steps}: answers are not saved")


# ---- The losses: tensors in, tensors out. Q questions with G answers each, N tokens of answers


def advantages(rewards, scaled):
    """Returns how much better each answer is than its group, (Q, G); rewards (Q, G).

    r - mean(r): Dr. GRPO (Liu et al. 2025, figure 1). `scaled` divides it by the deviation in the
    group: GRPO (Shao et al. 2024, section 4.1.2). 0 in a group of equal rewards.
    """
    gain = rewards - rewards.mean(dim=1, keepdim=True)
    gain = gain / (rewards.std(dim=1, keepdim=True) + 1e-4) if scaled else gain
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, gain)


def clipped_loss(log_ratio, advantage, epsilon, epsilon_high):
    """Returns (loss, whether it is clipped) of each token, both (N,); log_ratio is log pi / pi_old.

    pi_old is the policy that drew the answers. Equation 3 of Shao et al. 2024, with the upper bound
    of its own that DAPO has (Yu et al. 2025, equation 10): past its bound a token has no gradient.
    """
    ratio = log_ratio.exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage
    return -torch.minimum(free, bounded), bounded < free


def kl_estimate(log_ratio):
    """Returns KL(pi, ref) as estimated at each token that pi drew, (N,), from log ref / pi (N,).

    Equation 4 of Shao et al. 2024, which is never negative.
    """
    return log_ratio.expm1() - log_ratio


def token_weight(loss, length, mean_length, longest):
    """Returns the weight of a token in an answer of `length`; their sum is divided by the answers.

    grpo: each answer counts 1 (Shao et al. 2024, equation 3); dapo: each token counts alike (Yu et
    al. 2025, equation 12); dr_grpo: also, by a constant (Liu et al. 2025, section 3.2).
    """
    return 1 / {"grpo": length, "dapo": mean_length, "dr_grpo": longest}[loss]


def policy_loss(cfg, reference):
    """Returns loss_fn(model, batch) for `fit`; `reference` is None where an adapter turns off."""
    names = *MEANS, *(f"reward/{Path(name).name}" for name in cfg.reward)

    def loss_fn(model, batch):
        policy, sums = -label_nats(model, batch), dict(zip(names, batch["means"]))  # (N,) log p
        old = batch["log_p"] if cfg.num_iterations > 1 else policy.detach()
        bounds = cfg.epsilon, cfg.epsilon_high
        losses, clipped = clipped_loss(policy - old, batch["advantage"], *bounds)
        sums["clipped"] = clipped.sum() / batch["mean_length"]
        if cfg.beta:
            with torch.no_grad(), lora_off(model):
                before = -label_nats(reference or model, batch)
            kl = kl_estimate(before - policy)
            losses, sums["kl"] = losses + cfg.beta * kl, kl.detach().sum() / batch["mean_length"]
        return (losses * batch["weight"]).sum(), sums

    return loss_fn


@dataclass(eq=False, kw_only=True)
class Answer(Request):
    """A request of the engine and its marks. `ids` include the id that ended the answer, if any."""

    question: dict
    text: str = ""
    rewards: list = ()  # of each function
    reward: float = 0.0  # their sum
    advantage: float = 0.0


class Rollouts(ExampleStream):
    """Questions as a stream whose batches are answers of the model as it is.

    A rank's questions of a step are answered together when its first batch is asked for; the others
    must be asked for in their order.
    """

    def __init__(self, cfg, questions, model, tokenizer, functions, world):
        super().__init__(questions, list, cfg.batch_size, cfg.seed, world.size)
        self.cfg, self.model, self.tokenizer, self.world = cfg, model, tokenizer, world
        self.functions, self.ends = functions, set(stop_ids(tokenizer, tokenizer.template))
        self.period, self.batches, self.engine = cfg.num_iterations, [], None

    def batch(self, step, micro=0, rank=0, accumulation=1):
        if micro == 0 and (step % self.period == 0 or not self.batches):
            micros, ranks, size = accumulation, self.world_size, self.batch_size
            numbers = range(step * micros * ranks + rank, (step + 1) * micros * ranks, ranks)
            drawn = [self.draw(range(n * size, (n + 1) * size)) for n in numbers]
            lengths = [len(answer.ids) for answers in drawn for answer in answers]
            tokens, count = self.world.sum(sum(lengths), len(lengths))  # of all ranks
            self.batches = [self.batch_of(answers, tokens / count) for answers in drawn]
        return self.batches[micro]

    def draw(self, rows):
        """Returns G answers to each of the questions at `rows` of the stream.

        Up to `redraws` times a question whose answers are all alike, and teach nothing, makes way
        for another: DAPO's dynamic sampling (Yu et al. 2025, equation 11), row by row.
        """
        groups, G = {row: [] for row in rows}, range(self.cfg.num_generations)
        for attempt in range(1 + self.cfg.redraws):
            again = [row for row in rows if not any(a.advantage for a in groups[row])]
            if not again:
                break
            for row in again:
                question = self.examples[self.block_at(row + attempt * REDRAW)]
                groups[row] = [self.ask(question, row, attempt, number) for number in G]
            answers = [answer for row in again for answer in groups[row]]
            self.write(answers)
            rewards = torch.tensor([answer.reward for answer in answers]).view(-1, len(G))
            gains = advantages(rewards, self.cfg.scale_rewards).flatten().tolist()
            for answer, gain in zip(answers, gains):
                answer.advantage = gain
        return [answer for group in groups.values() for answer in group]

    def ask(self, question, *words):
        """Returns an Answer to be written: drawn by a seed made of `words`, without any greedy."""
        seed = int(hash_fraction(f" {words}", self.cfg.seed) * 2**32)
        drawn = Sampling(temperature=float(bool(words)), top_k=0, top_p=1.0, seed=seed)
        new = self.cfg.max_new_tokens
        return Answer(question["ids"], new, drawn, top_logprobs=0, question=question)

    @torch.no_grad()
    def write(self, answers):
        """Has the model write the answers, and the reward functions mark them."""
        training, device, waiting = self.model.training, self.world.device, deque(answers)
        self.model.eval()
        if self.engine is None:  # one for all steps, which keeps its memory
            longest = max(len(q["ids"]) for q in self.examples) + self.cfg.max_new_tokens
            self.engine = Engine(self.model, SLOTS, longest)
        dtype, _ = choose_dtype(self.cfg.dtype, device)  # as in training
        eager = torch.compiler.set_stance("force_eager")  # every length would be compiled anew
        with autocast(device, dtype), eager:
            while waiting or len(self.engine.free) < SLOTS:
                self.engine.join([waiting.popleft() for _ in self.engine.free[: len(waiting)]])
                for ids in self.engine.advance():
                    for answer, id in zip(self.engine.requests, ids):
                        if id in self.ends:  # kept in its ids: to end is learned, too
                            answer.finish = "stop"
        self.model.train(training)
        for a in answers:
            a.text = self.tokenizer.decode(a.ids[:-1] if a.finish == "stop" else a.ids).strip()
            a.rewards = [reward_of(*f, a.text, a.question) for f in self.functions.items()]
            a.reward = sum(a.rewards)

    def batch_of(self, answers, mean_length):
        """Returns the batch of some answers of a step with tokens of such a mean length.

        Besides `supervised_rows`: "advantage", "weight" and "log_p" (N,) of each token, "means",
        what the answers add to the logged means. Answers without a gradient are left out.
        """
        cfg, G = self.cfg, self.cfg.num_generations
        rows = [a for a in answers if a.advantage or cfg.beta] or answers[:1]
        mask = lambda a: np.repeat([0, 1], [len(a.prompt), len(a.ids)])
        examples = [[(np.array(a.prompt + a.ids), mask(a))] for a in rows]
        batch = supervised_rows(examples, self.model.cfg.sequence_length, self.tokenizer.pad_id)
        weight = lambda a: token_weight(cfg.loss, len(a.ids), mean_length, cfg.max_new_tokens)
        numbers = [(a.advantage, weight(a), log_p) for a in rows for log_p, _ in a.logprobs]
        for name, values in zip(("advantage", "weight", "log_p"), zip(*numbers)):
            padding = (0, len(batch["labels"]) - len(values))
            batch[name] = np.pad(np.array(values, np.float32), padding)
        rewards = np.reshape([answer.reward for answer in answers], (-1, G))
        alike = (rewards == rewards[:, :1]).all(axis=1)
        nats = -sum(log_p for answer in answers for log_p, _ in answer.logprobs)
        means = [rewards.sum(), G * rewards.std(axis=1, ddof=1).sum(), G * alike.sum()]
        means += [sum(len(a.ids) for a in answers), nats / mean_length]
        means += map(sum, zip(*(answer.rewards for answer in answers)))
        batch |= {"means": np.array(means, np.float32), "mean_length": np.float32([mean_length])}
        read = sum(len(answer.prompt) + len(answer.ids) for answer in answers)
        return batch | {"count": len(answers), "tokens": read}


def answers_validation(cfg, world, held_out):
    """Returns validate(model): the worth of answers to held-out questions, and one with its group.

    val_accuracy is the share of right greedy answers, val_pass@k that of questions of whose k drawn
    answers one is right; val_reward the mean of the drawn ones'.
    """
    G, rows = range(cfg.num_generations), min(cfg.eval_rows, held_out.blocks)
    checkable = all(question["checkable"] for question in held_out.examples)
    names = "val_reward", "val_accuracy", "val_pass@1", f"val_pass@{len(G)}"
    names = names if checkable else names[:1]
    if cfg.early_stopping_patience and cfg.early_stopping_metric not in names:
        unchecked = f"{cfg.early_stopping_metric}: nothing checks the answers to held-out questions"
        raise UserError(f"early_stopping_metric={unchecked}; use val_reward")

    def validate(model):
        totals, texts = np.zeros(5), {}
        for first, questions in world.batches(held_out, rows, cfg.batch_size):
            groups = [
                [held_out.ask(question), *(held_out.ask(question, "held out", row, n) for n in G)]
                for row, question in enumerate(questions, first)
            ]
            held_out.write([answer for group in groups for answer in group])
            for group in groups:
                marks = [checkable and right(None, a.text, a.question["row"]) for a in group]
                reward = np.mean([answer.reward for answer in group[1:]])
                totals += [1, reward, marks[0], np.mean(marks[1:]), any(marks[1:])]
            if first == 0:
                texts["question"] = questions[0]["prompt"][-1]["content"][:200]
                texts["answers"] = " | ".join(f"{a.reward:g} {a.text[:60]!r}" for a in groups[0])
        count, *totals = world.sum(*totals.tolist())
        means = {name: total / count for name, total in zip(names, totals) if count}
        if "val_accuracy" in means:
            watch_accuracy(cfg, means["val_accuracy"], world)
        return means | texts

    return validate


def watch_accuracy(cfg, accuracy, world):
    """Warns if the reward has risen since the start and held-out accuracy has not."""
    records = read_records(cfg.output_dir)
    rewards = [record["reward"] for record in records if "reward" in record]
    before = [record["val_accuracy"] for record in records if "val_accuracy" in record]
    part = len(rewards) // 4
    rise = np.mean(rewards[-part:]) - np.mean(rewards[:part]) if part else 0
    if before and accuracy <= before[0] and rise > 0.5 * np.std(rewards):
        accuracies = f"held-out accuracy did not: {before[0]:.1%} at the start, now {accuracy:.1%}"
        world.say(f"warning: the reward rose by {rise:.3f}, {accuracies}")


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = open_tokenizer(cfg, trained=True)
        functions = {name: load_reward(name) for name in cfg.reward}
        read = partial(read_questions, tokenizer=tokenizer, checked="right" in cfg.reward)
        rows, held_out, sha256 = read_split(cfg, read, "prompt", world.say)
        cfg, model, length, files = open_base(cfg, tokenizer, tokenizer.template, sha256, world.say)
        reference = copy.deepcopy(model).to(world.device) if cfg.beta and not cfg.lora_r else None

        def stream(rows, purpose):
            kept = [row for row in rows if len(row["ids"]) + cfg.max_new_tokens <= length]
            late = f"{len(rows) - len(kept):,} dropped: no room for {cfg.max_new_tokens} tokens"
            world.say(f"{len(kept):,} questions {purpose}, {late}")
            return Rollouts(cfg, kept, model, tokenizer, functions, world)

        loader, val_stream = stream(rows, "to train on"), stream(held_out, "held out")
        cfg = for_rows(cfg, loader, val_stream, world)
        validate = answers_validation(cfg, world, val_stream)
        fit(cfg, model, loader, policy_loss(cfg, reference), world, validate, *files)


if __name__ == "__main__":
    config.run(main, GRPOConfig, __doc__)
