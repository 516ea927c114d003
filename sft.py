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
from itertools import takewhile
from typing import Literal

import numpy as np

from data import ExampleStream, pack, read_chats, supervised_rows
from lib.checkpoint import check_unused
from lib.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UserError,
    run,
)
from lib.runtime import open_world, to_device
from lib.tokenizer import Tokenizer, render, stop_ids, usual_template
from model import LoRAConfig, model_folder, next_token_loss
from train import LoopConfig, fit
from tuning import answer_to, check_held_out, files_for, open_base, read_rows


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig, LoRAConfig):
    """Fine-tuning on conversations; the defaults are made for LoRA."""

    model_path: (
        str  # what to begin from: a model's folder, an adapter's, or that of a whole training
    )
    dataset_path: str  # conversations: a file, a folder or a glob
    # held-out conversations; none = a share of dataset_path, see val_ratio
    val_path: str | None = None
    val_ratio: Fraction = 0.05  # that share; a row falls into it by its hash
    # none = the model's own; without one chatml, or instruct where the tokenizer lacks chatml's markers
    prompt_template: Literal["chatml", "instruct", "chat"] | None = None
    sequence_length: PositiveInt | None = None  # positions of a row; none = the model's context
    packing: bool = True  # several conversations in a row, which do not see each other
    sample_tokens: NonNegativeInt = 48  # length of the answer shown at each evaluation; 0 = none

    output_dir: str = "checkpoints/sft"  # checkpoints, metrics.jsonl and final/ go here
    # at the top; for LoRA on a small model, full fine-tuning wants 5e-5
    learning_rate: PositiveFloat = 1e-3
    num_train_epochs: PositiveFloat | None = 3.0  # passes over the data
    warmup_steps: NonNegativeInt = 10  # linear rise to the top
    weight_decay: NonNegativeFloat = 0.0  # on matrices
    lora_dropout: Fraction = 0.1  # on what enters the adapter
    eval_steps: PositiveInt = 100  # steps between validations
    save_steps: PositiveInt = 100  # steps between checkpoints
    early_stopping_metric: Literal["val_loss"] = "val_loss"  # decides which is best

    def __post_init__(self):
        LoopConfig.__post_init__(self)
        LoRAConfig.__post_init__(self)


def main(cfg):
    with open_world(cfg) as world:
        tokenizer = Tokenizer.load(model_folder(cfg.model_path))
        template = choose_template(cfg, tokenizer)
        check_unused(cfg)
        chats, held_out, sha256 = read_rows(cfg, read_chats, "messages", world.say)
        model, base, length = open_base(cfg, tokenizer, world.say)
        context = model.cfg.sequence_length

        def stream(chats, purpose):
            examples = make_examples(chats, purpose, tokenizer, template, length, world.say)
            rows = pack(examples, length) if cfg.packing else [[example] for example in examples]
            return ExampleStream(rows, collate, cfg.batch_size, cfg.seed, world.size)

        def collate(rows):
            return supervised_rows(rows, length, tokenizer.pad_id, cfg.packing)

        loader, val_stream = stream(chats, "to train on"), stream(held_out, "held out")
        if not loader.blocks:
            longer = f", or --sequence_length={context}" if length < context else ""
            raise UserError(
                f"{cfg.dataset_path}: no answer begins within {length} positions; "
                f"shorten the questions{longer}"
            )
        check_held_out(cfg, val_stream)
        world.say(
            f"{loader.blocks:,} rows of up to {length} positions in a pass; template {template}"
        )
        questions = (question_of(chat["messages"]) for chat in held_out or chats)
        show = answer_to(cfg, tokenizer, template, questions, context)
        files = files_for(cfg, base, tokenizer, template, sha256)
        fit(cfg, model, loader, next_token_loss, world, validation(world, val_stream, show), *files)


def choose_template(cfg, tokenizer):
    """Returns the template to train in.

    UserError if the model was trained in another one already, or the tokenizer lacks the template's markers.
    """
    asked, own = cfg.prompt_template, tokenizer.template
    if asked and own and asked != own:
        raise UserError(
            f"prompt_template={asked}: {cfg.model_path} was trained in {own!r} and knows no other template; "
            f"use --prompt_template={own}, or begin from a model without one"
        )
    template = asked or usual_template(tokenizer)
    stop_ids(
        tokenizer, template
    )  # refuses a template that the tokenizer cannot write, before any work
    return template


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


def question_of(messages):
    """Returns the messages that come before a conversation's first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", messages))


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
