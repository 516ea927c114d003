"""Shows, for people, what a path holds: `python data.py inspect PATH`."""

import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from corpus.chats import CONTROLS, to_chat, to_pair
from corpus.files import kind_of
from corpus.prepare import DataConfig
from corpus.report import Tally, run_summary
from corpus.rows import ROW_READERS
from corpus.sources import USUAL, input_files, read_documents, source_rows, usable_rows
from lib.config import UserError, read_object
from lib.conversation import find_template, render_rows, template_of
from lib.folders import AGAIN, Shards, read_manifest
from lib.tokenizer import IM_END, IM_START, SPECIALS, Tokenizer


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    # conversations or preference pairs, any source of text, or the folder of a prepared dataset
    path: str
    # of a source of text: the column that holds it; empty = found by its name
    text_column: str = ""
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
    elif cfg.text_column or (content := content_of(cfg.path)) == "text":
        show_documents(cfg.path, cfg.text_column)
    else:
        show_rows(cfg, content)


def show_dataset(folder):
    """Prints what a prepared dataset holds; its shards are verified as training does."""
    splits = [name for name, entries in read_manifest(folder)["splits"].items() if entries]
    if not splits:
        raise UserError(f"{folder}: holds no documents; {AGAIN}")
    shards = [Shards(folder, name) for name in splits][-1]
    print(run_summary(folder, read_object(folder / "stats.json")))
    ids = shards.read(0, min(256, shards.tokens)).tolist()
    text = Tokenizer.load(folder / "tokenizer.model").decode(ids, controls=True)
    print(f"\nits last split, the first {len(ids)} ids:", text, sep="\n")


def content_of(path):
    """Returns "text", "conversations" or "preference pairs", by the first rows.

    Texts that are a conversation in a markup are conversations if all of them are.
    """
    paths = () if path.startswith(("hf:", "docstrings:")) else input_files(path)
    if not path.startswith("hf:") and not any(kind_of(p) in ROW_READERS for p in paths):
        return "text"
    rows = [row for _, row in islice(source_rows(path, Tally()), 20) if isinstance(row, dict)]
    if any(shape_of(row, to_pair) for row in rows):
        return "preference pairs"
    shapes = {shape_of(row, to_chat) for row in rows}
    is_text = None in shapes and shapes <= {None, "marked text"}
    return "text" if is_text and any(set(row) & set(USUAL) for row in rows) else "conversations"


def shape_of(row, convert):
    """Returns the name of the shape that reads a row, or None."""
    with suppress(Exception):  # BadRow, or what comes of values of types that nobody expects
        return convert(row)[0].partition(":")[0]


def show_documents(path, column):
    """Prints how many of the first 1000 documents can be read, and the first, not yet cleaned."""
    cfg, tally = DataConfig(input_path=path, text_column=column), Tally()
    documents = list(islice(read_documents(cfg, tally), 1000))
    print(f"{path}: text", f"{len(documents):>10,}  documents read", *tally.lines(), sep="\n  ")
    if not documents:
        raise UserError(f"{path}: 0 usable documents")
    print("", documents[0][0], documents[0][1].strip()[:600].translate(CONTROLS), sep="\n")


class Characters:
    """Stands in for a tokenizer that is not given: an id is a character or a control token."""

    bos_id, eos_id, im_start_id, im_end_id = "", SPECIALS["eos"], IM_START, IM_END
    opening, template = [""], None

    def encode(self, text, after=None):
        return list(text)

    def decode(self, ids, controls):
        return "".join(ids)


def show_rows(cfg, content):
    """Prints what a file of rows holds: formats, skipped rows, lengths, and an example."""
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else Characters()
    template = template_of(tokenizer, cfg.template)
    convert, tally = to_pair if content == "preference pairs" else to_chat, Tally()
    rows = usable_rows(cfg.path, convert, tally, least=0)
    rules = Counter(rule for _, rule, _ in rows).most_common()
    counts = [f"{count:>10,}  {rule}" for rule, count in [*rules, ("usable rows", len(rows))]]
    print(f"{cfg.path}: {content}", *counts, *tally.lines(), sep="\n  ")
    say = lambda line: print(f"  {line}")
    for line in find_template(tokenizer, template).notes:
        say(line)
    accepted = list(render_rows([value for _, _, value in rows], tokenizer, template, say))
    if not accepted:
        return
    lengths = [(len(ids), sum(mask)) for _, dialogues in accepted for _, ids, mask in dialogues]
    count, learned = map(sum, zip(*lengths))
    unit = "tokens" if cfg.tokenizer_path else "characters"
    say(f"{count:>10,}  {unit}, {learned:,} of them learned; at most {max(lengths)[0]:,} a row")
    sign = "dim" if sys.stdout.isatty() else "in [ ]"
    number, dialogues = accepted[0]
    print(f"\n{rows[number][0]} as {template}; {sign}: what the model does not learn")
    for name, ids, mask in dialogues:
        print(f"-- {name}", marked(ids, mask, tokenizer), sep="\n")


def marked(ids, mask, tokenizer):
    """Returns the text of ids; what is not learned is dim on a terminal, else in [ ]."""
    dim, plain = ("\x1b[2m", "\x1b[22m") if sys.stdout.isatty() else ("[", "]")
    text = ""
    for learned, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
        part = tokenizer.decode([id for id, _ in run], controls=True)
        text += part if learned else f"{dim}{part}{plain}"
    return text
