"""Shows, for people, what a path holds: `python data.py inspect PATH`.

A prepared dataset, a source of text, or a file of conversations or preference pairs; the first
rows tell.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from statistics import median_low
from typing import Literal

from corpus.chats import (
    CONTROLS,
    DIALOGUES,
    MAX_BAD,
    PAIR,
    QUESTIONS,
    to_chat,
    to_pair,
    usable_rows,
)
from corpus.files import ROW_READERS, kind_of
from corpus.prepare import DataConfig
from corpus.sources import USUAL, Tally, input_files, read_documents, source_rows
from lib.config import UserError
from lib.folders import AGAIN, Shards, read_manifest
from lib.tokenizer import IM_END, IM_START, SPECIALS, Tokenizer, render, usual_template

EXAMINED = 1000  # documents of a source of text
ROWS = {*ROW_READERS, None}  # the kinds of files that hold rows, or may


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    # conversations or preference pairs, any source of text, or the folder of a prepared dataset
    path: str
    # of a source of text: the column that holds it; empty = found by its name
    text_column: str = ""
    # how to write the example out; none = what sft.py would take with that tokenizer
    template: Literal["chatml", "instruct", "chat"] | None = None
    # a .model file or a folder with one: lengths are then counted in tokens
    tokenizer_path: str = ""


def inspect(cfg):
    """Show what a text, a file of conversations or preference pairs, or a prepared dataset holds.

    python data.py inspect PATH [--tokenizer_path=FOLDER] [--template=chatml|instruct|chat]
    """
    if any((Path(cfg.path) / name).is_file() for name in ("manifest.json", "tokenizer.model")):
        show_dataset(Path(cfg.path))
    elif cfg.text_column or (content := content_of(cfg.path)) == "text":
        show_documents(cfg.path, cfg.text_column)
    else:
        show_rows(cfg, content)


def show_dataset(folder):
    """Prints what a prepared dataset holds; its shards are verified as training does."""
    manifest = read_manifest(folder)
    splits = {name: Shards(folder, name) for name, entries in manifest["splits"].items() if entries}
    if not splits:
        raise UserError(f"{folder}: holds no documents; {AGAIN}")
    config = manifest["config"]
    print(f"{folder}: a prepared dataset of {config.get('mixture') or config.get('input_path')}")
    for name, split in splits.items():
        size = f"{split.bytes / 1e6:>11,.2f} MB in {len(split.arrays)} shards"
        print(f"  {name:<8}{split.documents:>12,} documents {split.tokens:>15,} tokens {size}")
    size, tokens = (sum(getattr(s, key) for s in splits.values()) for key in ("bytes", "tokens"))
    print(f"  bytes per token  {size / tokens:.2f}")
    print(f"  tokenizer        {manifest['vocab_size']:,} ids, {manifest['tokenizer_sha256']}")
    name, split = next(iter(splits.items()))
    ids = split.read(0, min(256, split.tokens)).tolist()
    ids = ids[: ids.index(manifest["eos_id"]) + 1] if manifest["eos_id"] in ids else ids
    text = Tokenizer.load(folder / "tokenizer.model").decode(ids, controls=True)
    print(f"\n{name}, the first document from its ids ({len(ids)} shown):", text, sep="\n")


def content_of(path):
    """Returns whether a path holds "text", "conversations" or "preference pairs".

    Of rows the fields of the first ones tell.
    """
    is_local = not path.startswith(("docstrings:", "hf:"))
    if path == "docstrings:" or (is_local and not set(map(kind_of, input_files(path))) & ROWS):
        return "text"
    rows = (row for _, row in islice(source_rows(path, Tally()), 20) if isinstance(row, dict))
    fields = set().union(*rows)
    if fields >= set(PAIR):
        return "preference pairs"
    is_text = fields & set(USUAL) and not fields & {*DIALOGUES, *QUESTIONS}
    return "text" if is_text else "conversations"


def show_documents(path, column):
    """Prints the first documents of a source of text, before anything is cleaned, and their sum."""
    cfg, tally = DataConfig(input_path=path, text_column=column), Tally()
    documents = list(islice(read_documents(cfg, tally), EXAMINED))
    more = "" if len(documents) < EXAMINED else ", and there are more"
    print(f"{path}: text", f"  {len(documents):>10,}  documents read{more}", sep="\n")
    show_reasons(tally)
    if not documents:
        raise UserError(f"{path}: 0 usable documents")
    where, text = documents[0]
    print(f"\n{where} ({len(text):,} characters, the beginning):")
    print(text.strip()[:600].translate(CONTROLS))


def show_reasons(tally):
    for _, reason, count, example in tally.reasons():
        print(f"  {-count:>10,}  {reason}, first: {example}")
    for reason, entry in tally.notes.items():
        print(f"  {entry['count']:>10,}  {reason}, first: {entry['examples'][0]}")


class Characters:
    """Stands in for a tokenizer that is not given: each character is an id."""

    bos_id, eos_id, im_start_id, im_end_id, template = 0, 1, 2, 3, None

    def encode(self, text, after=None):
        return list(map(ord, text))

    def decode(self, ids, controls):
        names = ["", SPECIALS["eos"], IM_START, IM_END]
        return "".join(names[id] if id < len(names) else chr(id) for id in ids)


def show_rows(cfg, content):
    """Prints what a file of rows holds: formats, skipped rows, lengths, and an example.

    Raises UserError as reading does; for too many unusable rows only after all else was printed.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else Characters()
    template = cfg.template or usual_template(tokenizer)
    convert, tally = to_pair if content == "preference pairs" else to_chat, Tally()
    rows = usable_rows(cfg.path, convert, tally, max_bad=1)
    total = tally.documents + tally.bad_rows
    print(f"{cfg.path}: {content}")
    for fields, count in Counter(fields for _, fields, _ in rows).most_common():
        print(f"  {count:>10,}  {fields}")
    show_reasons(tally)
    print(f"  {len(rows):>10,}  usable of {total:,} rows")
    dialogues = (dialogues_of(value, tokenizer, template) for _, _, value in rows)
    show_lengths(dialogues, "tokens" if cfg.tokenizer_path else "characters")
    sign = "dim" if sys.stdout.isatty() else "in [ ]"
    print(f"\n{rows[0][0]} as {template}; {sign}: what the model does not learn")
    for name, _, ids, mask in dialogues_of(rows[0][2], tokenizer, template):
        print(f"-- {name}", marked(ids, mask, tokenizer), sep="\n")
    if tally.bad_rows > MAX_BAD * total:
        share = f"{tally.bad_rows} of {total} rows are unusable, more than {MAX_BAD:.0%}"
        raise UserError(f"{cfg.path}: {share}: training refuses it")


def dialogues_of(value, tokenizer, template):
    """Returns [(name, messages, ids, mask)] of a conversation, or of both dialogues of a pair.

    The mask is 1 on what is learned: of a pair the messages after the prompt.
    """
    if isinstance(value, list):
        return [("conversation", len(value), *render(tokenizer, value, template))]
    opening, _ = render(tokenizer, value["prompt"], template, add_generation_prompt=True)
    dialogues = []
    for name in PAIR:
        messages = value["prompt"] + value[name]
        ids, mask = render(tokenizer, messages, template)
        mask[: len(opening)] = [0] * len(opening)
        dialogues.append((name, len(messages), ids, mask))
    return dialogues


def show_lengths(rows, unit):
    """Prints the least, the middle and the greatest length of what the rows hold."""
    lengths = {}
    for name, messages, ids, mask in chain.from_iterable(rows):
        counts = {"messages": messages, unit: len(ids), f"{unit} learned": sum(mask)}
        for key, count in counts.items():
            lengths.setdefault(f"{name}: {key}", []).append(count)
    print(f"\n  {'':<28}{'least':>9}{'middle':>9}{'greatest':>9}{'in all':>14}")
    for name, counts in lengths.items():
        least, middle, most = min(counts), median_low(counts), max(counts)
        print(f"  {name:<28}{least:>9,}{middle:>9,}{most:>9,}{sum(counts):>14,}")


def marked(ids, mask, tokenizer):
    """Returns the text of ids; what is not learned is dim on a terminal, else in [ ].

    Long parts are cut in the middle.
    """
    dim, plain = ("\x1b[2m", "\x1b[22m") if sys.stdout.isatty() else ("[", "]")
    text = ""
    for learned, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
        part = tokenizer.decode([id for id, _ in run], controls=True)
        part = part if len(part) <= 2000 else f"{part[:1000]} ... {part[-1000:]}"
        text += part if learned else f"{dim}{part}{plain}"
    return text
