"""Token shards in, batches out: the half of data preparation that training reads.

`python data.py inspect PATH` shows what such a folder holds, or a file of conversations or preference pairs;
`python data.py create_sample_datasets` makes small files of these.

`TokenStream` maps the shards of one split as one array of N tokens and cuts it into blocks of T inputs and T
labels, the labels one token ahead. A batch is a pure function of (seed, step, micro-step, rank): there is no
position to save, and nothing to lose when a run is killed. No torch here: arrays are numpy.
"""

import bisect
import hashlib
import json
import math
import sys
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path

import numpy as np

from corpus.chats import (  # noqa: F401 - others ask us for rows
    CONTROLS,
    InspectConfig,
    holds_text,
    read_chats,
    read_pairs,
    show_rows,
)
from corpus.prepare import DataConfig, RetokenizeConfig, main, retokenize
from corpus.samples import SampleConfig, create
from corpus.sources import Tally, peek
from lib.config import UserError, closest, run
from lib.folders import AGAIN, Shards, hash_fraction, open_all, read_manifest
from lib.tokenizer import IGNORE, Tokenizer

MIXTURE_PERIOD = 1024  # rows after which the proportions of a mixture are exact

# --- The stream ---------------------------------------------------------------------------------------------


class TokenStream:
    """Endless shuffled batches of one split of one or several prepared datasets, addressed by number.

    Block i of a dataset holds the inputs [i*T, i*T + T) and, as labels, the tokens one further; the last
    block is padded (labels -100), so one pass supervises every token but the first exactly once. Each pass
    visits the blocks in another permutation, a function of (seed, pass) alone.

    Several paths without `weights` count as one long dataset; with `weights` each batch row comes from one of
    them in exactly these proportions over any aligned MIXTURE_PERIOD rows, and each is passed over at its own
    pace.

    document_mask=True adds "documents" (B, T) int32, a number per row that grows at each BOS, and "positions"
    (B, T) int64, which restart at 0 there; the label BOS (what follows a finished document, which the model
    may not see across the border) is then unsupervised. Without it the stream is one text and BOS is a target
    like any other.

    A split of fewer than T + 1 training tokens, or datasets of different tokenizers, raise UserError.
    """

    def __init__(
        self,
        paths,
        split,
        sequence_length,
        batch_size,
        seed=0,
        world_size=1,
        weights=None,
        document_mask=False,
        verify=None,
    ):
        self.sources = open_all(paths, split, verify)
        self.sequence_length, self.batch_size, self.world_size = (
            sequence_length,
            batch_size,
            world_size,
        )
        self.seed, self.document_mask = seed, document_mask
        for source in self.sources:
            if split == "train" and source.tokens <= sequence_length:
                raise UserError(
                    f"{source.folder}: only {source.tokens} tokens, need at least {sequence_length + 1} for "
                    f"sequence_length {sequence_length}; shorten that, or prepare more text"
                )
        first = self.sources[0]
        self.vocab_size = first.vocab_size
        self.pad_id, self.bos_id = first.manifest["pad_id"], first.manifest["bos_id"]
        self.tokenizer = first.folder / "tokenizer.model"
        self.tokenizer_sha256 = first.tokenizer_sha256
        self.tokens = sum(source.tokens for source in self.sources)
        self.bytes = sum(
            source.bytes for source in self.sources
        )  # UTF-8 bytes of the text behind the tokens
        # One target fewer than tokens, in steps of T: 8 tokens at T 4 are two blocks, the second with 3
        # labels.
        sizes = [-(-(source.tokens - 1) // sequence_length) for source in self.sources]
        self.block_ends = np.cumsum(sizes)
        self.blocks = int(self.block_ends[-1])
        # A lane is a range of blocks shuffled together: one for everything, or one per weighted dataset.
        if weights is None:
            self.lanes, self.table = [(0, self.blocks)], np.zeros(1, np.int64)
        else:
            self.lanes = [
                (int(end) - size, size) for end, size in zip(self.block_ends, sizes, strict=True)
            ]
            self.table = _mixture_table(weights, [source.folder for source in self.sources], seed)
        self.shares = np.bincount(
            self.table, minlength=len(self.lanes)
        )  # rows of each lane per period
        # earlier[i]: how many rows of the same lane precede row i within a period.
        self.earlier = np.array(
            [np.sum(self.table[:i] == lane) for i, lane in enumerate(self.table)]
        )
        self._order = lru_cache(maxsize=2 * len(self.lanes))(
            self._permutation
        )  # this pass and the next

    def batch(self, step, micro=0, rank=0, accumulation=1):
        """The micro-batch of one rank: global rows ((step * accumulation + micro) * world_size + rank) *
        batch_size and on, so rank count and accumulation do not change which rows make up a step of the same
        global batch.
        """
        first = ((step * accumulation + micro) * self.world_size + rank) * self.batch_size
        return self._gather([self._block_of(row) for row in range(first, first + self.batch_size)])

    def rows(self, start, stop):
        """Blocks start..stop in their order on disk, each once: what validation scores."""
        return self._gather(range(start, min(stop, self.blocks)))

    def _permutation(self, lane, epoch):
        # RandomState is frozen by NumPy's policy: the same seed gives the same order under every later
        # release.
        words = [self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, lane, epoch]
        return np.random.RandomState(words).permutation(self.lanes[lane][1])

    def _block_of(self, row):
        """The block that row number `row` of the endless stream shows."""
        period, slot = divmod(row, len(self.table))
        lane = int(self.table[slot])
        first, size = self.lanes[lane]
        epoch, place = divmod(period * int(self.shares[lane]) + int(self.earlier[slot]), size)
        return first + int(self._order(lane, epoch)[place])

    def _gather(self, blocks):
        T = self.sequence_length
        ids = np.full((len(blocks), T), self.pad_id, np.int64)
        labels = np.full((len(blocks), T), IGNORE, np.int64)
        for row, block in enumerate(blocks):
            number = int(np.searchsorted(self.block_ends, block, side="right"))
            source, before = self.sources[number], int(self.block_ends[number - 1]) if number else 0
            start = (block - before) * T
            tokens = source.read(start, min(start + T + 1, source.tokens))
            ids[row, : len(tokens)] = tokens[:T]
            labels[row, : len(tokens) - 1] = tokens[1:]
        batch = {"ids": ids, "labels": labels}
        if self.document_mask:
            opens, place = ids == self.bos_id, np.arange(T)
            batch["documents"] = np.cumsum(opens, axis=1, dtype=np.int32)
            batch["positions"] = place - np.maximum.accumulate(np.where(opens, place, 0), axis=1)
            labels[labels == self.bos_id] = IGNORE
        batch["count"] = int(np.count_nonzero(labels != IGNORE))
        return batch


def _mixture_table(weights, names, seed):
    """Which dataset each of MIXTURE_PERIOD rows takes: counts by largest remainder, in a seeded order."""
    if len(weights) != len(names):
        raise UserError(
            f"{len(weights)} weights for {len(names)} datasets; give one weight for each"
        )
    for weight, name in zip(weights, names, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{name}: weight {weight} must be a finite number > 0")
    exact = np.asarray(weights, float) / np.sum(weights) * MIXTURE_PERIOD
    counts = exact.astype(np.int64)
    missing = MIXTURE_PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if not counts.all():
        least = (
            f"{names[int(counts.argmin())]}: its weight is below 1/{MIXTURE_PERIOD} of the mixture"
        )
        raise UserError(f"{least}; raise it, or leave the dataset out")
    table = np.repeat(np.arange(len(names)), counts)
    return np.random.RandomState(seed & 0xFFFFFFFF).permutation(table)


def unigram_bits_per_byte(paths):
    """What a model that knows only token frequencies scores on the val split: the baseline a real model must
    beat.

    Add-one frequencies over all train tokens; every val token but the first of each dataset is a target, BOS
    and EOS included, as in `TokenStream.rows` without document_mask. Nats of all targets / (UTF-8 bytes of
    the val text * ln 2).
    """
    train, val = open_all(paths, "train"), open_all(paths, "val")
    counts = 1 + sum(source.histogram() for source in train)
    targets = sum(source.histogram(start=1) for source in val)
    nats = -np.sum(targets * np.log(counts / counts.sum()))
    return float(nats / (sum(source.bytes for source in val) * math.log(2)))


# --- Examples -----------------------------------------------------------------------------------------------


class ExampleStream:
    """Endless shuffled batches of a list of examples, addressed by number as those of `TokenStream` are.

    `collate` makes a batch of some examples: a dict of arrays with "count", the supervised terms in it.
    """

    def __init__(self, examples, collate, batch_size, seed=0, world_size=1):
        self.examples, self.collate, self.batch_size = examples, collate, batch_size
        self.seed, self.world_size, self.blocks = seed, world_size, len(examples)
        self._order = lru_cache(maxsize=2)(self._permutation)  # this pass and the next

    def batch(self, step, micro=0, rank=0, accumulation=1):
        """The micro-batch of one rank: the rows of the endless stream that `TokenStream.batch` would take."""
        first = ((step * accumulation + micro) * self.world_size + rank) * self.batch_size
        places = [divmod(row, self.blocks) for row in range(first, first + self.batch_size)]
        return self.collate([self.examples[self._order(epoch)[place]] for epoch, place in places])

    def rows(self, start, stop):
        """Examples start..stop in their own order, as one batch: what validation scores."""
        return self.collate(self.examples[start:stop])

    def _permutation(self, epoch):
        words = [self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, epoch]
        return np.random.RandomState(words).permutation(self.blocks)


def supervised_rows(rows, length, pad_id, packed=False):
    """Lay examples out as arrays of static shape: the batch of `losses.next_token_loss`.

    `rows` are lists of (ids, mask), the examples that share a row of `length` positions, one after the other;
    mask 1 = the id is to be predicted. `packed`: they must not see each other, so "documents" and "positions"
    tell them apart; else there is one example in each row, and rows are only as long as the longest needs
    (in powers of two, so that there are few shapes). Returns "ids" (B, T), "where" and "labels" (N,) - flat
    places of the supervised positions and what follows them, filled up with label -100 - "count" (labels) and
    "tokens" (inputs).
    """
    used = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    T = length if packed else min(length, max(32, 1 << (used - 1).bit_length()))
    ids, labels = (
        np.full((len(rows), T), pad_id, np.int64),
        np.full((len(rows), T), IGNORE, np.int64),
    )
    documents, positions = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), np.int64)
    for row, examples in enumerate(rows):
        start = 0
        for number, (example, mask) in enumerate(examples, start=1):
            place = slice(start, start + len(example) - 1)
            ids[row, place] = example[:-1]
            labels[row, place] = np.where(mask[1:], example[1:], IGNORE)
            documents[row, place], positions[row, place] = number, np.arange(len(example) - 1)
            start = place.stop
    where = np.flatnonzero(labels != IGNORE)
    room = -(-max(1, len(where)) // 64) * 64
    batch = {
        "ids": ids,
        "where": np.zeros(room, np.int64),
        "labels": np.full(room, IGNORE, np.int64),
    }
    batch["where"][: len(where)], batch["labels"][: len(where)] = where, labels.flat[where]
    batch |= {"documents": documents, "positions": positions} if packed else {}
    return batch | {"count": len(where), "tokens": int(np.count_nonzero(documents))}


def pack(examples, length):
    """Put (ids, mask) examples into few rows of at most `length` positions: [[example, ...], ...].

    Longest first, each into the fullest row that still has room for it (best-fit decreasing).
    """
    rows, free = [], []  # free: (positions left, row), sorted
    for example in sorted(examples, key=lambda example: -len(example[0])):
        size = len(example[0]) - 1
        at = bisect.bisect_left(free, (size, -1))
        left, row = free.pop(at) if at < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(free, (left - size, row))
    return rows


def read_aloud(read, path, say):
    """Return what `read` (read_chats or read_pairs) makes of a file, after saying what it passed over."""
    tally = Tally()
    rows = read(path, tally)
    for _, reason, count, example in tally.reasons():
        number = "1 row" if count == 1 else f"{count:,} rows"
        say(f"{number} of {path} passed over: {reason} ({example.removeprefix(f'{path} ')})")
    return rows


def split_rows(rows, ratio, key):
    """Split rows into (the rest, about `ratio` of them) by the hash of row[key]: equal ones stay together."""
    sides = [], []
    for row in rows:
        sides[hash_fraction(json.dumps(row[key], ensure_ascii=False)) < ratio].append(row)
    return sides


def rows_sha256(rows):
    """Return the sha256 of the contents of rows, wherever they were read from."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


# --- The command line ---------------------------------------------------------------------------------------


def inspect(cfg):
    """Show what a source of text, a file of conversations or preference pairs, or a prepared dataset holds.

    python data.py inspect PATH [--tokenizer_path=FOLDER] [--template=chatml|instruct|chat]
    """
    if not cfg.path:
        raise UserError("inspect needs a path: python data.py inspect PATH")
    if (Path(cfg.path) / "config.json").is_file():
        raise UserError(
            f"{cfg.path}: the folder of a model; inspect shows data, sample.py what a model writes"
        )
    if any((Path(cfg.path) / name).is_file() for name in ("manifest.json", "tokenizer.model")):
        print(describe(cfg.path, cfg.tokenizer_path))
    elif cfg.text_column or holds_text(cfg.path):
        print(describe_text(cfg.path, cfg.text_column))
    else:
        show_rows(cfg)


def describe(folder, tokenizer_path=""):
    """Return, for people, what a prepared dataset holds; its shards are verified as training does.

    Raises UserError for a damaged one, or where another tokenizer is given than the one that made it.
    """
    manifest, folder = read_manifest(folder), Path(folder)
    config, sha256 = manifest["config"], manifest["tokenizer_sha256"]
    if tokenizer_path and (other := Tokenizer.load(tokenizer_path)).sha256 != sha256:
        raise UserError(
            f"{folder}: was encoded by the tokenizer {sha256}, {tokenizer_path} is {other.sha256}"
        )
    splits = {name: Shards(folder, name) for name, entries in manifest["splits"].items() if entries}
    if not splits:
        raise UserError(f"{folder}: holds no documents; {AGAIN}")
    first, *others = config.get("mixture") or [config.get("input_path")]
    lines = [f"{folder}: a prepared dataset", f"  {'source':<17}{first}"]
    lines += [f"  {'':<17}{other}" for other in others]
    for name, split in splits.items():
        counts = f"{split.documents:>12,} documents {split.tokens:>15,} tokens"
        lines.append(
            f"  {name:<8}{counts} {split.bytes / 1e6:>11,.2f} MB in {len(split.names)} shards"
        )
    ratio = sum(split.bytes for split in splits.values()) / sum(
        split.tokens for split in splits.values()
    )
    lines.append(f"  {'bytes per token':<17}{ratio:.2f}")
    lines.append(f"  {'tokenizer':<17}{manifest['vocab_size']:,} ids, sha256 {sha256}")
    name, split = next(iter(splits.items()))
    ids = split.read(0, min(256, split.tokens)).tolist()
    ids = ids[: ids.index(manifest["eos_id"]) + 1] if manifest["eos_id"] in ids else ids
    text = Tokenizer.load(folder / "tokenizer.model").decode(ids, controls=True)
    text = text.translate(CONTROLS)
    return "\n".join(
        [*lines, "", f"{name}, the first document from its ids ({len(ids)} shown):", text]
    )


def describe_text(path, column):
    """Return, for people, what the first documents of a source of text show, before anything is cleaned."""
    seen = peek(DataConfig(input_path=path, text_column=column))
    lines = [f"{path}: text", *(f"  {count:>10,}  {kind}" for kind, count in seen["kinds"].items())]
    lines += [f"  {seen['bytes']:>10,}  bytes on disk"] if seen["bytes"] is not None else []
    read = "documents in all" if seen["complete"] else "documents read to see, there are more"
    lines.append(f"  {seen['documents']:>10,}  {read}")
    for sign, entries in ((-1, seen["dropped"]), (1, seen["notes"])):
        for reason, entry in sorted(entries.items()):
            lines.append(f"  {sign * entry['count']:>10,}  {reason}, first: {entry['examples'][0]}")
    if not seen["example"]:
        raise UserError(
            f"{path}: 0 usable documents" + "".join(f"; {line.strip()}" for line in lines[1:])
        )
    where, text = seen["example"]
    shown = text.strip()[:600].translate(CONTROLS)
    return "\n".join([*lines, "", f"{where} ({len(text):,} characters, the beginning):", shown])


COMMANDS = {
    "inspect": (inspect, InspectConfig, "path"),
    "retokenize": (retokenize, RetokenizeConfig, "path"),
    "create_sample_datasets": (create, SampleConfig),
}  # word -> function, configuration, and its fields that may be given without a flag


def command_line(argv):
    """Prepare a dataset from raw text: python data.py configs/datasets/NAME.json [--key=value ...]

    Also: python data.py inspect PATH, retokenize FOLDER and create_sample_datasets; each has its own --help.
    """
    word = argv[0] if argv and argv[0][:1] != "-" else ""
    if word in COMMANDS:
        function, config, *places = COMMANDS[word]
        run(function, config, cleandoc(function.__doc__), argv=argv[1:], places=places)
    elif (near := closest(word, COMMANDS)) and not word.endswith(".json"):
        print(f"error: unknown command {word!r}; did you mean {near}?", file=sys.stderr)
        sys.exit(2)
    elif (
        word and not word.endswith(".json") and Path(word).exists()
    ):  # the text itself: a likely first try
        print(
            f"error: {word!r} is no preset; to prepare it write --input_path={word}",
            file=sys.stderr,
        )
        sys.exit(2)
    else:
        run(main, DataConfig, argv=argv, doc=cleandoc(command_line.__doc__))


if __name__ == "__main__":
    command_line(sys.argv[1:])
