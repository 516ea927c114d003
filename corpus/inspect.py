"""Shows, for people, what a path holds: `python data.py inspect PATH`.

A prepared dataset, a source of text, or a file of conversations or preference pairs; the first
rows tell.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
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
from corpus.files import ROW_READERS, USUAL, kind_of
from corpus.prepare import DataConfig
from corpus.sources import Tally, input_bytes, input_files, read_documents, source_rows
from lib.config import UserError
from lib.folders import AGAIN, Shards, read_manifest
from lib.tokenizer import TEMPLATES, Tokenizer, render, usual_template

EXAMINED = 1000  # documents of a source of text


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    # conversations or preference pairs, any source of text, or the folder of a prepared dataset
    path: str = ""
    # of a source of text: the column that holds it; empty = found by its name
    text_column: str = ""
    # how to write the example out; none = what sft.py would take with that tokenizer
    template: Literal["chatml", "instruct", "chat"] | None = None
    # a .model file or a folder with one: lengths are then counted in tokens too
    tokenizer_path: str = ""


def inspect(cfg):
    """Show what a text, a file of conversations or preference pairs, or a prepared dataset holds.

    python data.py inspect PATH [--tokenizer_path=FOLDER] [--template=chatml|instruct|chat]
    """
    if not cfg.path:
        raise UserError("inspect needs a path: python data.py inspect PATH")
    folder = Path(cfg.path)
    if (folder / "config.json").is_file():
        raise UserError(
            f"{cfg.path}: the folder of a model; inspect shows data, sample.py what a model writes"
        )
    if any((folder / name).is_file() for name in ("manifest.json", "tokenizer.model")):
        print("\n".join(dataset_lines(folder, cfg.tokenizer_path)))
    elif cfg.text_column or holds_text(cfg.path):
        print("\n".join(document_lines(cfg.path, cfg.text_column)))
    else:
        show_rows(cfg)


# ---- a prepared dataset


def dataset_lines(folder, tokenizer_path=""):
    """Returns the lines on a prepared dataset; its shards are verified as training does.

    Raises UserError for a damaged one, or where another tokenizer is given than the one that made
    it.
    """
    manifest = read_manifest(folder)
    config, sha256 = manifest["config"], manifest["tokenizer_sha256"]
    if tokenizer_path and (other := Tokenizer.load(tokenizer_path)).sha256 != sha256:
        raise UserError(
            f"{folder}: was encoded by the tokenizer {sha256}, {tokenizer_path} is {other.sha256}"
        )
    splits = {name: Shards(folder, name) for name, entries in manifest["splits"].items() if entries}
    if not splits:
        raise UserError(f"{folder}: holds no documents; {AGAIN}")
    lines = [f"{folder}: a prepared dataset"]
    for number, source in enumerate(config.get("mixture") or [config.get("input_path")]):
        lines.append(f"  {'' if number else 'source':<17}{source}")
    for name, split in splits.items():
        lines.append(
            f"  {name:<8}{split.documents:>12,} documents {split.tokens:>15,} tokens "
            f"{split.bytes / 1e6:>11,.2f} MB in {len(split.arrays)} shards"
        )
    size, tokens = (sum(getattr(s, key) for s in splits.values()) for key in ("bytes", "tokens"))
    lines.append(f"  {'bytes per token':<17}{size / tokens:.2f}")
    lines.append(f"  {'tokenizer':<17}{manifest['vocab_size']:,} ids, sha256 {sha256}")
    name, split = next(iter(splits.items()))
    ids = split.read(0, min(256, split.tokens)).tolist()
    ids = ids[: ids.index(manifest["eos_id"]) + 1] if manifest["eos_id"] in ids else ids
    text = Tokenizer.load(folder / "tokenizer.model").decode(ids, controls=True)
    lines += ["", f"{name}, the first document from its ids ({len(ids)} shown):"]
    return [*lines, text.translate(CONTROLS)]


# ---- a source of text


def holds_text(path):
    """Returns whether this is a source of text rather than of rows; the first rows tell."""
    if path.startswith("docstrings:"):
        return True
    if not path.startswith("hf:") and Path(path).exists():
        kinds = {kind_of(file) for file in input_files(path)}
        if kinds and not kinds & {*ROW_READERS, None}:
            return True
    rows = [row for _, row in islice(source_rows(path, Tally()), 20) if isinstance(row, dict)]
    usual = any(row.keys() & set(USUAL) for row in rows)
    return usual and not any(row.keys() & {*DIALOGUES, *QUESTIONS, *PAIR} for row in rows)


def document_lines(path, column):
    """Returns the lines on the first documents of a source of text, before anything is cleaned."""
    cfg, tally = DataConfig(input_path=path, text_column=column), Tally()
    documents = list(islice(read_documents(cfg, tally), EXAMINED))
    size, kinds = input_bytes(cfg), Counter([path])
    if size is not None:
        kinds = Counter(kind_of(file) or "text" for file in input_files(path))
    counts = [(count, kind) for kind, count in kinds.items()]
    counts += [(size, "bytes on disk")] if size is not None else []
    ended = len(documents) < EXAMINED
    read = "documents in all" if ended else "documents read to see, there are more"
    counts.append((len(documents), read))
    for sign, entries in ((-1, tally.dropped["read"]), (1, tally.notes)):
        for reason, entry in sorted(entries.items()):
            counts.append((sign * entry["count"], f"{reason}, first: {entry['examples'][0]}"))
    if not documents:
        details = "; ".join(f"{count:,}  {text}" for count, text in counts)
        raise UserError(f"{path}: 0 usable documents; {details}")
    where, text = documents[0]
    lines = [f"{path}: text", *(f"  {count:>10,}  {text}" for count, text in counts), ""]
    lines.append(f"{where} ({len(text):,} characters, the beginning):")
    return [*lines, text.strip()[:600].translate(CONTROLS)]


# ---- conversations and preference pairs


def show_rows(cfg):
    """Prints what a file of rows holds: formats, skipped rows, lengths, and an example.

    Raises UserError as reading does; for too many unusable rows only after all else was printed.
    """
    tokenizer = Tokenizer.load(cfg.tokenizer_path) if cfg.tokenizer_path else None
    template = cfg.template or (usual_template(tokenizer) if tokenizer else "chatml")
    objects = (row for _, row in source_rows(cfg.path, Tally()) if isinstance(row, dict))
    pairs, tally = set(PAIR) <= next(objects, {}).keys(), Tally()
    rows = usable_rows(cfg.path, to_pair if pairs else to_chat, tally, max_bad=1)
    total = tally.documents + tally.bad_rows
    print(f"{cfg.path}: {'preference pairs' if pairs else 'conversations'}")
    for kind, count in Counter(kind for _, kind, _ in rows).most_common():
        print(f"  {count:>10,}  {kind}")
    for _, reason, count, example in tally.reasons():
        print(f"  {-count:>10,}  {reason}, first: {example}")
    print(f"  {len(rows):>10,}  usable of {total:,} rows")
    print_lengths([value for _, _, value in rows], tokenizer, template)
    where, _, value = rows[0]
    terminal = sys.stdout.isatty()
    print(
        f"\n{where} as {template}; {'dim' if terminal else 'in [ ]'}: what the model does not learn"
    )
    for name, messages, start in dialogues(value):
        print(
            f"-- {name}", marked(rendered(messages, start, tokenizer, template), terminal), sep="\n"
        )
    if tally.bad_rows > MAX_BAD * total:
        share = f"{tally.bad_rows} of {total} rows are unusable, more than {MAX_BAD:.0%}"
        raise UserError(f"{cfg.path}: {share}: training refuses it")


def dialogues(value):
    """Returns [(name, messages, number of the first to learn from)] of a conversation or pair."""
    if isinstance(value, list):
        return [("conversation", value, 0)]
    prompt = value["prompt"]
    return [(name, prompt + value[name], len(prompt)) for name in PAIR]


def print_lengths(values, tokenizer, template):
    """Prints the least, the middle, the 95 % and the greatest length of what the rows hold."""
    lengths = {}
    for value in values:
        for name, messages, start in dialogues(value):
            sizes = [len(m["content"]) for m in messages]
            learned = [m["role"] == "assistant" for m in messages[start:]]
            counts = {"messages": len(messages), "characters": sum(sizes)}
            counts["of them answers"] = sum(n for n, bit in zip(sizes[start:], learned) if bit)
            if tokenizer:
                _, mask = tokens_of(messages, start, tokenizer, template)
                counts |= {"tokens": len(mask), "of them learned": sum(mask)}
            for key, count in counts.items():
                lengths.setdefault(f"{name}: {key}", []).append(count)
    print(f"\n  {'length':<28}{'least':>9}{'middle':>9}{'95 %':>9}{'greatest':>9}{'in all':>14}")
    for name, counts in lengths.items():
        counts.sort()
        cells = [counts[int(share * (len(counts) - 1))] for share in (0, 0.5, 0.95, 1)]
        print(f"  {name:<28}" + "".join(f"{cell:>9,}" for cell in cells) + f"{sum(counts):>14,}")


def tokens_of(messages, start, tokenizer, template):
    """Returns (ids, mask) of a dialogue, the mask 0 before message number `start`."""
    ids, mask = render(tokenizer, messages, template)
    if start:
        opening, _ = render(tokenizer, messages[:start], template, add_generation_prompt=True)
        mask[: len(opening)] = [0] * len(opening)
    return ids, mask


def rendered(messages, start, tokenizer, template):
    """Returns [(text, is it learned?)] of a dialogue, from its ids where there is a tokenizer."""
    if tokenizer:
        pairs = zip(*tokens_of(messages, start, tokenizer, template), strict=True)
        runs = groupby(pairs, lambda pair: pair[1])
        return [
            (tokenizer.decode([i for i, _ in run], controls=True), bool(bit)) for bit, run in runs
        ]
    shape, pieces = TEMPLATES[template], []
    for number, message in enumerate(messages):
        role = message["role"]
        pieces.append(((shape.between if number else "") + shape.heads[role], False))
        pieces.append(
            (message["content"] + shape.ends[role], role == "assistant" and number >= start)
        )
    runs = groupby(pieces, lambda piece: piece[1])
    return [("".join(text for text, _ in run), learned) for learned, run in runs]


def marked(pieces, terminal):
    """Returns the text of an example; what is not learned is dim on a terminal, else in [ ].

    Long parts are cut in the middle.
    """
    dim, plain = ("\x1b[2m", "\x1b[22m") if terminal else ("[", "]")
    text = ""
    for piece, learned in pieces:
        if len(piece) > 2000:
            piece = f"{piece[:900]} ... {len(piece) - 1800:,} characters ... {piece[-900:]}"
        text += piece if learned else f"{dim}{piece}{plain}"
    return text
