"""Shows, for people, what a path holds: `python data.py inspect PATH`."""

import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import numpy as np

from corpus.chats import CONTROLS, to_chat, to_pair
from corpus.files import kind_of
from corpus.prepare import DataConfig
from corpus.report import Tally, run_summary
from corpus.rows import ROW_READERS
from corpus.sources import USUAL, input_files, read_documents, source_rows, usable_rows
from lib.config import UserError, read_object
from lib.conversation import find_template, render_rows, template_of
from lib.folders import Shards, read_manifest
from lib.tokenizer import IM_END, IM_START, MARKERS, SPECIALS, Tokenizer


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    # conversations or preference pairs, any source of text, or the folder of a prepared dataset
    path: str
    # how to write the example out; none = what sft.py would take with that tokenizer
    template: Literal["chatml", "instruct", "chat"] | None = None
    # a model's folder or a training's, or a .model file: lengths are then counted in tokens
    tokenizer_path: str = ""


def inspect(cfg):
    """Show what a text, a file of conversations or preference pairs, or a prepared dataset holds.

    python data.py inspect PATH [--tokenizer_path=FOLDER] [--template=chatml|instruct|chat]
    """
    if any((Path(cfg.path) / name).is_file() for name in ("manifest.json", "tokenizer.model")):
        show_dataset(Path(cfg.path))
    elif convert := converter_of(cfg.path):
        show_rows(cfg, convert)
    else:
        show_documents(cfg.path)


def show_dataset(folder):
    """Prints what a prepared dataset holds; its shards are verified as training does."""
    held = [name for name, entries in read_manifest(folder)["splits"].items() if entries]
    shards = [Shards(folder, name) for name in held or ["train"]][-1]
    print(run_summary(folder, read_object(folder / "stats.json")))
    ids = shards.read(0, min(256, shards.tokens)).tolist()
    text = Tokenizer.load(folder / "tokenizer.model").decode(ids, controls=True)
    print(f"\nits last split, the first {len(ids)} ids:", text, sep="\n")


def converter_of(path):
    """Returns to_pair or to_chat if it reads half of the first rows; else None for texts."""
    if path.startswith("docstrings:"):
        return None
    kinds = ["json"] if path.startswith("hf:") else map(kind_of, input_files(path))
    if ROW_READERS.keys().isdisjoint(kinds):
        return None
    rows = [row for _, row in islice(source_rows(path, Tally()), 20) if isinstance(row, dict)]
    for convert in (to_pair, to_chat):
        if 2 * sum(is_read(row, convert) for row in rows) >= max(1, len(rows)):
            return convert
    return None if any(row.keys() & set(USUAL) for row in rows) else to_chat


def is_read(row, convert):
    with suppress(Exception):  # BadRow, or what comes of values of types that nobody expects
        return bool(convert(row))
    return False


def show_documents(path):
    """Prints how many of the first 1000 documents can be read, and the first, not yet cleaned."""
    tally = Tally()
    documents = list(islice(read_documents(DataConfig(input_path=path), tally), 1000))
    print(f"{path}: text", f"{len(documents):>10,}  documents read", *tally.lines(), sep="\n  ")
    if not documents:
        raise UserError(f"{path}: 0 usable documents")
    print("", documents[0][0], documents[0][1].strip()[:600].translate(CONTROLS), sep="\n")


class Characters:
    """Stands in for a tokenizer that is not given: an id is a character or a control token."""

    im_start_id, im_end_id, opening = IM_START, IM_END, []
    source, controls = "characters", {symbol: symbol for symbol in (SPECIALS["eos"], *MARKERS)}
    special_ids, added, config = {}, {}, {"eos_token": SPECIALS["eos"]}
    template, templates = None, {}

    def encode_spans(self, text, begins):
        places = np.arange(len(text))
        return list(text), places, places + 1

    def decode(self, ids, controls):
        return "".join(ids)


def show_rows(cfg, convert):
    """Prints what a file of rows holds: formats, skipped rows, lengths, and an example."""
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else Characters()
    template, tally = template_of(tokenizer, cfg.template), Tally()
    rows = usable_rows(cfg.path, convert, tally, least=0)
    rules = Counter(rule for _, rule, _ in rows).most_common()
    counts = [f"{count:>10,}  {rule}" for rule, count in [*rules, ("usable rows", len(rows))]]
    content = "preference pairs" if convert is to_pair else "conversations"
    notes = find_template(tokenizer, template).notes
    print(f"{cfg.path}: {content}", *counts, *tally.lines(), *notes, sep="\n  ")
    say = lambda line: print(f"  {line}")
    accepted = list(render_rows([value for _, _, value in rows], tokenizer, template, say))
    if not accepted:
        return
    lengths = [(len(ids), sum(mask)) for _, dialogues in accepted for _, ids, mask in dialogues]
    count, learned = map(sum, zip(*lengths))
    unit = "tokens" if cfg.tokenizer_path else "characters"
    say(f"{count:>10,}  {unit}, {learned:,} of them learned; at most {max(lengths)[0]:,} a row")
    number, dialogues = accepted[0]
    marks = ("\x1b[2m", "\x1b[22m") if sys.stdout.isatty() else ("[", "]")  # dim on a terminal
    within = "{}what the model does not learn{}".format(*marks)
    print(f"\n{rows[number][0]} as {template}; {within}:")
    for name, ids, mask in dialogues:
        print(f"-- {name}", marked(ids, mask, tokenizer, *marks), sep="\n")


def marked(ids, mask, tokenizer, opens="[", closes="]"):
    """Returns the text of ids, with marks around what is not learned."""
    text = ""
    for learned, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
        part = tokenizer.decode([id for id, _ in run], controls=True)
        text += part if learned else f"{opens}{part}{closes}"
    return text
