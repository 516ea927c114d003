"""A prepared dataset's folder: its manifest, checked; its shards, written and read as one array.

    data/processed/NAME/  train_00000.bin    token ids, uint16 (uint32 above 65,535 ids): BOS text EOS BOS ...
                          train_00000.jsonl  the same cleaned documents, {"text": ...} one a line
                          val_00000.bin      ... and val_00000.jsonl
                          tokenizer.model    what the ids belong to: the folder is all that training needs
                          manifest.json      sizes and sha256 of the shards; written last: "complete"
                          stats.json, DATA_CARD.md, TOKENIZER_CARD.md

Nothing in a folder is believed: a manifest may come from anywhere, a shard may have been cut or changed.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from lib.config import UserError

AGAIN = "delete the folder and prepare it again"  # the remedy for a damaged dataset
FORMAT = 1  # of the manifest; a reader refuses any other
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERIFY_BYTES = (
    64 << 20
)  # shards up to this size in all are hashed when opened (0.2 s), larger ones if asked

# --- The folder's format ------------------------------------------------------------------------------------


def file_sha256(path):
    """The hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_fraction(text, seed=""):
    """Returns a number in 0..1 that depends on the text (and seed) alone."""
    digest = hashlib.sha256(f"{seed}{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lock_file(file):
    """Locks an open file, without waiting, until it is closed. Returns False if another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (
        ImportError
    ):  # Windows locks bytes, which none but their holder may read: take one far off
        import msvcrt

        try:
            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    except OSError:
        return False
    return True


def _is_count(value):
    return type(value) is int and value >= 0


def _is_hash(value):
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_file_name(value):
    """A plain name inside the folder: no slash, no leading dot, hence no way out of it."""
    return (
        isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", value) is not None
    )


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
    "splits": lambda value: (
        isinstance(value, dict) and all(isinstance(v, list) for v in value.values())
    ),
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
    if (
        isinstance(manifest, dict) and "files" in manifest
    ):  # never to be deleted as a damaged dataset
        raise UserError(
            f"{folder}: a model or checkpoint, not a prepared dataset; name a folder of data.py"
        )
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        found = f"format {manifest.get('format')!r:.80}, this program reads {FORMAT}"
        raise UserError(
            f"{path}: {found}; prepare the text again, or use the version that wrote it"
        )
    _check_fields(manifest, MANIFEST_FIELDS, path)
    for split, shards in manifest["splits"].items():
        for number, shard in enumerate(shards):
            _check_fields(shard, SHARD_FIELDS, f"{path}: {split} shard {number}")
    return manifest


# --- Writing ------------------------------------------------------------------------------------------------


def dtype_name(vocab_size):
    """The manifest's name for the type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def text_row(text):
    """A document as a line of a .jsonl file."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read_rows(path, start=0):
    """Yield (text, end) of the lines of a .jsonl file from byte `start` on; the next begins at `end`."""
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            yield json.loads(line)["text"], start


def totals(entries):
    """The sums over shards of a manifest: {"shards", "documents", "tokens", "bytes"}."""
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    return {"shards": len(entries), **sums}


class ShardWriter:
    """Writes documents to numbered pairs of .bin and .jsonl, ended by the document that fills them.

    `entries` are the manifest's of the shards that are whole, to which those written are added.
    """

    def __init__(self, folder, split, vocab_size, shard_tokens, entries):
        self.folder, self.split, self.shard_tokens, self.entries = (
            folder,
            split,
            shard_tokens,
            entries,
        )
        self.dtype, self.vocab_size, self.files = DTYPES[dtype_name(vocab_size)], vocab_size, None

    def add(self, text, ids):
        """Append one document; opens a shard if none is open. Returns whether it filled, and so ended, it."""
        assert max(ids) < self.vocab_size
        if self.files is None:
            self._open()
        data = {"bin": np.asarray(ids, self.dtype).tobytes(), "text": text_row(text)}
        for kind, (file, digest) in self.files.items():
            file.write(data[kind])
            digest.update(data[kind])
        self.entry["tokens"] += len(ids)
        self.entry["documents"] += 1
        self.entry["bytes"] += len(text.encode())
        full = self.entry["tokens"] >= self.shard_tokens
        if full:
            self.close()
        return full

    def _open(self):
        name = f"{self.split}_{len(self.entries):05d}"
        names = {"bin": f"{name}.bin", "text": f"{name}.jsonl"}
        self.entry = {**names, "tokens": 0, "documents": 0, "bytes": 0}
        self.files = {
            kind: ((self.folder / n).open("wb"), hashlib.sha256()) for kind, n in names.items()
        }

    def close(self):
        """End the shard at hand, safe on the disk, and note its hashes; the next document opens another."""
        if self.files is not None:
            for kind, (file, digest) in self.files.items():
                file.flush()
                os.fsync(file.fileno())
                file.close()
                self.entry[f"{kind}_sha256"] = digest.hexdigest()
            self.entries.append(self.entry)
            self.files = None


# --- Reading, as one array ----------------------------------------------------------------------------------


class Shards:
    """The shards of one split of one dataset folder, memory-mapped and read as one array of `tokens` ids.

    Opening checks the manifest, the tokenizer's hash and the size of every shard; the shards' own hashes too
    when they are small, or always with verify=True. An id outside the vocabulary is caught at the latest
    where it is read.
    """

    def __init__(self, folder, split, verify=None):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        entries = self.manifest["splits"].get(split)
        if not entries:
            raise UserError(
                f"{folder}: holds no {split} documents; {AGAIN} with another train_ratio"
            )
        self.tokenizer_sha256 = self.manifest["tokenizer_sha256"]
        self._check_tokenizer()
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.vocab_size = self.manifest["vocab_size"]
        self.tokens = sum(entry["tokens"] for entry in entries)
        self.documents = sum(entry["documents"] for entry in entries)
        self.bytes = sum(entry["bytes"] for entry in entries)  # of the text, as UTF-8
        if verify is None:
            verify = self.tokens * self.dtype.itemsize <= VERIFY_BYTES
        self.names = [entry["bin"] for entry in entries]
        self.arrays = [self._open(entry, verify) for entry in entries]
        self.ends = np.cumsum([entry["tokens"] for entry in entries])

    def _check_tokenizer(self):
        path = self.folder / "tokenizer.model"
        if not path.is_file():
            raise UserError(f"{path}: not found; {AGAIN}")
        if (found := file_sha256(path)) != self.tokenizer_sha256:
            raise UserError(
                f"{path}: sha256 is {found}, the dataset was encoded with {self.tokenizer_sha256}; {AGAIN}"
            )

    def _open(self, entry, verify):
        path = self.folder / entry["bin"]
        if not path.is_file():
            raise UserError(f"shard {path}: not found; {AGAIN}")
        expected, found = entry["tokens"] * self.dtype.itemsize, path.stat().st_size
        if found != expected:
            raise UserError(f"shard {path}: {found} bytes, the manifest says {expected}; {AGAIN}")
        if verify and (digest := file_sha256(path)) != entry["bin_sha256"]:
            expected = entry["bin_sha256"]
            raise UserError(
                f"shard {path}: sha256 mismatch (expected {expected}, got {digest}); {AGAIN}"
            )
        array = np.memmap(path, dtype=self.dtype, mode="r")
        if verify:
            self._check_ids(entry["bin"], array)
        return array

    def _check_ids(self, name, ids):
        if (worst := int(ids.max())) >= self.vocab_size:
            where = f"shard {self.folder / name}: token id {worst}"
            raise UserError(f"{where} is outside the vocabulary of {self.vocab_size}; {AGAIN}")

    def read(self, start, stop):
        """Token ids start..stop of the whole split as one array, across shard borders."""
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right"))
            array = self.arrays[shard]
            offset = start - (int(self.ends[shard]) - len(array))
            part = array[offset : offset + stop - start]
            self._check_ids(self.names[shard], part)
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def histogram(self, start=0):
        """How often each id occurs from token `start` on: (vocab_size,) int64. Reads 4 M tokens at a time."""
        counts = np.zeros(self.vocab_size, np.int64)
        for begin in range(start, self.tokens, 1 << 22):
            chunk = self.read(begin, min(begin + (1 << 22), self.tokens))
            counts += np.bincount(chunk, minlength=self.vocab_size)
        return counts


def open_all(paths, split, verify=None):
    """Open several dataset folders (one path or a list), which must share one tokenizer."""
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise UserError("data_path: no dataset folder given; name one: --data_path=FOLDER")
    sources = [Shards(path, split, verify) for path in paths]
    first = sources[0]
    for other in sources[1:]:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"datasets of different tokenizers cannot be mixed: {first.folder} has sha256 "
                f"{first.tokenizer_sha256}, {other.folder} has {other.tokenizer_sha256}; "
                "prepare them with one --tokenizer_path"
            )
    return sources
