"""Direct preference optimization (Rafailov et al. 2023), on pairs of answers to a prompt.

    python dpo.py configs/dpo.json --model_path=checkpoints/sft/final --dataset_path=pairs.jsonl
    python dpo.py configs/dpo.json ... --beta=0.1 --loss=ipo --lora_r=0 --learning_rate=5e-7

The reference is what training begins from: the model in model_path, an adapter merged first. No
second model is loaded: the new adapter is turned off, or the reference's log-probabilities are
computed once beforehand. There is no dropout, because two probabilities of the same answer are
compared. So the first loss is ln 2 and the first margin 0, and both are asserted.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import sft
from corpus.chats import read_pairs
from data import ExampleStream, supervised_rows
from lib.config import PositiveFloat, PositiveInt, Range, run
from lib.conversation import render_answer, render_rows
from lib.runtime import autocast, choose_dtype, open_world, to_device
from lib.tokenizer import IGNORE
from model import choose_attention, label_nats, lora_off
from train import fit, rows_per_step, total_steps

# TRL's names; of validations they begin with val_
METRIC_NAMES = "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"
METRIC_NAMES += "logps/chosen", "logps/rejected"


@dataclass(frozen=True, kw_only=True)
class DPOConfig(sft.FineTuningConfig):
    """Preference optimization, on pairs of answers."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's own, or IPO's (Azar et al. 2023)
    beta: PositiveFloat = 0.1  # how strongly the policy is held to the reference; IPO's tau
    label_smoothing: Annotated[float, Range(0, 0.5)] = 0.0  # share of labels that may be wrong
    precompute_ref: bool | None = None  # compute the reference once, beforehand; none = if it pays
    output_dir: str = "checkpoints/dpo"  # checkpoints, metrics.jsonl and final/ go here
    learning_rate: PositiveFloat = 5e-4  # for LoRA on a small model; full fine-tuning wants 5e-7
    batch_size: PositiveInt = 4  # pairs per micro-batch and rank
    eval_steps: PositiveInt = 50  # steps between validations
    # decides which is best
    early_stopping_metric: Literal["val_loss", "val_rewards/accuracies"] = "val_loss"

    PASSES, STEPS, DROPOUT = 1, 50, False

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss=sigmoid; IPO is robust without it")
        if not self.lora_r and self.precompute_ref is False:
            raise ValueError("precompute_ref=false needs an adapter to turn off, and lora_r is 0")


# ---- The losses: tensors in, tensors out. Of B pairs, y_w is the chosen answer to x, y_l the other


def sigmoid_loss(margin, beta, label_smoothing=0.0):
    """Returns DPO's loss per pair (B,), -log sigmoid(beta h): equation 7 of Rafailov et al. 2023.

    margin (B,) is h = log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x), sums over the
    tokens; beta > 0, usually 0.1 to 0.5. With label_smoothing e it is the conservative DPO of
    Mitchell 2023 (equation 3), -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): a share e of
    the labels is taken to be wrong.
    """
    # Bradley and Terry (1952): how likely the label is right, or wrong, given the margin
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margin, beta):
    """Returns IPO's loss per pair (B,), (h - 1 / (2 beta))^2: equation 17 of Azar et al. 2023.

    margin (B,) is h as above, but of the means over each answer's tokens, as in that paper's
    experiments: the target does not grow with the length of an answer.
    """
    return (margin - 1 / (2 * beta)) ** 2


def preference_loss(cfg):
    """Returns loss_fn(model, batch) for `fit`: the loss of the pairs, sums of METRIC_NAMES.

    A batch of B pairs has 2 B rows, the chosen answers first, and "reference" (2 B,), the
    reference's log p of each answer, where that was computed beforehand.
    """

    def loss_fn(model, batch):
        reference = batch.get("reference")
        if reference is None:  # before the policy, whose activations wait for its backward
            with torch.no_grad(), lora_off(model):
                reference, _ = answer_log_probs(model, batch)
        policy, tokens = answer_log_probs(model, batch)  # (2 B,) each
        gain = policy - reference  # log pi / ref of each answer: what it won over the start
        chosen, rejected = (gain / tokens if cfg.loss == "ipo" else gain).chunk(2)  # (B,) each
        if cfg.loss == "ipo":
            losses = ipo_loss(chosen - rejected, cfg.beta)
        else:
            losses = sigmoid_loss(chosen - rejected, cfg.beta, cfg.label_smoothing)
        won, lost = (cfg.beta * gain.detach()).chunk(2)  # the rewards, (B,) each
        metrics = won, lost, (won > lost).float(), won - lost, *policy.detach().chunk(2)
        return losses.sum(), {n: m.sum() for n, m in zip(METRIC_NAMES, metrics, strict=True)}

    return loss_fn


def answer_log_probs(model, batch):
    """Returns (log p, number of tokens) of each row's answer, (2 B,) each, summed in float32."""
    nats = label_nats(model, batch)  # (N,), of the supervised positions of all rows
    rows, length = batch["ids"].shape
    row, supervised = batch["where"] // length, (batch["labels"] != IGNORE).float()
    zeros = torch.zeros(rows, device=nats.device)
    return zeros.index_add(0, row, -nats), zeros.index_add(0, row, supervised)


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = sft.open_tokenizer(cfg, trained=True)
        template = tokenizer.template
        rows, held_out, sha256 = sft.read_split(cfg, read_pairs, "prompt", world.say)
        cfg, model, length, files = sft.open_base(cfg, tokenizer, template, sha256, world.say)
        collate = lambda pairs: pair_rows(pairs, length, tokenizer.pad_id)

        def stream(rows, purpose):
            pairs = make_pairs(rows, purpose, tokenizer, template, length, world.say)
            return ExampleStream(pairs, collate, cfg.batch_size, cfg.seed, world.size)

        loader, val_stream = stream(rows, "to train on"), stream(held_out, "held out")
        if not loader.blocks:
            render_answer(tokenizer, rows[0]["prompt"], rows[0]["chosen"], template)  # may refuse
        cfg = sft.for_rows(cfg, loader, val_stream, world)
        loss_fn, context = preference_loss(cfg), model.cfg.sequence_length
        questions = [row["prompt"] for row in held_out or rows]
        show = sft.answer_to(cfg, tokenizer, template, questions, context)
        watch = partial(watch_chosen, cfg, world.say)
        validate = sft.validation(world, val_stream, loss_fn, METRIC_NAMES, show, watch)
        dtype, _ = choose_dtype(cfg.dtype, world.device)  # here and below as in training
        attention, _ = choose_attention(world.device, context, dtype, cfg.flash_attn)
        model.to(world.device).use_attention(attention)
        with torch.no_grad(), autocast(world.device, dtype):
            if precomputes(cfg, loader, world):
                world.say("the reference's log-probabilities are computed once, beforehand")
                for pairs in (loader, val_stream):
                    pairs.examples = with_reference(model, pairs, world)
            check_start(cfg, loss_fn, model, loader, world, dtype)
        fit(cfg, model, loader, loss_fn, world, validate, *files)


class Pair(NamedTuple):
    """Two answers to a prompt, each (ids, mask) with the prompt in front; the reference's log p."""

    chosen: tuple
    rejected: tuple
    reference: tuple = ()


def make_pairs(rows, purpose, tokenizer, template, length, say):
    """Returns preference pairs as a list of Pair.

    An answer that does not fit into `length` positions is cut. A pair is dropped if nothing of an
    answer is left, or if nothing distinguishes the two.
    """
    pairs, cut, equal, late = [], 0, 0, 0
    for _, sides in render_rows(rows, tokenizer, template, say):
        longest = max(len(ids) for _, ids, _ in sides)
        # the last id is only predicted
        sides = [tuple(np.array(part[: length + 1]) for part in side) for _, *side in sides]
        if not all(mask.any() for _, mask in sides):
            late += 1
        elif np.array_equal(sides[0][0], sides[1][0]):
            equal += 1
        else:
            pairs.append(Pair(*sides))
            cut += longest > length + 1
    dropped = f"{equal:,} with equal answers, {late:,} whose answer begins beyond"
    say(f"{len(pairs):,} pairs {purpose}, {cut:,} cut to {length} positions; dropped: {dropped}")
    return pairs


def pair_rows(pairs, length, pad_id):
    """Returns the batch of B pairs: 2 B rows, the chosen answers first. Its count is B."""
    rows = [[pair.chosen] for pair in pairs] + [[pair.rejected] for pair in pairs]
    batch = supervised_rows(rows, length, pad_id) | {"count": len(pairs)}
    if pairs[0].reference:
        batch["reference"] = np.array([pair.reference for pair in pairs], np.float32).T.flatten()
    return batch


# ---- The reference


def precomputes(cfg, loader, world):
    """Returns whether the reference is computed beforehand: by default, if every pair is used."""
    if cfg.plan or cfg.precompute_ref is False:  # a plan is to be quick
        return False
    steps = 0 if cfg.max_minutes else total_steps(cfg, loader.blocks, world.size)
    every = steps * rows_per_step(cfg, world.size) >= loader.blocks
    return bool(cfg.precompute_ref) or not cfg.lora_r or every


def with_reference(model, stream, world):
    """Returns the pairs of `stream` with the reference's log p; each rank computes a share."""
    values = np.zeros((stream.blocks, 2))
    for first, batch in world.batches(stream, stream.blocks, stream.batch_size):
        with lora_off(model):
            log_p, _ = answer_log_probs(model, to_device(batch, world.device))  # (2 B,)
        values[first : first + batch["count"]] = log_p.view(2, -1).T.cpu()
    values = np.reshape(world.sum(*values.flat), values.shape)  # the rows of the other ranks were 0
    return [pair._replace(reference=tuple(v)) for pair, v in zip(stream.examples, values)]


def check_start(cfg, loss_fn, model, stream, world, dtype):
    """Asserts that policy and reference begin as one: margin 0, loss ln 2 (IPO: 1 / (2 beta)^2)."""
    batch = stream.rows(0, cfg.batch_size)
    loss, metrics = loss_fn(model, to_device(batch, world.device))
    loss, margin = (n.item() / batch["count"] for n in (loss, metrics["rewards/margins"]))
    expected = math.log(2) if cfg.loss == "sigmoid" else 1 / (2 * cfg.beta) ** 2
    near = 0.001 if dtype == torch.float32 else 0.1
    assert abs(margin) < 10 * near * cfg.beta, f"the first margin is {margin}"
    assert math.isclose(loss, expected, rel_tol=near), f"the first loss is {loss}"
    world.say(f"policy and reference begin as one: loss {loss:.4f}, margin {margin:.4f}")


def watch_chosen(cfg, say, metrics):
    """Warns when the chosen answers have lost a tenth of their log p: the loss may still fall."""
    now = metrics["val_logps/chosen"]
    before = now - metrics["val_rewards/chosen"] / cfg.beta
    if now < before - 0.1 * abs(before):
        less = f"became less likely, logps/chosen {before:.1f} -> {now:.1f}"
        say(f"warning: the chosen answers {less}; lower learning_rate, or raise beta")


if __name__ == "__main__":
    run(main, DPOConfig, __doc__)
