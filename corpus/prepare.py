"""Raw text to a prepared dataset: the run.

Documents are read in a fixed order, cleaned and filtered (clean.py), compared with those kept before them
(dedup.py), and put aside for train or val by their own hash. When all are read, the tokenizer is trained on
a sample of the training text (or an existing one opened) and the text encoded into shards (shards.py). What
each stage drops is counted by reason, with examples, in stats.json: a bad row never ends a run, and none
disappears unseen.

The result is a pure function of (input, config): no clock, no random state, no number of workers, no order
of a file system enters it (the date on DATA_CARD.md apart). The work is done in a hidden folder, renamed
when complete. Whatever ends a run, a kill or a full disk, the same command goes on with the first part or
shard that is not whole, and gives the same bytes.

Memory does not grow with the corpus except for the deduplication index (see dedup.py).
"""

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from corpus.report import data_card, documents_part, report, tokenizer_card, tokens_part
from corpus.clean import CleanConfig, clean, language_score, reject
from corpus.dedup import Index, RedisIndex, hidden, minhash, sha256
from corpus.sources import Tally, input_bytes, read_documents
from lib.config import Fraction, NonNegativeInt, PositiveInt, Range, UserError, write_whole
from lib.folders import (
    AGAIN,
    FORMAT,
    ShardWriter,
    dtype_name,
    file_sha256,
    hash_fraction,
    lock_file,
    read_manifest,
    read_rows,
    text_row,
    totals,
)
from lib.tokenizer import Tokenizer, train_tokenizer

BATCH, BATCH_CHARACTERS = 256, 1 << 20  # documents handled together, or fewer when they are long
PART_BYTES = 64 << 20  # of raw text between two points at which a killed run can go on
SAMPLE_BYTES = (
    48 << 20
)  # of training text that a tokenizer is trained on: SentencePiece holds it in memory
SPLITS = ("train", "val")


@dataclass(frozen=True)
class SourceConfig:
    """Which text to read."""

    # a file, folder or glob; docstrings: (this Python's documentation); hf:owner/name[:config[:split]]
    input_path: str = "docstrings:"
    input_config: str = ""  # configuration of a hf: dataset, such as wikitext-103-raw-v1
    text_column: str = ""  # the column that holds the text; empty = found by its name
    licence: str = ""  # a note on the source's licence, for DATA_CARD.md
    # several sources instead: [{"name": ..., "input_path": ..., "weight": 1, "max_samples": null}, ...]
    mixture: list | None = None
    max_docs: PositiveInt | None = None  # read no more documents than this


@dataclass(frozen=True)
class DataConfig(CleanConfig, SourceConfig):
    """What to read, what to keep of it, and where to write it."""

    output_dir: str = ""  # the dataset folder; empty = data/processed/ and the name of the input
    use_minhash: bool = True  # drop near-duplicates; exact ones always go
    # Jaccard similarity of word 5-grams from which the later of two documents is dropped
    minhash_threshold: Annotated[float, Range(0, 1, open_low=True)] = 0.8
    # an index that the preparations of one corpus share: redis://HOST:6379/0#NAME; empty = this run's own
    dedup_storage: str = ""
    # a .model file to reuse, or to train if it is absent; empty = one for this folder alone
    tokenizer_path: str = ""
    train_tokenizer: bool = True  # may a tokenizer be trained where tokenizer_path holds none?
    vocab_size: PositiveInt = 32768  # of the tokenizer, trained or reused
    # the length you will train at: the report counts blocks of it
    sequence_length: PositiveInt = 1024
    train_ratio: Fraction = 0.98  # share of documents for training; the rest is val
    shard_tokens: PositiveInt = 100_000_000  # a shard ends with the document that reaches this
    seed: NonNegativeInt = 42  # of the tokenizer's sample and of the MinHash permutations
    # processes that clean, threads that encode; the result does not depend on it
    num_workers: PositiveInt = 2


ENCODING = {
    "tokenizer_path",
    "train_tokenizer",
    "vocab_size",
    "shard_tokens",
}  # settings of the ids alone
NOTES = {"sequence_length", "licence"}  # settings that only the report heeds


def main(cfg):
    """Prepare a dataset from raw text, or verify and name the one that is there; print its numbers."""
    output, settings = output_folder(cfg), lasting(cfg)
    if already_there(output, settings, shared_tokenizer(cfg)):
        return
    with unfinished(output) as work:
        progress = Progress.open(work / "progress.json", settings)
        tally = gather(cfg, work, progress)
        check_usable(cfg, tally, progress.kept)
        files = {split: sorted(work.glob(f"part_*.{split}.jsonl")) for split in SPLITS}
        tokenizer = make_tokenizer(cfg, work, files["train"], progress)
        encode(cfg, work, tokenizer, files, progress, spent=Path.unlink)
        stats = documents_part(cfg, progress, tally)
        stats = finish(work, output.name, settings, tokenizer, progress, stats, cfg.sequence_length)
    print(report(output, stats))


# --- What is done already -----------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a preparation has done, as WORK/progress.json holds it: a killed run need not do it again."""

    path: Path
    settings: dict
    documents: int = 0  # read, judged and, if kept, in a part
    checksum: int = 0  # CRC-32 of their raw text: is the input still the same?
    parts: int = 0  # pairs of files that hold the documents kept
    gathered: bool = False  # there are no more documents
    kept: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # documents, by split
    lengths: Counter = field(
        default_factory=Counter
    )  # of them, in characters: "256" counts 256 to 511
    scores: Counter = field(default_factory=Counter)  # of all documents in the language, in tenths
    tally: dict = field(default_factory=dict)
    index: dict = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)  # its sha256, and a line on where it is from
    places: dict = field(
        default_factory=lambda: {split: ["", 0] for split in SPLITS}
    )  # to encode from
    splits: dict = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )  # shards that are whole

    @classmethod
    def open(cls, path, settings):
        """What an earlier run wrote there, as far as these settings can use it."""
        progress = cls(path, settings)
        old = read_progress(path)
        if not old:
            return progress
        then, keys = old["settings"], (settings.keys() | old["settings"].keys()) - NOTES
        changed = sorted(key for key in keys if settings.get(key) != then.get(key))
        if set(changed) - ENCODING or (changed and any(old["splits"].values())):
            was = f"{changed[0]} was {then.get(changed[0])!r:.80}, now {settings.get(changed[0])!r:.80}"
            print(f"starting over: an unfinished preparation is of no use, {was}", flush=True)
            return progress
        reset = {"settings"} | ({"tokenizer"} if changed else set())
        vars(progress).update({key: value for key, value in old.items() if key not in reset})
        progress.lengths, progress.scores = Counter(progress.lengths), Counter(progress.scores)
        return progress

    def save(self):
        """Write it down, whole or not at all."""
        values = {key: value for key, value in vars(self).items() if key != "path"}
        write_whole(self.path, json.dumps(values).encode())

    def reset(self):
        """Forget it all."""
        vars(self).update(vars(Progress(self.path, self.settings)))


def read_progress(path):
    """What `Progress.save` wrote; {} where there is nothing, or nothing that could be used."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        old
        if isinstance(old, dict) and vars(Progress(path, {})).keys() - {"path"} == old.keys()
        else {}
    )


# --- From documents to parts --------------------------------------------------------------------------------


def gather(cfg, work, progress):
    """Read, clean, filter and deduplicate into WORK/part_00000.train.jsonl and so on; returns the Tally."""
    if progress.gathered:
        return Tally.from_state(progress.tally)
    tally = Tally()
    source = itertools.islice(read_documents(cfg, tally), cfg.max_docs)
    if progress.documents:
        if not passed_over(source, progress):
            print("starting over: the input has changed since this preparation began", flush=True)
            progress.reset()
            return gather(cfg, work, progress)
        print(f"going on after {progress.documents:,} documents", flush=True)
        before = Tally.from_state(progress.tally).dropped
        tally.dropped |= {stage: before[stage] for stage in ("filter", "dedup")}
    for path in work.glob("part_*"):
        if int(path.name[5:10]) >= progress.parts:
            path.unlink()
    intake = Intake(cfg, work, progress, tally)
    rows = batches(watched(source, cfg, tally, progress.documents))
    for batch, refined in in_order(partial(refine, cfg=cfg), rows, cfg.num_workers):
        intake.add(batch, *refined)
    progress.gathered = True
    intake.settle()
    return tally


def passed_over(source, progress):
    """Skip the documents that are done; returns whether they are still the same."""
    checksum = count = 0
    for _, raw in itertools.islice(source, progress.documents):
        checksum, count = zlib.crc32(raw.encode(), checksum), count + 1
    return (checksum, count) == (progress.checksum, progress.documents)


def watched(source, cfg, tally, done):
    """The documents of `source`, with a progress bar: of bytes where they can be known, else of documents."""
    size = None if cfg.max_docs else input_bytes(cfg)
    unit = {"total": size, "unit": "B"} if size else {"total": cfg.max_docs, "unit": " documents"}
    with progress_bar("read", **unit) as bar:
        for count, document in enumerate(source, start=done):
            if count % BATCH == 0:
                bar.update((tally.read_bytes if size else count) - bar.n)
            yield document


def progress_bar(what, **settings):
    from tqdm import tqdm

    return tqdm(desc=what, disable=None, unit_scale=True, dynamic_ncols=True, **settings)


def batches(documents):
    """Lists of consecutive (where, text): BATCH of them, or BATCH_CHARACTERS in all."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def refine(batch, cfg):
    """What each document tells without the others: clean texts, language scores, reasons against them;
    and of those with no reason, digests and signatures (None without use_minhash).
    """
    texts = [clean(raw, cfg) for _, raw in batch]
    scores = [
        language_score(text, cfg) if cfg.language != "off" and len(text) >= cfg.min_length else None
        for text in texts
    ]
    reasons = [reject(text, cfg, score) for text, score in zip(texts, scores, strict=True)]
    good = [text for text, reason in zip(texts, reasons, strict=True) if not reason]
    return (
        texts,
        scores,
        reasons,
        sha256(good),
        minhash(good, cfg.seed) if cfg.use_minhash else None,
    )


def open_index(cfg, work, state):
    """The index of the documents kept: this run's own, or the one that cfg.dedup_storage names."""
    threshold = cfg.minhash_threshold if cfg.use_minhash else None
    if not cfg.dedup_storage:
        return Index(work, threshold, state)
    url, _, name = cfg.dedup_storage.partition("#")
    owner = f"{socket.gethostname()}:{output_folder(cfg).resolve()}"
    return RedisIndex(url, name or "mini-llm", owner, threshold, cfg.seed, state)


class Intake:
    """Takes batches in their turn: judges what repeats, counts, and writes what stays into numbered parts."""

    def __init__(self, cfg, work, progress, tally):
        self.cfg, self.work, self.progress, self.tally = cfg, work, progress, tally
        self.index = open_index(cfg, work, progress.index)
        self.files, self.size = {}, 0  # of the part at hand; bytes of raw text that went into it

    def add(self, batch, texts, scores, reasons, digests, signatures):
        """Take in one batch, and end the part if that filled it."""
        judged = zip(digests, self.index.judge(digests, signatures), strict=True)
        for (where, raw), text, reason in zip(batch, texts, reasons, strict=True):
            data = raw.encode()
            self.progress.checksum = zlib.crc32(data, self.progress.checksum)
            self.size += len(data)
            if reason:
                self.tally.drop("filter", reason, where, text)
                continue
            digest, verdict = next(judged)
            if verdict:
                self.tally.drop("dedup", verdict, where, text)
            else:
                self._write(
                    text, "train" if fraction(bytes(digest)) < self.cfg.train_ratio else "val"
                )
        self.progress.documents += len(batch)
        self.progress.scores.update(
            f"{int(10 * score) / 10}" for score in scores if score is not None
        )
        if self.size >= PART_BYTES:
            self.settle()

    def _write(self, text, split):
        """A document goes to train or val by its own hash: whatever else there is, it stays on its side."""
        if split not in self.files:
            self.files[split] = (self.work / f"part_{self.progress.parts:05d}.{split}.jsonl").open(
                "wb"
            )
        self.files[split].write(text_row(text))
        self.progress.kept[split] += 1
        self.progress.lengths[str(1 << len(text).bit_length() - 1)] += 1

    def settle(self):
        """End the part at hand: all that was taken in is safe from here on."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.files, self.size = {}, 0
        self.progress.parts += 1
        self.progress.index, self.progress.tally = self.index.checkpoint(), self.tally.state()
        self.progress.save()


def fraction(digest):
    """A number in 0..1 from the first 8 bytes of a hash."""
    return int.from_bytes(digest[:8], "big") / 2**64


# --- Processes ----------------------------------------------------------------------------------------------


def in_order(function, items, workers):
    """Yield (item, function(item)) in the order of items, computed by as many processes, a few items ahead.

    With too few items to keep them busy no process is started: that would take longer than the work.
    """
    items, ahead = iter(items), 4 * workers
    waiting = deque(itertools.islice(items, ahead))
    if workers == 1 or len(waiting) < ahead:
        yield from ((item, function(item)) for item in itertools.chain(waiting, items))
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # as everywhere: a fork copies locks that threads may hold
    pool = ProcessPoolExecutor(workers, context, initializer=follow_parent)
    try:
        waiting = deque((item, pool.submit(function, item)) for item in waiting)
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            waiting.extend(
                (item, pool.submit(function, item)) for item in itertools.islice(items, 1)
            )
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, for want of memory perhaps: run the same command with fewer num_workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent():
    """A worker leaves Ctrl-C to its parent, and ends when that ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# --- The tokenizer ------------------------------------------------------------------------------------------


def shared_tokenizer(cfg):
    """The .model file that tokenizer_path names, itself or by its folder; None if it names none.

    UserError for a folder without one: a model may lie there, among whose files a new tokenizer is no help.
    """
    path = Path(cfg.tokenizer_path)
    if cfg.tokenizer_path and path.is_dir():
        path /= "tokenizer.model"
        if not path.is_file():
            raise UserError(
                f"{path}: not found; name a folder that holds one, or a .model file to train"
            )
    return path if cfg.tokenizer_path else None


def make_tokenizer(cfg, work, files, progress):
    """The tokenizer, put in WORK/tokenizer.model: the one at tokenizer_path, or one trained on FILES."""
    shared, own = shared_tokenizer(cfg), work / "tokenizer.model"
    if not (
        progress.tokenizer and own.is_file() and file_sha256(own) == progress.tokenizer["sha256"]
    ):
        if shared and shared.exists():
            tokenizer = Tokenizer.load(shared)  # under its own name, which an error shall name
            write_whole(own, tokenizer.model)
            made = f"Taken as it is from `{shared}`; this dataset had no part in its training"
        elif cfg.train_tokenizer:
            tokenizer, made = train(cfg, own, files)
        else:
            off = "not found, and train_tokenizer is off; name a .model file that is there"
            raise UserError(f"tokenizer_path '{shared or ''}': {off}")
        if tokenizer.vocab_size != cfg.vocab_size:
            sizes = f"its vocab_size is {tokenizer.vocab_size}, not {cfg.vocab_size}"
            raise UserError(f"{shared}: {sizes}; set that, or name another tokenizer_path")
        progress.tokenizer = {"sha256": tokenizer.sha256, "made": made}
        progress.save()
    tokenizer = Tokenizer.load(own)
    if shared and not shared.exists():
        try:
            write_whole(shared, tokenizer.model)
        except OSError as error:
            why = f"cannot be written ({error.strerror}); name another tokenizer_path"
            raise UserError(f"{shared}: {why}") from None
    return tokenizer


def train(cfg, path, files):
    """A tokenizer trained on a random sample of the texts of FILES, and a line that says so."""
    size = sum(file.stat().st_size for file in files)
    share = SAMPLE_BYTES / max(size, 1)
    sample = [
        text
        for file in files
        for text, _ in read_rows(file)
        if hash_fraction(text, cfg.seed) < share
    ]
    used = sum(len(text.encode()) for text in sample)
    print(
        f"training a tokenizer of {cfg.vocab_size:,} pieces on {used / 1e6:.1f} MB of text",
        flush=True,
    )
    made = f"Trained on {len(sample):,} documents of train, drawn at random (seed {cfg.seed}): {used:,} bytes"
    return train_tokenizer(sample, path, cfg.vocab_size), made


# --- From parts to shards -----------------------------------------------------------------------------------


def encode(cfg, work, tokenizer, files, progress, spent=lambda file: None):
    """Encode the rows of FILES {split: [.jsonl]} into shards, BOS document EOS, from where progress left off.

    Each file is handed to `spent` when all of it is in whole shards.
    """
    with progress_bar("encode", unit=" documents", total=sum(progress.kept.values())) as bar:
        bar.update(
            sum(entry["documents"] for entries in progress.splits.values() for entry in entries)
        )
        for split, left in files.items():
            writer = ShardWriter(
                work, split, tokenizer.vocab_size, cfg.shard_tokens, progress.splits[split]
            )
            for batch in rows_from(tuple(left), *progress.places[split]):
                encoded = tokenizer.encode_batch([text for text, _ in batch], cfg.num_workers)
                for (text, place), ids in zip(batch, encoded, strict=True):
                    if writer.add(text, [tokenizer.bos_id, *ids, tokenizer.eos_id]):
                        progress.places[split] = place
                        progress.save()
                        while left[0].name < place[0]:
                            spent(left.pop(0))
                bar.update(len(batch))
            writer.close()
            progress.places[split] = ["~", 0]  # after any name
            progress.save()


def rows_from(files, name, start):
    """Lists of (text, place) of FILES from byte `start` of the one called `name`; a place is such a pair."""
    rows = (
        (text, [file.name, end])
        for file in files
        if file.name >= name
        for text, end in read_rows(file, start if file.name == name else 0)
    )
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


# --- The folder ---------------------------------------------------------------------------------------------


def output_folder(cfg):
    """cfg.output_dir, or data/processed/ and a name made from the input (of a mixture, "mixture")."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    if cfg.mixture:
        return Path("data/processed/mixture")
    source = cfg.input_path.removeprefix("hf:").split(":")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).name.split(".")[0]).strip("_")
    return Path("data/processed") / (name or "dataset")


def lasting(cfg):
    """The settings that the manifest keeps, as JSON has them: not where the result is, nor how it came."""
    settings = json.loads(json.dumps(asdict(cfg)))
    if "dedup_storage" in settings:  # where a password may be in it
        settings["dedup_storage"] = hidden(settings["dedup_storage"])
    return {
        key: value for key, value in settings.items() if key not in ("output_dir", "num_workers")
    }


def already_there(output, settings, tokenizer):
    """Is this dataset complete on disk? UserError if something else, or a damaged one, is in its place."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "manifest.json").is_file():
        raise UserError(f"{output}: exists and is no prepared dataset; name another output_dir")
    manifest = read_manifest(output)
    for key in settings | manifest["config"]:
        old, new = manifest["config"].get(key), settings.get(key)
        if old != new:
            was = f"was prepared with {key} {old!r:.80}, now it is {new!r:.80}"
            raise UserError(f"{output}: {was}; name another output_dir, or delete this one")
    if tokenizer and tokenizer.is_file() and file_sha256(tokenizer) != manifest["tokenizer_sha256"]:
        encoded = f"was encoded by the tokenizer of sha256 {manifest['tokenizer_sha256']}"
        found = f"{tokenizer} has {file_sha256(tokenizer)}"
        raise UserError(f"{output}: {encoded}, {found}; name another, or delete the folder")
    entries = list(itertools.chain.from_iterable(manifest["splits"].values()))
    check_files(output, entries, ("bin", "text"), {"tokenizer.model": manifest["tokenizer_sha256"]})
    total = totals(entries)
    print(
        f"{output} exists: {total['documents']:,} documents, {total['tokens']:,} tokens, verified"
    )
    return True


def check_files(folder, entries, kinds, hashes):
    """UserError unless the shards' files of these kinds, and those in {name: sha256}, are what they were."""
    hashes = {entry[kind]: entry[f"{kind}_sha256"] for entry in entries for kind in kinds} | hashes
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != expected:
            raise UserError(
                f"{path}: missing or changed since; delete {folder} to prepare it again"
            )


@contextmanager
def unfinished(output):
    """A hidden folder beside `output` to work in, renamed to `output` only if the block succeeds.

    A lock, which dies with its process, keeps a second run out. What would take long to do again stays there
    when the block fails, for the same command to go on.
    """
    work = output.parent / f".{output.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("wb")
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); name another output_dir"
        ) from None
    with lock:
        if not lock_file(lock):
            raise UserError(
                f"{output}: another run is preparing it now; wait, or name another output_dir"
            )
        try:
            yield work
        except BaseException as error:
            if not (kept := worth_keeping(work)):
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                done = "the same command goes on" if kept else "begin again"
                raise UserError(
                    f"{work}: no space left on the disk; free some, and {done}"
                ) from None
            raise
    (work / "lock").unlink()
    if output.is_dir():
        output.rmdir()  # empty, or already_there would have refused it
    os.replace(work, output)


def worth_keeping(work):
    """Has an unfinished preparation more behind it than one part, which is made again in a moment?"""
    done = read_progress(work / "progress.json")
    return bool(done) and (done["parts"] > 1 or any(done["splits"].values()))


def check_usable(cfg, tally, kept):
    """Raises UserError, with the main reasons, if nothing is left to train on."""
    if kept["train"]:
        return
    where = "mixture" if cfg.mixture else cfg.input_path
    if kept["val"]:
        raise UserError(
            f"{where}: all {kept['val']} usable documents fell to val; raise train_ratio"
        )
    reasons = sorted(tally.reasons(), key=lambda entry: -entry[2])[:3]
    told = "; ".join(f"{count} {reason} ({example})" for _, reason, count, example in reasons)
    raise UserError(f"{where}: 0 usable documents{': ' if told else ''}{told}")


def finish(work, name, settings, tokenizer, progress, stats, T):
    """Write the manifest and what goes with it, leave nothing else in WORK; returns the whole statistics."""
    sums = {split: totals(entries) for split, entries in progress.splits.items()}
    assert progress.kept == {split: total["documents"] for split, total in sums.items()}
    manifest = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": dtype_name(tokenizer.vocab_size),
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "config": settings,
        "splits": progress.splits,
        "totals": sums,
    }
    stats = stats | tokens_part(manifest, T)
    shards = itertools.chain.from_iterable(progress.splits.values())
    files = {
        "lock",
        "tokenizer.model",
        *(entry[kind] for entry in shards for kind in ("bin", "text")),
    }
    texts = {
        "stats.json": json.dumps(stats, indent=1) + "\n",
        "DATA_CARD.md": data_card(name, settings, stats),
        "TOKENIZER_CARD.md": tokenizer_card(tokenizer, progress.tokenizer["made"], stats),
        "manifest.json": json.dumps(manifest, indent=1)
        + "\n",  # the last, after all that it speaks of
    }
    for file, text in texts.items():
        write_whole(work / file, text.encode())
    for path in work.iterdir():
        if path.name not in files | texts.keys():
            path.unlink()
    return stats


# --- Again, with another tokenizer --------------------------------------------------------------------------


@dataclass(frozen=True)
class RetokenizeConfig:
    """Which dataset to encode again, and how."""

    path: str = ""  # a prepared dataset, whose text is taken as it is
    output_dir: str = ""  # the new dataset folder
    tokenizer_path: str = ""  # a .model file to use, or to train if it is absent; empty = train one
    train_tokenizer: bool = True  # may a tokenizer be trained where tokenizer_path holds none?
    vocab_size: PositiveInt = 32768  # of the tokenizer, trained or reused
    # the length you will train at: the report counts blocks of it
    sequence_length: PositiveInt = 1024
    shard_tokens: PositiveInt = 100_000_000  # a shard ends with the document that reaches this
    seed: NonNegativeInt = 42  # of the tokenizer's sample
    num_workers: PositiveInt = 2  # threads that encode; the result does not depend on it


def retokenize(cfg):
    """Encode a prepared dataset again, with another tokenizer, without cleaning its text again.

    python data.py retokenize FOLDER --output_dir=NEW [--tokenizer_path=MODEL] [--vocab_size=N]
    """
    if not (cfg.path and cfg.output_dir):
        raise UserError(
            "retokenize needs two folders: python data.py retokenize FOLDER --output_dir=NEW"
        )
    folder, output = Path(cfg.path), Path(cfg.output_dir)
    source = read_manifest(folder)
    own = {key: value for key, value in lasting(cfg).items() if key != "path"}
    texts = [entry["text_sha256"] for entries in source["splits"].values() for entry in entries]
    settings = source["config"] | own | {"retokenized": texts}
    if already_there(output, settings, shared_tokenizer(cfg)):
        return
    check_files(folder, itertools.chain.from_iterable(source["splits"].values()), ("text",), {})
    try:
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        report(output, stats)  # so that what is missing in it shows now
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{folder / 'stats.json'}: not readable as data.py writes it; {AGAIN}"
        ) from None
    with unfinished(output) as work:
        progress = Progress.open(work / "progress.json", settings)
        progress.kept = {
            split: totals(entries)["documents"] for split, entries in source["splits"].items()
        }
        files = {
            split: [folder / entry["text"] for entry in es]
            for split, es in source["splits"].items()
        }
        tokenizer = make_tokenizer(cfg, work, files["train"], progress)
        encode(cfg, work, tokenizer, files, progress)
        stats = finish(work, output.name, settings, tokenizer, progress, stats, cfg.sequence_length)
    print(report(output, stats))
