"""A prepared dataset's folder: its manifest, checked; its shards, written and read as one array.

    train_00000.bin    token ids, uint16 (uint32 above 65,535 ids): BOS text EOS BOS text EOS ...
    train_00000.jsonl  the same documents, {"text": ...} one a line; val_00000.bin, .jsonl alike
    tokenizer.model    of these ids: the folder is all that training needs
    manifest.json      sizes and sha256 of the shards; written last: the folder is complete
    stats.json, DATA_CARD.md, TOKENIZER_CARD.md

Nothing in a folder is trusted: a manifest may come from anywhere, a shard may be cut or changed.
"""

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np

from lib.config import UserError, read_object

AGAIN = "delete the folder and prepare it again"  # the remedy for a damaged dataset
MANIFEST_FORMAT = 1  # a reader refuses any other
ID_TYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERIFY_BYTES = 64 << 20  # datasets up to this size are hashed when opened (0.2 s), larger if asked

# A legal value is of a type, in a range, or matched by a pattern.
COUNT, HASH = range(2**63), re.compile("[0-9a-f]{64}")
FILE_NAME = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # no way out of the folder
MANIFEST_FIELDS = {
    "vocab_size": range(1, 2**32 + 1),
    "tokenizer_sha256": HASH,
    "dtype": re.compile("uint16|uint32"),
    "config": dict,
    "splits": dict,
}
MANIFEST_FIELDS |= dict.fromkeys(("pad_id", "bos_id", "eos_id"), COUNT)
SHARD_FIELDS = {"tokens": range(1, 2**63), "documents": COUNT, "bytes": COUNT}
SHARD_FIELDS |= dict.fromkeys(("bin", "text"), FILE_NAME)
SHARD_FIELDS |= dict.fromkeys(("bin_sha256", "text_sha256"), HASH)


# ---- files


def file_sha256(path):
    """Returns the hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_fraction(text, seed=""):
    """Returns a number in 0..1 that depends on the text (and seed) alone."""
    digest = hashlib.sha256(f"{seed}{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lock_file(file):
    """Locks an open file until it is closed. Returns False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt  # locks bytes, which only their holder may read: take one far off

            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


# ---- the manifest


def check_fields(values, fields, where):
    """Raises UserError unless `values` is an object with legal values in all these fields."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, got {type(values).__name__}; {AGAIN}")
    for name, kind in fields.items():
        if name not in values:
            raise UserError(f"{where}: '{name}' is missing; {AGAIN}")
        value = values[name]
        if isinstance(kind, range):
            legal = type(value) is int and value in kind
        elif isinstance(kind, re.Pattern):
            legal = isinstance(value, str) and kind.fullmatch(value)
        else:
            legal = isinstance(value, kind)
        if not legal:
            raise UserError(f"{where}: illegal '{name}' {value!r:.80}; {AGAIN}")


def read_manifest(folder):
    """Returns FOLDER/manifest.json. Raises UserError for anything wrong with it."""
    path = Path(folder) / "manifest.json"
    if Path(folder).is_file():
        remedy = f"prepare it: python data.py --input_path={folder}"
        raise UserError(f"{folder}: a file, not a prepared dataset; {remedy}")
    if not path.is_file():
        remedy = "make one: python data.py configs/datasets/NAME.json"
        raise UserError(f"{folder}: no prepared dataset (no manifest.json); {remedy}")
    manifest = read_object(path)
    if "files" in manifest:  # not a damaged dataset: nobody must be told to delete it
        remedy = "name a folder of data.py"
        raise UserError(f"{folder}: a model or checkpoint, not a prepared dataset; {remedy}")
    if manifest.get("format") != MANIFEST_FORMAT:
        formats = f"format {manifest.get('format')!r:.80}, this program reads {MANIFEST_FORMAT}"
        remedy = "prepare the text again, or use the version that wrote it"
        raise UserError(f"{path}: {formats}; {remedy}")
    check_fields(manifest, MANIFEST_FIELDS, path)
    check_fields(manifest["splits"], dict.fromkeys(manifest["splits"], list), path)
    for split, entries in manifest["splits"].items():
        for number, entry in enumerate(entries):
            check_fields(entry, SHARD_FIELDS, f"{path}: {split} shard {number}")
    return manifest


def totals(entries):
    """Returns the sums over a manifest's shards: {"shards", "documents", "tokens", "bytes"}."""
    entries = list(entries)
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    return {"shards": len(entries), **sums}


def check_file(path, sha256, size=None):
    """Raises UserError unless a file is there, has this size and, where given, this sha256."""
    if not path.is_file():
        raise UserError(f"{path}: not found; {AGAIN}")
    if size is not None and path.stat().st_size != size:
        sizes = f"{path.stat().st_size} bytes, the manifest says {size}"
        raise UserError(f"{path}: {sizes}; {AGAIN}")
    if sha256 and (found := file_sha256(path)) != sha256:
        hashes = f"the manifest says {sha256}, the file has {found}"
        raise UserError(f"{path}: sha256 mismatch ({hashes}); {AGAIN}")


def check_shards(folder, manifest, kinds):
    """Raises UserError unless the shards' files of these kinds, bin or text, are unchanged."""
    for entry in itertools.chain.from_iterable(manifest["splits"].values()):
        for kind in kinds:
            check_file(folder / entry[kind], entry[f"{kind}_sha256"])


# ---- writing


def dtype_name(vocab_size):
    """Returns the manifest's name for the type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def text_row(text):
    """Returns a document as a line of a .jsonl file."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read_texts(path):
    """Yields the documents of a .jsonl file."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def write_shards(folder, split, documents, vocab_size, shard_tokens, first=0):
    """Writes (text, ids) into shards, numbered from `first`. Yields the manifest's entry of each.

    A shard ends with the document that reaches `shard_tokens`, and is on the disk when yielded.
    """
    dtype, documents = ID_TYPES[dtype_name(vocab_size)], iter(documents)
    for number, document in zip(itertools.count(first), documents):
        name = f"{split}_{number:05d}"
        entry = {"bin": f"{name}.bin", "text": f"{name}.jsonl"}
        entry |= {"tokens": 0, "documents": 0, "bytes": 0}
        with open(folder / entry["bin"], "wb") as bins, open(folder / entry["text"], "wb") as texts:
            for text, ids in itertools.chain([document], documents):
                assert max(ids) < vocab_size
                bins.write(np.asarray(ids, dtype).tobytes())
                texts.write(text_row(text))
                entry["tokens"] += len(ids)
                entry["documents"] += 1
                entry["bytes"] += len(text.encode())
                if entry["tokens"] >= shard_tokens:
                    break
            for file in (bins, texts):
                file.flush()
                os.fsync(file.fileno())
        hashes = {f"{kind}_sha256": file_sha256(folder / entry[kind]) for kind in ("bin", "text")}
        yield entry | hashes


# ---- reading, as one array


class Shards:
    """The shards of one split of a dataset, memory-mapped and read as one array of `tokens` ids.

    Opening checks the manifest, the tokenizer's hash and the size of every shard; their hashes too
    when they are small, or always with verify=True. An id outside the vocabulary is found at the
    latest when it is read. Each failure is a UserError.
    """

    def __init__(self, folder, split, verify=None):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        entries = self.manifest["splits"].get(split)
        if not entries:
            remedy = f"{AGAIN} with another train_ratio"
            raise UserError(f"{folder}: holds no {split} documents; {remedy}")
        self.tokenizer_sha256 = self.manifest["tokenizer_sha256"]
        check_file(self.folder / "tokenizer.model", self.tokenizer_sha256)
        self.dtype = ID_TYPES[self.manifest["dtype"]]
        self.vocab_size = self.manifest["vocab_size"]
        sums = totals(entries)
        self.tokens, self.documents = sums["tokens"], sums["documents"]
        self.bytes = sums["bytes"]  # of the text, as UTF-8
        if verify is None:
            verify = self.tokens * self.dtype.itemsize <= VERIFY_BYTES
        self.names = [entry["bin"] for entry in entries]
        self.arrays = [self._open(entry, verify) for entry in entries]
        self.ends = np.cumsum([entry["tokens"] for entry in entries])

    def _open(self, entry, verify):
        path = self.folder / entry["bin"]
        check_file(path, verify and entry["bin_sha256"], entry["tokens"] * self.dtype.itemsize)
        array = np.memmap(path, dtype=self.dtype, mode="r")
        return self._checked(entry["bin"], array) if verify else array

    def _checked(self, name, ids):
        if (largest := int(ids.max())) >= self.vocab_size:
            outside = f"token id {largest} is outside the vocabulary of {self.vocab_size}"
            raise UserError(f"{self.folder / name}: {outside}; {AGAIN}")
        return ids

    def read(self, start, stop):
        """Returns token ids start..stop of the whole split as one array, across shard borders."""
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right"))
            array = self.arrays[shard]
            offset = start - (int(self.ends[shard]) - len(array))
            piece = array[offset : offset + stop - start]
            pieces.append(self._checked(self.names[shard], piece))
            start += len(piece)
        return np.concatenate(pieces)

    def histogram(self, start=0):
        """Returns how often each id occurs from token `start` on: (vocab_size,) int64."""
        counts = np.zeros(self.vocab_size, np.int64)
        for begin in range(start, self.tokens, 1 << 22):  # 4 M tokens at a time
            chunk = self.read(begin, min(begin + (1 << 22), self.tokens))
            counts += np.bincount(chunk, minlength=self.vocab_size)
        return counts


def open_all(paths, split, verify=None):
    """Returns the Shards of one dataset folder or of a list, which must share one tokenizer."""
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise UserError("data_path: no dataset folder given; name one: --data_path=FOLDER")
    first, *others = sources = [Shards(path, split, verify) for path in paths]
    for other in others:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            hashes = [f"{s.folder} has sha256 {s.tokenizer_sha256}" for s in (first, other)]
            problem = f"datasets of different tokenizers cannot be mixed: {', '.join(hashes)}"
            raise UserError(f"{problem}; prepare them with one --tokenizer_path")
    return sources
