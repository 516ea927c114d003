"""Supervised fine-tuning: conversations -> ids and masks -> `fit`. Learned are the answers and their ends.

    python sft.py configs/sft.json --model_path=checkpoints/pretrain/tiny --dataset_path=chats.jsonl
    python sft.py configs/sft.json --model_path=... --dataset_path=... --lora_r=0 --learning_rate=5e-5
    python sample.py --model_path=checkpoints/sft/final --prompt="Why?"

Rows may be prompt/response, alpaca, OpenAI messages or ShareGPT, in JSON, JSON Lines or CSV. Each is rendered
in the chat template, whose name the resulting folder keeps: later programs ask in no other. A conversation
longer than the context loses its end, and the mark of it: nobody is to learn to break off there. One
whose answers are cut away whole is dropped. Both are counted.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from checkpoint import check_unused
from configurator import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UserError,
    run,
)
from data import ExampleStream, pack, read_aloud, read_chats, rows_sha256, split_rows, supervised_rows
from lora import LoRAConfig, files_for, model_folder, open_base
from losses import next_token_loss
from tokenizer import Tokenizer, render, stop_ids, usual_template
from train import LoopConfig, check_data, check_tokenizer, fit, greedy
from world import open_world, to_device


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig, LoRAConfig):
    """Fine-tuning on conversations; the defaults are made for LoRA."""

    model_path: str  # what to begin from: a model's folder, an adapter's, or that of a whole training
    dataset_path: str  # conversations: a file, a folder or a glob
    val_path: str | None = None  # held-out conversations; none = a share of dataset_path, see val_ratio
    val_ratio: Fraction = 0.05  # that share; a row falls into it by its hash
    # none = the model's own; without one chatml, or instruct where the tokenizer lacks chatml's markers
    prompt_template: Literal["chatml", "instruct", "chat"] | None = None
    sequence_length: PositiveInt | None = None  # positions of a row; none = the model's context
    packing: bool = True  # several conversations in a row, which do not see each other
    sample_tokens: NonNegativeInt = 48  # length of an answer shown at each evaluation

    output_dir: str = "checkpoints/sft"  # checkpoints, metrics.jsonl and final/ go here
    learning_rate: PositiveFloat = 1e-3  # at the top; for LoRA on a small model, full fine-tuning wants 5e-5
    num_train_epochs: PositiveFloat | None = 3.0  # passes over the data
    warmup_steps: NonNegativeInt = 10  # linear rise to the top
    weight_decay: NonNegativeFloat = 0.0  # on matrices
    lora_dropout: Fraction = 0.1  # on what enters the adapter
    eval_steps: PositiveInt = 100  # steps between validations
    save_steps: PositiveInt = 100  # steps between checkpoints

    def __post_init__(self):
        LoopConfig.__post_init__(self)
        LoRAConfig.__post_init__(self)


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = Tokenizer.load(model_folder(cfg.model_path))
        template = choose_template(cfg, tokenizer)
        ends = stop_ids(tokenizer, template)
        check_unused(cfg)
        chats, held_out, sha256 = read_conversations(cfg, world)
        model, base, length = open_base(cfg, tokenizer)
        data = {cfg.model_path: base.sha256, cfg.dataset_path: sha256}  # all that the training depends on
        maker = (tokenizer, template, length, world.say)

        def stream(examples):
            rows = pack(examples, length) if cfg.packing else [[example] for example in examples]
            return ExampleStream(rows, collate, cfg.batch_size, cfg.seed, world.size)

        def collate(rows):
            return supervised_rows(rows, length, tokenizer.pad_id, cfg.packing)

        def check(folder):
            check_tokenizer(tokenizer, folder)
            check_data(cfg, data, folder)

        files = files_for(cfg, base, tokenizer, template, ends, data, check)
        loader = stream(make_examples(chats, "to train on", *maker))
        if not loader.blocks:
            longer = f", or --sequence_length={most}" if length < (most := model.cfg.sequence_length) else ""
            raise UserError(
                f"{cfg.dataset_path}: no answer begins within {length} positions; "
                f"shorten the questions{longer}"
            )
        show = answer_to(cfg, tokenizer, template, (held_out or chats)[0]["messages"])
        validate = validation(world, stream(make_examples(held_out, "held out", *maker)), show)
        world.say(f"{loader.blocks:,} rows of up to {length} positions in a pass; template {template}")
        fit(cfg, model, loader, next_token_loss, world, validate, *files)


def choose_template(cfg, tokenizer):
    """Returns the template to train in; UserError if the model was trained in another one already."""
    asked, own = cfg.prompt_template, tokenizer.template
    if asked and own and asked != own:
        raise UserError(
            f"prompt_template={asked}: {cfg.model_path} was trained in {own!r} and knows no other template; "
            f"use --prompt_template={own}, or begin from a model without one"
        )
    return asked or usual_template(tokenizer)


def read_conversations(cfg, world):
    """Returns (conversations, those held out, the sha256 of what dataset_path holds)."""
    chats = read_aloud(read_chats, cfg.dataset_path, world.say)
    sha256 = rows_sha256(chats)
    if cfg.val_path:
        return chats, read_aloud(read_chats, cfg.val_path, world.say), sha256
    chats, held_out = split_rows(chats, cfg.val_ratio, "messages")
    if not chats:
        raise UserError(f"{cfg.dataset_path}: every row is held out at val_ratio {cfg.val_ratio}; lower it")
    return chats, held_out, sha256


def make_examples(chats, purpose, tokenizer, template, length, say):
    """Renders conversations: [(ids, mask), ...] of at most length + 1 ids each, something in each supervised.

    One more than `length`, because the last id is only ever predicted.
    """
    examples, cut = [], 0
    for chat in chats:
        ids, mask = (np.array(half) for half in render(tokenizer, chat["messages"], template))
        cut += len(ids) > length + 1
        if mask[: length + 1].any():
            examples.append((ids[: length + 1], mask[: length + 1]))
    dropped = len(chats) - len(examples)
    say(f"{len(examples):,} conversations {purpose}, {cut:,} cut to {length} positions, "
        f"{dropped:,} dropped: no answer begins within them")  # fmt: skip
    return examples


def answer_to(cfg, tokenizer, template, messages):
    """Returns show(model): the first question of a conversation and the model's greedy answer, as metrics."""
    end = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt, _ = render(tokenizer, messages[:end], template, add_generation_prompt=True) if end else ([], [])

    def show(model):
        if not (cfg.sample_tokens and 0 < len(prompt) < model.cfg.sequence_length):
            return {}
        fresh = greedy(model, prompt, cfg.sample_tokens, stop_ids(tokenizer, template))
        return {"question": messages[end - 1]["content"][:200], "answer": tokenizer.decode(fresh).strip()}

    return show


def validation(world, stream, show):
    """Returns validate(model, walk): nats per supervised token of held-out rows, and an answer to look at."""

    def validate(model, walk):
        def scored(batch):
            return next_token_loss(model, to_device(batch, world.device))[0].item(), batch["count"]

        nats, count = walk.total(scored, stream, stream.blocks, 2)
        return ({"val_loss": nats / count} if count else {}) | show(model)

    return validate


if __name__ == "__main__":
    run(main, SFTConfig, __doc__)
