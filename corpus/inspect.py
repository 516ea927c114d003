"""Shows, for people, what a path holds: `python data.py inspect PATH`."""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from corpus.chats import CHAT_SHAPES, CONTROLS, PAIR_SHAPES, read_row, to_chat, to_pair
from corpus.files import kind_of
from corpus.prepare import DataConfig
from corpus.report import Tally, reasons_of
from corpus.rows import ROW_READERS
from corpus.sources import USUAL, input_files, read_documents, source_rows, usable_rows
from lib.config import UserError
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
    manifest, shards = read_manifest(folder), None
    config = manifest["config"]
    print(f"{folder}: a prepared dataset of {config.get('mixture') or config.get('input_path')}")
    print(f"  tokenizer {manifest['tokenizer_sha256']} of {manifest['vocab_size']:,} ids")
    for name in (name for name, entries in manifest["splits"].items() if entries):
        shards = Shards(folder, name)
        sizes = f"{shards.tokens:>15,} tokens {shards.bytes / 1e6:>11,.2f} MB"
        print(f"  {name:<8}{shards.documents:>12,} documents {sizes}")
    if not shards:
        raise UserError(f"{folder}: holds no documents; {AGAIN}")
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
    if any(shape_of(row, PAIR_SHAPES) for row in rows):
        return "preference pairs"
    shapes = {shape_of(row, CHAT_SHAPES) for row in rows}
    is_text = None in shapes and shapes <= {None, "marked text"}
    return "text" if is_text and any(set(row) & set(USUAL) for row in rows) else "conversations"


def shape_of(row, shapes):
    """Returns the name of the shape that reads a row, or None."""
    try:
        return read_row(row, shapes)[0].partition(":")[0]
    except Exception:  # BadRow, or what comes of values of types that nobody expects
        return None


def show_documents(path, column):
    """Prints how many of the first 1000 documents can be read, and the first, not yet cleaned."""
    cfg, tally = DataConfig(input_path=path, text_column=column), Tally()
    documents = list(islice(read_documents(cfg, tally), 1000))
    print(f"{path}: text", f"  {len(documents):>10,}  documents read", sep="\n")
    show_reasons(tally)
    if not documents:
        raise UserError(f"{path}: 0 usable documents")
    print("", documents[0][0], documents[0][1].strip()[:600].translate(CONTROLS), sep="\n")


def show_reasons(tally):
    for _, reason, count, example in reasons_of(tally.dropped):
        print(f"  {-count:>10,}  {reason}, first: {example}")
    if unread := tally.unread():
        print(f"              {unread}")


class Characters:
    """Stands in for a tokenizer that is not given: each character is an id."""

    bos_id, eos_id, im_start_id, im_end_id, opening, template = 0, 1, 2, 3, [0], None

    def encode(self, text, after=None):
        return list(map(ord, text))

    def decode(self, ids, controls):
        names = ["", SPECIALS["eos"], IM_START, IM_END]
        return "".join(names[id] if id < len(names) else chr(id) for id in ids)


def show_rows(cfg, content):
    """Prints what a file of rows holds: formats, skipped rows, lengths, and an example."""
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else Characters()
    template = template_of(tokenizer, cfg.template)
    convert, tally = to_pair if content == "preference pairs" else to_chat, Tally()
    rows = usable_rows(cfg.path, convert, tally, least=0)
    print(f"{cfg.path}: {content}")
    for rule, count in Counter(rule for _, rule, _ in rows).most_common():
        print(f"  {count:>10,}  {rule}")
    show_reasons(tally)
    print(f"  {len(rows):>10,}  usable rows")
    if rows:
        show_lengths(rows, tokenizer, template)


def show_lengths(rows, tokenizer, template):
    """Prints how long rows are in a template, and the first that it takes."""
    say = lambda line: print(f"  {line}")
    for line in find_template(tokenizer, template).notes:
        say(line)
    unit = "tokens" if isinstance(tokenizer, Tokenizer) else "characters"
    accepted = list(render_rows([value for _, _, value in rows], tokenizer, template, say))
    if not accepted:
        return
    lengths = [(len(ids), sum(mask)) for _, dialogues in accepted for _, ids, mask in dialogues]
    count, learned = map(sum, zip(*lengths))
    print(f"  {count:>10,}  {unit}, {learned:,} of them learned; at most {max(lengths)[0]:,} a row")
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
