"""Raw text to a prepared dataset: the run.

Documents are read in a fixed order, cleaned and filtered (clean.py), compared with those kept
before (dedup.py), and assigned to train or val by the hash of their raw text. Where that leaves a
split empty, the text is cut. Then a tokenizer is trained on a sample of the training text, or an
existing one is opened, and the text is encoded into shards.

The result is a pure function of (input, config): no clock, no random state, no number of workers
and no order of a file system enters it (except the date on DATA_CARD.md). Memory does not grow with
the corpus, except for the index of dedup.py.
"""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from corpus import report
from corpus.clean import CleanConfig, clean, cut_at, pieces, reject, tidy
from corpus.dedup import Index, minhash, sha256
from corpus.files import package
from corpus.report import Tally, main_reasons
from corpus.sources import SourceConfig, read_documents
from corpus.tokenizer import train_tokenizer
from lib import config, folders
from lib.config import NonNegativeInt, PositiveInt, Range, UserError, refusing, write_whole
from lib.folders import ID_TYPES, check_file, file_sha256, hash_fraction, totals
from lib.tokenizer import Tokenizer

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 18  # handled together: so many, fewer when long
CHECKPOINT_CHARACTERS = 8 << 20  # of raw text between two points from which a killed run resumes
SAMPLE_BYTES = 48 << 20  # of text to train a tokenizer on: SentencePiece holds it in memory
SPLITS = ("train", "val")
KINDS = ("bin", "text")  # of a shard's files: token ids, and the documents they are of
GROWING = ("train.jsonl", "val.jsonl", "digests.bin", "signatures.bin")  # texts, and the index
JSON = json.JSONEncoder(ensure_ascii=False)
progress_bar = partial(tqdm, disable=None, unit=" documents", unit_scale=True)


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode text, and where to write the dataset."""

    output_dir: str = ""  # the dataset folder; empty = data/processed/ and the name of the input
    # a .model file to reuse, or to train if it is absent; empty = one for this folder alone
    tokenizer_path: str = ""
    train_tokenizer: bool = True  # may a tokenizer be trained where tokenizer_path holds none?
    vocab_size: PositiveInt = 32768  # of the tokenizer, trained or reused
    sequence_length: PositiveInt = 1024  # you will train at: the report counts blocks of it
    shard_tokens: PositiveInt = 100_000_000  # a shard ends with the document that reaches this
    seed: NonNegativeInt = 42  # of the tokenizer's sample and of the MinHash permutations
    # processes that clean, threads that encode; or ray or ray://HOST:10001, a cluster that cleans
    workers: PositiveInt | str = 2


@dataclass(frozen=True)
class DataConfig(EncodeConfig, CleanConfig, SourceConfig):
    """What to read, what to keep of it, and where to write it."""

    # several sources instead: [{"name": ..., "input_path": ..., "weight": 1, "max_samples": 9}]
    mixture: list | None = None
    max_docs: PositiveInt | None = None  # read no more documents than this
    use_minhash: bool = True  # drop near-duplicates; exact ones always go
    # Jaccard similarity of word 5-grams at which the later of two documents goes
    minhash_threshold: Annotated[float, Range(0, 1, open_low=True)] = 0.8
    train_ratio: Annotated[float, Range(0, 1, open_low=True)] = 0.98  # share of documents; or val


@dataclass(frozen=True, kw_only=True)
class RetokenizeConfig(EncodeConfig):
    """Which dataset to encode again, and how."""

    path: str  # a prepared dataset, whose text is taken as it is


def main(cfg):
    """Prepare a dataset from raw text, or verify and name the one that is there."""

    def text_files(progress):
        if not progress.stats:
            collect(cfg, progress)
        if not progress.counts["kept_bytes"]:
            reasons = main_reasons(progress.stats["documents"]["dropped"])
            where = "mixture" if cfg.mixture else cfg.input_path
            raise UserError(f"{where}: 0 usable documents: {reasons or 'the input holds none'}")
        files = {split: [progress.work / f"{split}.jsonl"] for split in SPLITS}
        is_split = all(progress.counts[split] for split in SPLITS)
        return files if is_split or cfg.train_ratio == 1 else hold_out(cfg, progress, files)

    build(cfg, output_folder(cfg), kept_settings(cfg), text_files)


def retokenize(cfg):
    """Encode a prepared dataset again, with another tokenizer, without cleaning its text again.

    python data.py retokenize FOLDER --output_dir=NEW [--tokenizer_path=MODEL] [--vocab_size=N]
    """
    if not cfg.output_dir:
        raise UserError("retokenize needs a new folder: --output_dir=NEW")
    folder, manifest = Path(cfg.path), folders.read_manifest(cfg.path)
    entries = {split: manifest["splits"].get(split, []) for split in SPLITS}
    hashes = [entry["text_sha256"] for entry in chain(*entries.values())]

    def text_files(progress):
        check_shards(folder, manifest, ["text"])
        progress.stats = config.read_object(folder / "stats.json")
        return {split: [folder / entry["text"] for entry in entries[split]] for split in SPLITS}

    settings = manifest["config"] | kept_settings(cfg) | {"retokenized": hashes}
    build(cfg, Path(cfg.output_dir), settings, text_files)


def build(cfg, output, settings, text_files):
    """Makes a dataset, if it is not there, of text_files(progress): {split: .jsonl files}."""
    if is_prepared(output, settings):
        return
    shared_tokenizer(cfg)  # what is wrong with it is said now, not after the reading
    with unfinished(output, settings) as progress:
        files = text_files(progress)
        tokenizer = make_tokenizer(cfg, progress, files["train"])
        for split in SPLITS:
            encode(cfg, progress, tokenizer, split, files[split])
        stats = finish_folder(cfg, progress, tokenizer, output.name)
    print(report.run_summary(output, stats))


# ---- resumption


@dataclass
class Progress:
    """How an interrupted preparation resumes: only what WORK/progress.json counts is done.

    A step (some documents, the tokenizer, a shard) brings its files to the disk, then replaces this
    file. After a kill or on a full disk the same command cuts the files that grow to the `sizes`
    counted, and writes all else again.
    """

    work: Path
    settings: dict
    counts: Counter = field(default_factory=Counter)  # documents read, split, in train ...
    checksum: int = 0  # CRC-32 of the raw text of the documents read
    dropped: dict = field(default_factory=lambda: {"filter": {}, "dedup": {}})
    sizes: dict = field(default_factory=lambda: dict.fromkeys(GROWING, 0))  # bytes
    stats: dict = field(default_factory=dict)  # stats.json on documents, once all are read
    tokenizer: str = ""  # where it is from, once it is there
    splits: dict = field(default_factory=lambda: {split: [] for split in SPLITS})  # whole shards

    def resume(self):
        """Takes over what an earlier run did, if it had the same settings."""
        saved = {}
        with suppress(UserError):  # none is there, or an unreadable one
            saved = config.read_object(self.work / "progress.json")
        if saved.keys() != vars(self).keys() - {"work"}:
            return
        if changes := changed_settings(saved["settings"], self.settings):
            print(f"starting over: {changes[0]}", flush=True)
        else:
            vars(self).update(saved, counts=Counter(saved["counts"]))

    def checkpoint(self, files=()):
        """Brings {name: a file that grows} to the disk, then all that is counted."""
        for name in files:
            files[name].flush()
            os.fsync(files[name].fileno())
            self.sizes[name] = files[name].tell()
        values = {key: value for key, value in vars(self).items() if key != "work"}
        write_whole(self.work / "progress.json", json.dumps(values).encode())


@contextmanager
def unfinished(output, settings):
    """Yields the Progress in a hidden folder, which becomes `output` if the block succeeds.

    A lock keeps a second run out. If the block fails, the folder stays where it saves much work.
    """
    work = output.parent / f".{output.name}.partial"
    with refusing(OSError, f"{output}: cannot be written", "name another output_dir"):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("wb")
    with lock:
        if not folders.lock_file(lock):
            raise UserError(f"{output}: another run is preparing it; wait, or change output_dir")
        progress = Progress(work, settings)
        progress.resume()
        try:
            progress.checkpoint()  # from here on it describes this run
            yield progress
        except BaseException as error:
            saves_work = progress.counts["kept_bytes"] > CHECKPOINT_CHARACTERS
            if not (saves_work or any(progress.splits.values())):
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                problem = "no space left on the disk; free some, and the same command goes on"
                raise UserError(f"{work}: {problem}") from None
            raise
    (work / "lock").unlink()
    if output.is_dir():
        output.rmdir()  # it is empty: is_prepared refuses any other
    os.replace(work, output)


# ---- from documents to texts


def collect(cfg, progress):
    """Reads, cleans, filters and deduplicates the input into texts; describes it in `stats`."""
    tally = Tally()
    tally.dropped |= progress.dropped  # the same dicts: what is counted here is saved there
    documents = unread(islice(read_documents(cfg, tally), cfg.max_docs), progress)
    first = list(islice(documents, 2))
    if len(first) + progress.counts["read"] == 1:  # quality chooses among documents
        cfg = replace(cfg, quality=False)
    bar = {"total": cfg.max_docs, "initial": progress.counts["read"]}
    documents = progress_bar(chain(first, documents), "read", **bar)
    files = {name: reopen(progress.work / name, size) for name, size in progress.sizes.items()}
    threshold = cfg.minhash_threshold if cfg.use_minhash else None
    index, unsaved = Index(files["digests.bin"], files["signatures.bin"], threshold), 0
    results = in_order(partial(refine, cfg=cfg), batches_of(documents), cfg.workers)
    for batch, (refined, fingerprints) in results:
        verdicts = chain.from_iterable(index.judge(*group) for group in fingerprints)
        for (where, raw, opening), texts in zip(batch, refined, strict=True):
            progress.checksum = zlib.crc32(raw.encode(), progress.checksum)
            split = "train" if hash_fraction(opening) < cfg.train_ratio else "val"
            for text, reason in texts:
                if reason:
                    tally.drop("filter", reason, where, text)
                elif reason := next(verdicts):
                    tally.drop("dedup", reason, where, text)
                else:
                    files[f"{split}.jsonl"].write(text_row(text))
                    progress.counts.update({split: 1, "kept_bytes": len(text.encode())})
            if len(texts) > 1:
                progress.counts.update(split=1, pieces=len(texts))
            progress.counts["read"] += 1
            unsaved += len(raw)
        if unsaved >= CHECKPOINT_CHARACTERS:
            progress.checkpoint(files)
            unsaved = 0
    progress.stats = report.document_stats(cfg, progress, tally)
    progress.checkpoint(files)


def reopen(path, size):
    """Opens a file to append to it, cut to its first `size` bytes. UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115
    if file.tell() < size:
        raise UserError(f"{path}: shorter than at the last checkpoint; delete {path.parent}")
    file.seek(size)
    file.truncate()
    return file


def unread(documents, progress):
    """Returns the documents behind those that an earlier run has done, which must be the same."""
    done, checksum = progress.counts["read"], 0
    for _, raw, _ in islice(documents, done):
        checksum = zlib.crc32(raw.encode(), checksum)
    if checksum != progress.checksum:
        raise UserError(f"{progress.work}: the input has changed; delete this folder to start over")
    if done:
        print(f"going on after {done:,} documents", flush=True)
    return documents


def batches_of(documents):
    """Yields lists of consecutive documents: BATCH_DOCUMENTS, or BATCH_CHARACTERS in all."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def refine(batch, cfg):
    """Returns what can be said of documents without the others.

    For each its texts, several of a long one: [(text, reason to drop it or None)]; and of all texts
    without a reason [(digests, signatures)], BATCH_DOCUMENTS or fewer at a time.
    """
    documents = []
    for _, raw, _ in batch:
        texts = [clean(raw, cfg)]
        if cfg.too_long == "split":
            texts = map(tidy, pieces(texts, cfg.max_length))
        documents.append([(text, reject(text, cfg)) for text in texts])
    good = [text for text, reason in chain.from_iterable(documents) if not reason]
    groups = [good[at : at + BATCH_DOCUMENTS] for at in range(0, len(good), BATCH_DOCUMENTS)]
    signatures = [minhash(group, cfg.seed) if cfg.use_minhash else None for group in groups]
    return documents, [*zip(map(sha256, groups), signatures, strict=True)]


def in_order(function, items, workers):
    """Yields (item, function(item)) in order; `workers` as in EncodeConfig, some items at a time.

    With too few items to keep processes busy none is started: that would take longer.
    """
    items, local = iter(items), isinstance(workers, int)
    if local:
        first = list(islice(items, 32 * workers))
        items = chain(first, items)
        if workers == 1 or len(first) < 32 * workers:
            yield from ((item, function(item)) for item in items)
            return
    with (local_processes if local else ray_cluster)(function, workers) as (submit, most):
        pending = deque((item, submit(item)) for item in islice(items, most))
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
            pending.extend((item, submit(item)) for item in islice(items, 1))


@contextmanager
def local_processes(function, count):
    """Yields (item -> future, the most items under way) of so many processes of this machine."""
    context = multiprocessing.get_context("spawn")  # a fork copies locks that threads may hold
    pool = ProcessPoolExecutor(count, context, initializer=follow_parent)
    try:
        yield partial(pool.submit, function), 32 * count
    except BrokenProcessPool:
        raise UserError("a worker process died; if for want of memory, try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)  # nobody waits for them after Ctrl-C


@contextmanager
def ray_cluster(function, address):
    """As local_processes, of a Ray cluster, which repeats the tasks of a lost machine."""
    if not re.fullmatch("ray(://.+)?", address):
        raise UserError(f"workers must be a number, ray or ray://HOST:10001, got {address!r}")
    ray, root = package("ray", f"--workers={address}"), Path(__file__).parents[1]
    address = "ray://127.0.0.1:10001" if address == "ray" else address
    code = [str(root / "corpus"), str(root / "lib")]  # the cluster gets these, and texts
    try:
        ray.init(address, runtime_env={"py_modules": code})
        task = ray.remote(max_retries=-1)(lambda item: function(item))
        cores = int(ray.cluster_resources().get("CPU", 0))
        yield lambda item: task.remote(item).future(), 4 + 4 * cores
    except (ConnectionError, ImportError, RuntimeError, ray.exceptions.RayError) as error:
        problem = str(error).strip().rpartition("\n")[2]  # before it a traceback may stand
        raise UserError(f"{address}: {problem}; mend it, and the same command goes on") from None
    finally:
        ray.shutdown()


def follow_parent():
    """Makes a worker leave Ctrl-C to its parent, and end when that ends, even by a kill."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def hold_out(cfg, progress, files):
    """Returns {split: .jsonl files}, split at train_ratio of the bytes of all texts of FILES."""
    print("too few documents to choose some for val: the end of the text is val", flush=True)
    total = progress.counts["kept_bytes"]
    left = min(cfg.train_ratio * total, total - 4)  # a character for val, of four bytes at most
    paths = {split: progress.work / f"held_out.{split}.jsonl" for split in SPLITS}
    with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
        for text in read_texts(chain(*files.values())):
            size = max(1, len(text.encode()))
            at = max(0, min(len(text), round(len(text) * left / size)))
            if 0 < at < len(text):  # behind a sentence, if val then gets at most twice its share
                at = cut_at(text, max(0, 2 * at - len(text)), at)
            tail = text[at:].lstrip() if at else text
            for file, part in (train, text[:at].rstrip()), (val, tail):
                file.write(text_row(part) if part else b"")
            left -= size
    return {split: [path] for split, path in paths.items()}


# ---- the tokenizer


def shared_tokenizer(cfg):
    """Returns the tokenizer in tokenizer_path, or None if one is to be trained."""
    path = Path(cfg.tokenizer_path)
    if not (cfg.tokenizer_path and path.exists()):
        if cfg.train_tokenizer:
            return None
        raise UserError(f"tokenizer {cfg.tokenizer_path!r}: not found, and train_tokenizer is off")
    # in a folder that lacks this file, as one of another kind of tokenizer, nothing is trained
    tokenizer = Tokenizer.load(path / "tokenizer.model" if path.is_dir() else path)
    if (size := tokenizer.vocab_size) != cfg.vocab_size:
        raise UserError(f"{path}: its vocab_size is {size}, not {cfg.vocab_size}; set that")
    if tokenizer.bos_id is None:
        raise UserError(f"{path}: has no BOS, which opens each document; name another tokenizer")
    return tokenizer


def make_tokenizer(cfg, progress, files):
    """Returns the shared tokenizer, or one trained on FILES, as WORK/tokenizer.model."""
    path = progress.work / "tokenizer.model"
    if not progress.tokenizer:
        if shared := shared_tokenizer(cfg):
            write_whole(path, shared.model)
            origin = f"Taken as it is from `{cfg.tokenizer_path}`"
            progress.tokenizer = f"{origin}; this dataset had no part in its training"
        else:
            progress.tokenizer = train_on_sample(cfg, path, files)
        progress.checkpoint()
    tokenizer, shared = Tokenizer.load(path), cfg.tokenizer_path
    if shared and not os.path.exists(shared):
        with refusing(OSError, f"{shared}: cannot be written", "name another tokenizer_path"):
            write_whole(shared, tokenizer.model)
    return tokenizer


def train_on_sample(cfg, path, files):
    """Trains a tokenizer on a random sample of the texts of FILES. Returns a line on that."""
    share = SAMPLE_BYTES / max(sum(file.stat().st_size for file in files), 1)
    sample = [text for text in read_texts(files) if hash_fraction(text, cfg.seed) < share]
    size, kind = sum(len(text.encode()) for text in sample), f"of {cfg.vocab_size:,} pieces"
    print(f"training a tokenizer {kind} on {size / 1e6:.1f} MB of text", flush=True)
    train_tokenizer(sample, path, cfg.vocab_size)
    origin = f"drawn at random (seed {cfg.seed}): {size:,} bytes"
    return f"Trained on {len(sample):,} documents of train, {origin}"


# ---- from texts to shards


def text_row(text):
    """Returns a document as a line of a .jsonl file."""
    return b'{"text": %b}\n' % JSON.encode(text).encode()


def read_texts(files):
    """Yields the documents of .jsonl files."""
    for path in files:
        with open(path, "rb") as file:
            for line in file:
                yield json.loads(line)["text"]


def encode(cfg, progress, tokenizer, split, files):
    """Encodes .jsonl files into shards, after those of the split that are whole.

    A shard ends with the document that reaches shard_tokens.
    """
    entries, work = progress.splits[split], progress.work
    done = totals(entries)["documents"]
    texts = islice(read_texts(files), done, None)
    texts = iter(progress_bar(texts, f"encode {split}", initial=done))
    threads = cfg.workers if isinstance(cfg.workers, int) else os.cpu_count()
    documents = with_ids(texts, tokenizer, threads)
    dtype = ID_TYPES[dtype_name(tokenizer.vocab_size)]
    for document in documents:
        name = f"{split}_{len(entries):05d}"
        entry = {"bin": f"{name}.bin", "text": f"{name}.jsonl"}
        entry |= {"tokens": 0, "documents": 0, "bytes": 0}
        with open(work / entry["bin"], "wb") as bins, open(work / entry["text"], "wb") as rows:
            for text, ids in chain([document], documents):
                bins.write(np.asarray(ids, dtype).tobytes())
                rows.write(text_row(text))
                entry["tokens"] += len(ids)
                entry["documents"] += 1
                entry["bytes"] += len(text.encode())
                if entry["tokens"] >= cfg.shard_tokens:
                    break
        for kind in KINDS:
            config.fsync(work / entry[kind])
            entry[f"{kind}_sha256"] = file_sha256(work / entry[kind])
        entries.append(entry)
        progress.checkpoint()


def with_ids(texts, tokenizer, workers):
    """Yields (text, ids): BOS, the ids of the text, EOS."""
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch, workers), strict=True):
            yield text, [tokenizer.bos_id, *ids, tokenizer.eos_id]


# ---- the folder


def output_folder(cfg):
    """Returns cfg.output_dir, or data/processed/ and a name made from the input."""
    if cfg.output_dir or cfg.mixture:
        return Path(cfg.output_dir or "data/processed/mixture")
    source = cfg.input_path.removeprefix("hf:").split(":")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).name.split(".")[0]).strip("_")
    return Path("data/processed") / (name or "dataset")


def kept_settings(cfg):
    """Returns the settings that decide the contents of a dataset, as JSON has them."""
    settings = json.loads(json.dumps(asdict(cfg)))
    return {k: v for k, v in settings.items() if k not in ("output_dir", "workers", "path")}


def changed_settings(then, now):
    """Returns lines on the settings that differ. An absent one has its default."""
    # what versions without these did
    defaults = kept_settings(DataConfig()) | {"normalize_punctuation": True, "too_long": "drop"}
    keys = [key for key in now | then if key not in ("dedup_storage", "language_detector")]
    pairs = [(key, *(s.get(key, defaults.get(key)) for s in (then, now))) for key in keys]
    return [f"{key} was {a!r:.80}, now it is {b!r:.80}" for key, a, b in pairs if a != b]


def is_prepared(output, settings):
    """Returns whether this dataset is there. UserError if it is damaged, or another is there."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "manifest.json").is_file():
        raise UserError(f"{output}: exists and is no prepared dataset; name another output_dir")
    manifest = folders.read_manifest(output)
    if changes := changed_settings(manifest["config"], settings):
        remedy = "name another output_dir, or delete this one"
        raise UserError(f"{output}: exists already, but {changes[0]}; {remedy}")
    check_file(output, "tokenizer.model", manifest["tokenizer_sha256"])
    check_shards(output, manifest, KINDS)
    sums = totals(chain.from_iterable(manifest["splits"].values()))
    print(f"{output} exists: {sums['documents']:,} documents, {sums['tokens']:,} tokens, verified")
    return True


def check_shards(folder, manifest, kinds):
    """Raises UserError unless the shards' files of these kinds, bin or text, are unchanged."""
    for entry in chain.from_iterable(manifest["splits"].values()):
        for kind in kinds:
            check_file(folder, entry[kind], entry[f"{kind}_sha256"])


def dtype_name(vocab_size):
    """Returns the manifest's name for the type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def finish_folder(cfg, progress, tokenizer, name):
    """Writes the cards and the manifest, and leaves nothing else. Returns all of stats.json."""
    manifest = {
        "format": folders.MANIFEST_FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": dtype_name(tokenizer.vocab_size),
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "config": progress.settings,
        "splits": progress.splits,
        "totals": {split: totals(entries) for split, entries in progress.splits.items()},
    }
    stats = progress.stats | report.token_stats(manifest, cfg.sequence_length)
    texts = {
        "stats.json": json.dumps(stats, indent=1) + "\n",
        "DATA_CARD.md": report.data_card(name, progress.settings, stats, progress.tokenizer),
        "manifest.json": json.dumps(manifest, indent=1) + "\n",  # last: it says "complete"
    }
    for file, text in texts.items():
        write_whole(progress.work / file, text.encode())
    shards = chain.from_iterable(progress.splits.values())
    names = {"lock", "tokenizer.model", *texts, *(s[kind] for s in shards for kind in KINDS)}
    for path in progress.work.iterdir():
        if path.name not in names:
            path.unlink()
    return stats
