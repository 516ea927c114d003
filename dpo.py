"""Direct preference optimization (Rafailov et al. 2023): pairs of answers -> the preference loss -> `fit`.

    python dpo.py configs/dpo.json --model_path=checkpoints/sft/final --dataset_path=pairs.jsonl --beta=0.1
    python dpo.py configs/dpo.json --model_path=... --dataset_path=... --loss=ipo
    python dpo.py configs/dpo.json --model_path=... --dataset_path=... --lora_r=0 --learning_rate=5e-7

The reference is the model that training begins from: what lies in model_path, an adapter merged into its
base first, without the adapter that is trained here. No second model is loaded: the new adapter is turned
off, or the reference's log-probabilities are computed once, before anything is trained. There is no dropout,
because two probabilities of the same answer are compared; so the first loss is ln 2 and the first margin 0,
and both are asserted. Both answers of a pair go through the model in one forward, and only their tokens
through the head.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from corpus.chats import read_pairs
from data import ExampleStream, supervised_rows
from lib.checkpoint import check_unused
from lib.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UserError,
    run,
)
from lib.runtime import autocast, choose_dtype, open_world, to_device
from lib.tokenizer import IGNORE, Tokenizer, render
from model import (
    LoRAConfig,
    choose_attention,
    lora_off,
    model_folder,
    supervised_hidden,
    token_nats,
)
from sft import answer_to, check_held_out, model_files, open_base, read_split
from train import LoopConfig, fit


@dataclass(frozen=True, kw_only=True)
class DPOConfig(LoopConfig, LoRAConfig):
    """Preference optimization; the defaults are made for LoRA."""

    model_path: str  # the SFT model: a model's folder, an adapter's, or that of a whole training
    dataset_path: str  # preference pairs: a file, a folder or a glob
    val_path: str | None = None  # held-out pairs; none = a share of dataset_path, see val_ratio
    val_ratio: Fraction = 0.05  # that share; a pair falls into it by the hash of its prompt
    # of a prompt with its answer; none = the model's context
    sequence_length: PositiveInt | None = None

    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's own, or IPO's (Azar et al. 2023)
    beta: PositiveFloat = 0.1  # how strongly the policy is held to the reference; IPO's tau
    # share of pairs that may be labelled wrongly
    label_smoothing: Annotated[float, Range(0, 0.5)] = 0.0
    # compute the reference once, beforehand; none = where it pays
    precompute_ref: bool | None = None
    sample_tokens: NonNegativeInt = 48  # length of the answer shown at each evaluation; 0 = none

    output_dir: str = "checkpoints/dpo"  # checkpoints, metrics.jsonl and final/ go here
    # at the top; for LoRA on a small model, full fine-tuning wants 5e-7
    learning_rate: PositiveFloat = 5e-4
    num_train_epochs: PositiveFloat | None = 1.0  # passes over the pairs
    warmup_steps: NonNegativeInt = 10  # linear rise to the top
    weight_decay: NonNegativeFloat = 0.0  # on matrices
    batch_size: PositiveInt = 4  # pairs per micro-batch and rank
    eval_steps: PositiveInt = 50  # steps between validations
    save_steps: PositiveInt = 100  # steps between checkpoints
    # decides which is best
    early_stopping_metric: Literal["val_loss", "val_rewards/accuracies"] = "val_loss"

    def __post_init__(self):
        LoopConfig.__post_init__(self)
        LoRAConfig.__post_init__(self)
        if self.lora_dropout:
            raise ValueError(
                "lora_dropout must be 0: DPO compares two probabilities of the same answer"
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                "label_smoothing belongs to loss=sigmoid; IPO is robust by its own means"
            )
        if not self.lora_r and self.precompute_ref is False:
            raise ValueError("precompute_ref=false needs an adapter to turn off, and lora_r is 0")


# ---- the losses: tensors in, tensors out


def sigmoid_loss(margin, beta, label_smoothing=0.0):
    """Returns DPO's loss per pair, - log sigmoid(beta h): equation 7 of Rafailov et al. 2023.

    margin (B,) is h = log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected), sums over the tokens.
    beta > 0, usually 0.1 to 0.5. With label_smoothing e it is the conservative DPO of Mitchell 2023 (equation
    3), - (1 - e) log sigmoid(beta h) - e log sigmoid(- beta h): a share e of the labels is taken to be wrong.
    """
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margin, beta):
    """Returns IPO's loss per pair, (h - 1 / (2 tau))^2: equation 17 of Azar et al. 2023, tau = beta.

    margin (B,) is h as above, but of the means over each answer's tokens, as that paper's experiments had it:
    the target does not grow with the length of an answer.
    """
    return (margin - 1 / (2 * beta)) ** 2


def answer_log_probs(model, batch):
    """Returns (log p, number of tokens) of each row's answer, each (rows,), summed in float32."""
    nats = token_nats(supervised_hidden(model, batch), model.lm_head.weight, batch["labels"])
    rows, length = batch["ids"].shape
    row, known = batch["where"] // length, (batch["labels"] != IGNORE).float()
    total = torch.zeros(rows, device=nats.device)
    return total.index_add(0, row, -nats), total.index_add(0, row, known)


def preference_loss(cfg):
    """Returns loss_fn(model, batch) for `fit`: the summed loss of the pairs, and sums of TRL's metrics.

    A batch of B pairs has 2 B rows, the chosen answers first; "reference" (2 B,) where that is known already.
    """

    def loss_fn(model, batch):
        reference = batch.get("reference")
        if reference is None:  # before the policy, whose activations wait for its backward
            with torch.no_grad(), lora_off(model):
                reference, _ = answer_log_probs(model, batch)
        policy, tokens = answer_log_probs(model, batch)
        gain = policy - reference  # log pi / ref of each answer
        chosen, rejected = (gain / tokens if cfg.loss == "ipo" else gain).chunk(2)
        if cfg.loss == "ipo":
            losses = ipo_loss(chosen - rejected, cfg.beta)
        else:
            losses = sigmoid_loss(chosen - rejected, cfg.beta, cfg.label_smoothing)
        return losses.sum(), metrics_of(policy.detach(), cfg.beta * gain.detach())

    return loss_fn


def metrics_of(policy, rewards):
    """Returns sums over the pairs under TRL's names; policy: log-probabilities (2 B,), rewards (2 B,)."""
    chosen, rejected = rewards.chunk(2)
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": policy.chunk(2)[0].sum(),
        "logps/rejected": policy.chunk(2)[1].sum(),
    }


# ---- training


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = Tokenizer.load(model_folder(cfg.model_path))
        template = tokenizer.template
        if template is None:
            raise UserError(
                f"{cfg.model_path}: names no chat template of ours; train it with sft.py first"
            )
        check_unused(cfg)
        pairs, held_out, sha256 = read_split(cfg, read_pairs, "prompt", world.say)
        model, base, length = open_base(cfg, tokenizer, world.say)
        drop_nothing(model)

        def stream(rows, purpose):
            pairs = make_pairs(rows, purpose, tokenizer, template, length, world.say)
            return ExampleStream(pairs, collate, cfg.batch_size, cfg.seed, world.size)

        def collate(pairs):
            return pair_rows(pairs, length, tokenizer.pad_id)

        loader, val_stream = stream(pairs, "to train on"), stream(held_out, "held out")
        if not loader.blocks:
            raise UserError(
                f"{cfg.dataset_path}: no two different answers within {length} positions"
            )
        check_held_out(cfg, val_stream)
        loss_fn = preference_loss(cfg)
        with as_in_training(cfg, world, model) as precise:
            if precomputed(cfg, loader, world):
                world.say(
                    f"the reference: {loader.blocks + val_stream.blocks:,} pairs, computed once"
                )
                for one in (loader, val_stream):
                    one.examples = with_reference(model, one, world)
            check_start(cfg, loss_fn, model, loader, world, precise)
        questions = [row["prompt"] for row in held_out or pairs]
        show = answer_to(cfg, tokenizer, template, questions, model.cfg.sequence_length)
        validate = validation(cfg, world, val_stream, loss_fn, show)
        files = model_files(cfg, base, tokenizer, template, sha256)
        fit(cfg, model, loader, loss_fn, world, validate, *files)


def drop_nothing(model):
    """Sets every dropout of `model` to 0, whatever its configuration says."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.model.layers:
        block.self_attn.dropout = 0.0


class Pair(NamedTuple):
    """Two answers to a prompt, each as (ids, mask) with the prompt in front; the reference's log p."""

    chosen: tuple
    rejected: tuple
    reference: tuple = ()


def make_pairs(rows, purpose, tokenizer, template, length, say):
    """Renders preference pairs, prompt and answers apart, joined as ids; returns a list of Pair.

    An answer that does not fit into `length` positions loses its end. A pair is dropped if nothing of an
    answer is left, or if nothing distinguishes the two.
    """
    pairs, cut, equal, late = [], 0, 0, 0
    for row in rows:
        prompt, _ = render(tokenizer, row["prompt"], template, add_generation_prompt=True)
        sides, longest = [], 0
        for answer in (row["chosen"], row["rejected"]):
            ids, mask = (
                np.array(half) for half in render(tokenizer, row["prompt"] + answer, template)
            )
            assert ids[: len(prompt)].tolist() == prompt
            mask[: len(prompt)] = 0  # earlier answers are part of the prompt
            longest = max(longest, len(ids))
            sides.append((ids[: length + 1], mask[: length + 1]))
        if not (sides[0][1].any() and sides[1][1].any()):
            late += 1
        elif np.array_equal(sides[0][0], sides[1][0]):
            equal += 1
        else:
            pairs.append(Pair(*sides))
            cut += longest > length + 1
    say(f"{len(pairs):,} pairs {purpose}, {cut:,} cut to {length} positions; dropped: {equal:,} with equal "
        f"answers, {late:,} whose answer begins beyond")  # fmt: skip
    return pairs


def pair_rows(pairs, length, pad_id):
    """Returns the batch of some pairs: 2 B rows, the chosen answers first. Its count is the pairs, B."""
    rows = [[pair.chosen] for pair in pairs] + [[pair.rejected] for pair in pairs]
    batch = supervised_rows(rows, length, pad_id) | {"count": len(pairs)}
    if pairs[0].reference:
        batch["reference"] = np.array([pair.reference for pair in pairs], np.float32).T.flatten()
    return batch


# ---- the reference


@contextlib.contextmanager
def as_in_training(cfg, world, model):
    """Inside, the model computes as `fit` will let it, without learning. Yields whether in float32."""
    dtype, _ = choose_dtype(cfg.dtype, world.device)
    model.to(world.device)
    length = model.cfg.sequence_length
    model.use_attention(choose_attention(world.device, length, dtype, cfg.flash_attn)[0])
    with torch.no_grad(), autocast(world.device, dtype):
        yield dtype == torch.float32


def precomputed(cfg, loader, world):
    """Returns whether the reference is computed beforehand: by default, if every pair is certain to be used.

    Not for a plan, which is to be quick: there each timed step computes the reference of its own pairs.
    """
    if cfg.plan:
        return False
    if cfg.precompute_ref is not None or not cfg.lora_r:
        return cfg.precompute_ref is not False
    if cfg.max_steps:
        rows = cfg.batch_size * cfg.gradient_accumulation_steps * world.size
        return cfg.max_steps * rows >= loader.blocks
    return not cfg.max_minutes and (cfg.num_train_epochs or 1) >= 1


def with_reference(model, stream, world):
    """Returns the pairs of `stream` with the reference's log-probabilities, each rank a share."""
    values = np.zeros((stream.blocks, 2))
    for first, batch in world.batches(stream, stream.blocks, stream.batch_size):
        with lora_off(model):
            log_probs, _ = answer_log_probs(model, to_device(batch, world.device))
        values[first : first + batch["count"]] = log_probs.view(2, -1).T.cpu()
    values = np.reshape(world.sum(*values.flat), values.shape)
    return [pair._replace(reference=tuple(value)) for pair, value in zip(stream.examples, values)]


def check_start(cfg, loss_fn, model, stream, world, precise):
    """Asserts that policy and reference begin as one: margin 0, a loss of ln 2 (IPO: 1 / (2 beta)^2)."""
    loss = margin = 0.0
    pairs = min(cfg.batch_size, stream.blocks)
    for _, batch in world.batches(stream, pairs, cfg.batch_size):
        losses, metrics = loss_fn(model, to_device(batch, world.device))
        loss += losses.item() / pairs
        margin += metrics["rewards/margins"].item() / pairs
    loss, margin = world.sum(loss, margin)
    expected = math.log(2) if cfg.loss == "sigmoid" else 1 / (2 * cfg.beta) ** 2
    assert abs(margin) < cfg.beta * (1e-2 if precise else 1.0), (
        f"the margin begins at {margin}, not at 0"
    )
    assert math.isclose(loss, expected, rel_tol=1e-3 if precise else 0.1), (
        f"the loss begins at {loss}"
    )
    world.say(f"policy and reference begin as one: loss {loss:.4f}, margin {margin:.4f}")


# ---- validation


def validation(cfg, world, stream, loss_fn, show):
    """Returns validate(model): loss and metrics of held-out pairs, named val_..., and an answer."""

    names = ["loss", *metrics_of(torch.zeros(2), torch.zeros(2))]

    def validate(model):
        sums = np.zeros(len(names) + 1)
        for _, batch in world.batches(stream, stream.blocks, stream.batch_size):
            loss, metrics = loss_fn(model, to_device(batch, world.device))
            sums += [loss.item(), *map(float, metrics.values()), batch["count"]]
        *sums, pairs = world.sum(*sums.tolist())
        if not pairs:
            return show(model)
        metrics = {f"val_{name}": value / pairs for name, value in zip(names, sums)}
        watch_chosen(cfg, metrics, world.say)
        return metrics | show(model)

    return validate


def watch_chosen(cfg, metrics, say):
    """Says so when the chosen answers have lost a tenth of the log-probability that the reference gives them.

    The loss only asks that they lose less than the rejected ones: it may fall while both become unlikely.
    """
    now = metrics["val_logps/chosen"]
    before = now - metrics["val_rewards/chosen"] / cfg.beta
    if now < before - 0.1 * abs(before):
        say(f"warning: the chosen answers became less likely, logps/chosen {before:.1f} -> {now:.1f}; "
            "a lower learning_rate or a higher beta holds them")  # fmt: skip


if __name__ == "__main__":
    run(main, DPOConfig, __doc__)
