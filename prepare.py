"""Raw text to a prepared dataset: cleaning, filters, deduplication, tokenizer, shards, manifest, card.

A document passes the stages in the order of this file, one at a time: it is read, cleaned, filtered, compared
with those kept before it, and assigned to train or val by its own hash. Only then, when the training text is
known, is the tokenizer trained (or an existing one opened) and the text encoded. What each stage drops is
counted by reason, with examples, in stats.json: a bad row never ends a run, and none disappears unseen.

The result is a pure function of (input, config): no clock, no random state, no order of a file system enters
it (the date on DATA_CARD.md apart). It is written in a hidden folder and renamed when complete, so a killed
run leaves nothing that looks like a dataset, and a second run gives the same bytes.

Memory does not grow with the corpus except for the deduplication index: about 0.1 KB per document for exact
duplicates and, with use_minhash, 6 KB more per document kept.
"""

import datetime
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from configurator import Fraction, NonNegativeInt, PositiveInt, Range, UserError
from sources import Tally, read_documents
from tokenizer import Tokenizer, train_tokenizer

AGAIN = "delete the folder and prepare it again"  # the remedy for a damaged dataset
FORMAT = 1  # of the manifest; a reader refuses any other
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BATCH = 256  # documents handled together
SAMPLE_BYTES = 48 << 20  # of training text that a tokenizer is trained on: SentencePiece holds it in memory


@dataclass(frozen=True)
class DataConfig:
    """What to read, what to keep of it, and where to write it."""

    # a file, folder or glob; docstrings: (this Python's documentation); hf:owner/name[:config[:split]]
    input_path: str = "docstrings:"
    input_config: str = ""  # configuration of a hf: dataset, such as wikitext-103-raw-v1
    text_column: str = ""  # the column that holds the text; empty = found by its name
    licence: str = ""  # a note on the source's licence, for DATA_CARD.md
    output_dir: str = ""  # the dataset folder; empty = data/processed/ and the name of the input
    # a .model file to reuse, or to train if it is absent; empty = one for this folder alone
    tokenizer_path: str = ""
    train_tokenizer: bool = True  # may a tokenizer be trained where tokenizer_path holds none?
    vocab_size: PositiveInt = 32768  # of the tokenizer, trained or reused
    sequence_length: PositiveInt = 1024  # the length you will train at: the report counts blocks of it
    min_length: NonNegativeInt = 50  # characters; shorter documents are dropped
    max_length: PositiveInt = 10000  # characters; longer documents are dropped, longer plain-text files cut
    language: Literal["en", "off"] = "en"  # keep English (a stop-word score), or everything
    language_threshold: Fraction = 0.7  # the score from which a document counts as English
    use_minhash: bool = True  # drop near-duplicates; exact ones always go
    # Jaccard similarity of word 5-grams from which the later of two documents is dropped
    minhash_threshold: Annotated[float, Range(0, 1, open_low=True)] = 0.8
    train_ratio: Fraction = 0.98  # share of documents for training; the rest is val
    shard_tokens: PositiveInt = 100_000_000  # a shard ends with the document that reaches this
    max_docs: PositiveInt | None = None  # read no more documents than this
    seed: NonNegativeInt = 42  # of the tokenizer's sample and of the MinHash permutations
    num_workers: PositiveInt = 2  # threads that encode; the result does not depend on it


# --- The folder's format ------------------------------------------------------------------------------------


def file_sha256(path):
    """The hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_count(value):
    return type(value) is int and value >= 0


def _is_hash(value):
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_file_name(value):
    """A plain name inside the folder: no slash, no leading dot, hence no way out of it."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", value) is not None


SHARD_FIELDS = {
    "bin": _is_file_name,
    "text": _is_file_name,
    "tokens": lambda value: _is_count(value) and value > 0,
    "documents": _is_count,
    "bytes": _is_count,
    "bin_sha256": _is_hash,
    "text_sha256": _is_hash,
}
MANIFEST_FIELDS = {
    "vocab_size": lambda value: _is_count(value) and 0 < value <= 2**32,
    "tokenizer_sha256": _is_hash,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "pad_id": _is_count,
    "bos_id": _is_count,
    "eos_id": _is_count,
    "config": lambda value: isinstance(value, dict),
    "splits": lambda value: isinstance(value, dict) and all(isinstance(v, list) for v in value.values()),
}


def _check_fields(thing, fields, where):
    if not isinstance(thing, dict):
        raise UserError(f"{where}: expected an object, got {type(thing).__name__}")
    for name, good in fields.items():
        if name not in thing:
            raise UserError(f"{where}: '{name}' is missing; {AGAIN}")
        if not good(thing[name]):
            what = "illegal file name" if fields[name] is _is_file_name else f"illegal '{name}'"
            raise UserError(f"{where}: {what} {thing[name]!r:.80}; {AGAIN}")


def read_manifest(folder):
    """Read and check FOLDER/manifest.json. All that is wrong with it is a UserError."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        if Path(folder).is_file():
            make = f"prepare it: python data.py --input_path={folder}"
            raise UserError(f"{folder}: a file, not a prepared dataset; {make}")
        make = "make one: python data.py configs/datasets/NAME.json"
        raise UserError(f"{folder}: no prepared dataset (no manifest.json); {make}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({error}); {AGAIN}") from None
    if isinstance(manifest, dict) and "files" in manifest:  # never to be deleted as a damaged dataset
        raise UserError(f"{folder}: a model or checkpoint, not a prepared dataset; name a folder of data.py")
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r:.80}, this program reads {FORMAT}")
    _check_fields(manifest, MANIFEST_FIELDS, path)
    for split, shards in manifest["splits"].items():
        for number, shard in enumerate(shards):
            _check_fields(shard, SHARD_FIELDS, f"{path}: {split} shard {number}")
    return manifest


# --- Cleaning and filters -----------------------------------------------------------------------------------

# Zero-width and bidirectional marks, the soft hyphen, and the control characters that ftfy keeps. The
# zero-width joiners U+200C and U+200D stay: emoji and several scripts are spelled with them.
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A)])
INVISIBLE |= dict.fromkeys([0xFEFF, *range(0x1C, 0x20)]) | {0x0B: "\n", 0x0C: "\n", 0xA0: " "}
UNPLAIN = re.compile(r"[^\n\t\x20-\x25\x27-\x7e]")  # ftfy changes nothing but what holds one of these


def clean(text):
    """Text as a model should see it: repaired by ftfy, without invisible characters, its paragraphs kept.

    Every step is linear in the length of the text, whatever the text.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\b" in text:
        text = re.sub("[^\n]\b", "", text)  # nroff's bold: a letter, backspace, the letter again
    text = fix_encoding(text).translate(INVISIBLE)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def fix_encoding(text):
    """ftfy.fix_text, with the same result and without its cost for the lines that it would leave alone."""
    if text.isascii() and not UNPLAIN.search(text):
        return text
    import ftfy

    lines, config = text.split("\n"), ftfy.TextFixerConfig(explain=False)
    for number, line in enumerate(lines):
        if "<" in line:  # ftfy, too, reads entities as such only up to the first tag
            config = config._replace(unescape_html=False)
        if UNPLAIN.search(line):
            lines[number] = ftfy.fix_text(line, config)
    return "\n".join(lines)


# Function words that tell English from its neighbours in Latin script; a word in both counts as English.
ENGLISH_WORDS = """
    the of and to that is was for it with as his on be at by i this had not are but from or have an they which
    one you were her all she there would their we him been has when who will more no if out so said what up
    its about into than them can only other new some could time these two may then do first any my now such
    like our over even most after also did many before must through back where much your well should because
    each just those how too very make does here while again between under always never see use used using
    being"""
FOREIGN_WORDS = """
    der die das und ist nicht ein eine zu den von mit sich des auf für im dem auch es wird sind wie
    oder aber bei nach nur noch aus werden einer einen el la los las del que en y por con una para
    se su al como más pero sus le ya fue ha muy les et est une dans qui pas plus ce il au sur ne
    sont avec cette mais nous vous elle être aux lo gli che di della per non sono è nel dei delle
    alla anche questo da ao os uma não mais dos das foi em ele och att det som på är av för till den
    inte han jag er og til af ikke de het een van niet zijn voor met op dat te ook maar aan door nie
    się na jest jak tak ale przez są je że jako byl ve pro w z"""
ENGLISH = frozenset(ENGLISH_WORDS.split())
FOREIGN = frozenset(FOREIGN_WORDS.split()) - ENGLISH


def english_score(text):
    """How English a text is, 0 to 1, from the function words of its first 2,000 characters.

    The share of words in plain letters, times the share of English function words (full marks from one in
    five), times their share among the function words of all the languages known here.
    """
    words = re.findall(r"[^\W\d_]+", text[:2000].lower())
    english = sum(word in ENGLISH for word in words)
    if not english:
        return 0.0
    foreign = sum(word in FOREIGN for word in words)
    plain = sum(word.isascii() for word in words) / len(words)
    return plain * min(1.0, english / len(words) / 0.2) * english / (english + foreign)


def reject(text, cfg):
    """Why a cleaned document is not kept, or None."""
    if len(text) < cfg.min_length:
        return "too-short"
    if len(text) > cfg.max_length:
        return "too-long"
    if cfg.language == "en" and english_score(text) < cfg.language_threshold:
        return "not-english"
    return None


# --- Deduplication ------------------------------------------------------------------------------------------

PERMUTATIONS = 128  # of a MinHash: the estimate of a Jaccard similarity of 0.8 is off by 0.035 (one sigma)


class Deduplicator:
    """Finds documents that repeat an earlier one: exactly (SHA-256), or nearly one kept (MinHash).

    The LSH index only proposes candidates, with bands narrow enough to miss hardly any pair above the
    threshold; the full signatures then decide, so that pairs below it stay.
    """

    def __init__(self, cfg):
        self.exact, self.threshold, self.lsh = set(), cfg.minhash_threshold, None
        if cfg.use_minhash:
            from datasketch import MinHash, MinHashLSH

            self.lsh = MinHashLSH(threshold=self.threshold, num_perm=PERMUTATIONS, weights=(0.05, 0.95))
            self.minhashes = partial(
                MinHash.generator, num_perm=PERMUTATIONS, seed=cfg.seed % 2**32, hashfunc=int
            )
            self.signatures = []

    def reasons(self, texts):
        """For each text, why it is dropped ("exact-duplicate", "near-duplicate"), or None if it is kept."""
        digests = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        if self.lsh is None:
            return ["exact-duplicate" if self._seen(digest) else None for digest in digests]
        pairs = zip(digests, self.minhashes(map(shingles, texts)), strict=True)
        return ["exact-duplicate" if self._seen(digest) else self._near(minhash) for digest, minhash in pairs]

    def _seen(self, digest):
        seen = digest in self.exact
        self.exact.add(digest)
        return seen

    def _near(self, signature):
        if signature.is_empty():
            return None  # no words at all: nothing to compare
        for other in self.lsh.query(signature):
            if np.mean(self.signatures[other] == signature.hashvalues) >= self.threshold:
                return "near-duplicate"
        self.lsh.insert(len(self.signatures), signature, check_duplication=False)
        self.signatures.append(signature.hashvalues.astype(np.uint32))
        return None


def shingles(text):
    """32-bit hashes of the distinct word 5-grams of a text (of the whole, if it has fewer words)."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return words
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    grams = np.zeros(max(1, len(words) - 4), np.uint64)
    for offset in range(min(5, len(words))):  # the words enter in order: a polynomial, modulo 2**64
        grams = (grams + hashes[offset : offset + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
        grams ^= grams >> np.uint64(29)
    return np.unique(grams >> np.uint64(32)).tolist()


# --- From documents to shards -------------------------------------------------------------------------------


def batches(items, size):
    """Consecutive lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def hash_fraction(text, seed=""):
    """A number in 0..1 that is a function of the text (and seed) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}{text}".encode()).digest()[:8], "big") / 2**64


def progress(items, **settings):
    from tqdm import tqdm

    return tqdm(items, disable=None, unit=" documents", unit_scale=True, dynamic_ncols=True, **settings)


def write_documents(cfg, work, tally):
    """Read, clean, filter and deduplicate into WORK/train.text and val.text, a JSON row for each kept.

    A document goes to train or val by its own hash: whatever else is in the corpus, it stays on its side.
    """
    source, dedup = itertools.islice(read_documents(cfg, tally), cfg.max_docs), Deduplicator(cfg)
    sizes = {"train": 0, "val": 0}
    with open(work / "train.text", "wb") as train, open(work / "val.text", "wb") as val:
        for rows in batches(progress(source, desc="read", total=cfg.max_docs), BATCH):
            tally.documents += len(rows)
            kept = []
            for where, raw in rows:
                text = clean(raw)
                if reason := reject(text, cfg):
                    tally.drop("filter", reason, where, text)
                else:
                    kept.append((where, text))
            for (where, text), reason in zip(kept, dedup.reasons([text for _, text in kept]), strict=True):
                if reason:
                    tally.drop("dedup", reason, where, text)
                    continue
                tally.kept += 1
                split = "train" if hash_fraction(text) < cfg.train_ratio else "val"
                sizes[split] += len(text.encode())
                (train if split == "train" else val).write(text_row(text))
    return sizes


def text_row(text):
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read_texts(path):
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def shared_tokenizer(cfg):
    """The .model file that tokenizer_path names, itself or by its folder; None if it names none."""
    path = Path(cfg.tokenizer_path)
    return (path / "tokenizer.model" if path.is_dir() else path) if cfg.tokenizer_path else None


def make_tokenizer(cfg, work, train_bytes):
    """Put the tokenizer in WORK/tokenizer.model: the one at tokenizer_path, or one trained on train.text."""
    shared, own = shared_tokenizer(cfg), work / "tokenizer.model"
    if shared and shared.exists():
        tokenizer = Tokenizer.load(shared)  # under its own name, which an error shall name
        own.write_bytes(tokenizer.model)
        if tokenizer.vocab_size != cfg.vocab_size:
            sizes = f"its vocab_size is {tokenizer.vocab_size}, not {cfg.vocab_size}"
            raise UserError(f"{shared}: {sizes}; set that, or name another tokenizer_path")
        return tokenizer
    if not cfg.train_tokenizer:
        raise UserError(f"tokenizer_path '{shared or ''}': not found, and train_tokenizer is off")
    share = SAMPLE_BYTES / max(train_bytes, 1)
    sample = (text for text in read_texts(work / "train.text") if hash_fraction(text, cfg.seed) < share)
    size = min(train_bytes, SAMPLE_BYTES) / 1e6
    print(f"training a tokenizer of {cfg.vocab_size:,} pieces on {size:.1f} MB of text", flush=True)
    tokenizer = train_tokenizer(sample, own, cfg.vocab_size)
    if shared:
        shared.parent.mkdir(
            parents=True, exist_ok=True
        )  # then a copy that a crash leaves whole or not at all
        temporary = shared.with_name(f".{shared.name}.{os.getpid()}")
        shutil.copyfile(own, temporary)
        os.replace(temporary, shared)
    return tokenizer


class ShardWriter:
    """Writes documents to numbered pairs of .bin and .jsonl, ended by the document that fills them."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.entries, self.files = [], None

    def add(self, text, ids):
        """Append one document; opens a shard when none is open, ends it when it is full."""
        if self.files is None:
            self._open()
        data = {"bin": np.asarray(ids, self.dtype).tobytes(), "text": text_row(text)}
        for kind, (file, digest) in self.files.items():
            file.write(data[kind])
            digest.update(data[kind])
        self.entry["tokens"] += len(ids)
        self.entry["documents"] += 1
        self.entry["bytes"] += len(text.encode())
        if self.entry["tokens"] >= self.shard_tokens:
            self.close()

    def _open(self):
        name = f"{self.split}_{len(self.entries):05d}"
        names = {"bin": f"{name}.bin", "text": f"{name}.jsonl"}
        self.entry = {**names, "tokens": 0, "documents": 0, "bytes": 0}
        self.files = {kind: ((self.folder / n).open("wb"), hashlib.sha256()) for kind, n in names.items()}

    def close(self):
        """End the shard at hand and note its hashes; the next document opens another."""
        if self.files is not None:
            for kind, (file, digest) in self.files.items():
                file.close()
                self.entry[f"{kind}_sha256"] = digest.hexdigest()
            self.entries.append(self.entry)
            self.files = None


def write_shards(cfg, work, tokenizer, documents):
    """Encode WORK/*.text into shards, BOS document EOS; returns the manifest's splits."""
    dtype, splits = DTYPES[dtype_name(tokenizer)], {}
    bar = progress(None, desc="encode", total=documents)
    for split in ("train", "val"):
        writer, path = ShardWriter(work, split, dtype, cfg.shard_tokens), work / f"{split}.text"
        for texts in batches(read_texts(path), BATCH):
            rows = tokenizer.encode_batch(texts, num_threads=cfg.num_workers)
            for text, ids in zip(texts, rows, strict=True):
                assert not ids or max(ids) < tokenizer.vocab_size
                writer.add(text, [tokenizer.bos_id, *ids, tokenizer.eos_id])
            bar.update(len(texts))
        writer.close()
        splits[split] = writer.entries
        path.unlink()
    bar.close()
    return splits


def dtype_name(tokenizer):
    return "uint16" if tokenizer.vocab_size <= 65_535 else "uint32"


# --- The run ------------------------------------------------------------------------------------------------


def main(cfg):
    """Prepare a dataset from raw text, or verify and name the one that is there; print its numbers."""
    output, settings = output_folder(cfg), lasting(cfg)
    if already_there(output, settings, shared_tokenizer(cfg)):
        return
    with unfinished(output) as work:
        tally = Tally()
        sizes = write_documents(cfg, work, tally)
        check_usable(cfg, tally, sizes)
        tokenizer = make_tokenizer(cfg, work, sizes["train"])
        splits = write_shards(cfg, work, tokenizer, tally.kept)
        manifest = {
            "format": FORMAT,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "dtype": dtype_name(tokenizer),
            "pad_id": tokenizer.pad_id,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "config": settings,
            "splits": splits,
            "totals": {split: totals(entries) for split, entries in splits.items()},
        }
        stats = statistics(cfg, tally, manifest)
        write_json(work / "stats.json", stats)
        (work / "DATA_CARD.md").write_text(card(output.name, cfg, stats, manifest), encoding="utf-8")
        write_json(work / "manifest.json", manifest)
    print(report(output, stats))


def output_folder(cfg):
    """cfg.output_dir, or data/processed/ and a name made from the input."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    source = cfg.input_path.removeprefix("hf:").split(":")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).name.split(".")[0]).strip("_")
    return Path("data/processed") / (name or "dataset")


def lasting(cfg):
    """The settings that decide what the dataset holds, which the manifest keeps: not where nor how fast."""
    return {key: value for key, value in asdict(cfg).items() if key not in ("output_dir", "num_workers")}


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
            was = f"was prepared with {key} {old!r}, now it is {new!r}"
            raise UserError(f"{output}: {was}; name another output_dir, or delete this one")
    if (
        tokenizer
        and tokenizer.is_file()
        and (found := file_sha256(tokenizer)) != manifest["tokenizer_sha256"]
    ):
        encoded = f"was encoded by the tokenizer of sha256 {manifest['tokenizer_sha256']}"
        raise UserError(f"{output}: {encoded}, {tokenizer} has {found}; name another, or delete the folder")
    entries = list(itertools.chain.from_iterable(manifest["splits"].values()))
    hashes = {entry[kind]: entry[f"{kind}_sha256"] for entry in entries for kind in ("bin", "text")}
    hashes["tokenizer.model"] = manifest["tokenizer_sha256"]
    for name, expected in hashes.items():
        path = output / name
        if not path.is_file() or file_sha256(path) != expected:
            raise UserError(f"{path}: missing or changed since; delete {output} to prepare it again")
    total = totals(entries)
    print(f"{output} exists: {total['documents']:,} documents, {total['tokens']:,} tokens, verified")
    return True


@contextmanager
def unfinished(output):
    """A hidden folder beside `output` to work in, renamed to `output` only if the block succeeds.

    Whatever a killed run left there is swept away first; a lock, which dies with its process, keeps a second
    run out.
    """
    work = output.parent / f".{output.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another output_dir") from None
    with lock:
        if not take(lock):
            raise UserError(f"{output}: another run is preparing it now; wait, or name another output_dir")
        try:
            for old in work.iterdir():
                if old.name != "lock":
                    old.unlink()
            yield work
            for path in work.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise UserError(f"{work}: no space left on the disk; nothing was kept") from None
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    (work / "lock").unlink()
    if output.is_dir():
        output.rmdir()  # empty, or already_there would have refused it
    os.rename(work, output)


def take(lock):
    """Lock an open file without waiting; False if another process holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_usable(cfg, tally, sizes):
    """Raises UserError, with the main reasons, if nothing is left to train on."""
    if sizes["train"]:
        return
    if tally.kept:
        raise UserError(f"{cfg.input_path}: all {tally.kept} usable documents fell to val; raise train_ratio")
    reasons = sorted(tally.reasons(), key=lambda entry: -entry[2])[:3]
    told = "; ".join(f"{count} {reason} ({example})" for _, reason, count, example in reasons)
    raise UserError(f"{cfg.input_path}: 0 usable documents{': ' if told else ''}{told}")


def totals(entries):
    total = {"shards": 0, "documents": 0, "tokens": 0, "bytes": 0}
    for entry in entries:
        total["shards"] += 1
        for key in ("documents", "tokens", "bytes"):
            total[key] += entry[key]
    return total


def statistics(cfg, tally, manifest):
    """What stats.json says."""
    both = [manifest["totals"][split] for split in ("train", "val")]
    T = cfg.sequence_length
    return {
        "source": cfg.input_path,
        "cap": {"max_docs": cfg.max_docs, "reached": tally.documents == cfg.max_docs},
        "documents": {"read": tally.documents + tally.bad_rows, "kept": tally.kept, "dropped": tally.dropped},
        "splits": {
            split: {**total, f"blocks_of_{T}": max(0, -(-(total["tokens"] - 1) // T))}
            for split, total in manifest["totals"].items()
        },
        "bytes_per_token": round(sum(t["bytes"] for t in both) / sum(t["tokens"] for t in both), 4),
        "tokenizer": {"sha256": manifest["tokenizer_sha256"], "vocab_size": manifest["vocab_size"]},
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def dropped_lines(stats):
    """(stage, reason, count) of everything dropped."""
    for stage, entries in stats["documents"]["dropped"].items():
        for reason, entry in sorted(entries.items()):
            yield stage, reason, entry["count"]


def report(output, stats):
    """The numbers of a run, for the terminal."""
    lines = [("read", stats["documents"]["read"])]
    lines += [(f"  {reason}", -count) for _, reason, count in dropped_lines(stats)]
    lines += [("kept", stats["documents"]["kept"])]
    text = [f"{output}", *(f"  {name:<24}{count:>14,} documents" for name, count in lines)]
    for split, total in stats["splits"].items():
        text.append(f"  {split:<24}{total['tokens']:>14,} tokens, {total['bytes'] / 1e6:.2f} MB")
    text.append(f"  {'bytes per token':<24}{stats['bytes_per_token']:>14.2f}")
    if stats["cap"]["reached"]:
        text.append(f"  stopped at max_docs {stats['cap']['max_docs']:,}")
    if not stats["splits"]["val"]["documents"]:
        text.append("  no document fell to val: lower train_ratio, or training cannot validate")
    return "\n".join(text)


def card(name, cfg, stats, manifest):
    """DATA_CARD.md: where the text is from, what was done to it, what to beware of."""
    rows = [f"| read | | {stats['documents']['read']:,} |"]
    rows += [f"| dropped: {stage} | {reason} | {count:,} |" for stage, reason, count in dropped_lines(stats)]
    rows += [f"| kept | | {stats['documents']['kept']:,} |"]
    splits = [
        f"| {split} | {t['documents']:,} | {t['tokens']:,} | {t['bytes']:,} | {t['shards']} |"
        for split, t in stats["splits"].items()
    ]
    cap = f"capped at max_docs {cfg.max_docs:,}" if stats["cap"]["reached"] else "not capped"
    settings = "\n".join(f"    {key} = {json.dumps(value)}" for key, value in manifest["config"].items())
    near = "Near-duplicates were **not** removed; copies of val documents may be in train."
    if cfg.use_minhash:
        near = f"Of documents with a Jaccard similarity of {cfg.minhash_threshold} or more, the first stayed."
    return f"""# {name}

Prepared {datetime.date.today().isoformat()}.

- Source: `{cfg.input_path}`{f", {cfg.input_config}" if cfg.input_config else ""} ({cap})
- Licence: {cfg.licence or "not noted; ask the source before passing the text or a model trained on it on"}
- Tokenizer: {manifest["vocab_size"]:,} entries, sha256 `{manifest["tokenizer_sha256"]}`, \
{stats["bytes_per_token"]:.2f} bytes per token

| stage | reason | documents |
|---|---|---|
{chr(10).join(rows)}

| split | documents | tokens | bytes of text | shards |
|---|---|---|---|---|
{chr(10).join(splits)}

Examples of what was dropped are in `stats.json`. A document belongs to val if its own hash says so.
{near}

## Risks

The text is what its authors wrote: it may be wrong, biased, offensive or out of date. Private data (names,
addresses, keys) was not removed. The language filter and the near-duplicate search are heuristics: some of
what should have gone is still here, and some that was dropped was fine.

## Settings

{settings}
"""
