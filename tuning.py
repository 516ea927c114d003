"""What SFT and DPO share: rows read and held out, the model to begin from, what is saved, an answer shown.

Both are users of `train.fit` on top of a finished model; what differs between them is in sft.py and dpo.py.
"""

import json
from pathlib import Path

import torch

from data import read_aloud, rows_sha256, split_rows
from lib.config import UserError
from lib.tokenizer import render, stop_ids
from model import add_lora, identify, load_trained, open_model_folder, save_trained
from train import check_data, check_tokenizer, greedy


def read_rows(cfg, read, key, say):
    """Returns (rows to train on, rows held out, the sha256 of everything in dataset_path).

    `read` is data.read_chats or data.read_pairs. Without val_path a row is held out by the hash of its `key`.
    """
    rows = read_aloud(read, cfg.dataset_path, say)
    sha256 = rows_sha256(rows)
    if cfg.val_path:
        return rows, read_aloud(read, cfg.val_path, say), sha256
    rows, held_out = split_rows(rows, cfg.val_ratio, key)
    if not rows:
        raise UserError(
            f"{cfg.dataset_path}: every row is held out at val_ratio {cfg.val_ratio}; lower it"
        )
    return rows, held_out, sha256


def check_held_out(cfg, stream):
    """Raises UserError if early stopping is asked for and nothing is held out to decide by."""
    if cfg.early_stopping_patience and not stream.blocks:
        raise UserError(
            f"early_stopping_patience={cfg.early_stopping_patience}: {cfg.early_stopping_metric} is not "
            "validated, because no row is held out; give --val_path, a higher --val_ratio, or "
            "--early_stopping_patience=none"
        )


def open_base(cfg, tokenizer, say):
    """Returns (model to train, its Base, positions of a row): cfg.model_path with a LoRAConfig's adapter."""
    base, model = identify(cfg.model_path), open_model_folder(cfg.model_path)
    context = model.cfg.sequence_length
    tokenizer.match(model.cfg.vocab_size, cfg.model_path)
    if cfg.sequence_length is None:
        say(
            f"sequence_length {context:,}, the model's whole context; a shorter one takes less memory"
        )
    elif cfg.sequence_length > context:
        raise UserError(
            f"sequence_length {cfg.sequence_length} is more than the model's {context}; lower it"
        )
    torch.manual_seed(cfg.seed)
    if cfg.lora_r:
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_target_modules)
    return model.train(), base, cfg.sequence_length or context


def files_for(cfg, base, tokenizer, template, data_sha256):
    """Returns (write_model, read_model, write_final) for `train.fit`, of a training on top of `base`.

    Beside what was trained lie the tokenizer with the template's name, and data.json, the hashes of what it
    came from. read_model raises UserError for a checkpoint that came from something else.
    """
    data = {cfg.model_path: base.sha256, cfg.dataset_path: data_sha256}
    ends = stop_ids(tokenizer, template)

    def write_model(model, folder, merge=False):
        save_trained(model, folder, base, ends, merge)
        for place in filter(Path.is_dir, (folder, folder / "adapter")):
            tokenizer.save(place, model.cfg.sequence_length, template)
        (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def read_model(model, folder):
        check_tokenizer(tokenizer, folder)
        check_data(cfg, data, folder)
        load_trained(model, folder, base)

    def write_final(model, folder):
        write_model(model, folder, cfg.merge)

    return write_model, read_model, write_final


def answer_to(cfg, tokenizer, template, prompts, context):
    """Returns show(model), which gives a held-out question and the model's greedy answer, as texts to log.

    Numbers do not show everything: a model can prefer every chosen answer and write none of its own any more.
    `prompts` are lists of messages; asked is the first that leaves room for an answer in `context` positions,
    and nothing where none does.
    """
    asked = (
        (
            messages[-1]["content"],
            render(tokenizer, messages, template, add_generation_prompt=True)[0],
        )
        for messages in prompts
        if messages
    )
    question, ids = next((one for one in asked if len(one[1]) < context), ("", []))
    ends = stop_ids(tokenizer, template)

    def show(model):
        if not (ids and cfg.sample_tokens):
            return {}
        fresh = greedy(model, ids, cfg.sample_tokens, ends)
        return {"question": question[:200], "answer": tokenizer.decode(fresh).strip()}

    return show
