"""Supervised fine-tuning on conversations: the model learns the answers and their ends.

    python sft.py configs/sft.json --model_path=checkpoints/pretrain/tiny --dataset_path=chats.jsonl

Each row is rendered in a chat template, whose name the resulting folder keeps. A conversation
longer than the context is cut, and its end-of-turn token is not trained: nobody is to learn to
break off there. The second half is shared with dpo.py and grpo.py.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Literal

import numpy as np
import torch

import model as llama
from corpus.chats import read_chats
from corpus.report import Tally
from data import ExampleStream, pack_examples, supervised_rows
from lib import config
from lib.checkpoint import check_unused, find_checkpoint
from lib.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from lib.conversation import find_template, render, render_rows, stop_ids, template_of
from lib.folders import Shards, hash_fraction, read_manifest
from lib.runtime import open_world, to_device
from lib.tokenizer import Tokenizer
from train import LoopConfig, fit, greedy, model_files, rows_per_step, total_steps

SMALL = 30_000_000  # parameters below which all the weights are trained, unless lora_r says more
# where learning_rate is none: (the model is small, all its weights are trained) -> it
RATES = {(True, True): 1e-3, (True, False): 3e-3, (False, True): 5e-5, (False, False): 2e-4}


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(LoopConfig):
    """What fine-tunings share: the model to begin from, the rows, and defaults made for LoRA."""

    model_path: str  # what to begin from: a model's folder, an adapter's, or a whole training's
    dataset_path: str  # rows to train on: a file, a folder or a glob
    val_path: str | None = None  # held-out rows; none = a share of dataset_path, see val_ratio
    val_ratio: config.Fraction = 0.05  # that share; a row falls into it by its hash
    sequence_length: PositiveInt | None = None  # positions of a row; none = the model's context
    sample_tokens: NonNegativeInt = 48  # length of the answer shown at each evaluation; 0 = none
    # passes over the rows; none = 8 (DPO: 1), or as many more as make 400 steps (DPO: 50)
    num_train_epochs: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0  # on matrices
    save_steps: PositiveInt = 100  # steps between checkpoints
    lora_r: NonNegativeInt = 16  # rank of the difference that is learned; 0 = train all weights
    lora_alpha: PositiveFloat = 32.0  # the difference is scaled by lora_alpha / lora_r
    lora_dropout: config.Fraction = 0.0  # on the adapter's input
    # the projections that get an adapter
    lora_target_modules: tuple[llama.Projection, ...] = llama.PROJECTIONS
    merge: bool = True  # final/ is a whole model, its adapter in final/adapter; else that alone

    WARMUP = 10  # steps, where warmup_steps is none and the run is long enough
    PASSES, STEPS = 8, 400  # where num_train_epochs is none: so many passes, so many steps at least
    DROPOUT = True  # is any allowed?

    def __post_init__(self):
        super().__post_init__()
        if self.lora_r and not self.lora_target_modules:
            raise ValueError("lora_target_modules names no projection; lora_r=0 trains all weights")
        if self.lora_r and self.optimizer == "muon":
            raise ValueError("optimizer=muon is for whole matrices: use adamw, or lora_r=0")
        if self.lora_dropout and not self.DROPOUT:
            raise ValueError("lora_dropout must be 0: two probabilities of an answer are compared")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(FineTuningConfig):
    """Fine-tuning on conversations."""

    # none = the model's own; without one chatml, or instruct where the tokenizer lacks its markers
    prompt_template: Literal["chatml", "instruct", "chat"] | None = None
    # conversations share a row and do not see each other; none = unless a step took more than 10
    packing: bool | None = None
    # a dataset prepared with the same tokenizer, as the model's own: with rows of its plain text
    # among the others the model forgets less of what it knew
    replay_path: str | None = None
    replay_share: Annotated[float, config.Range(0, 0.9)] = 0.03  # of all rows, if there is a path
    output_dir: str = "checkpoints/sft"  # checkpoints, metrics.jsonl and final/ go here
    # none = 1e-3 for all weights of a small model (adapter 3e-3), 5e-5 of a larger (adapter 2e-4)
    learning_rate: PositiveFloat | None = None
    lora_r: NonNegativeInt | None = None  # none = 16, or 0 (all weights) below 30M parameters
    lora_dropout: config.Fraction = 0.1  # on what enters the adapter
    eval_steps: PositiveInt = 100  # steps between validations
    early_stopping_metric: Literal["val_loss"] = "val_loss"  # decides which is best


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = open_tokenizer(cfg)
        template = choose_template(cfg, tokenizer)
        for line in find_template(tokenizer, template).notes:  # raises if it cannot be written
            world.say(line)
        chats, held_out, sha256 = read_split(cfg, read_chats, "messages", world.say)
        cfg, model, length, files = open_base(cfg, tokenizer, template, sha256, world.say)
        settings = tokenizer, template, length, world.say
        examples = make_examples(chats, "to train on", *settings)
        cfg = with_packing(cfg, examples, length, world)
        packed = lambda examples: pack_examples(examples, length)
        alone = lambda examples: [[example] for example in examples]
        rows_of = packed if cfg.packing else alone
        collate = lambda rows: supervised_rows(rows, length, tokenizer.pad_id, cfg.packing)
        stream = lambda rows: ExampleStream(rows, collate, cfg.batch_size, cfg.seed, world.size)
        rows = rows_of(examples)
        rows += replayed_rows(cfg, tokenizer, length, len(rows), world.say)
        held_out_rows = rows_of(make_examples(held_out, "held out", *settings))
        loader, val_stream = stream(rows), stream(held_out_rows)
        if not loader.blocks:
            render(tokenizer, chats[0]["messages"], template)  # raises where the template refuses
        world.say(f"{loader.blocks:,} rows of up to {length} positions; template {template}")
        cfg = for_rows(cfg, loader, val_stream, world)
        asks = lambda message: message["role"] != "assistant"
        questions = [list(takewhile(asks, chat["messages"])) for chat in held_out or chats]
        show = answer_to(cfg, tokenizer, template, questions, model.cfg.sequence_length)
        validate = validation(world, val_stream, llama.next_token_loss, (), show)
        fit(cfg, model, loader, llama.next_token_loss, world, validate, *files)


def choose_template(cfg, tokenizer):
    """Returns the name of the template to train in; a training that resumes keeps its own.

    UserError if the model was trained in another one already, or the tokenizer lacks its markers.
    """
    if cfg.resume_from_checkpoint and (folder := find_checkpoint(cfg, lambda line: None)):
        tokenizer = Tokenizer.load(folder)
    asked, trained = cfg.prompt_template, tokenizer.template
    template = template_of(tokenizer, asked)
    if trained not in (None, template):
        knows = f"{cfg.model_path} was trained in {trained!r} and knows no other template"
        remedy = "leave --prompt_template out, or begin from a model without one"
        raise UserError(f"prompt_template={asked}: {knows}; {remedy}")
    return template


def for_size(cfg, size, say):
    """Returns cfg with its lora_r and learning_rate for a model of `size` parameters."""
    small, given = size < SMALL, cfg.lora_r is not None
    r = cfg.lora_r if given else 0 if small or cfg.optimizer == "muon" else 16
    rate = cfg.learning_rate or RATES[small, not r]
    what = f"an adapter of rank {r}" if r else "all weights"
    if small and r:
        what += ", where a model this small learns more with --lora_r=0"
    elif not given:
        what += "; --lora_r=0 trains all weights" if r else "; --lora_r=16 trains an adapter"
    say(f"{size:,} parameters, learning rate {rate:g} for {what}")
    return replace(cfg, lora_r=r, learning_rate=rate)


def make_examples(chats, purpose, tokenizer, template, length, say):
    """Returns conversations as [(ids, mask), ...], each with something supervised in it.

    ids and mask are (at most length + 1,), because the last id is only predicted and never read.
    """
    examples, cut, rows = [], 0, [chat["messages"] for chat in chats]
    for _, [(_, ids, mask)] in render_rows(rows, tokenizer, template, say):
        cut += len(ids) > length + 1
        ids, mask = np.array(ids[: length + 1]), np.array(mask[: length + 1])
        if mask.any():
            examples.append((ids, mask))
    dropped = f"{len(chats) - len(examples):,} dropped: no answer begins within them"
    say(f"{len(examples):,} conversations {purpose}, {cut:,} cut to {length} positions, {dropped}")
    return examples


def with_packing(cfg, examples, length, world):
    """Returns cfg with packing on or off: by default off where a step took more than 10 examples.

    Where max_steps counts the steps, packing takes none away and is on.
    """
    if cfg.packing is not None:
        return cfg
    rows, per_step = len(pack_examples(examples, length)), rows_per_step(cfg, world.size)
    packing = bool(cfg.max_steps) or len(examples) * per_step <= 10 * rows
    if not packing:
        full = f"{len(examples):,} conversations would fill {rows:,} rows, {per_step} a step"
        world.say(f"packing is off: {full}, too few steps; --packing=true packs them")
    return replace(cfg, packing=packing)


def replayed_rows(cfg, tokenizer, length, count, say):
    """Returns rows of text from cfg.replay_path, evenly spread over it, to add to `count` others.

    They are then the share cfg.replay_share of all rows. All of their ids are learned.
    """
    if cfg.replay_path is None or not count:
        return []
    shards = Shards(cfg.replay_path, "train")
    if shards.tokenizer_sha256 != tokenizer.sha256:
        problem = f"was prepared with another tokenizer than {cfg.model_path} has"
        remedy = f"prepare it with --tokenizer_path={llama.model_folder(cfg.model_path)}"
        raise UserError(f"replay_path {cfg.replay_path}: {problem}; {remedy}, or leave it out")
    number = math.ceil(count * cfg.replay_share / (1 - cfg.replay_share))
    say(f"{number:,} rows of text from {cfg.replay_path} are added, so that it is not forgotten")
    starts = np.linspace(0, max(0, shards.tokens - length - 1), number, dtype=int).tolist()
    texts = [shards.read(at, min(at + length + 1, shards.tokens)) for at in starts]
    return [[(ids.astype(np.int64), np.ones(len(ids), int))] for ids in texts]


# ---- What sft.py, dpo.py and grpo.py share


def open_tokenizer(cfg, trained=False):
    """Returns the tokenizer of cfg.model_path; UserError if it is `trained` in no template yet."""
    tokenizer = Tokenizer.load(llama.model_folder(cfg.model_path))
    check_unused(cfg)
    if trained and tokenizer.template is None:
        raise UserError(f"{cfg.model_path}: names no chat template; train it with sft.py first")
    return tokenizer


def for_rows(cfg, loader, held_out, world):
    """Returns cfg with its number of passes, and early stopping off where no row is held out.

    Few rows are seen more often: a few steps would teach nothing. UserError if none is left.
    """
    if not loader.blocks:
        above = "no row is left to train on, see above"
        raise UserError(f"{cfg.dataset_path}: {above}; a longer --sequence_length keeps more")
    if cfg.early_stopping_patience and not held_out.blocks:
        remedy = "--val_path or more rows turn it on"
        world.say(f"early stopping is off, because no row is held out to decide by: {remedy}")
        cfg = replace(cfg, early_stopping_patience=None)
    if cfg.num_train_epochs is None:
        cfg, rows = replace(cfg, num_train_epochs=cfg.PASSES), loader.blocks
        steps = total_steps(cfg, rows, world.size)
        if steps < cfg.STEPS and not cfg.max_steps:
            passes = math.ceil(cfg.STEPS * rows_per_step(cfg, world.size) / rows)
            why = f"{cfg.PASSES} would make {steps} steps, {cfg.STEPS} are wanted"
            world.say(f"{passes:,} passes over {rows:,} rows: --num_train_epochs={why}")
            cfg = replace(cfg, num_train_epochs=passes)
    return cfg


def read_split(cfg, read, key, say):
    """Returns (rows to train on, rows held out, the sha256 of everything in dataset_path).

    `read` is chats.read_chats or the like. Without val_path a row is held out by the hash of its
    `key`: equal ones stay together, and a higher val_ratio only adds rows.
    """
    tally = Tally()
    rows = read(cfg.dataset_path, tally)
    held_out = read(cfg.val_path, tally) if cfg.val_path else []
    for line in tally.lines():
        say(line)
    sha256 = hashlib.sha256(json.dumps(rows, ensure_ascii=False, default=str).encode()).hexdigest()
    if not cfg.val_path:
        rows, held_out = split_rows(rows, cfg.val_ratio, key)
    if not rows:
        raise UserError(f"{cfg.dataset_path}: every row is held out; lower --val_ratio")
    if cfg.val_ratio and not held_out:
        equal = f"no two of {len(rows):,} rows differ in {key}"
        say(f"nothing is held out to validate on: {equal}; --val_path names other rows")
    return rows, held_out, sha256


def split_rows(rows, ratio, key):
    """Returns (the other rows, about `ratio` of them), split by the hash of row[key]."""
    hashes = [hash_fraction(json.dumps(row[key], ensure_ascii=False)) for row in rows]
    if 0 < ratio < 1:  # the lowest is held out, the highest is not: neither side is empty
        ratio = min(max(ratio, math.nextafter(min(hashes), 1)), max(hashes))
    sides = [], []
    for row, value in zip(rows, hashes, strict=True):
        sides[value < ratio].append(row)
    return sides


def open_base(cfg, tokenizer, template, sha256, say):
    """Returns (cfg `for_size`, model with a new adapter, length of a row, `model_files`).

    `sha256` is that of the rows: a checkpoint of other rows, or on another base, is refused.
    """
    base, model = llama.identify(cfg.model_path), llama.load_model(cfg.model_path)
    context = model.cfg.sequence_length
    tokenizer.match(model.cfg.vocab_size, cfg.model_path)
    if (length := cfg.sequence_length or context) > context:
        raise UserError(f"sequence_length {length} is more than the model's {context}; lower it")
    if isinstance(cfg, SFTConfig):
        cfg = for_size(cfg, llama.count_parameters(model.cfg)["total"], say)
    torch.manual_seed(cfg.seed)
    if cfg.lora_r:
        llama.add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_modules)
    for module in model.modules() if not cfg.DROPOUT else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = {cfg.model_path: base.sha256, cfg.dataset_path: sha256}
    if path := getattr(cfg, "replay_path", None):
        data[path] = hashlib.sha256(json.dumps(read_manifest(path)).encode()).hexdigest()
    files = model_files(cfg, tokenizer, data, template, stop_ids(tokenizer, template), base)
    return cfg, model.train(), length, files


def validation(world, stream, loss_fn, names, show, watch=lambda means: None):
    """Returns validate(model): means over the held-out rows, and an answer to look at.

    The means are val_loss, per supervised term, and val_NAME for each of `names`, which loss_fn
    sums up too; watch(means) may comment on them. Without held-out rows there is only the answer.
    """

    def validate(model):
        totals = np.zeros(2 + len(names))
        for _, batch in world.batches(stream, stream.blocks, stream.batch_size):
            loss, sums = loss_fn(model, to_device(batch, world.device))
            totals += [batch["count"], loss.item(), *(sums[name].item() for name in names)]
        count, *totals = world.sum(*totals.tolist())
        means = {f"val_{n}": total / count for n, total in zip(("loss", *names), totals) if count}
        if means:
            watch(means)
        return means | show(model)

    return validate


def answer_to(cfg, tokenizer, template, questions, context):
    """Returns show(model): a held-out question and the model's greedy answer, as texts to log.

    `questions` are lists of messages. The first that leaves room for an answer in `context`
    positions is asked; without one nothing is shown.
    """
    prompt = lambda chat: render(tokenizer, chat, template, add_generation_prompt=True)[0]
    prompts = ((chat[-1]["content"], prompt(chat)) for chat in questions if chat)
    question, ids = next(((text, ids) for text, ids in prompts if len(ids) < context), ("", []))

    def show(model):
        if not (ids and cfg.sample_tokens):
            return {}
        answer = greedy(model, ids, cfg.sample_tokens, stop_ids(tokenizer, template))
        return {"question": question[:200], "answer": tokenizer.decode(answer).strip()}

    return show


if __name__ == "__main__":
    config.run(main, SFTConfig, __doc__)
