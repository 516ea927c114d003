"""A prepared dataset's folder: its manifest, checked; its shards, read as one array.

    train_00000.bin    token ids, uint16 (uint32 above 65,535 ids): BOS text EOS BOS text EOS ...
    train_00000.jsonl  the same documents, {"text": ...} one a line; val_00000.bin, .jsonl alike
    tokenizer.model    of these ids: the folder is all that training needs
    manifest.json      sizes and sha256 of the shards; written last: the folder is complete
    stats.json, DATA_CARD.md

corpus/prepare.py writes it. Nothing in it is trusted: it may come from anywhere, or be damaged.
"""

import contextlib
import hashlib
import itertools
import os
import re
from pathlib import Path

import numpy as np

from lib.config import UserError, read_object

AGAIN = "delete the folder and prepare it again"  # the remedy for a damaged dataset
MANIFEST_FORMAT = 1  # a reader refuses any other
ID_TYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERIFY_BYTES = 64 << 20  # datasets up to this size are hashed when opened (0.2 s), larger not

FILE_NAME = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # no way out of the folder
HASH = re.compile("[0-9a-f]{64}")


# ---- files


def file_sha256(path):
    """Returns the hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(path):
    """Raises UserError if a file is a pointer of Git LFS, a few lines that stand for the file."""
    with open(path, "rb") as file:
        if file.read(40) == b"version https://git-lfs.github.com/spec/":
            remedy = "run `git lfs pull` where it was cloned, or download the file itself"
            raise UserError(f"{path}: a Git LFS pointer, not the file; {remedy}")


def hash_fraction(text, seed=""):
    """Returns a number in 0..1 that depends on the text (and seed) alone."""
    digest = hashlib.sha256(f"{seed}{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lock_file(file):
    """Locks an open file until it is closed. Returns False if another process holds it."""
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        import msvcrt  # Windows locks bytes, which only their holder may read: take one far off

        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except OSError:
        return False


def file_problem(folder, name, size=None, sha256=None):
    """Returns None if a file is there, of this size and sha256 where given, else what is wrong."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if size is not None and path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, expected {size}"
    if sha256 is not None and (actual := file_sha256(path)) != sha256:
        return f"{name}: checksum mismatch (expected {sha256:.8}.., got {actual:.8}..)"
    return None


# ---- the manifest


def is_legal(manifest):
    """Returns whether a manifest is as data.py writes it; a KeyError or the like means no, too."""
    entries = [*itertools.chain.from_iterable(manifest["splits"].values())]
    counts = [entry[key] for entry in entries for key in ("documents", "bytes", "tokens")]
    counts += [manifest[key] for key in ("pad_id", "bos_id", "eos_id", "vocab_size")]
    names = [entry[key] for entry in entries for key in ("bin", "text")]
    hashes = [entry[key] for entry in entries for key in ("bin_sha256", "text_sha256")]
    return (
        all(type(count) is int and 0 <= count < 2**63 for count in counts)
        and all(entry["tokens"] for entry in entries)
        and all(FILE_NAME.fullmatch(name) for name in names)
        and all(HASH.fullmatch(sha256) for sha256 in [manifest["tokenizer_sha256"], *hashes])
        and 0 < manifest["vocab_size"] <= 2**32
        and manifest["dtype"] in ID_TYPES
        and isinstance(manifest["config"], dict)
    )


def read_manifest(folder):
    """Returns FOLDER/manifest.json. Raises UserError for anything wrong with it."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        remedy = "make one: python data.py --input_path=TEXTS"
        raise UserError(f"{folder}: no prepared dataset (no manifest.json); {remedy}")
    manifest = read_object(path)
    if manifest.get("format") != MANIFEST_FORMAT:
        formats = f"format {manifest.get('format')!r:.80}, this program reads {MANIFEST_FORMAT}"
        remedy = "prepare the text again, or use the version that wrote it"
        raise UserError(f"{path}: {formats}; {remedy}")
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        if is_legal(manifest):
            return manifest
    remedy = "name a prepared dataset, or prepare this one again"  # it may be a model's folder
    raise UserError(f"{path}: not as data.py writes it; {remedy}")


def totals(entries):
    """Returns the sums over a manifest's shards: {"shards", "documents", "tokens", "bytes"}."""
    entries = list(entries)
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    return {"shards": len(entries), **sums}


def check_file(folder, name, sha256, size=None):
    """Raises UserError unless a file of a dataset is there and as its manifest says."""
    if problem := file_problem(folder, name, size, sha256):
        if (Path(folder) / name).is_file():
            refuse_pointer(Path(folder) / name)
        raise UserError(f"{folder}: {problem}; {AGAIN}")


# ---- reading, as one array


class Shards:
    """The shards of one split of a dataset, memory-mapped and read as one array of `tokens` ids.

    Opening checks the manifest, the tokenizer's hash and the size of every shard; their hashes too
    when they are small. Reading checks that ids are in the vocabulary. A failure is a UserError.
    """

    def __init__(self, folder, split):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        entries = self.manifest["splits"].get(split)
        if not entries:
            remedy = f"{AGAIN} with another train_ratio"
            raise UserError(f"{folder}: holds no {split} documents; {remedy}")
        self.tokenizer_sha256 = self.manifest["tokenizer_sha256"]
        check_file(self.folder, "tokenizer.model", self.tokenizer_sha256)
        self.dtype = ID_TYPES[self.manifest["dtype"]]
        self.vocab_size = self.manifest["vocab_size"]
        sums = totals(entries)
        self.tokens, self.documents = sums["tokens"], sums["documents"]
        verify = self.tokens * self.dtype.itemsize <= VERIFY_BYTES
        self.arrays = []
        for entry in entries:
            name, size = entry["bin"], entry["tokens"] * self.dtype.itemsize
            check_file(self.folder, name, entry["bin_sha256"] if verify else None, size)
            self.arrays.append(np.memmap(self.folder / name, dtype=self.dtype, mode="r"))
        self.ends = np.cumsum([entry["tokens"] for entry in entries])

    def read(self, start, stop):
        """Returns token ids start..stop of the whole split as one array, across shard borders."""
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right"))
            array = self.arrays[shard]
            offset = start - (int(self.ends[shard]) - len(array))
            pieces.append(array[offset : offset + stop - start])
            start += len(pieces[-1])
        ids = np.concatenate(pieces)
        if (largest := int(ids.max())) >= self.vocab_size:
            outside = f"token id {largest} is outside the vocabulary of {self.vocab_size}"
            raise UserError(f"{self.folder}: {outside}; {AGAIN}")
        return ids


def open_all(paths, split):
    """Returns the Shards of one dataset folder or of a list, which must share one tokenizer."""
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise UserError("data_path: no dataset folder given; name one: --data_path=FOLDER")
    sources = [Shards(path, split) for path in paths]
    hashes = {source.tokenizer_sha256: source.folder for source in sources}
    if len(hashes) > 1:
        apart = ", ".join(f"{folder} has {sha256:.12}.." for sha256, folder in hashes.items())
        problem = f"datasets of different tokenizers cannot be mixed: {apart}"
        raise UserError(f"{problem}; prepare them with one --tokenizer_path")
    return sources
